"""likeness against a plain cosine; the Triton form on CUDA, else in the interpreter's own process."""

from __future__ import annotations

import pytest
import torch
from interpreter import DEVICE, FORMS, INTERPRETED, mend_interpreter, needs_triton, run_interpreted

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


def test_choice():
    assert likeness.choose(torch.zeros(1, 4)) == ("torch", "not triton: needs CUDA capability >= 8")
    with pytest.raises(ConfigError, match="'nonsense' is not a backend of likeness"):
        likeness.run(torch.zeros(1, 4), torch.zeros(1, 4), torch.zeros(1), 0.5, _backend="nonsense")


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests above run the fused form")
def test_the_fused_form_in_tritons_interpreter():
    run_interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", __file__)
