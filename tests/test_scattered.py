"""scattered against naive: groups of rows in any order, each with its own keys and weights.

The torch form, and the fused one on CUDA or in Triton's interpreter.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from interpreter import DEVICE, FORMS, HALF, INTERPRETED, mend_interpreter, needs_triton, run_interpreted
from test_row_lists import TOLERANCE, problem

from attnpatch.decisions import Selection
from attnpatch.errors import ConfigError, InputError
from attnpatch.executors import backends, column_sums, dispatch, naive, scattered

if INTERPRETED:
    mend_interpreter()
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(HALF, id="half")]


def groups(q, kv, size=17, width=20, heads=None, rows=None, weighted=True, seed=3):
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


def to(x, device):
    """The object with its tensors on a device."""
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in vars(x).items()}
    return replace(x, **moved) if isinstance(x, Selection) else SimpleNamespace(**moved)


def attend(form, q, kv, selection, ctx, want_lse=False):
    """What `form` computes on its device, brought back."""
    name, device = form
    if name == "torch":
        return dispatch.run(q, kv, selection, ctx, want_lse)
    from attnpatch.executors._scattered_triton import launch

    first, stop, _ = (selection.rows or slice(None)).indices(q.shape[2])
    given = q.to(device), to(kv, device), to(selection, device), to(ctx, device)
    out, lse = launch(*given, (first, stop), want_lse)
    return out.cpu(), None if lse is None else lse.cpu()


def check(form, q, kv, selection, ctx):
    out, lse = attend(form, q, kv, selection, ctx, want_lse=True)
    expected, expected_lse = naive.run(q, kv, selection, ctx, want_lse=True)
    rows, tolerance = selection.rows or slice(None), TOLERANCE[q.dtype]
    assert out.dtype == q.dtype and torch.isfinite(out).all() and (lse == float("-inf")).any()
    torch.testing.assert_close(out, expected[:, rows], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, expected_lse[:, :, rows], atol=tolerance, rtol=tolerance)
    alone, none = attend(form, q, kv, selection, ctx)
    assert none is None and torch.equal(alone, out)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("short", [0, 9], ids=["full", "padded"])
@pytest.mark.parametrize(("rows", "slots"), [(61, 61), (40, 83), (1, 77)], ids=str)
def test_matches_naive(rows, slots, short, softcap, dtype, form):
    q, kv, ctx = problem(rows, slots, group=2, dtype=dtype, short=short)
    ctx.softcap = softcap
    selection = groups(q, kv)
    if rows == 1:
        selection = replace(selection, groups=torch.zeros_like(selection.groups).where(selection.groups >= 0, -1))
        selection.groups[:, :, :, 1:], selection.groups[0, 0] = -1, -1
    check(form, q, kv, selection, ctx)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("heads", [1, 2, None], ids=["one", "Hkv", "Hq"])
@pytest.mark.parametrize("group", [1, 4, 8], ids=["mha", "group4", "group8"])
def test_grouped_heads(group, heads, form):
    q, kv, ctx = problem(40, 71, group=group, short=3)
    check(form, q, kv, groups(q, kv, heads=heads, weighted=group != 4), ctx)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [slice(0, 16), slice(5, 40), slice(32, None)], ids=str)
def test_rows_of_a_term(rows, form):
    q, kv, ctx = problem(50, 90, group=2, short=9)
    check(form, q, kv, groups(q, kv, rows=rows), ctx)


@pytest.mark.parametrize("form", FORMS)
def test_one_group_at_a_time_and_the_models_window(form, monkeypatch):
    monkeypatch.setattr(column_sums, "MAX_BLOCK", 1)
    q, kv, ctx = problem(50, 90, short=9)
    ctx.window = 30
    check(form, q, kv, groups(q, kv), ctx)
    ctx.window = None
    kv.pos = kv.pos.expand(-1, 2, -1)  # positions by kv head, as after an eviction
    check(form, q, kv, groups(q, kv), ctx)


def test_repeats_of_weight_minus_infinity_do_not_count():
    q, kv, ctx = problem(20, 20)
    one = groups(q, kv, width=6)
    weight = torch.cat([one.weight, torch.full_like(one.weight, float("-inf"))], -1)
    twice = Selection(index=torch.cat([one.index, one.index], -1), groups=one.groups, weight=weight)
    torch.testing.assert_close(dispatch.run(q, kv, twice, ctx)[0], dispatch.run(q, kv, one, ctx)[0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dim", [16, 80, 128, 256])
def test_head_sizes_and_large_groups(dim, form):
    q, kv, ctx = problem(150, 150, dim=dim, kv_heads=1, group=2, short=9, dtype=HALF)
    check(form, q, kv, groups(q, kv, size=140, width=100), ctx)


@pytest.mark.parametrize("form", FORMS)
def test_slots_without_positions_and_one_batch_row_of_lists(form):
    q, kv, ctx = problem(40, 71, group=2)
    one = groups(q, kv)
    one = replace(one, index=one.index[:1], groups=one.groups[:1], weight=one.weight[:1])
    check(form, q, kv, one, ctx)
    kv.complete = False
    kv.pos, ctx.q_pos = kv.pos * 3, ctx.q_pos * 3 + 1  # as after an eviction
    check(form, q, kv, one, ctx)
    kv.pos = ctx.q_pos = None
    place = torch.arange(71)[None, None]
    named = SimpleNamespace(
        q_pos=place[0, :, 31:].expand(2, -1), scaling=ctx.scaling, softcap=None, window=None, mask=None
    )
    other = SimpleNamespace(k=kv.k, v=kv.v, pos=place.expand(2, 1, -1), holes=False)
    got, expected = attend(form, q, kv, one, ctx)[0], naive.run(q, other, one, named)[0]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_strides(form):
    q, kv, ctx = problem(40, 71, group=2)
    one = groups(q, kv)
    expected = attend(form, q, kv, one, ctx)[0]
    kv.k, kv.v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (kv.k, kv.v))
    assert torch.equal(attend(form, q.transpose(2, 3).contiguous().transpose(2, 3), kv, one, ctx)[0], expected)
    one = replace(one, **{n: getattr(one, n).transpose(2, 3).contiguous().transpose(2, 3) for n in ("index", "weight")})
    assert torch.equal(attend(form, q, kv, one, ctx)[0], expected)


def test_what_does_not_fit_is_refused():
    q, kv, ctx = problem(20, 20)
    good = groups(q, kv)
    assert dispatch.explain(q, kv, good, ctx).startswith("scattered by torch (the fastest that fits; not triton: ")
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


# ---- the choice ----


def test_the_choice(monkeypatch):
    q, kv, ctx = problem(20, 20, dtype=torch.bfloat16)
    one = groups(q, kv)
    monkeypatch.setenv("ATTNPATCH_BACKEND", "triton")
    with pytest.raises(ConfigError, match="ATTNPATCH_BACKEND=triton cannot do this call: needs CUDA capability >= 8"):
        scattered.run(q, kv, one, ctx)
    monkeypatch.setenv("ATTNPATCH_BACKEND", "flex")
    assert "ATTNPATCH_BACKEND=flex belongs to another executor" in scattered.choose(q, kv, one, ctx)[1]
    monkeypatch.delenv("ATTNPATCH_BACKEND")
    call = backends.ListCall.of(q, kv)._replace(device="cuda", capability=9)
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    monkeypatch.setattr(backends.ListCall, "of", lambda *_: call)
    assert scattered.choose(q, kv, one, ctx) == ("triton", "the fastest that fits")
    for change, why in (
        ({"dim": 320}, "head dimension up to 256"),
        ({"alike": False}, "one dtype"),
        ({"grad": True}, "no backward pass"),
        ({"dtype": torch.float64}, "this is float64"),
    ):
        monkeypatch.setattr(backends.ListCall, "of", lambda *_, change=change: call._replace(**change))
        name, reason = scattered.choose(q, kv, one, ctx)
        assert name == "torch" and why in reason


def test_import_is_light():
    code = "import sys, attnpatch.executors.scattered; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@needs_triton
@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the fused form runs here itself")
def test_the_fused_form_in_tritons_interpreter():
    run_interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", __file__)
