"""likeness against a plain cosine; the Triton form on CUDA, else in the interpreter's own process."""

from __future__ import annotations

import math

import pytest
import torch
from interpreter import DEVICE, FORMS, HALF, INTERPRETED, mend_interpreter, needs_triton, run_interpreted

from attnpatch.errors import ConfigError
from attnpatch.executors import likeness

if INTERPRETED:
    mend_interpreter()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [5, 96, 4096])
def test_rows_that_are_unlike_replace_what_was_kept(form, width):
    g = torch.Generator().manual_seed(0)
    query, kept = (torch.randn(5, width, generator=g) for _ in "ab")
    query[0] = kept[0] * 3  # alike
    query[1] = -kept[1]
    kept[2] = float("nan")
    query[3] = float("nan")  # no token
    kept[4] = 0.0
    query, kept = query.to(form[1]), kept.to(form[1])
    q_pos = torch.tensor([[7, 3], [7, 3], [7, 3], [7, -1], [7, 3]], device=form[1])[:, -1]
    old = kept.clone()
    like = likeness.run(query, kept, q_pos, 0.95, _backend=form[0])
    assert like.tolist() == [True, False, False, True, False] and like.dtype == torch.bool
    for i, alike in enumerate(like.tolist()):
        assert torch.equal(kept[i], (old if alike else query)[i])


@pytest.mark.parametrize("form", FORMS)
def test_a_cosine_of_just_the_threshold(form):
    for above in (False, True):
        query, kept = torch.tensor([[3.0, 4.0]], device=form[1]), torch.tensor([[1.0, 0.0]], device=form[1])
        q_pos = torch.zeros(1, dtype=torch.long, device=form[1])
        threshold = float(torch.tensor(3.0) / torch.tensor(5.0))
        assert likeness.run(query, kept, q_pos, threshold, above=above, _backend=form[0]).tolist() == [not above]


def rotation(by, dim, device):
    """[B, D, D] for vectors as rows: neighbours 0 and 1, 2 and 3 ... turn together, the last two channels stay."""
    matrix = torch.eye(dim).repeat(len(by), 1, 1)
    for b, angle in enumerate(by):
        for i in range(0, dim - 2, 2):
            c, s = math.cos(angle * 0.7**i), math.sin(angle * 0.7**i)
            matrix[b, i : i + 2, i : i + 2] = torch.tensor([[c, s], [-s, c]])
    return matrix.to(device)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["fp32", "half"])
@pytest.mark.parametrize("mean", [False, True], ids=["heads", "mean"])
@pytest.mark.parametrize(("heads", "dim"), [(1, 8), (6, 12), (8, 128)])
def test_queries_are_turned_first(form, heads, dim, mean, dtype):
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(4, 2 * heads, 2, dim, generator=g).to(form[1], dtype)
    query = wide[:, ::2, 1]  # [B, H, D], not contiguous
    matrix = rotation([3.0, 1.0, 0.0, 2.0], dim, form[1])
    partner = likeness.partners(matrix)
    assert partner.tolist() == [i ^ 1 if i < dim - 2 else i for i in range(dim)]
    turned = query.float() @ matrix  # [B, H, D]
    turned = (turned.mean(1) if mean else turned.flatten(1)).contiguous()
    kept, q_pos = turned.clone(), torch.tensor([7, 9, 12, -1], device=form[1])
    kept[1] = -kept[1]
    tally, scored = torch.arange(8, device=form[1]).view(4, 2), torch.arange(4, device=form[1])
    like = likeness.run(
        query, kept, q_pos, 0.99, turn=likeness.Pairs.of(matrix, partner), mean=mean, least=10, tally=tally,
        scored=scored, read=50, _backend=form[0],
    )  # fmt: skip
    assert like.tolist() == [True, False, True, True]
    assert tally.tolist() == [[1, 2], [3, 3], [5, 6], [6, 7]] and scored.tolist() == [0, 51, 2, 3]
    assert kept[:2].isnan().all(), "rows with less than 10 keep nothing"
    torch.testing.assert_close(kept[2:], turned[2:])
    kept = torch.full_like(turned, float("nan"))
    likeness.run(query, kept, q_pos, 0.99, turn=likeness.Pairs.of(matrix, partner), mean=mean, _backend=form[0])
    torch.testing.assert_close(kept[:3], turned[:3], atol=1e-5, rtol=1e-5)


def test_a_rotation_of_more_than_pairs_has_no_partners():
    matrix = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0]
    assert likeness.partners(matrix[None]) is None
    one = torch.eye(4)
    one[[0, 1], [1, 0]] = 1.0
    assert likeness.partners(torch.stack([torch.eye(4), one])).tolist() == [1, 0, 2, 3]


def test_choice():
    assert likeness.choose(torch.zeros(1, 4)) == ("torch", "not triton: needs CUDA capability >= 8")
    with pytest.raises(ConfigError, match="'nonsense' is not a backend of likeness"):
        likeness.run(torch.zeros(1, 4), torch.zeros(1, 4), torch.zeros(1), 0.5, _backend="nonsense")


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests above run the fused form")
def test_the_fused_form_in_tritons_interpreter():
    run_interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", __file__)
