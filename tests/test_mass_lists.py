"""mass_lists against plain loops; the Triton form on CUDA, else in the interpreter's own process."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from interpreter import DEVICE, FORMS, INTERPRETED, mend_interpreter, needs_triton, run_interpreted

from attnpatch.errors import ConfigError
from attnpatch.executors import backends, mass_lists

if INTERPRETED:
    mend_interpreter()


def estimate(batch, heads, rows, blocks, seed=0):
    """Mass [batch, heads, rows, blocks] of the last `rows` blocks, 0 above the diagonal, with ties and zeros.

    Whole numbers: their sums are exact.
    """
    g = torch.Generator().manual_seed(seed)
    mass = torch.randint(0, 9, (batch, heads, rows, blocks), generator=g).float()
    return mass.tril(blocks - rows)


def by_loops(mass, end, block, first, threshold, early):
    """[B][H][R] lists from the definition."""
    found = []
    for b, head in enumerate(mass.tolist()):
        found.append([])
        for h, of_head in enumerate(head):
            share = threshold[h, 0].item() if isinstance(threshold, torch.Tensor) else threshold
            found[b].append([])
            for r, row in enumerate(of_head):
                i, back = first + r, 2 if early is not None and early[b, 0, r] else 1
                named = {i} if back == 2 else {0, i}
                held = [-1.0] * (back - 1) + [sum(row[j] for j in named)]
                for j in sorted({*range(i)} - named, key=lambda j: (-row[j], -j)):
                    if held[-back] >= share * sum(row):
                        break
                    named.add(j)
                    held.append(held[-1] + row[j])
                found[b][h].append(sorted(named | {0}) if i * block < end[b] else [])
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("threshold", [0.0, 0.875, 1.01, "table"])
@pytest.mark.parametrize(
    ("ends", "block", "first", "last", "heads"),
    [
        ([40], 64, 0, 1, 1),
        ([300], 64, 0, 5, 2),
        ([700, 130, 0], 64, 3, 11, 2),
        ([300, 212], 16, 0, 19, 4),
        ([20000], 16, 1248, 1250, 1),
    ],
    ids=["one", "few", "prefix", "heads", "long"],
)
def test_lists_hold_the_share(ends, block, first, last, heads, threshold, form):
    mass = estimate(len(ends), heads, last - first, last)
    if threshold == "table":
        threshold = torch.tensor([[0.25], [0.75], [0.5], [1.0]])[:heads]
    expected = by_loops(mass, ends, block, first, threshold, None)
    index, count = mass_lists.run(
        mass.to(form[1]), torch.tensor(ends, device=form[1]), block, first,
        threshold.to(form[1]) if isinstance(threshold, torch.Tensor) else threshold, _backend=form[0],
    )  # fmt: skip
    assert index.dtype == count.dtype == torch.int32 and index.shape == mass.shape
    for at, row in enumerate(index.flatten(0, 2)):
        r, h, b = at % (last - first), at // (last - first) % heads, at // (last - first) // heads
        n = int(count[b, h, r])
        assert row[:n].tolist() == expected[b][h][r] and not row[n:].any()


@pytest.mark.parametrize("form", FORMS)
def test_mass_of_any_strides(form):
    mass, end = estimate(2, 3, 40, 50).to(form[1]), torch.tensor([[3200, 0], [1300, 0]], device=form[1])[:, 0]
    expected = mass_lists.run(mass, end, 64, 10, 0.75, _backend="torch")
    turned = mass.transpose(0, 3).contiguous().transpose(0, 3)
    wide = torch.full((2, 3, 60, 70), float("nan"), device=form[1])
    wide[:, :, 7:47, :50] = mass
    for given in (turned, wide[:, :, 7:47, :50]):
        got = mass_lists.run(given, end, 64, 10, 0.75, _backend=form[0])
        assert all(torch.equal(a, e) for a, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_rounded_sums_end_a_block_apart_at_most(form):
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 2, 60, 90, generator=g).masked_fill(~torch.ones(60, 90).tril(30).bool(), float("-inf"))
    mass, end = scores.softmax(-1), torch.tensor([90 * 32, 70 * 32])
    expected = mass_lists.run(mass.double(), end, 32, 30, 0.9, _backend="torch")[1]
    got = mass_lists.run(mass.to(form[1]), end.to(form[1]), 32, 30, 0.9, _backend=form[0])[1].cpu()
    assert (got - expected).abs().max() <= 1 and (got != expected).sum() <= 2


def test_early_blocks_look_one_back():
    mass, ends = estimate(2, 2, 12, 15), [15 * 64, 700]
    early = torch.zeros(2, 1, 12, dtype=torch.bool)
    early[0, :, :5], early[1, :, :9] = True, True
    for threshold in (0.0, 0.5, 0.875, 1.01):
        expected = by_loops(mass, ends, 64, 3, threshold, early)
        index, count = mass_lists.run(mass, torch.tensor(ends), 64, 3, threshold, early=early)
        got = [
            [[x[:n].tolist() for x, n in zip(*head, strict=True)] for head in zip(*row, strict=True)]
            for row in zip(index, count, strict=True)
        ]
        assert got == expected


def test_choice(monkeypatch):
    mass = torch.zeros(1, 1, 1, 4)
    assert mass_lists.choose(mass) == ("torch", "not triton: needs CUDA capability >= 8, this is cpu")
    with pytest.raises(ConfigError, match="by 'nonsense': allowed are 'torch', and 'triton' where no block looks back"):
        mass_lists.run(mass, torch.ones(1), 64, 3, 0.9, _backend="nonsense")
    with pytest.raises(ConfigError, match="by 'triton': allowed are 'torch'"):
        mass_lists.run(mass, torch.ones(1), 64, 3, 0.9, early=mass[..., 0] == 0, _backend="triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    cuda = torch.device("cuda", 0)
    for dtype, blocks, early, why in (
        (torch.float32, 32768, None, None),
        (torch.float64, 5, None, "needs float32, this is float64"),
        (torch.float32, 32769, None, "takes 32768 key blocks, these are 32769"),
        (torch.float32, 5, mass, "looks back alike at every block"),
    ):
        name, reason = mass_lists.choose(SimpleNamespace(device=cuda, dtype=dtype, shape=(1, 1, 5, blocks)), early)
        assert (name == "triton" and why is None) or (name == "torch" and why in reason)


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests above run the fused form")
def test_the_fused_form_in_tritons_interpreter():
    run_interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", __file__)
