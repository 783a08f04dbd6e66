"""Pages and columns beside them as two forms added up: flash-attn-4 for pages, Triton for the columns outside them.

Stand-ins for either half here; the Triton half itself under its interpreter, in a process of its own.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from interpreter import mend_interpreter, needs_triton, run_interpreted
from oracle import tiny
from test_page_lists import cuda_call
from test_pages import DTYPES, RUN, check, choice, every, fake_fa4, problem  # noqa: F401

from attnpatch import PatchCache, patched, status
from attnpatch.decisions import Selection
from attnpatch.engine.compat import cache_name
from attnpatch.errors import ConfigError, VersionError
from attnpatch.executors import naive, pages, row_lists

NAME = "fa4+triton"


def columns(q, kv, heads, width=40, seed=3, batch=None):
    """Random columns: unsorted, some repeated, some unused, some in listed pages, some behind every row."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-2, kv.k.shape[2] + 1, (batch or q.shape[0], heads, width), generator=g).int()


def parts(by_pages, by_columns="torch"):
    """`pages._run_fa4_triton` with other halves."""
    return partial(pages._run_parts, by_pages=by_pages, by_columns=by_columns)


@pytest.fixture(params=[*RUN, "fa4"])
def run(request, fake_fa4):  # noqa: F811
    return parts(RUN.get(request.param, pages._run_fa4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("want_lse", [True, False], ids=["lse", "out"])
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize(("rows", "slots"), [(150, 150), (150, 333), (67, 129)], ids=["T150", "prefix183", "prefix62"])
def test_the_parts_are_the_whole(rows, slots, group, want_lse, dtype, run):
    q, kv, ctx = problem(rows, slots, group=group, batch=2, dtype=dtype)
    selection = choice(q, kv, page=64, bq=64, columns=columns(q, kv, q.shape[1]))
    check(q, kv, ctx, selection, run, want_lse)


@pytest.mark.parametrize("of_pages", [1, 2, 8])
@pytest.mark.parametrize("of_columns", [1, 2, 8])
def test_heads_that_share_pages_or_columns(of_columns, of_pages, run):
    q, kv, ctx = problem(130, 530, group=4, batch=2)
    for page, bq in ((64, 64), (64, 128), (128, 64)):
        selection = choice(q, kv, page=page, bq=bq, heads=of_pages, columns=columns(q, kv, of_columns))
        check(q, kv, ctx, selection, run)
        check(q, kv, ctx, every(selection, 2), run, want_lse=False)
        one = choice(q, kv, page=page, bq=bq, heads=of_pages, batch=1, columns=columns(q, kv, of_columns, batch=1))
        check(q, kv, ctx, one, run)


@pytest.mark.parametrize("slots", [256, 307], ids=["aligned", "prefix"])
@pytest.mark.parametrize("rows", [slice(0, 100), slice(64, 192), slice(13, 256), slice(250, None)], ids=str)
def test_stripes_of_rows(rows, slots, run):
    q, kv, ctx = problem(256, slots)
    selection = choice(q, kv, page=64, bq=64, rows=rows, columns=columns(q, kv, 4))
    expected, _ = check(q, kv, ctx, selection, run)
    end = slots - 256 + rows.indices(256)[1]
    kv.k[:, :, end:] = 1e4  # keys behind the stripe count for nothing
    torch.testing.assert_close(run(q, kv, selection, ctx, False)[0], expected)


def test_one_list_for_all_rows(run):
    q, kv, ctx = problem(150, 190)
    selection = choice(q, kv, page=64, bq=150, columns=columns(q, kv, 4))
    check(q, kv, ctx, replace(selection, bq=0), run)


def test_padded_rows_stand_as_if_alone(run):
    q, kv, ctx = problem(200, 200, batch=2, lengths=(200, 77))
    selection = choice(q, kv, page=64, bq=64, columns=columns(q, kv, 4))
    out, _ = check(q, kv, ctx, selection, run)
    held = SimpleNamespace(k=kv.k[1:, :, :77], v=kv.v[1:, :, :77], pos=None, holes=False)
    more = {name: getattr(selection, name)[1:, :, :2] for name in ("index", "count")}
    own = replace(selection, **more, columns=selection.columns[1:])
    alone = SimpleNamespace(**{**vars(ctx), "q_pos": None})
    torch.testing.assert_close(out[1:, :77], run(q[1:, :, :77], held, own, alone, False)[0])


def test_rows_that_one_half_or_neither_reaches(run):
    q, kv, ctx = problem(192, 192)
    index = torch.tensor([[0, 1], [0, 1], [1, 2]], dtype=torch.int32).expand(1, 4, 3, 2)
    count = torch.tensor([0, 0, 1], dtype=torch.int32).expand(1, 4, 3)
    held = torch.tensor([70, 75, 75, 150, -1], dtype=torch.int32).expand(1, 4, 5)  # 70 and 75 lie in the third's page
    selection = Selection(index=index, count=count, page=64, bq=64, columns=held)
    out, lse = check(q, kv, ctx, selection, run)
    assert (out[:, :70] == 0).all() and (lse[:, :, :70] == float("-inf")).all(), "neither half"
    assert torch.isfinite(lse[:, :, 70:]).all()
    torch.testing.assert_close(out[0, 70, 0], kv.v[0, 0, 70])  # the columns alone
    pages_only, _ = RUN["torch"](q, kv, replace(selection, columns=None), ctx, False)
    torch.testing.assert_close(out[:, 128:150], pages_only[:, 128:150])  # the pages alone


def test_columns_that_are_promised_to_lie_outside(run):
    q, kv, ctx = problem(128, 128)
    index = torch.tensor([[0], [1]], dtype=torch.int32).expand(1, 1, 2, 1)
    selection = Selection(index=index, page=64, bq=64, columns=torch.tensor([[[-1]]]).int(), distinct=True)
    check(q, kv, ctx, selection, run)
    held = torch.tensor([64, 65, 99, -1], dtype=torch.int32).view(1, 1, 4)
    first = Selection(index=index[:, :, :1], page=64, columns=held, distinct=True)
    check(q, kv, ctx, first, run)


def test_the_marks_wait_for_no_device(monkeypatch):
    """The columns' half on tensors without values."""
    q, kv, _ = problem(150, 333)
    selection = choice(q, kv, page=64, bq=64, columns=columns(q, kv, 4))
    meta = replace(selection, **{n: getattr(selection, n).to("meta") for n in ("index", "count", "columns")})
    seen = []
    monkeypatch.setitem(row_lists._RUN, "triton", lambda *given: seen.append(given) or (None, None))
    row_lists.run_outside(q, kv, meta, None)
    ((_, _, _, _, want_lse, lists),) = seen
    assert want_lse and lists.index is None and lists.count is None
    assert lists.columns.shape == (1, 4, 40) and lists.repeated.shape == (1, 4, 3, 40)


# ---- the choice ----


@pytest.fixture
def usable(monkeypatch, fake_fa4):  # noqa: F811
    """Here, both halves by stand-ins, for whatever has columns beside pages."""
    monkeypatch.setitem(pages._WHY_NOT, NAME, lambda c: None if c.columns and c.page else "not this one")
    monkeypatch.setitem(row_lists._RUN, "triton", row_lists._run_torch)
    monkeypatch.setattr(pages, "_chosen", {})


def test_it_is_taken_where_it_fits(usable):
    q, kv, ctx = problem(150, 333)
    selection = choice(q, kv, page=64, bq=64, columns=columns(q, kv, 4))
    assert pages.choose(q, kv, selection, ctx)[0] == NAME
    check(q, kv, ctx, selection, pages.run)
    assert pages.choose(q, kv, replace(selection, columns=None), ctx)[0] == "torch"


def test_a_method_with_columns_runs_by_it_and_says_so(usable):
    ids = torch.randint(1, 97, (1, 333), generator=torch.Generator().manual_seed(0))

    def logits():
        with patched(tiny("llama"), "minference", vertical=60, slash=100) as model, torch.no_grad():
            cache = PatchCache(model)
            found = model(input_ids=ids, **{cache_name(): cache}).logits
            return found, {layer.backend for layer in status(model).layers}

    got, said = logits()
    assert all(x.startswith("pages by fa4+triton (the fastest that fits; not fa4: ") for x in said)
    pages._WHY_NOT[NAME] = lambda c: "not asked for"
    pages._chosen.clear()
    expected, said = logits()
    assert all(x.startswith("pages by torch") for x in said)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"columns": False}, "needs columns beside the pages"),
        ({"near": True, "columns": False}, "takes no sink or window beside the pages"),
        ({"near": True}, "takes no sink or window beside the pages"),
        ({"holes": True}, "cannot skip empty slots"),
        ({"mask": True}, "takes no 4-D mask"),
        ({"softcap": True}, "no soft-capping or sliding-window layers"),
        ({"window": True}, "no soft-capping or sliding-window layers"),
        ({"page": 32}, "needs pages of 64 or 128 keys, these have 32"),
        ({"bq": 96}, "needs query blocks of a multiple of 64 rows, these have 96"),
        ({"page": 0}, "needs lists of pages"),
        ({"dim": 80}, "needs a head dimension of 64, 96 or 128, this is 80"),
        ({"capability": 8}, "needs CUDA capability >= 9, this is capability 8"),
        ({"dtype": torch.float32}, "needs float16 or bfloat16, this is float32"),
    ],
    ids=lambda x: "+".join(x) if isinstance(x, dict) else "",
)
def test_it_refuses_what_either_half_refuses(change, why, monkeypatch):
    monkeypatch.setattr(pages, "fa4", lambda: object())
    monkeypatch.setattr(row_lists, "has_triton", lambda: True)
    monkeypatch.setattr(pages, "_chosen", {})
    with pytest.raises(ConfigError, match=f"=fa4.triton cannot do this call: {why}"):
        pages._decide(cuda_call(**{"columns": True, **change}), NAME)


@pytest.mark.parametrize(("change", "why"), [
    ({"aligned": False}, "needs slots that equal positions"), ({"grad": True}, "has no backward pass"),
], ids=["evicted", "grad"])  # fmt: skip
def test_it_refuses_what_the_columns_half_refuses(change, why, monkeypatch):
    monkeypatch.setattr(pages, "fa4", lambda: object())
    monkeypatch.setattr(row_lists, "has_triton", lambda: True)
    monkeypatch.setattr(pages, "_chosen", {})
    call = cuda_call(columns=True)
    assert pages._decide(call, NAME) == (NAME, "forced by ATTNPATCH_BACKEND")
    with pytest.raises(ConfigError, match=why):
        pages._decide(call._replace(fine=call.fine._replace(**change)), NAME)


@pytest.mark.parametrize("missing", ["fa4", "triton"])
def test_without_one_of_the_packages(missing, monkeypatch):
    monkeypatch.setattr(pages, "fa4", lambda: None if missing == "fa4" else object())
    monkeypatch.setattr(row_lists, "has_triton", lambda: missing != "triton")
    monkeypatch.setattr(pages, "_chosen", {})
    with pytest.raises(VersionError, match=f"=fa4.triton cannot do this call: .*{missing[0]}.* is not installed"):
        pages._decide(cuda_call(columns=True), NAME)


def test_forced_on_a_cpu(monkeypatch):
    q, kv, ctx = problem(64, 64)
    monkeypatch.setenv("ATTNPATCH_BACKEND", NAME)
    selection = choice(q, kv, page=64, bq=64, columns=columns(q, kv, 4))
    with pytest.raises(ConfigError, match="needs CUDA capability >= 9, this is cpu"):
        pages.run(q, kv, selection, ctx)
    with (
        patched(tiny("llama"), "minference") as model,
        pytest.raises(ConfigError, match="cannot serve this model: needs CUDA capability >= 9, this is cpu"),
    ):
        model(input_ids=torch.ones(1, 9, dtype=torch.long))
    name, reason = row_lists.choose(q, kv, selection, ctx)
    assert name == "torch" and "fa4+triton belongs to another executor" in reason


@pytest.mark.parametrize("forced", [False, True], ids=["", "forced"])
def test_it_is_listed_as_what_it_is_for(forced, monkeypatch):
    listed = {name: (usable, why) for name, usable, why in pages.backends(torch.device("cpu"), forced=forced)}
    assert listed[NAME] == (False, "needs CUDA capability >= 9, this is cpu")
    monkeypatch.setattr(pages, "fa4", lambda: object())
    monkeypatch.setattr(row_lists, "has_triton", lambda: True)
    for module in (pages, row_lists):
        monkeypatch.setattr(module, "capability", lambda device: 9)
    listed = pages.backends(SimpleNamespace(type="cuda"), forced=forced)
    assert [name for name, usable, _ in listed if usable] == ["fa4", NAME, "flex", "triton", "torch"]


# ---- both halves themselves; the Triton half, interpreted ----


def usable_here():
    with warnings.catch_warnings():  # of what flash-attn-4 imports
        warnings.simplefilter("ignore")
        return torch.cuda.is_available() and dict((n, u) for n, u, _ in pages.backends())[NAME]


@pytest.mark.skipif(not usable_here(), reason="needs a GPU of capability 9 or more, flash-attn-4 and triton")
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize(("rows", "slots"), [(1000, 1000), (301, 1333)], ids=["T1000", "prefix1032"])
def test_both_halves_on_a_gpu(rows, slots, group):
    q, kv, ctx = problem(rows, slots, group=group, batch=2, dim=128, dtype=torch.bfloat16)
    block = 64 if torch.cuda.get_device_capability()[0] == 9 else 256
    selection = choice(q, kv, page=min(block, 128), bq=block, columns=columns(q, kv, q.shape[1], width=200))
    for given in (selection, replace(selection, count=selection.count * 0)):  # and without any page
        expected, expected_lse = naive.run(q, kv, given, ctx, want_lse=True)
        there = replace(given, **{n: getattr(given, n).cuda() for n in ("index", "count", "columns")})
        held = SimpleNamespace(k=kv.k.cuda(), v=kv.v.cuda(), pos=kv.pos.cuda(), holes=False, complete=True)
        context = SimpleNamespace(**{**vars(ctx), "q_pos": ctx.q_pos.cuda()})
        with torch.no_grad():
            assert pages.choose(q.cuda(), held, there, context)[0] == NAME
            out, lse = pages.run(q.cuda(), held, there, context, want_lse=True)
            assert torch.equal(pages.run(q.cuda(), held, there, context)[0], out)
        torch.testing.assert_close(out.cpu(), expected, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(lse.cpu(), expected_lse, atol=1e-2, rtol=1e-3)


def interpreted():
    """Runs in a process of its own: the interpreter must be asked for before triton is imported."""
    mend_interpreter()
    for by_pages in RUN.values():
        for dtype in (torch.float32, torch.float16):  # the interpreter multiplies bfloat16 as integers
            for rows, slots, group, of_pages, of_columns, stripe in [
                (67, 129, 4, 8, 8, None), (70, 70, 1, 1, 2, None), (130, 150, 8, 2, 1, slice(13, 120)),
            ]:  # fmt: skip
                q, kv, ctx = problem(rows, slots, group=group, dtype=dtype)
                given = columns(q, kv, of_columns, width=70)
                selection = choice(q, kv, page=64, bq=64, heads=of_pages, rows=stripe, columns=given)
                compared(q, kv, ctx, selection, parts(by_pages, "triton"))
    q, kv, ctx = problem(100, 100, batch=2, lengths=(100, 33))
    selection = choice(q, kv, page=64, bq=64, columns=columns(q, kv, 4))
    compared(q, kv, ctx, replace(selection, count=selection.count * 0), parts(RUN["torch"], "triton"))
    compared(q, kv, ctx, selection, parts(RUN["torch"], "triton"))


def compared(q, kv, ctx, selection, run):
    if q.dtype == torch.float32:
        check(q, kv, ctx, selection, run)
        return
    out, lse = run(q, kv, selection, ctx, True)
    expected = check(q.float(), SimpleNamespace(**{**vars(kv), "k": kv.k.float(), "v": kv.v.float()}), ctx, selection,
                     parts(RUN["torch"]))  # fmt: skip
    torch.testing.assert_close((out.float(), lse), expected, atol=5e-3, rtol=5e-3)


@needs_triton
def test_the_triton_half_under_the_interpreter():
    run_interpreted(__file__)


if __name__ == "__main__":
    interpreted()
