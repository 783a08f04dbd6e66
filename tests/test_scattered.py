"""scattered against naive: groups of rows in any order, each with its own keys and weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_row_lists import TOLERANCE, problem

from attnpatch.decisions import Selection
from attnpatch.errors import ConfigError, InputError
from attnpatch.executors import column_sums, dispatch, naive, scattered

DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]


def groups(q, kv, size=7, width=20, heads=None, rows=None, weighted=True, seed=3):
    """Rows in a random order in groups of `size`, a few left out; random distinct keys, some unused, random weights."""
    g = torch.Generator().manual_seed(seed)
    first, stop, _ = (rows or slice(None)).indices(q.shape[2])
    heads, count = heads or q.shape[1], stop - first
    lists = -(-count // size)
    order = torch.rand(q.shape[0], heads, lists * size, generator=g).argsort(-1)
    order = torch.where((order < count) & (order % 11 != 5), order, -1).unflatten(-1, (lists, size))
    index = torch.rand(q.shape[0], heads, lists, kv.k.shape[2], generator=g).argsort(-1)[..., :width]
    index = torch.where(torch.rand(index.shape, generator=g) < 0.8, index, -1)
    weight = torch.randn(index.shape, generator=g) * 2
    weight = weight.masked_fill(torch.rand(index.shape, generator=g) < 0.2, float("-inf")) if weighted else None
    return Selection(index=index.int(), groups=order.int(), weight=weight, rows=rows)


def check(q, kv, selection, ctx):
    out, lse = dispatch.run(q, kv, selection, ctx, want_lse=True)
    expected, expected_lse = naive.run(q, kv, selection, ctx, want_lse=True)
    rows, tolerance = selection.rows or slice(None), TOLERANCE[q.dtype]
    assert out.dtype == q.dtype and torch.isfinite(out).all() and (lse == float("-inf")).any()
    torch.testing.assert_close(out, expected[:, rows], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, expected_lse[:, :, rows], atol=tolerance, rtol=tolerance)
    alone, none = dispatch.run(q, kv, selection, ctx)
    assert none is None and torch.equal(alone, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("short", [0, 9], ids=["full", "padded"])
@pytest.mark.parametrize(("rows", "slots"), [(61, 61), (40, 83), (1, 77)], ids=str)
def test_matches_naive(rows, slots, short, softcap, dtype):
    q, kv, ctx = problem(rows, slots, dtype=dtype, short=short)
    ctx.softcap = softcap
    selection = groups(q, kv)
    if rows == 1:
        selection = replace(selection, groups=torch.zeros_like(selection.groups).where(selection.groups >= 0, -1))
        selection.groups[:, :, :, 1:], selection.groups[0, 0] = -1, -1
    check(q, kv, selection, ctx)


@pytest.mark.parametrize("heads", [1, 2, None], ids=["one", "Hkv", "Hq"])
@pytest.mark.parametrize("group", [1, 4, 8], ids=["mha", "group4", "group8"])
def test_grouped_heads(group, heads):
    q, kv, ctx = problem(40, 71, group=group, short=3)
    check(q, kv, groups(q, kv, heads=heads, weighted=group != 4), ctx)


@pytest.mark.parametrize("rows", [slice(0, 16), slice(5, 40), slice(32, None)], ids=str)
def test_rows_of_a_term(rows):
    q, kv, ctx = problem(50, 90, short=9)
    check(q, kv, groups(q, kv, rows=rows), ctx)


def test_one_group_at_a_time_and_the_models_window(monkeypatch):
    monkeypatch.setattr(column_sums, "MAX_BLOCK", 1)
    q, kv, ctx = problem(50, 90, short=9)
    ctx.window = 30
    check(q, kv, groups(q, kv), ctx)
    ctx.window = None
    kv.pos = kv.pos.expand(-1, 2, -1)  # positions by kv head, as after an eviction
    check(q, kv, groups(q, kv), ctx)


def test_repeats_of_weight_minus_infinity_do_not_count():
    q, kv, ctx = problem(20, 20)
    one = groups(q, kv, width=6)
    weight = torch.cat([one.weight, torch.full_like(one.weight, float("-inf"))], -1)
    twice = Selection(index=torch.cat([one.index, one.index], -1), groups=one.groups, weight=weight)
    torch.testing.assert_close(dispatch.run(q, kv, twice, ctx)[0], dispatch.run(q, kv, one, ctx)[0])


def test_what_does_not_fit_is_refused():
    q, kv, ctx = problem(20, 20)
    good = groups(q, kv)
    assert dispatch.explain(q, kv, good, ctx) == "scattered by torch (the only form)"
    for bad, message in (
        (replace(good, page=2), "groups go with index of page 1"),
        (replace(good, window=3), "groups go with index of page 1"),
        (replace(good, columns=good.index[:, :, 0]), "groups go with index"),
        (replace(good, weight=good.weight[..., :-1]), "weight of shape .*expected that of index"),
        (replace(good, groups=good.groups[:, :, :-1]), "groups of shape .* do not fit index"),
        (
            replace(good, index=good.index[:, :3], groups=good.groups[:, :3], weight=None),
            "expected \\[1 or 2, 1, 2 or 8",
        ),
    ):
        with pytest.raises(InputError, match=message):
            scattered.run(q, kv, bad, ctx)
    ctx.mask = torch.ones(2, 1, 20, 20, dtype=torch.bool)
    with pytest.raises(ConfigError, match="takes no 4-D mask"):
        scattered.run(q, kv, good, ctx)
