"""block_lists against plain loops; the Triton form on CUDA, else in the interpreter's own process."""

from __future__ import annotations

import pytest
import torch
from interpreter import DEVICE, FORMS, INTERPRETED, mend_interpreter, needs_triton, run_interpreted

from attnpatch.errors import ConfigError
from attnpatch.executors import block_lists

if INTERPRETED:
    mend_interpreter()


def by_loops(offsets, end, block, first, last, columns, pairs, whole):
    """{(row, head, query block): key blocks} from the definition."""
    found = {}
    for b, h, i in ((b, h, i) for b in range(len(end)) for h in range(offsets.shape[1]) for i in range(first, last)):
        named = [
            j
            for j in range(i + 1)
            if offsets[b, h, i - j]
            or (columns is not None and columns[b, h, j])
            or (pairs is not None and pairs[b, h, i - first, j])
            or (whole is not None and whole[b])
        ]
        found[b, h, i] = named if i * block < end[b] else []
    return found


def parts(batch, heads, blocks, rows, seed=0):
    """Random offsets and columns [batch, heads, blocks], pairs [batch, heads, rows, blocks]."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, blocks), (batch, heads, blocks), (batch, heads, rows, blocks))
    return [torch.rand(*shape, generator=g) < 0.2 for shape in shapes]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("given", ["offsets", "columns", "pairs", "all"])
@pytest.mark.parametrize(
    ("ends", "block", "first", "last", "heads"),
    [
        ([40], 64, 0, 1, 1),
        ([1000, 130, 0], 64, 3, 16, 2),
        ([700, 512], 16, 0, 44, 4),
        ([4999], 64, 76, 79, 1),
        ([40000], 16, 2040, 2042, 1),
    ],
    ids=["one", "prefix", "heads", "late", "long"],
)
def test_lists_name_what_the_parts_name(ends, block, first, last, heads, given, form):
    offsets, columns, pairs = parts(len(ends), heads, last + 3, last - first)
    columns = columns if given in ("columns", "all") else None
    pairs = pairs if given in ("pairs", "all") else None
    whole = torch.tensor([n < 200 for n in ends]) if given in ("offsets", "all") else None
    expected = by_loops(offsets, ends, block, first, last, columns, pairs, whole)
    moved = [x if x is None else x.to(form[1]) for x in (offsets, columns, pairs, whole)]
    index, count = block_lists.run(
        moved[0], torch.tensor(ends, device=form[1]), block, first, last, columns=moved[1], pairs=moved[2],
        whole=moved[3], _backend=form[0],
    )  # fmt: skip
    assert index.dtype == count.dtype == torch.int32 and index.shape == (len(ends), heads, last - first, last)
    for (b, h, i), named in expected.items():
        n = int(count[b, h, i - first])
        assert index[b, h, i - first, :n].tolist() == named and not index[b, h, i - first, n:].any()


@pytest.mark.parametrize("form", FORMS)
def test_parts_of_any_strides(form):
    offsets, columns, pairs = (x.to(form[1]) for x in parts(2, 3, 50, 40, seed=1))
    end = torch.tensor([[48 * 64, 0], [9 * 64 + 1, 0]], device=form[1])[:, 0]
    plain = block_lists.run(offsets, end, 64, 10, 50, columns=columns, pairs=pairs, _backend="torch")
    turned = offsets.transpose(0, 2).contiguous().transpose(0, 2)
    wide = torch.zeros(2, 3, 60, 70, dtype=torch.bool, device=form[1])
    wide[:, :, 7:47, :50] = pairs
    got = block_lists.run(turned, end, 64, 10, 50, columns=columns, pairs=wide[:, :, 7:47], _backend=form[0])
    assert all(torch.equal(a, e) for a, e in zip(got, plain, strict=True))
    one = offsets[:1, :1].expand(2, 3, -1)
    expected = block_lists.run(one.contiguous(), end, 64, 10, 50, columns=columns, _backend="torch")
    got = block_lists.run(one, end, 64, 10, 50, columns=columns, _backend=form[0])
    assert all(torch.equal(a, e) for a, e in zip(got, expected, strict=True))
    expected = block_lists.run(one.contiguous(), end, 64, 10, 50, pairs=pairs, _backend="torch")
    got = block_lists.run(offsets[:1, :1], end, 64, 10, 50, pairs=pairs, _backend=form[0])
    assert all(torch.equal(a, e) for a, e in zip(got, expected, strict=True))


def test_choice():
    offsets = torch.zeros(1, 1, 4, dtype=torch.bool)
    assert block_lists.choose(offsets) == ("torch", "not triton: needs CUDA capability >= 8, this is cpu")
    with pytest.raises(ConfigError, match="'nonsense' is not a backend of block_lists; allowed: triton, torch"):
        block_lists.run(offsets, torch.ones(1), 64, 0, 1, _backend="nonsense")


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests above run the fused form")
def test_the_fused_form_in_tritons_interpreter():
    run_interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", __file__)
