"""The executor for page lists against the naive reference."""

from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from attnpatch.decisions import Selection
from attnpatch.executors import dense, lists, naive, pages, pages_torch
from attnpatch.executors.pages_torch import Stripe

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float64: 1e-10}
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]
RUN = {"torch": pages_torch._gathered, "masked": pages_torch._masked}  # the two forms of the torch backend
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="FlexAttention on a CPU needs g++ to compile")


def problem(rows, slots, *, group=2, kv_heads=2, batch=1, dim=16, dtype=torch.float32, lengths=None):
    """q, kv, ctx of a complete layer; lengths: real tokens of each row, left-aligned, finite garbage behind."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(batch, kv_heads * group, rows, dim, generator=g).to(dtype)
    k, v = (torch.randn(batch, kv_heads, slots, dim, generator=g).to(dtype) for _ in range(2))
    pos = torch.arange(slots, dtype=torch.int32).expand(batch, 1, -1).clone()
    if lengths is not None:
        pos = torch.where(pos < torch.tensor(lengths)[:, None, None], pos, -1)
    kv = SimpleNamespace(k=k, v=v, pos=pos, holes=False)
    q_pos = pos[:, 0, slots - rows :]
    return q, kv, SimpleNamespace(scaling=dim**-0.5, softcap=None, window=None, q_pos=q_pos, mask=None)


def choice(q, kv, *, page=128, bq=128, heads=None, rows=None, share=0.4, batch=None, **beside):
    """A random Selection, with the diagonal and page 0 in most lists, and garbage behind each list's count."""
    g = torch.Generator().manual_seed(1)
    start, stop, _ = (rows or slice(None)).indices(q.shape[2])
    first, grid = kv.k.shape[2] - q.shape[2] + start, -(-(stop - start) // bq)
    shape = (batch or q.shape[0], heads or q.shape[1], grid, -(-kv.k.shape[2] // page))
    chosen = torch.rand(shape, generator=g) < share
    key, row = torch.arange(shape[3]) * page, first + torch.arange(grid)[:, None] * bq
    chosen |= (key < row + bq) & (key + page > row) & (torch.rand(shape, generator=g) < 0.9)
    chosen[..., 0] |= torch.rand(shape[:3], generator=g) < 0.9
    index, count = lists.pack(chosen)
    garbage = torch.arange(shape[3]) >= count[..., None]
    return Selection(index=index.masked_fill(garbage, 3), count=count, page=page, bq=bq, rows=rows, **beside)


def every(selection, width=3):
    """The same grid with `width` random pages in each list, and no count."""
    pages = int(selection.index.max()) + 1
    order = torch.rand(*selection.index.shape[:3], pages, generator=torch.Generator().manual_seed(2)).argsort(-1)
    return replace(selection, index=order[..., :width].sort(-1).values.int(), count=None)


def check(q, kv, ctx, selection, run, want_lse=True):
    """Against naive on the rows of the selection that hold a token."""
    out, lse = run(q, kv, selection, ctx, want_lse)
    rows = selection.rows or slice(None)
    expected, expected_lse = naive.run(q, kv, selection, ctx, want_lse=True)
    expected, expected_lse, real = expected[:, rows], expected_lse[:, :, rows], ctx.q_pos[:, rows] >= 0
    assert out.shape == expected.shape and out.dtype == q.dtype and torch.isfinite(out).all()
    torch.testing.assert_close(out[real], expected[real], atol=TOLERANCE[q.dtype], rtol=TOLERANCE[q.dtype])
    assert (lse is not None) == want_lse
    if want_lse:
        real = real[:, None].expand_as(lse)
        torch.testing.assert_close(lse[real], expected_lse[real], atol=1e-4, rtol=1e-4)
    return out, lse


@pytest.fixture(params=RUN, ids=RUN)
def run(request):
    return RUN[request.param]


# ---- the torch backend ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "slots", "group", "kv_heads", "dim"),
    [(1025, 1025, 8, 1, 64), (2048, 2048, 1, 2, 128), (3000, 3000, 2, 1, 64), (700, 1725, 4, 1, 64),
     (1025, 2049, 2, 1, 128)],
    ids=lambda x: str(x),
)  # fmt: skip
def test_pages_match_naive(rows, slots, group, kv_heads, dim, dtype, run):
    q, kv, ctx = problem(rows, slots, group=group, kv_heads=kv_heads, dim=dim, dtype=dtype)
    check(q, kv, ctx, choice(q, kv), run)


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("shared", ["1", "Hkv", "Hq"])
@pytest.mark.parametrize("slots", [150, 333], ids=["T150", "prefix183"])
def test_heads_that_share_lists(slots, shared, group, run):
    q, kv, ctx = problem(150, slots, group=group, batch=2)
    heads = {"1": 1, "Hkv": 2, "Hq": 2 * group}[shared]
    for page, bq in ((16, 16), (16, 64), (64, 16), (48, 32)):
        selection = choice(q, kv, page=page, bq=bq, heads=heads)
        check(q, kv, ctx, selection, run)
        check(q, kv, ctx, every(selection), run)
        check(q, kv, ctx, choice(q, kv, page=page, bq=bq, heads=heads, batch=1), run, want_lse=False)


BESIDE = {
    "columns": {"columns": True},
    "sink": {"sink": 5},
    "window": {"window": 40},
    "narrow": {"window": 1},
    "all": {"columns": True, "sink": 20, "window": 19},
}


@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("listed", [True, False], ids=["pages", "nothing"])
def test_columns_sink_and_window_count_once(listed, heads, beside, run, monkeypatch):
    monkeypatch.setattr(pages_torch, "ROWS", 24)
    q, kv, ctx = problem(150, 333, batch=2)
    beside = dict(beside)
    if "columns" in beside:
        beside["columns"] = torch.randint(-1, 333, (2, heads, 30), generator=torch.Generator().manual_seed(2)).int()
    for bq in (16, 64):
        selection = choice(q, kv, page=16, bq=bq, share=0.2, **beside)
        check(q, kv, ctx, selection if listed else replace(selection, index=None, count=None), run)


@pytest.mark.parametrize("slots", [256, 307], ids=["aligned", "prefix"])
@pytest.mark.parametrize("rows", [slice(0, 100), slice(64, 192), slice(13, 256), slice(250, None)], ids=str)
def test_stripes_of_rows(rows, slots, run):
    q, kv, ctx = problem(256, slots)
    selection = choice(q, kv, page=32, bq=64, rows=rows)
    expected, _ = check(q, kv, ctx, selection, run)
    end = slots - 256 + rows.indices(256)[1]
    kv.k[:, :, end:], kv.v[:, :, end:] = float("nan"), float("nan")  # keys behind the stripe are not touched
    assert torch.equal(run(q, kv, selection, ctx, False)[0], expected)
    check(q, kv, ctx, replace(selection, window=10, sink=3), RUN["torch"]) if end == slots else None


def test_stripes_add_up_to_the_call(run):
    q, kv, ctx = problem(256, 307)
    whole = choice(q, kv, page=32, bq=64)
    parts = [
        run(q, kv, replace(whole, index=whole.index[:, :, r], count=whole.count[:, :, r], rows=rows), ctx, False)[0]
        for r, rows in ((slice(0, 1), slice(0, 64)), (slice(1, 4), slice(64, None)))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), run(q, kv, whole, ctx, False)[0])


def test_padded_rows_stand_as_if_alone(run):
    lengths = (200, 77)
    q, kv, ctx = problem(200, 200, batch=2, lengths=lengths)
    selection = choice(q, kv, page=16, bq=32, window=9)
    out, _ = check(q, kv, ctx, selection, run)
    own, _ = run(q[1:, :, :77], SimpleNamespace(k=kv.k[1:, :, :77], v=kv.v[1:, :, :77], pos=None, holes=False),
                 replace(selection, index=selection.index[1:, :, :3], count=selection.count[1:, :, :3]),
                 ctx, False)  # fmt: skip
    torch.testing.assert_close(out[1:, :77], own)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beside", [{}, {"sink": 6, "window": 11}], ids=["pages", "beside"])
@pytest.mark.parametrize("change", [{}, {"softcap": 1.5}, {"window": 30}, {"mask": True}], ids=lambda c: str(list(c)))
def test_empty_slots_full_of_nan(change, beside, dtype):
    q, kv, ctx = problem(90, 150, batch=2, dtype=dtype)
    g = torch.Generator().manual_seed(3)
    kv.pos = torch.where(torch.rand(2, 2, 150, generator=g) < 0.3, -1, kv.pos)
    kv.pos[:, :, 60:] = torch.arange(60, 150)
    kv.pos[0, :, 130:] = -1
    ctx.q_pos, kv.holes = kv.pos[:, 0, 60:].clone(), True
    kv.k, kv.v = (x.masked_fill((kv.pos < 0)[..., None], float("nan")) for x in (kv.k, kv.v))
    if "mask" in change:
        change = {"mask": torch.rand(2, 1, 90, 150, generator=g) < 0.5}
    vars(ctx).update(change)
    check(q, kv, ctx, choice(q, kv, page=16, bq=32, **beside), pages.run)


@pytest.mark.parametrize("change", [{"softcap": 1.5}, {"window": 30}], ids=lambda c: str(list(c)))
def test_softcap_and_sliding_window(change):
    q, kv, ctx = problem(90, 150)
    vars(ctx).update(change)
    check(q, kv, ctx, choice(q, kv, page=16, bq=32), pages.run)


def test_rows_that_see_nothing_are_zero(run):
    q, kv, ctx = problem(96, 96)
    index = torch.tensor([[0, 2], [3, 5], [1, 1]], dtype=torch.int32).expand(1, 4, 3, 2)
    count = torch.tensor([0, 2, 1], dtype=torch.int32).expand(1, 4, 3)
    out, lse = check(q, kv, ctx, Selection(index=index, count=count, page=16, bq=32), run)
    blind = slice(0, 48)  # an empty list, and rows before the first page of theirs
    assert (out[:, blind] == 0).all() and (lse[:, :, blind] == float("-inf")).all()
    assert torch.isfinite(lse[:, :, 48:]).all()


def test_one_list_for_all_rows_in_many_blocks(run, monkeypatch):
    monkeypatch.setattr(pages_torch, "ROWS", 20)
    q, kv, ctx = problem(150, 190)
    selection = choice(q, kv, page=16, bq=150)
    check(q, kv, ctx, selection, run)
    check(q, kv, ctx, replace(selection, bq=0), run)


def test_fp64_gradients_and_strides(run):
    q, kv, ctx = problem(70, 90, dtype=torch.float64)
    selection = choice(q, kv, page=16, bq=32, window=5)
    check(q, kv, ctx, selection, run)
    grads = []
    for form in (run, naive.run):
        leaf = q.clone().requires_grad_()
        form(leaf, kv, selection, ctx, False)[0].square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    kv.k = torch.cat([kv.k, kv.k], dim=2)[:, :, :90]
    check(q, kv, ctx, selection, run)


def test_full_lists_are_dense_attention():
    q, kv, ctx = problem(200, 200)
    selection = Selection(index=torch.arange(13, dtype=torch.int32).expand(1, 1, 7, 13), page=16, bq=32)
    out, lse = pages.run(q, kv, selection, ctx, want_lse=True)
    torch.testing.assert_close((out, lse), dense.run(q, kv, Selection(), ctx, want_lse=True), atol=1e-5, rtol=1e-5)


# ---- the block-sparse kernels ----


class FakeFA4:
    """Stands in for flash-attn-4: pages in full_* get no token mask, those in mask_* a bottom-right causal one."""

    def __call__(self, q, k, v, *, softmax_scale, causal, pack_gqa, block_sparse_tensors, return_lse=False):
        assert causal and not pack_gqa
        blocks, (batch, rows, heads, _), end = block_sparse_tensors, q.shape, k.shape[1]
        block, page = blocks.block_size
        grid, wide = -(-rows // block), -(-end // page)
        causality = torch.arange(end) <= torch.arange(rows)[:, None] + end - rows
        seen, named = torch.zeros(batch, heads, rows, end, dtype=torch.bool), 0
        for kind in ("mask", "full"):
            count, index = (getattr(blocks, f"{kind}_block_{x}") for x in ("cnt", "idx"))
            assert count.dtype == index.dtype == torch.int32 and index.stride(-1) == 1 and index.shape[3] <= wide
            assert count.shape == index.shape[:3] and index.shape[2] == grid and index.shape[1] in (1, heads)
            assert (count <= index.shape[3]).all() and (count >= 0).all()
            chosen = lists.unpack(index, count, wide).expand(batch, heads, -1, -1)
            pairs = chosen.repeat_interleave(block, 2)[:, :, :rows].repeat_interleave(page, 3)[..., :end]
            seen |= pairs & causality if kind == "mask" else pairs
            named = named + chosen.int()
        assert (named <= 1).all()  # a page in both would count twice
        assert not (seen & ~causality).any()
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        probs, lse = naive._probabilities(naive._logits(q, SimpleNamespace(k=k), softmax_scale, None), seen)
        out = (probs @ v.float().repeat_interleave(heads // v.shape[1], dim=1)).to(q.dtype).transpose(1, 2)
        return (out, lse) if return_lse else out


@pytest.fixture
def fake_fa4(monkeypatch):
    fields = ["mask_block_cnt", "mask_block_idx", "full_block_cnt", "full_block_idx", "block_size"]
    monkeypatch.setattr(pages, "fa4", lambda: FakeFA4())
    monkeypatch.setattr(pages, "_fa4_lists", lambda: lambda **given: SimpleNamespace(**{f: given[f] for f in fields}))


@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(("bq", "page"), [(128, 128), (64, 64), (128, 64), (64, 128), (256, 64)], ids=str)
@pytest.mark.parametrize(
    ("rows", "slots", "stripe"),
    [(500, 500, None), (300, 555, None), (500, 500, slice(128, 384)), (500, 612, slice(13, 400)),
     (500, 612, slice(0, 28))],
    ids=str,
)  # fmt: skip
def test_lists_as_flash_attn_4_takes_them(rows, slots, stripe, bq, page, group, heads, fake_fa4):
    if heads == 8 and group == 1:
        heads = 2
    q, kv, ctx = problem(rows, slots, group=group, kv_heads=2)
    selection = choice(q, kv, page=page, bq=bq, heads=heads, rows=stripe)
    check(q, kv, ctx, selection, pages._run_fa4)
    check(q, kv, ctx, every(selection), pages._run_fa4, want_lse=False)


def test_one_list_and_a_list_past_the_keys_on_flash_attn_4(fake_fa4):
    q, kv, ctx = problem(100, 150)
    held, wide = (torch.arange(n, dtype=torch.int32).expand(1, 1, 1, n) for n in (3, 6))
    for rows in (None, slice(10, 60)):
        expected = check(q, kv, ctx, Selection(index=held, page=64, rows=rows), pages._run_fa4)
        given = Selection(index=wide, page=64, rows=rows)
        torch.testing.assert_close(pages._run_fa4(q, kv, given, ctx, True), expected)
        torch.testing.assert_close(pages.run(q, kv, given, ctx, True), expected, atol=1e-5, rtol=1e-5)
    narrow = torch.tensor([[1], [0]], dtype=torch.int32).expand(1, 4, 2, 1)
    check(q, kv, ctx, Selection(index=narrow, page=64, bq=64), pages._run_fa4)


def test_the_split_waits_for_no_device():
    q, kv, _ = problem(500, 612)
    selection = choice(q, kv, page=64, bq=128)
    meta = replace(selection, index=selection.index.to("meta"), count=selection.count.to("meta"))
    blocks = pages._split(meta, 4, Stripe(0, 500, 112))  # a meta tensor has no value to wait for
    assert blocks.mask_index.shape == (1, 4, 4, 3) and blocks.full_index.shape == (1, 4, 4, 10)


@needs_compiler
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("dtype", DTYPES)
def test_flex_matches_naive(dtype):
    torch.compiler.reset()
    cases = [
        problem(300, 300, group=4, kv_heads=2, dtype=dtype),
        problem(200, 555, group=4, kv_heads=2, dtype=dtype),
        problem(333, 400, group=4, kv_heads=2, dtype=dtype),
    ]
    with torch.no_grad():
        for q, kv, ctx in cases:
            for rows in (None, slice(64, 190)):
                selection = choice(q, kv, page=64, bq=64, rows=rows)
                check(q, kv, ctx, selection, lambda *a: pages.run(*a, _backend="flex"), want_lse=False)
