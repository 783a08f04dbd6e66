"""Every executor of lists against masked dense attention: random decisions, head sizes, odd lengths, prefixes, pads.

The expected output is made here from nothing but what `Selection` says, in fp64.
"""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from interpreter import DEVICE, HALF, INTERPRETED, mend_interpreter, needs_triton, run_interpreted
from test_decode_select import turned

from attnpatch.decisions import Selection

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
SHAPES = [  # keys, head dim, query heads a KV head, queries (the rest is a prefix), tokens that row 0 lacks
    (1025, 64, 1, 1025, 0), (1025, 96, 4, 130, 41), (2048, 128, 8, 70, 0), (2048, 256, 1, 200, 130),
    (3000, 64, 8, 40, 0), (3000, 128, 4, 67, 1), (3000, 96, 1, 150, 0), (1025, 256, 8, 64, 7),
]  # fmt: skip
RANKED = [(1025, 64, 1, 9, 0), (2048, 96, 4, 1, 130), (3000, 256, 8, 5, 0), (3000, 128, 4, 3, 0)]
NAMES = ["pages", "row_lists", "gather_decode", "scattered"]


def problem(slots, dim, group, rows, short, dtype=torch.float32, seed=0):
    """q, kv, ctx of two rows and kv heads; row 0 lacks its last `short` tokens, NaN in their place."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 2 * group, rows, dim, generator=g).to(dtype)
    k, v = (torch.randn(2, 2, slots, dim, generator=g).to(dtype) for _ in "kv")
    pos = torch.arange(slots, dtype=torch.int32).expand(2, 1, -1).clone()
    pos[0, :, slots - short :] = -1
    empty = (pos < 0)[..., None]
    k, v = k.masked_fill(empty, float("nan")), v.masked_fill(empty, float("nan"))
    q_pos = pos[:, 0, slots - rows :].long()
    if rows == 1:  # the newest token of each row
        q_pos = pos.amax(-1).long()
    kv = SimpleNamespace(k=k, v=v, pos=pos, holes=short > 0, complete=True, aligned=True)
    return q, kv, SimpleNamespace(scaling=dim**-0.5, softcap=None, window=None, mask=None, q_pos=q_pos)


def decision(name, q, kv, heads, seed):
    """A random Selection in the form that the executor takes, one list for each of `heads` heads."""
    g = torch.Generator().manual_seed(seed)
    (batch, _, rows, _), slots = q.shape, kv.k.shape[2]
    if name == "scattered":
        size, width = 13, 50
        order = torch.rand(batch, heads, -(-rows // size) * size, generator=g).argsort(-1)
        groups = torch.where((order < rows) & (order % 11 != 5), order, -1).unflatten(-1, (-1, size)).int()
        index = torch.rand(batch, heads, groups.shape[2], slots, generator=g).argsort(-1)[..., :width].int()
        weight = torch.randn(index.shape, generator=g)
        weight[torch.rand(index.shape, generator=g) < 0.2] = float("-inf")
        return Selection(index=index, groups=groups, weight=weight)
    page, bq = {"pages": (64, 64), "row_lists": (2, 16), "gather_decode": (16, 0)}[name]
    lists, pages = -(-rows // bq) if bq else 1, -(-slots // page)
    width = min(pages, 40)
    index = torch.rand(batch, heads, lists, pages, generator=g).argsort(-1)[..., :width].sort(-1).values.int()
    count = torch.randint(0, width + 1, index.shape[:3], generator=g).int()
    index = index.masked_fill(torch.arange(width) >= count[..., None], pages - 1)  # behind the count: anything
    columns = torch.randint(-1, slots, (batch, heads, 20), generator=g).int()
    return Selection(index, count, page, bq, columns, sink=3, window=17)


def spread(x, heads):
    """A list tensor [B, 1|Hkv|Hq, ...] per query head."""
    return x.repeat_interleave(heads // x.shape[1], 1)


def logits_added(selection, q, kv, ctx):
    """fp64 [B, Hq, T, S]: 0 or the log weight of an attended pair, -inf elsewhere; by plain loops over the lists."""
    (batch, heads, rows, _), slots = q.shape, kv.k.shape[2]
    bias = torch.full((batch, heads, rows, slots), float("-inf"), dtype=torch.float64)
    index = spread(selection.index, heads)
    for b, h, r in ((b, h, r) for b in range(batch) for h in range(heads) for r in range(index.shape[2])):
        listed = index[b, h, r].long()
        if selection.groups is not None:
            mine = spread(selection.groups, heads)[b, h, r].long()
            weight = spread(selection.weight, heads)[b, h, r].double()
            here = weight > float("-inf")
            bias[b, h, mine[mine >= 0][:, None], listed[here][None]] = weight[here]
            continue
        mine = slice(r * selection.bq, (r + 1) * selection.bq) if selection.bq else slice(None)
        for j in listed[: int(spread(selection.count, heads)[b, h, r])].tolist():
            bias[b, h, mine, j * selection.page : (j + 1) * selection.page] = 0
    if selection.columns is not None:
        for b, h in ((b, h) for b in range(batch) for h in range(heads)):
            columns = spread(selection.columns, heads)[b, h].long()
            bias[b, h, :, columns[columns >= 0]] = 0
    key, query = kv.pos[:, :, None].long(), ctx.q_pos[:, None, :, None]
    if selection.groups is None:
        bias = torch.where((key < selection.sink) | (query - key < selection.window), 0.0, bias)
    return bias.masked_fill((key < 0) | (key > query), float("-inf"))


def expected(selection, q, kv, ctx):
    """(out [B, T, Hq, D], lse [B, Hq, T]) fp64, zero and -inf where a row sees nothing."""
    k, v = (spread(x.double().nan_to_num(0.0), q.shape[1]) for x in (kv.k, kv.v))
    logits = q.double() @ k.transpose(-1, -2) * ctx.scaling + logits_added(selection, q, kv, ctx)
    lse = logits.logsumexp(-1)
    return ((logits - lse[..., None]).exp().nan_to_num(0.0) @ v).transpose(1, 2), lse


def check(name, shape, dtype, heads, **more):
    slots, dim, group, rows, short = shape
    rows = 1 if name == "gather_decode" else rows
    q, kv, ctx = problem(slots, dim, group, rows, short, dtype)
    selection = decision(name, q, kv, {"1": 1, "Hkv": 2, "Hq": 2 * group}[heads], seed=slots + dim)
    if more.pop("triton", False):
        run = import_module("attnpatch.executors.row_lists").run_triton
    else:
        run = import_module(f"attnpatch.executors.{name}").run
    out, lse = run(q, kv, selection, ctx, True, **more)
    wanted, logsum = expected(selection, q, kv, ctx)
    real, tolerance = ctx.q_pos >= 0, TOLERANCE[dtype]
    assert out.dtype == dtype and torch.isfinite(out).all()
    torch.testing.assert_close(out.double()[real], wanted[real], atol=tolerance, rtol=tolerance)
    real = real[:, None].expand_as(lse)
    torch.testing.assert_close(lse.double()[real], logsum[real], atol=max(tolerance, 1e-3), rtol=tolerance)
    alone, none = run(q, kv, selection, ctx, False, **more)
    assert none is None
    torch.testing.assert_close(alone, out, atol=tolerance / 10, rtol=tolerance / 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
@pytest.mark.parametrize("name", NAMES)
def test_lists_are_dense_attention_under_their_mask(name, shape, dtype):
    heads = ["1", "Hkv", "Hq"][(SHAPES.index(shape) + NAMES.index(name)) % 3]
    check(name, shape, dtype, heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", RANKED, ids=lambda s: "-".join(map(str, s)))
def test_lists_by_rank_are_dense_attention_of_a_short_text(shape, dtype):
    slots, dim, group, rows, short = shape
    q, kv, ctx = problem(slots, dim, group, rows, short, dtype)
    ctx.turn = lambda x, by: turned(x.float(), by).to(x.dtype)
    g = torch.Generator().manual_seed(1)
    first = (slots - short if rows == 1 else slots - rows) - 1
    early = torch.stack([torch.randperm(first, generator=g)[:200].sort().values for _ in range(2)])
    new = torch.arange(rows) + slots - rows if rows > 1 else ctx.q_pos
    index = torch.cat([early, new.expand(2, -1)], 1)  # [B, W], every row's own tokens last
    selection = Selection(index[:, None, None].int(), positions="rank")
    out, lse = import_module("attnpatch.executors.rank_lists").run(q, kv, selection, ctx, True)
    assert torch.isfinite(out).all()
    for b in range(2):
        k, v = (x[b : b + 1, :, index[b]].double() for x in (kv.k, kv.v))
        rank = torch.arange(index.shape[1])
        k = turned(k, (rank - index[b])[None])  # each key at its place in the list
        query = turned(q[b : b + 1].double(), (rank[-rows:] - index[b, -rows:])[None])
        k, v = (spread(x, q.shape[1]) for x in (k, v))
        logits = query @ k.transpose(-1, -2) * ctx.scaling
        logits = logits.masked_fill(rank > rank[-rows:, None], float("-inf"))
        tolerance = TOLERANCE[dtype] * (2 if dtype == torch.bfloat16 else 1)
        wanted = (logits.softmax(-1) @ v)[0].transpose(0, 1)
        torch.testing.assert_close(out[b].double(), wanted, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(lse[b].double(), logits.logsumexp(-1)[0], atol=tolerance, rtol=tolerance)


def interpreted():
    """The Triton kernels, in a process of their own."""
    mend_interpreter()
    gather = import_module("attnpatch.executors.gather_decode")
    gather.no_cuda_lists = lambda call: None
    for i, (slots, dim, group, rows, short) in enumerate(SHAPES):
        dtype, heads, few = (torch.float32, HALF)[i % 2], ["1", "Hkv", "Hq"][i % 3], min(rows, 35)
        check("gather_decode", (slots, dim, group, 1, short), dtype, heads, _backend="triton")
        for name in ("row_lists", "pages"):
            check(name, (slots, dim, group, few, min(short, 5)), dtype, heads, triton=True)


@needs_triton
@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the kernels' own tests run on the GPU")
def test_triton_kernels_under_the_interpreter():
    run_interpreted(__file__)


if __name__ == "__main__":
    interpreted()
