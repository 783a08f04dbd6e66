"""row_lists against naive: the torch backend here, the Triton kernel in a process of its own under the interpreter."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from interpreter import mend_interpreter, needs_triton, run_interpreted

from attnpatch.decisions import Selection
from attnpatch.errors import ConfigError, InputError
from attnpatch.executors import naive, row_lists

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float64: 1e-10}
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]


def problem(rows, slots, *, group=4, kv_heads=2, batch=2, dim=64, dtype=torch.float32, short=0, seed=0):
    """q, kv, ctx of a layer whose slots are positions; row 0 lacks its last `short` tokens, garbage in their place."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, kv_heads * group, rows, dim, generator=g).to(dtype)
    k, v = (torch.randn(batch, kv_heads, slots, dim, generator=g).to(dtype) for _ in range(2))
    pos = torch.arange(slots, dtype=torch.int32).expand(batch, 1, slots).clone()
    q_pos = pos[:, 0, slots - rows :].clone()
    if short:
        pos[0, :, slots - short :] = -1
        q_pos[0, max(0, rows - short) :] = -1
        empty = (pos < 0)[..., None]
        k, v = k.masked_fill(empty, float("nan")), v.masked_fill(empty, float("nan"))
    kv = SimpleNamespace(k=k, v=v, pos=pos, holes=short > 0, complete=True)
    return q, kv, SimpleNamespace(scaling=dim**-0.5, softcap=None, window=None, q_pos=q_pos, mask=None)


def lists(q, kv, *, page=2, bq=16, width=12, heads="Hq", rows=None, counts=True, columns=0, one_batch=False, **more):
    """A Selection of random ascending pages (all within reach or beyond it), and of random columns."""
    g = torch.Generator().manual_seed(7)
    batch, slots = 1 if one_batch else q.shape[0], kv.k.shape[2]
    count = {"1": 1, "Hkv": kv.k.shape[1], "Hq": q.shape[1]}[heads]
    first, stop, _ = (rows or slice(None)).indices(q.shape[2])
    blocks = -(-(stop - first) // bq) if bq else 1
    given = {}
    if width:
        pages = -(-slots // page)
        width = min(width, pages)
        index = torch.rand(batch, count, blocks, pages, generator=g).argsort(-1)[..., :width].sort(-1).values
        given["index"] = index.to(torch.int32)
    if width and counts:
        given["count"] = torch.randint(0, width + 1, (batch, count, blocks), generator=g, dtype=torch.int32)
    if columns:
        given["columns"] = torch.randint(-1, slots, (batch, count, columns), generator=g, dtype=torch.int32)
    return Selection(page=page, bq=bq, rows=rows, **given, **more)


def compare(run, q, kv, selection, ctx):
    out, lse = run(q, kv, selection, ctx, want_lse=True)
    expected, expected_lse = naive.run(q, kv, selection, ctx, want_lse=True)
    rows = selection.rows or slice(None)
    expected, expected_lse = expected[:, rows], expected_lse[:, :, rows]
    tolerance = TOLERANCE[q.dtype]
    assert out.shape == expected.shape and out.dtype == q.dtype and torch.isfinite(out).all()
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, expected_lse, atol=tolerance, rtol=tolerance)
    return out


def check(q, kv, selection, ctx):
    out = compare(row_lists.run, q, kv, selection, ctx)
    alone, none = row_lists.run(q, kv, selection, ctx)
    assert none is None and torch.equal(alone, out)
    return out


EVERYTHING = {"columns": 9, "sink": 5, "window": 11}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("short", [0, 9], ids=["full", "padded"])
@pytest.mark.parametrize(("rows", "slots"), [(1, 1), (1, 77), (61, 61), (61, 150)], ids=lambda x: str(x))
def test_matches_naive(rows, slots, short, softcap, dtype):
    q, kv, ctx = problem(rows, slots, dtype=dtype, short=min(short, slots - 1))
    ctx.softcap = softcap
    check(q, kv, lists(q, kv, **EVERYTHING), ctx)


PARTS = [
    {"width": 0, "sink": 4, "window": 7},
    {"width": 0, "window": 7},
    {"width": 0, "sink": 4},
    {"width": 0, "columns": 8},
    {"columns": 8},
    {},
    {"counts": False},
    {"sink": 3},
    {"window": 200},
    {"sink": 200},
    {"one_batch": True, "columns": 8},
]


@pytest.mark.parametrize("more", PARTS, ids=lambda m: "+".join(m) or "pages")
def test_every_part_alone(more):
    q, kv, ctx = problem(50, 83)
    check(q, kv, lists(q, kv, **more), ctx)


@pytest.mark.parametrize("heads", ["1", "Hkv", "Hq"])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_grouped_heads(group, heads):
    q, kv, ctx = problem(40, 71, group=group, short=3)
    check(q, kv, lists(q, kv, heads=heads, **EVERYTHING), ctx)


def test_lists_of_kv_heads_beside_columns_of_query_heads():
    q, kv, ctx = problem(40, 71)
    pages, columns = lists(q, kv, heads="Hkv"), lists(q, kv, columns=8).columns
    check(q, kv, Selection(pages.index, pages.count, 2, 16, columns, window=5), ctx)


@pytest.mark.parametrize("page", [1, 2, 8, 32])
@pytest.mark.parametrize("bq", [0, 1, 7, 16, 48, 128, 160])
def test_pages_and_blocks(bq, page):
    q, kv, ctx = problem(200, 230, kv_heads=1, batch=1, group=2, dim=16)
    check(q, kv, lists(q, kv, page=page, bq=bq, width=5, **EVERYTHING), ctx)


@pytest.mark.parametrize(("dim", "slots"), [(64, 1000), (128, 1000), (256, 1000), (64, 4097)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_odd_lengths(dim, slots, dtype):
    q, kv, ctx = problem(slots // 4 + 1, slots, dim=dim, dtype=dtype, kv_heads=1, group=2, batch=1)
    check(q, kv, lists(q, kv, bq=64, width=40, columns=30, sink=16, window=64), ctx)


@pytest.mark.parametrize("rows", [slice(0, 16), slice(5, 40), slice(32, None), slice(49, 50)], ids=str)
@pytest.mark.parametrize("short", [0, 9], ids=["full", "padded"])
def test_rows_of_a_term(rows, short):
    q, kv, ctx = problem(50, 90, short=short)
    out = check(q, kv, lists(q, kv, rows=rows, **EVERYTHING), ctx)
    assert out.shape[1] == len(range(*rows.indices(50)))


def test_many_passes_over_few_tiles(monkeypatch):
    monkeypatch.setattr(row_lists, "MAX_BLOCK", 1)
    q, kv, ctx = problem(50, 90, short=9)
    check(q, kv, lists(q, kv, **EVERYTHING), ctx)


def test_a_key_named_many_times_counts_once():
    q, kv, ctx = problem(20, 40)
    index = torch.tensor([0, 0, 3, 3, 3, 9, 19, 19], dtype=torch.int32).expand(2, 8, 2, 8)  # pages of two keys
    columns = torch.tensor([7, 7, -1, 0, 1, 30, 38, 30], dtype=torch.int32).expand(1, 1, 8)
    check(q, kv, Selection(index, page=2, bq=10, columns=columns, sink=2, window=4), ctx)
    check(q, kv, Selection(index, torch.full((2, 8, 2), 5), 2, 10, columns), ctx)


def test_rows_without_keys_give_zeros():
    q, kv, ctx = problem(20, 40)
    index = torch.full((1, 1, 2, 1), 19, dtype=torch.int32)  # keys 38, 39: only the last rows see them
    out, lse = row_lists.run(q, kv, Selection(index, page=2, bq=10), ctx, want_lse=True)
    assert (out[:, :18] == 0).all() and (lse[..., :18] == float("-inf")).all() and torch.isfinite(lse[..., 18:]).all()


@pytest.mark.parametrize("rows", [1, 30])
def test_slots_that_are_not_positions(rows):
    """After an eviction, or with pads between tokens, sink and window go by position, lists by slot."""
    q, kv, ctx = problem(rows, 70, short=0)
    kv.complete = False
    kv.pos[..., : 70 - rows] = kv.pos[..., : 70 - rows].flip(-1) * 3
    kv.pos[..., 70 - rows :] += 200
    kv.pos[0, :, 3:9] = -1
    ctx.q_pos = kv.pos[:, 0, 70 - rows :].clone()
    kv.k, kv.v = (x.masked_fill((kv.pos < 0)[..., None], float("nan")) for x in (kv.k, kv.v))
    kv.holes = True
    check(q, kv, lists(q, kv, columns=9, sink=30, window=11), ctx)
    ctx.window = 90
    check(q, kv, lists(q, kv, columns=9, sink=30, window=11), ctx)


def distinct(kv, width=21, window=11):
    """Ascending columns without repeats, their own in every KV head, fewer in some; some lie in the window."""
    g, (batch, heads, slots, _) = torch.Generator().manual_seed(3), kv.k.shape
    columns = torch.rand(batch, heads, slots, generator=g).argsort(-1)[..., :width].sort(-1).values.to(torch.int32)
    meant = torch.arange(width) < torch.randint(1, width + 1, (batch, heads, 1), generator=g)
    return Selection(columns=columns.masked_fill(~meant, -1), distinct=True, window=window)


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize(("rows", "short"), [(70, 0), (70, 9), (23, 0)], ids=["prompt", "padded", "chunk"])
def test_distinct_columns_beside_a_window(rows, short, group):
    for dtype in (torch.float32, torch.bfloat16):
        q, kv, ctx = problem(rows, 70, group=group, kv_heads=2, short=short, dtype=dtype)
        check(q, kv, distinct(kv), ctx)


def test_positions_need_not_exist_where_slots_say_it_all():
    q, kv, ctx = problem(30, 70)
    selection = lists(q, kv, **EVERYTHING)
    expected = naive.run(q, kv, selection, ctx)[0]
    kv.pos = ctx.q_pos = None
    torch.testing.assert_close(row_lists.run(q, kv, selection, ctx)[0], expected, atol=1e-5, rtol=1e-5)


def test_fp64_gradients_and_strides():
    q, kv, ctx = problem(30, 70, dtype=torch.float64)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    kv.k = kv.k.transpose(1, 2).contiguous().transpose(1, 2)
    selection = lists(q, kv, **EVERYTHING)
    check(q, kv, selection, ctx)
    grads = []
    for run in (row_lists.run, naive.run):
        leaf = q.clone().requires_grad_()
        run(leaf, kv, selection, ctx)[0].square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_never_gathers_all_pairs(monkeypatch):
    biggest, take = [], row_lists.take

    def watched(x, slot):
        biggest.append(slot.numel())
        return take(x, slot)

    monkeypatch.setattr(row_lists, "take", watched)
    monkeypatch.setattr(row_lists, "MAX_BLOCK", 200_000)
    q, kv, ctx = problem(2000, 2000, kv_heads=1, group=1, batch=1, dim=16)
    row_lists.run(q, kv, lists(q, kv, sink=4, window=16), ctx)
    assert max(biggest) <= 200_000 // 16 and sum(biggest) < 2 * 2000 * 60


# ---- the choice and the refusals ----


def test_choice_and_its_reason(monkeypatch):
    q, kv, ctx = problem(7, 12)
    selection = lists(q, kv)
    assert row_lists.choose(q, kv, selection, ctx) == (
        "torch", "the fastest that fits; not triton: needs CUDA capability >= 8, this is cpu"
    )  # fmt: skip
    monkeypatch.setenv("ATTNPATCH_BACKEND", "torch")
    assert row_lists.choose(q, kv, selection, ctx) == ("torch", "forced by ATTNPATCH_BACKEND")
    with pytest.raises(ConfigError, match="=triton cannot do this call: needs CUDA"):
        row_lists.run(q, kv, selection, ctx, _backend="triton")
    with pytest.raises(ConfigError, match="'nonsense' is not a backend; allowed: fa4, "):
        row_lists.run(q, kv, selection, ctx, _backend="nonsense")


@pytest.mark.parametrize(("change", "why"), [
    ({}, None), ({"capability": 7}, "this is capability 7"), ({"dtype": torch.float32}, "this is float32"),
    ({"dim": 512}, "this is 512"), ({"aligned": False}, "slots that equal positions"), ({"grad": True}, "backward"),
    ({"window": True}, "sliding window"),
], ids=lambda x: "+".join(x) if isinstance(x, dict) else "")  # fmt: skip
def test_choice_on_cuda(change, why, monkeypatch):
    monkeypatch.setattr(row_lists, "has_triton", lambda: True)
    plain = {"device": "cuda", "capability": 9, "dtype": torch.bfloat16, "dim": 128, "aligned": True}
    name, reason = row_lists._decide(row_lists.Call(**{**plain, "grad": False, "window": False, **change}), None)
    assert name == ("torch" if why else "triton") and (why or "fastest") in reason


def test_refusals():
    q, kv, ctx = problem(40, 40)
    with pytest.raises(ConfigError, match="give a dense term to `dense`"):
        row_lists.run(q, kv, Selection(), ctx)
    with pytest.raises(InputError, match="step 1"):
        row_lists.run(q, kv, Selection(window=3, rows=slice(0, 40, 2)), ctx)
    with pytest.raises(InputError, match="at least one row"):
        row_lists.run(q, kv, Selection(window=3, rows=slice(9, 9)), ctx)
    index = torch.zeros(2, 3, 2, 1, dtype=torch.int32)
    with pytest.raises(InputError, match="expected \\[1 or 2, 1, 2 or 8, ...\\]"):
        row_lists.run(q, kv, Selection(index, bq=20), ctx)
    with pytest.raises(InputError, match="do not cover 40 rows"):
        row_lists.run(q, kv, Selection(index[:, :1], bq=16), ctx)
    ctx.mask = torch.ones(2, 1, 40, 40, dtype=torch.bool)
    with pytest.raises(ConfigError, match="takes no 4-D mask"):
        row_lists.run(q, kv, Selection(window=3), ctx)


def test_import_is_light():
    code = "import sys, attnpatch.executors.row_lists; sys.exit(bool({'flash_attn', 'triton'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- the Triton kernel, interpreted ----


def interpreted():
    """Runs in a process of its own: the interpreter must be asked for before triton is imported."""
    mend_interpreter()

    def run(q, kv, selection, ctx, want_lse=False):
        return row_lists.run_triton(q, kv, selection, ctx, want_lse)

    def compared(q, kv, selection, ctx):
        compare(run, q, kv, selection, ctx)

    for dtype in (torch.float32, torch.float16):  # the interpreter multiplies bfloat16 as integers
        q, kv, ctx = problem(37, 75, group=2, kv_heads=1, dtype=dtype, short=5)
        compared(q, kv, lists(q, kv, **EVERYTHING), ctx)
    for dim, group, heads, page, bq in [
        (96, 1, "Hkv", 1, 16),
        (128, 4, "1", 16, 0),
        (256, 1, "Hq", 2, 24),
        (64, 8, "Hkv", 32, 7),
        (64, 1, "Hq", 2, 160),
    ]:
        q, kv, ctx = problem(170 if bq > 128 else 37, 203, dim=dim, group=group, kv_heads=1)
        compared(q, kv, lists(q, kv, page=page, bq=bq, heads=heads, width=40, columns=70, sink=16, window=80), ctx)
    q, kv, ctx = problem(37, 75, group=2, kv_heads=1)
    for more in PARTS[1:7]:
        compared(q, kv, lists(q, kv, **more), ctx)
    compared(q, kv, distinct(kv), ctx)
    ctx.softcap = 2.0
    compared(q, kv, lists(q, kv, rows=slice(10, 33), one_batch=True, **EVERYTHING), ctx)
    q, kv, ctx = problem(1, 75, group=4)  # decoding
    compared(q, kv, lists(q, kv, **EVERYTHING), ctx)
    kv.pos = ctx.q_pos = None
    assert torch.isfinite(run(q, kv, lists(q, kv, **EVERYTHING), ctx)[0]).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(("rows", "slots"), [(1, 1000), (1000, 1000), (301, 4097)])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_triton_kernel_on_a_gpu(dim, rows, slots, dtype, softcap):
    for short, heads, page, bq in [(0, "Hq", 2, 64), (99, "1", 1, 16), (0, "Hkv", 16, 128), (9, "Hq", 32, 0)]:
        q, kv, ctx = problem(rows, slots, dim=dim, dtype=dtype, short=short if rows == slots else 0)
        selection = lists(q, kv, page=page, bq=bq, heads=heads, width=40, columns=30, sink=16, window=64)
        q, kv.k, kv.v, kv.pos, ctx.q_pos = (x.cuda() for x in (q, kv.k, kv.v, kv.pos, ctx.q_pos))
        selection = replace(selection, **{n: getattr(selection, n).cuda() for n in ("index", "count", "columns")})
        ctx.softcap = softcap
        assert row_lists.choose(q, kv, selection, ctx)[0] == "triton"
        check(q, kv, selection, ctx)


@needs_triton
def test_triton_kernel_under_the_interpreter():
    run_interpreted(__file__)


if __name__ == "__main__":
    interpreted()
