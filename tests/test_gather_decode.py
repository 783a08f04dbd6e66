"""gather_decode against naive: the torch form here; the Triton form on CUDA, else in the interpreter's own process."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from interpreter import DEVICE, FORMS, HALF, INTERPRETED, mend_interpreter, needs_triton, run_interpreted

from attnpatch.decisions import Selection
from attnpatch.errors import ConfigError, InputError
from attnpatch.executors import backends, dispatch, gather_decode, naive, votes

if INTERPRETED:
    mend_interpreter()

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float64: 1e-10}


def problem(slots, *, group=4, kv_heads=2, batch=2, dim=32, dtype=torch.float32, short=0, device="cpu", seed=0):
    """q, kv, ctx of a step; row 0 lacks its last `short` tokens, NaN in their place."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, kv_heads * group, 1, dim, generator=g).to(device, dtype)
    k, v = (torch.randn(batch, kv_heads, slots, dim, generator=g).to(device, dtype) for _ in range(2))
    pos = torch.arange(slots, dtype=torch.int32).expand(batch, 1, slots).clone()
    if short:
        pos[0, :, slots - short :] = -1
    pos = pos.to(device)
    empty = (pos < 0)[..., None]
    k, v = k.masked_fill(empty, float("nan")), v.masked_fill(empty, float("nan"))
    kv = SimpleNamespace(k=k, v=v, pos=pos, holes=short > 0, complete=True, aligned=True)
    return q, kv, SimpleNamespace(scaling=dim**-0.5, softcap=None, window=None, q_pos=pos.amax(-1).long(), mask=None)


def holed(slots, **more):
    """A layer after evictions: slots in no order, other keys in each KV head, holes in the middle."""
    q, kv, ctx = problem(slots, **{**more, "short": 0})
    g, batch = torch.Generator().manual_seed(1), kv.k.shape[0]
    order = torch.rand(batch, kv.k.shape[1], slots - 1, generator=g).argsort(-1).to(kv.pos)
    kv.pos = torch.cat([order * 3, torch.full_like(order[..., :1], 3 * slots)], -1).int()
    kv.pos[:, 0, 4:9], kv.pos[0, 1, slots // 2] = -1, -1
    empty = (kv.pos < 0)[..., None]
    kv.k, kv.v = kv.k.masked_fill(empty, float("nan")), kv.v.masked_fill(empty, float("nan"))
    kv.holes, kv.complete, kv.aligned, ctx.q_pos = True, False, False, kv.pos.amax((1, 2))[:, None].long()
    return q, kv, ctx


def lists(q, kv, *, page=2, width=12, heads="Hq", counts=True, columns=0, one_batch=False, **more):
    """A Selection of random ascending pages and of random columns, repeats and -1 among them."""
    g = torch.Generator().manual_seed(7)
    batch, slots = 1 if one_batch else q.shape[0], kv.k.shape[2]
    count = {"1": 1, "Hkv": kv.k.shape[1], "Hq": q.shape[1]}[heads]
    given = {}
    if width:
        pages = -(-slots // page)
        width = min(width, pages)
        index = torch.rand(batch, count, 1, pages, generator=g).argsort(-1)[..., :width].sort(-1).values
        given["index"] = index.to(q.device, torch.int32)
    if width and counts:
        given["count"] = torch.randint(0, width + 1, (batch, count, 1), generator=g, dtype=torch.int32).to(q.device)
    if columns:
        given["columns"] = torch.randint(-1, slots, (batch, count, columns), generator=g).to(q.device, torch.int32)
    return Selection(page=page, **given, **more)


def check(backend, q, kv, selection, ctx):
    out, lse = gather_decode.run(q, kv, selection, ctx, True, _backend=backend)
    expected, expected_lse = naive.run(q, kv, selection, ctx, want_lse=True)
    tolerance = TOLERANCE[q.dtype]
    assert out.shape == expected.shape and out.dtype == q.dtype and torch.isfinite(out).all()
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, expected_lse, atol=tolerance, rtol=tolerance)
    alone, none = gather_decode.run(q, kv, selection, ctx, _backend=backend)
    assert none is None and torch.equal(alone, out)
    return out, lse


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """(backend, device), the choice being open to any device."""
    monkeypatch.setattr(gather_decode, "no_cuda_lists", lambda call: None)
    return request.param


EVERYTHING = {"columns": 9, "sink": 5, "window": 11}


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["fp32", "half"])
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("short", [0, 9], ids=["full", "padded"])
@pytest.mark.parametrize("slots", [1, 77, 150])
def test_matches_naive(form, slots, short, softcap, dtype):
    q, kv, ctx = problem(slots, dtype=dtype, short=min(short, slots - 1), device=form[1])
    ctx.softcap = softcap
    check(form[0], q, kv, lists(q, kv, **EVERYTHING), ctx)


PARTS = [
    {"width": 0, "sink": 4, "window": 7, "columns": 3}, {"width": 0, "columns": 8}, {"columns": 8}, {},
    {"counts": False}, {"sink": 3}, {"window": 7}, {"window": 200}, {"sink": 200}, {"sink": 60, "window": 60},
    {"one_batch": True, "columns": 8},
]  # fmt: skip


@pytest.mark.parametrize("layer", [problem, holed], ids=["whole", "holed"])
@pytest.mark.parametrize("more", PARTS, ids=lambda m: "+".join(m) or "pages")
def test_every_part_alone(form, more, layer):
    q, kv, ctx = layer(83, device=form[1])
    check(form[0], q, kv, lists(q, kv, **more), ctx)


@pytest.mark.parametrize("heads", ["1", "Hkv", "Hq"])
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("layer", [problem, holed], ids=["padded", "holed"])
def test_grouped_heads(form, layer, group, heads):
    q, kv, ctx = layer(71, group=group, short=5, device=form[1])
    check(form[0], q, kv, lists(q, kv, heads=heads, **EVERYTHING), ctx)


def test_lists_of_kv_heads_beside_columns_of_query_heads(form):
    q, kv, ctx = problem(71, device=form[1])
    pages, columns = lists(q, kv, heads="Hkv"), lists(q, kv, columns=8).columns
    check(form[0], q, kv, Selection(pages.index, pages.count, 2, columns=columns, window=5), ctx)
    check(form[0], q, kv, replace(pages, count=lists(q, kv, heads="1").count[:, :1]), ctx)


@pytest.mark.parametrize("page", [1, 2, 7, 16, 64])
def test_pages(form, page):
    q, kv, ctx = problem(230, device=form[1], short=31)
    check(form[0], q, kv, lists(q, kv, page=page, width=5, **EVERYTHING), ctx)


@pytest.mark.parametrize(("dim", "dtype"), [(96, torch.float32), (128, HALF), (256, HALF), (64, torch.float32)])
def test_long_odd_lengths_in_many_splits(form, dim, dtype):
    q, kv, ctx = problem(1501, dim=dim, dtype=dtype, kv_heads=1, group=2, batch=1, device=form[1])
    check(form[0], q, kv, lists(q, kv, width=500, heads="1", counts=False, columns=300, sink=16, window=64), ctx)


def test_more_heads_than_a_tile_has_rows(form):
    q, kv, ctx = problem(90, kv_heads=1, group=20, device=form[1])
    check(form[0], q, kv, lists(q, kv, heads="1", **EVERYTHING), ctx)


def test_a_key_named_many_times_counts_once(form):
    q, kv, ctx = problem(40, device=form[1])
    index = torch.tensor([0, 0, 3, 3, 3, 9, 19, 19], dtype=torch.int32, device=form[1]).expand(2, 8, 1, 8)
    columns = torch.tensor([7, 7, -1, 0, 1, 30, 38, 30], dtype=torch.int32, device=form[1]).expand(1, 1, 8)
    check(form[0], q, kv, Selection(index, page=2, columns=columns, sink=2, window=4), ctx)
    count = torch.full((2, 8, 1), 5, device=form[1])
    check(form[0], q, kv, Selection(index, count, 2, columns=columns), ctx)


def test_columns_that_promise_to_be_distinct(form):
    q, kv, ctx = problem(60, short=4, device=form[1])
    columns = torch.tensor([50, 3, -1, 20, 57, 41, 4], dtype=torch.int32, device=form[1]).expand(2, 2, 7)
    check(form[0], q, kv, Selection(columns=columns, distinct=True, window=4), ctx)
    index = torch.tensor([1, 6, 15], dtype=torch.int32, device=form[1]).expand(1, 1, 1, 3)
    check(form[0], q, kv, Selection(index, page=2, columns=columns, distinct=True, sink=4), ctx)


@pytest.mark.parametrize("layer", [problem, holed], ids=["whole", "holed"])
def test_rows_without_keys_give_zeros(form, layer):
    q, kv, ctx = layer(40, device=form[1])
    selection = lists(q, kv, heads="1", columns=3)
    none = replace(selection, count=torch.zeros_like(selection.count), columns=torch.full_like(selection.columns, -1))
    out, lse = check(form[0], q, kv, none, ctx)
    assert (out == 0).all() and (lse == float("-inf")).all()
    ctx.q_pos = torch.tensor([[-1], [30]], device=form[1])  # row 0 has no token in this step
    kv.holes = True
    out, lse = check(form[0], q, kv, lists(q, kv, counts=False, **EVERYTHING), ctx)
    assert (out[0] == 0).all() and (lse[0] == float("-inf")).all() and torch.isfinite(lse[1]).all()


@pytest.mark.parametrize("parts", [
    {"width": 0, "columns": 9}, {"columns": 9}, {"counts": False}, {"width": 0, "columns": 9, "window": 5, "sink": 2},
    {"heads": "1", "columns": 9, "page": 7},
], ids=lambda p: "+".join(p))  # fmt: skip
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("short", [0, 9], ids=["full", "padded"])
def test_rows_that_attend_everything(form, short, softcap, parts):
    """And what they leave: the logits, and the log-sum-exp of the parts, for the votes of the same query."""
    q, kv, ctx = problem(150, batch=3, short=short, device=form[1])
    ctx.softcap = softcap
    for row in (0, 2):
        only, left = torch.arange(3, device=form[1]) != row, {}
        selection = replace(lists(q, kv, **{"heads": "Hkv", **parts}), only=only, leave=left)
        check(form[0], q, kv, selection, ctx)
        assert set(left) == ({"logits", "lse"} if form[0] == "triton" else set())
        given = {"end": ctx.q_pos[:, 0], "late": -1, "scaling": ctx.scaling, "softcap": softcap, "heads": 2}
        for reduce in ("max", "mean"):
            wanted = votes.run(q, kv.k, **given, reduce=reduce, _backend="torch")
            found = votes.run(q, kv.k, **given, reduce=reduce, skip=only, known=left, _backend=form[0])
            torch.testing.assert_close(found[row], wanted[row], atol=1e-5, rtol=1e-5)
    whole = replace(selection, only=torch.zeros(3, dtype=torch.bool, device=form[1]))
    out, _ = check(form[0], q, kv, whole, ctx)
    torch.testing.assert_close(out, naive.run(q, kv, Selection(), ctx)[0], atol=1e-4, rtol=1e-4)


def test_rows_that_attend_everything_between_holes(form):
    q, kv, ctx = holed(83, device=form[1])
    only = torch.tensor([False, True], device=form[1])
    check(form[0], q, kv, replace(lists(q, kv, columns=9, sink=3), only=only), ctx)
    ctx.q_pos = torch.tensor([[-1], [30]], device=form[1])
    check(form[0], q, kv, replace(lists(q, kv, columns=9, window=3), only=only), ctx)


def test_a_window_of_the_model(form):
    for layer in (problem, holed):
        q, kv, ctx = layer(70, device=form[1])
        ctx.window = 40
        check(form[0], q, kv, lists(q, kv, **{**EVERYTHING, "sink": 30}), ctx)


def test_positions_need_not_exist_where_slots_say_it_all(form):
    q, kv, ctx = problem(70, device=form[1])
    selection = lists(q, kv, **EVERYTHING)
    expected = naive.run(q, kv, selection, ctx)[0]
    kv.pos = ctx.q_pos = None
    out = gather_decode.run(q, kv, selection, ctx, _backend=form[0])[0]
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_strides(form):
    q, kv, ctx = problem(70, device=form[1])
    selection = lists(q, kv, **EVERYTHING)
    expected = check(form[0], q, kv, selection, ctx)[0]
    kv.k, kv.v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (kv.k, kv.v))
    wide = torch.randn(2, 2, 70, 64, device=form[1])
    wide[..., ::2] = kv.v
    kv.v = wide[..., ::2]
    longer = torch.cat([selection.index, selection.index], -1)[..., : selection.index.shape[-1]]
    out, _ = check(form[0], q, kv, replace(selection, index=longer), ctx)
    torch.testing.assert_close(out, expected)


# ---- the choice and the refusals ----


def test_fp64_and_gradients_by_torch():
    q, kv, ctx = problem(70, dtype=torch.float64)
    check(None, q, kv, lists(q, kv, **EVERYTHING), ctx)


def test_choice_and_its_reason(monkeypatch):
    q, kv, ctx = problem(12)
    selection = lists(q, kv)
    assert dispatch.executor(selection, 1) == "gather_decode"
    assert gather_decode.choose(q, kv, selection, ctx) == (
        "torch", "not triton: needs CUDA capability >= 8, this is cpu"
    )  # fmt: skip
    assert dispatch.explain(q, kv, selection, ctx).startswith("gather_decode by torch (not triton: needs CUDA")
    monkeypatch.setenv("ATTNPATCH_BACKEND", "torch")
    assert gather_decode.choose(q, kv, selection, ctx) == ("torch", "forced")
    with pytest.raises(ConfigError, match="triton backend cannot do this call: needs CUDA"):
        gather_decode.run(q, kv, selection, ctx, _backend="triton")
    with pytest.raises(ConfigError, match="'nonsense' is not a backend of gather_decode; allowed: triton, torch"):
        gather_decode.run(q, kv, selection, ctx, _backend="nonsense")


@pytest.mark.parametrize(("change", "why"), [
    ({}, None), ({"dtype": torch.float32}, None), ({"capability": 7}, "this is capability 7"),
    ({"dtype": torch.float64}, "this is float64"), ({"dim": 512}, "this is 512"), ({"alike": False}, "one dtype"),
    ({"grad": True}, "backward"),
], ids=lambda x: "+".join(x) if isinstance(x, dict) else "")  # fmt: skip
def test_choice_on_cuda(change, why, monkeypatch):
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    plain = {"device": "cuda", "capability": 9, "dtype": torch.bfloat16, "dim": 128, "alike": True, "grad": False}
    name, reason = gather_decode._decide(backends.ListCall(**{**plain, **change}), None)
    assert name == ("torch" if why else "triton") and (why or "fastest") in reason


def test_refusals():
    q, kv, ctx = problem(40)
    with pytest.raises(InputError, match="one query per row, these are 2; use row_lists"):
        gather_decode.run(torch.cat([q, q], 2), kv, Selection(window=3), ctx)
    with pytest.raises(ConfigError, match="give a dense term to `dense`"):
        gather_decode.run(q, kv, Selection(), ctx)
    with pytest.raises(InputError, match="expected \\[1 or 2, 1, 2 or 8, ...\\]"):
        gather_decode.run(q, kv, Selection(torch.zeros(2, 3, 1, 1, dtype=torch.int32)), ctx)
    only = Selection(torch.zeros(2, 1, 1, 1, dtype=torch.int32), only=torch.ones(2, dtype=torch.bool))
    with pytest.raises(InputError, match="only goes with the lists of a decode step; row_lists knows no rows"):
        dispatch.run(torch.cat([q, q], 2), kv, only, ctx)
    ctx.mask = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    with pytest.raises(ConfigError, match="takes no 4-D mask"):
        gather_decode.run(q, kv, Selection(window=3), ctx)


def test_import_is_light():
    code = "import sys, attnpatch.executors.gather_decode; sys.exit(bool({'flash_attn', 'triton'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests above run the fused form")
def test_the_fused_form_in_tritons_interpreter():
    run_interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", __file__)
