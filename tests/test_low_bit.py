"""`low_bit.pages_above` against the naive reference: the torch form, and the fused one on CUDA or interpreted."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from attnpatch.patches.sale import SALE
from interpreter import DEVICE, FORMS, INTERPRETED, mend_interpreter, needs_triton, run_interpreted
from selections import layer, structured

from attnpatch.engine.terms import each_term
from attnpatch.errors import ConfigError
from attnpatch.executors import backends, column_sums, low_bit, naive

if INTERPRETED:
    mend_interpreter()
INF = float("inf")
NUMBERS = [torch.int8, torch.float16 if INTERPRETED else torch.bfloat16]
SETTINGS = [{}, {"BLOCK_M": 64, "BLOCK_N": 32}, {"BLOCK_M": 16, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2}]


def problem(rows, keys, *, bits=4, kinds=(None, None), start=0, group=2, kv_heads=2, dim=32, batch=1, dtype=None):
    """q, k, bias, limit: a part of the pages has an estimate above; garbage lies behind the keys' pages."""
    g = torch.Generator().manual_seed(rows + keys)
    heads = group * kv_heads
    q = torch.randn(batch, heads, rows, dim, generator=g).to(dtype or torch.float32)
    k = torch.randn(batch, kv_heads, keys, dim, generator=g).to(dtype or torch.float32)
    bias = torch.randn(batch, heads, keys, generator=g)
    limit = torch.randn(batch, heads, rows, generator=g) + 3.3 * dim**0.5
    q, k = low_bit.quantise(q, bits, kind=kinds[0], start=start), low_bit.quantise(k, bits, kind=kinds[1])
    values = torch.cat([k.values, torch.full_like(k.values[:, :, :64], 127)], 2)
    scale, bias = (torch.cat([x, torch.full_like(x[..., :64], float("nan"))], 2) for x in (k.scale, bias))
    return q, low_bit.Low(values[:, :, :keys], scale[..., :keys]), bias[..., :keys], limit


def moved(low, device):
    """On another device; slices of one buffer stay that."""
    return low_bit.Low(low.values.to(device), low.scale.to(device))


def above(form, given, run=low_bit.pages_above, **more):
    name, device = form
    q, k, bias, limit = given
    more = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in more.items()}
    given = (moved(q, device), moved(k, device), bias.to(device), limit.to(device))
    return run(*given, **{"start": 0, "page": 32, "block": 64, **more}, _backend=name).cpu()


def check(form, given, **more):
    """Equal to the reference, but for estimates within a rounding of the limit."""
    got, more = above(form, given, **more), {"start": 0, "page": 32, "block": 64, **more}
    q, k, bias, limit = given
    few, many = (naive.pages_above(q, k, bias, limit + sign * 1e-5, **more) for sign in (1, -1))
    assert got.dtype == torch.bool and got.shape == few.shape
    assert (few <= got).all() and (got <= many).all()
    assert torch.equal(few, many), "the problem leaves nothing open"
    return got


# ---- against the reference ----


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kinds", [(None, None), ("query", "key")], ids=["token", "thread"])
@pytest.mark.parametrize("start", [0, 37, 64])
@pytest.mark.parametrize("form", FORMS)
def test_matches_naive(form, start, kinds, bits):
    got = check(form, problem(131, 224, bits=bits, kinds=kinds, start=start, batch=2), start=start)
    assert 0 < got.float().mean() < 1


@pytest.mark.parametrize(("group", "kv_heads"), [(1, 3), (4, 2), (8, 1)], ids=["mha", "group4", "group8"])
@pytest.mark.parametrize("form", FORMS)
def test_grouped_heads(form, group, kv_heads):
    check(form, problem(97, 128, group=group, kv_heads=kv_heads, batch=2))


@pytest.mark.parametrize("dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("form", FORMS)
def test_head_sizes(form, dim):
    check(form, problem(70, 96, dim=dim, bits=8, group=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_what_was_quantised_had_any_dtype(form, dtype):
    given = problem(70, 96, dtype=dtype)
    assert given[0].values.dtype == torch.int8 and given[0].scale.dtype == torch.float32
    check(form, given)


@pytest.mark.parametrize(("page", "block"), [(16, 32), (16, 128), (64, 32), (64, 64), (128, 64)])
@pytest.mark.parametrize("form", FORMS)
def test_sizes_of_blocks_and_pages(form, page, block):
    check(form, problem(150, 256, group=1), page=page, block=block, start=45)


@pytest.mark.parametrize("rows", [1, 5, 64, 128, 129])
@pytest.mark.parametrize("form", FORMS)
def test_few_rows_and_edges_of_tiles(form, rows):
    check(form, problem(rows, 320, group=1), start=200)
    assert not check(form, problem(rows, 32, group=1), start=0, begin=1).any()


@pytest.mark.parametrize("form", FORMS)
def test_pages_that_are_not_asked_for(form):
    given = problem(190, 320)
    until = torch.tensor([0, 1, 5, 3])
    got = check(form, given, start=100, begin=1, until=until)
    whole = above(form, given, start=100)
    at = torch.arange(10)
    assert torch.equal(got, whole & (at >= 1) & (at < until[:, None])) and got.any()
    assert not above(form, given, start=100, begin=4, until=until.clamp(max=4)).any()


@pytest.mark.parametrize("form", FORMS)
def test_limits_without_bound(form):
    q, k, bias, limit = problem(131, 160)
    at = torch.arange(5) * 32 < 64 * torch.arange(1, 4)[:, None]
    assert torch.equal(above(form, (q, k, bias, limit.fill_(-INF)))[0, 0], at)
    for nothing in (INF, float("nan")):
        assert not above(form, (q, k, bias, limit.fill_(nothing))).any()
    limit[:, 1, 70] = -INF  # one row of one block asks for everything
    got = above(form, (q, k, bias, limit))
    assert got[0, 1, 1].sum() == 4 and got.sum() == 4


@pytest.mark.parametrize("form", FORMS)
def test_strides(form):
    q, k, bias, limit = problem(70, 96, batch=2)
    expected = above(form, (q, k, bias, limit))
    turned = [low_bit.Low(x.values.transpose(1, 2).contiguous().transpose(1, 2), x.scale) for x in (q, k)]
    assert torch.equal(above(form, (*turned, bias, limit.transpose(0, 1).contiguous().transpose(0, 1))), expected)
    turned = [low_bit.Low(x.values.transpose(2, 3).contiguous().transpose(2, 3), x.scale) for x in (q, k)]
    scales = bias.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(above(form, (*turned, scales, limit)), expected)


@pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="needs a CUDA device, or Triton's interpreter")
@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=["default", "small", "wide"])
def test_triton_operands_and_tiles(settings, numbers):
    from attnpatch.executors._low_bit_triton import launch

    given = problem(150, 256, bits=8, group=4, kv_heads=1)
    q, k, bias, limit = given
    ends, expected = torch.tensor([2, 4, 5]).to(DEVICE), check(("torch", "cpu"), given, start=40)
    place = (moved(q, DEVICE), moved(k, DEVICE), bias.to(DEVICE), limit.to(DEVICE))
    got = launch(*place, ends, 40, 32, 64, 0, numbers=numbers, **settings).cpu()
    assert torch.equal(got, expected & (torch.arange(8) < ends.cpu()[:, None]))


@pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="needs a CUDA device, or Triton's interpreter")
@pytest.mark.parametrize("scales", ["token", "thread"])
@pytest.mark.parametrize("prefix", [0, 100])
def test_triton_chooses_what_sale_chooses_by_torch(prefix, scales, monkeypatch):
    lengths = [400, 301, 230] if not prefix else None
    q, kv, ctx = layer(*structured(400, 4, 2, batch=3), lengths=lengths, prefix=prefix)
    patch = SALE(tau=0.1, dense_up_to=250, scales=scales)

    def pages(form):
        monkeypatch.setattr(low_bit, "pages_above", lambda *a, _form=form, **more: above(_form, a, **more))
        found = []

        def compute(term):
            found.append(term)
            clean = q.masked_fill((ctx.q_pos < 0)[:, None, :, None], 0.0)
            out, lse = naive.run(clean, kv, term, ctx, want_lse=True)
            return out[:, term.rows], lse[:, :, term.rows]

        each_term(patch.select(q, kv, ctx), compute)
        return found

    expected = pages(("torch", "cpu"))
    for got, term in zip(pages(("triton", DEVICE)), expected, strict=True):
        assert torch.equal(got.count, term.count)
        there = torch.arange(got.index.shape[-1]) < got.count[..., None]
        assert torch.equal(got.index[there], term.index[there])
    assert expected[-1].count.any()


@pytest.mark.parametrize("most", [1, 2 * 4 * 64 * 50, 2**26])
def test_the_torch_form_is_bounded_and_the_same(most, monkeypatch):
    given = problem(300, 320, batch=2)
    monkeypatch.setattr(column_sums, "MAX_BLOCK", most)
    check(("torch", "cpu"), given, begin=1)


def test_fp64_stays_fp64():
    given = problem(70, 96, dtype=torch.float64)
    assert given[0].scale.dtype == torch.float64
    check(("torch", "cpu"), given)


# ---- the choice ----


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({}, None),
        ({"dim": 80, "page": 128}, None),
        ({"dim": 320}, "head dimension up to 256, this is 320"),
        ({"page": 48}, "needs pages of 16, 32, 64, 128 keys, these have 48"),
        ({"dtype": torch.float64}, "needs scales in float32, these are float64"),
        ({"values": torch.float32}, "needs values in int8"),
    ],
    ids=lambda x: "-".join(map(str, x)) if isinstance(x, dict) else "",
)
def test_the_choice_on_cuda(given, why, monkeypatch):
    monkeypatch.setattr(low_bit, "capability", lambda device: 9)
    monkeypatch.setattr(low_bit, "too_old", lambda device, found, needed: backends.too_old("cuda", found, needed))
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    low = low_bit.quantise(torch.ones(1, 2, 8, given.get("dim", 64), dtype=given.get("dtype", torch.bfloat16)), 4)
    low = low_bit.Low(low.values.to(given.get("values", torch.int8)), low.scale)
    name, reason = low_bit.choose(low, low, given.get("page", 32))
    assert (name == "triton" and why is None) or (name == "torch" and why in reason)
    monkeypatch.setattr(backends, "has_triton", lambda: False)
    assert low_bit.choose(low, low, given.get("page", 32))[1].startswith("not triton: ")


def test_a_backend_that_is_none_is_an_error():
    q, k, bias, limit = problem(9, 32)
    assert low_bit.choose(q, k, 32) == ("torch", "not triton: needs CUDA capability >= 8, this is cpu")
    with pytest.raises(ConfigError, match="pages above a limit by 'cuda': allowed are 'torch' and 'triton'"):
        low_bit.pages_above(q, k, bias, limit, start=0, page=32, block=64, _backend="cuda")


def test_import_is_light():
    code = "import sys, attnpatch.executors.low_bit; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@needs_triton
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the fused form runs here itself")
def test_the_fused_form_in_tritons_interpreter():
    run_interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", __file__)
