"""The search by digits of the kernels that choose by a count, against a sort, and its users with every launch setting.

On CUDA, or in the interpreter's own process.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from interpreter import DEVICE, HALF, INTERPRETED, mend_interpreter, needs_triton, run_interpreted

from attnpatch.executors import halving, lists, top_slots

HERE = find_spec("triton") is not None and (INTERPRETED or torch.cuda.is_available())
fused = pytest.mark.skipif(
    not HERE,
    reason="needs triton and a CUDA device; without one test_the_kernels_in_tritons_interpreter runs it",
)
if INTERPRETED:
    mend_interpreter()
if HERE:
    import triton
    import triton.language as tl

    from attnpatch.executors import _halving_triton, _kth_triton, _mass_triton, _top_slots_triton

    @triton.jit
    def _edges(out, at, GROUPS: tl.constexpr, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(out + i, _halving_triton._edge(tl.load(at), i, GROUPS))

    @triton.jit
    def _found(
        far_at, wanted, count, out, COLUMNS: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr
    ):
        """out: int64 [4]"""
        far = tl.load(far_at + tl.arange(0, N)).to(tl.uint32, bitcast=True)
        base, span, above, equal = _kth_triton.bucket(far, tl.load(wanted), tl.load(count), COLUMNS, N, BITS, GROUPS)
        tl.store(out, base.to(tl.int64))
        tl.store(out + 1, span.to(tl.int64))
        tl.store(out + 2, above.to(tl.int64))
        tl.store(out + 3, equal.to(tl.int64))


def found(far, wanted, size, bits, columns, groups=0):
    """(base, span, above, equal) of the numbers far, filled up to `size`."""
    filled = torch.full((size,), 2**32 - 1)
    filled[: len(far)] = torch.tensor(far, dtype=torch.int64)
    bits32 = torch.where(filled >= 2**31, filled - 2**32, filled).to(torch.int32).to(DEVICE)
    number = (torch.tensor([x], dtype=torch.int32, device=DEVICE) for x in (wanted, len(far)))
    out = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    _found[(1,)](bits32, *number, out, COLUMNS=columns, N=size, BITS=bits, GROUPS=groups, num_warps=4)
    return [int(x) % 2**32 for x in out.tolist()]


def numbers(kind, n):
    g = torch.Generator().manual_seed(n)
    if kind == "all alike":
        return [7] * n
    if kind == "near":  # the last bits alone differ, across a carry
        return (2**31 - 3 + torch.randint(0, 6, (n,), generator=g)).tolist()
    if kind == "a range":
        return (2**31 - 2**20 + torch.randint(0, 15 * 2**20 + 1, (n,), generator=g)).tolist()
    if kind == "ends":
        return [(0, 2**32 - 1, 2**31, 2**31 - 1)[i] for i in torch.randint(0, 4, (n,), generator=g)]
    return torch.randint(0, 2**32, (n,), generator=g).tolist()


@fused
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("kind", ["all alike", "near", "a range", "ends", "any"])
@pytest.mark.parametrize("setting", [(1, 1, 1, 0), (16, 16, 2, 4), (77, 128, 128, 0), (77, 128, 16, 32)], ids=str)
def test_triton_bucket(setting, kind, bits):
    n, size, columns, groups = setting
    far = numbers(kind, n)
    ranked = sorted(far)
    for wanted in sorted({-3, 0, 1, 3, n // 3, n - 1, n + 4}):
        base, span, above, equal = found(far, wanted, size, bits, columns, groups)
        if wanted <= 0:
            assert above == 0
            continue
        assert above == sum(x < base for x in far) < wanted
        assert equal == sum(base <= x <= base + span for x in far)
        taken = min(wanted, n) - above
        assert taken == equal or (span == 0 and taken < equal), "alike, or all wanted"
        assert base <= ranked[min(wanted, n) - 1] <= base + span


@fused
def test_triton_bucket_of_more_than_fields_of_16_bits_hold():
    assert found([5] * 65535 + [4], 65536, 65536, 4, 8192) == [0, 2**32 - 1, 0, 65536]
    assert found([5] * 65530 + [4] * 6, 65529, 65536, 4, 8192) == [5, 0, 6, 65530]


SCORES = ["alike", "-inf", "zeros", "special", "one above", "noise"]


def scores(kind, *shape):
    g = torch.Generator().manual_seed(shape[-1])
    x = torch.randn(shape, generator=g)
    some = torch.rand(shape, generator=g)
    if kind == "alike":
        x = torch.full(shape, -2.5)
    elif kind == "-inf":
        x = torch.full(shape, float("-inf"))
    elif kind == "zeros":
        x = torch.where(some < 0.5, 0.0, torch.where(some < 0.9, -0.0, x))
    elif kind == "special":
        x = torch.where(some < 0.3, float("inf"), torch.where(some < 0.6, float("-inf"), x * 1e-42))
    elif kind == "one above":
        x = torch.where(torch.arange(shape[-1]) == shape[-1] // 2, 1.0, 1.0 - 2**-24).expand(shape)
    return x.contiguous()


CONFIGS = [{}, {"BITS": 3}, {"BITS": 4, "num_warps": 1}]


@fused
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("n", [1, 333])
def test_triton_top_k(n, kind, config):
    k = torch.tensor(sorted({0, min(9, n), n // 2, n - 1, n + 3}), device=DEVICE)
    x = scores(kind, 1, n).expand(len(k), n)
    for later in (True, False):
        got = _mass_triton.launch(x.to(DEVICE), k, _mass_triton.COUNT, later=later, **config)
        for row, expected in zip(got.cpu(), k.tolist(), strict=True):
            assert torch.equal(row, lists.top_k(x[0], expected, later, _backend="torch")), (expected, later)
    count = _mass_triton.launch(x.to(DEVICE), k, _mass_triton.COUNT, count=True)
    assert torch.equal(count, k.clamp(max=n).int())


@fused
def test_triton_top_k_of_nan_and_odd_limits():
    """A NaN takes the place that its sign gives it, and is not chosen."""
    nan = float("nan")
    x = torch.tensor([[nan, 3.0, -nan, 1.0, float("-inf"), 2.0]])
    x[0, 2] = torch.tensor(-4194304, dtype=torch.int32).view(torch.float32)  # the lowest
    for limit, chosen in (
        (-1.0, []),
        (1.9, []),
        (2.0, [1]),
        (3.7, [1, 5]),
        (1e30, [1, 3, 5]),
        (float("inf"), [1, 3, 5]),
    ):
        got = _mass_triton.launch(x.to(DEVICE), torch.tensor([limit], device=DEVICE), _mass_triton.COUNT)
        assert got[0].nonzero()[:, 0].tolist() == chosen, limit


@fused
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("kind", [kind for kind in SCORES if kind != "zeros"])
@pytest.mark.parametrize("n", [1, 333])
def test_triton_top_slots(n, kind, config):
    x = scores(kind, 1, n)
    for k in sorted({1, n // 2 + 1, n + 3}):
        index, count = (torch.empty(s, dtype=torch.int32, device=DEVICE) for s in ((1, k), (1,)))
        _top_slots_triton.launch(x.to(DEVICE), k, None, None, index, count, **config)
        expected = top_slots.run(x, k, _backend="torch")
        assert torch.equal(index.cpu(), expected[0]) and torch.equal(count.cpu(), expected[1]), k


@fused
@pytest.mark.parametrize(
    ("block", "stride", "group", "groups", "page", "few"),
    [
        (2, 1, 2, 11, 2, True),
        (6, 2, 1, 11, 12, False),
        (1, 1, 2, 16, 7, False),
        (1, 1, 2, 1, 4, True),
        (2, 2, 2, 40, 4, True),
    ],
    ids=str,
)
def test_triton_halving(block, stride, group, groups, page, few, monkeypatch):
    """Whole numbers: sums are exact and ties frequent. Groups and sampled queries are no powers of two."""
    heads, slots = 2, 301
    g = torch.Generator().manual_seed(block)
    q = torch.randint(-2, 3, (2, heads, 297, 16), generator=g).to(HALF)
    k = torch.randint(-2, 3, (2, heads // group, slots, 16), generator=g).to(HALF)
    q_pos = torch.tensor([[[-1, 90, 200], [296, 300, 297]], [[5, -1, -1], [299, -1, 4]]])
    last = torch.tensor([[201, 300], [-1, 299]])
    given = (q, k, q_pos, last), (groups, 3, 20, block, stride, page, "center", slots)
    expected = halving._run_torch(*given[0], *given[1])
    monkeypatch.setattr(_halving_triton, "processors", lambda device: 1000 if few else 0)
    for config in ({}, {"BITS": 3, "N": 16, "num_warps": 8}):
        got = _halving_triton.launch(*(x.to(DEVICE) for x in given[0]), *given[1], **config)
        for a, e in zip(got, expected, strict=True):
            assert torch.equal(a.cpu(), e), config


@fused
@pytest.mark.parametrize("groups", [1, 3, 7, 256, 300])
def test_triton_first_groups(groups):
    """Also regions too long for the keys of a test."""
    size = triton.next_power_of_2(groups + 1)
    for region in (0, 1, 5, 255, 256, 257, 4097, 131000, 2**24 - 1, 2**24 + 1, 2**30 + 12345):
        out = torch.empty(size, dtype=torch.int32, device=DEVICE)
        _edges[(1,)](out, torch.tensor([region], dtype=torch.int32, device=DEVICE), groups, size)
        start, length = halving.first_groups(torch.tensor(region), groups)
        assert out[:groups].tolist() == start.tolist() and int(out[groups]) == region, region
        assert out[: groups + 1].diff().tolist() == length.tolist(), region


@fused
def test_triton_settings_of_halving_fit():
    for samples in (1, 17, 33, 128):
        for dim in (64, 80, 128, 256):
            for groups in (1, 64, 256, 2048):
                for per in (1, 2, 3, 8, 64):
                    for few in (True, False):
                        s = _halving_triton.shapes(samples, dim, groups, per, few=few)
                        keys, queries = 2 * s["N"] * s["WIDE"] * per * (s["num_stages"] - 1), 2 * s["M"] * s["WIDE"]
                        assert 16 <= s["N"] and keys <= 128 * 1024 and keys + queries <= 192 * 1024
                        assert s["CHILDREN"] % s["COLUMNS"] == 0
                        assert s["CHILDREN"] // s["COLUMNS"] <= _kth_triton.COLUMN
    assert _halving_triton.shapes(1, 128, 256, 2, few=True)["N"] == 256
    assert _halving_triton.shapes(128, 128, 256, 2, few=True)["N"] == 64
    assert _halving_triton.shapes(32, 128, 256, 2)["maxnreg"] == 128
    assert _halving_triton.shapes(32, 128, 256, 2, few=True)["maxnreg"] is None


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests above run the kernels here")
def test_the_kernels_in_tritons_interpreter():
    run_interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", __file__)
