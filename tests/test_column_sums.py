"""`column_sums` against the naive reference: the torch form, and the fused one on CUDA or in Triton's interpreter."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from interpreter import FORMS, HALF, INTERPRETED, mend_interpreter, needs_triton, run_interpreted

from attnpatch.decisions import Selection
from attnpatch.errors import ConfigError
from attnpatch.executors import backends, column_sums, naive

if INTERPRETED:
    mend_interpreter()
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(HALF, id="half")]
SHAPES = [(130, 130), (67, 301), (5, 140)]  # whole prompt, behind a prefix, few rows
SHAPE_IDS = [f"T{t}-S{s}" for t, s in SHAPES]


def problem(rows, slots, *, group=2, kv_heads=2, dim=16, dtype=torch.float32, empty="none", softcap=None, size=1.0):
    """queries, kv and keywords of two batch rows. empty: none | row (padding behind row 0) | head (holes by head too).

    Empty slots and padding rows hold NaN, and so does the log-sum-exp of padding rows.
    """
    g = torch.Generator().manual_seed(0)
    q = size * torch.randn(2, kv_heads * group, rows, dim, generator=g).to(dtype)
    k = torch.randn(2, kv_heads, slots, dim, generator=g).to(dtype)
    pos = torch.arange(slots, dtype=torch.int32).expand(2, 1, -1).clone()
    if empty != "none":
        pos[0, :, slots - rows // 3 :] = -1
    q_pos = pos[:, 0, slots - rows :].long()
    if empty == "head":
        pos = pos.repeat(1, kv_heads, 1)
        pos[torch.rand(pos.shape, generator=g) < 0.3] = -1
        pos[:, :, : slots - rows] = pos[:, :, : slots - rows].flip(-1)  # the past in any order
    kv = SimpleNamespace(k=k, v=k.nan_to_num(), pos=pos, holes=empty == "head")
    given = {"q_pos": q_pos, "scaling": dim**-0.5, "softcap": softcap}
    k.masked_fill_((pos < 0)[..., None], float("nan"))
    q.masked_fill_((q_pos < 0)[:, None, :, None], float("nan"))
    ctx = SimpleNamespace(**given, window=None, mask=None)
    lse = naive.run(q, kv, Selection(), ctx, want_lse=True)[1]
    return q, kv, {**given, "lse": lse.masked_fill((q_pos < 0)[:, None], float("nan"))}


def sums(form, q, kv, given):
    """What `form` computes on its device, brought back."""
    name, device = form
    kv = SimpleNamespace(**{n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in vars(kv).items()})
    given = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in given.items()}
    return column_sums.run(q.to(device), kv, **given, _backend=name).cpu()


def check(form, q, kv, given):
    got = sums(form, q, kv, given)
    assert got.dtype == torch.float32 and got.shape == (2, q.shape[1], kv.k.shape[2])
    expected = naive.column_sums(q, kv, **given)
    # the product of halves is exact in fp32; only the order of sums differs
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
    held = kv.pos.expand(-1, kv.k.shape[1], -1).repeat_interleave(q.shape[1] // kv.k.shape[1], dim=1) >= 0
    assert (got[~held] == 0).all()
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("empty", ["none", "row", "head"])
@pytest.mark.parametrize(("rows", "slots"), SHAPES, ids=SHAPE_IDS)
@pytest.mark.parametrize("form", FORMS)
def test_matches_naive(form, rows, slots, empty, dtype):
    check(form, *problem(rows, slots, empty=empty, dtype=dtype))


@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize("form", FORMS)
def test_grouped_heads(form, group):
    check(form, *problem(70, 99, group=group, kv_heads=2 if group == 8 else 3, empty="head", dtype=HALF))


@pytest.mark.parametrize("dim", [24, 64, 128, 256])
@pytest.mark.parametrize("form", FORMS)
def test_head_sizes(form, dim):
    check(form, *problem(33, 70, group=1, dim=dim, dtype=HALF))


@pytest.mark.parametrize("empty", ["none", "head"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # meant: 2 / (inf + 1) is the 0 of tanh's end
def test_soft_capped_logits(form, empty):
    check(form, *problem(67, 131, group=2, softcap=1.5, empty=empty))
    check(form, *problem(67, 131, group=2, softcap=0.5, size=100.0))  # far behind the cap: no overflow


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_are_not_the_last_and_in_no_order(form):
    q, kv, given = problem(70, 140, group=2)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    given["q_pos"] = given["q_pos"][:, order] - 40
    ctx = SimpleNamespace(**given, window=None, mask=None)
    given["lse"] = naive.run(q, kv, Selection(), ctx, want_lse=True)[1]
    got = check(form, q, kv, given)
    assert (got[..., 100:] == 0).all() and (got[..., :100] > 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_strided_inputs(form):
    q, kv, given = problem(67, 131, group=2)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    kv.k = torch.cat([kv.k, kv.k], dim=2)[:, :, :131]
    check(form, q, kv, given)
    kv.k = kv.k.transpose(2, 3).contiguous().transpose(2, 3)
    check(form, q, kv, given)


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_see_nothing_give_nothing(form):
    q, kv, given = problem(66, 66, group=2)
    given["q_pos"][0] = -1  # a row of padding alone
    given["lse"][1, :, 7] = float("-inf")
    got = sums(form, q, kv, given)
    assert (got[0] == 0).all()
    torch.testing.assert_close(got[1].sum(-1), torch.full((4,), 65.0))


@pytest.mark.parametrize("form", FORMS)
def test_a_real_nan_is_not_hidden(form):
    q, kv, given = problem(66, 66, group=2)
    q[1, 3, 40] = float("nan")
    given["lse"][1, 3, 40] = float("nan")
    got = sums(form, q, kv, given)
    assert got[1, 3, :41].isnan().all() and torch.isfinite(got[0]).all() and torch.isfinite(got[1, :3]).all()


@pytest.mark.parametrize("rows", [1, 9])
def test_the_newest_rows_need_no_mask_over_the_past(rows):
    q, kv, given = problem(rows, 61)
    for lse in (None, given["lse"]):
        plain, quick = (column_sums.run(q, kv, **{**given, "lse": lse}, newest=n) for n in (False, True))
        torch.testing.assert_close(plain, quick)


# ---- the choice ----


def test_the_choice_and_its_reason():
    q, kv, given = problem(67, 67)
    assert column_sums.choose(q, kv, None) == ("torch", "not triton: needs the rows' log-sum-exp")
    assert column_sums.choose(q, kv, given["lse"]) == ("torch", "not triton: needs CUDA capability >= 8, this is cpu")


@pytest.mark.parametrize(
    ("shape", "dtype", "why"),
    [
        ((1, 4, 64, 128), torch.bfloat16, None),
        ((1, 4, 64, 96), torch.float16, None),
        ((1, 4, 64, 128), torch.float32, "needs float16 or bfloat16, this is float32"),
        ((1, 4, 64, 100), torch.bfloat16, "multiple of 8 up to 256, this is 100"),
        ((1, 4, 64, 512), torch.bfloat16, "multiple of 8 up to 256, this is 512"),
        ((1, 4, 1, 128), torch.bfloat16, "needs 64 rows to fill a tile, these are 1"),
    ],
)
def test_the_choice_on_cuda(shape, dtype, why, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    q = SimpleNamespace(shape=shape, dtype=dtype, device=torch.device("cuda", 0))
    name, reason = column_sums.choose(q, SimpleNamespace(k=q), torch.zeros(1))
    assert (name == "triton" and why is None) or (name == "torch" and why in reason)
    monkeypatch.setattr(backends, "has_triton", lambda: False)
    assert "not triton" in column_sums.choose(q, SimpleNamespace(k=q), torch.zeros(1))[1]


def test_a_backend_that_cannot_is_an_error():
    q, kv, given = problem(9, 9)
    with pytest.raises(ConfigError, match="'triton' where lse is given"):
        column_sums.run(q, kv, **{**given, "lse": None}, _backend="triton")
    with pytest.raises(ConfigError, match="'cuda'"):
        column_sums.run(q, kv, **given, _backend="cuda")


def test_import_is_light():
    code = "import sys, attnpatch.executors.column_sums; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@needs_triton
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the fused form runs here itself")
def test_the_fused_form_in_tritons_interpreter():
    run_interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", __file__)
