"""`merging`: two disjoint parts of a softmax against the whole, by torch, and fused on CUDA or interpreted."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from interpreter import DEVICE, FORMS, HALF, INTERPRETED, mend_interpreter, needs_triton, run_interpreted

from attnpatch.errors import ConfigError
from attnpatch.executors import backends, merging

if INTERPRETED:
    mend_interpreter()
INF = float("inf")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def parts(rows=37, heads=6, batch=2, dim=24, dtype=torch.float32, seed=0):
    """(out, lse, other, lse_other): the softmax over 50 keys in two parts; some rows see nothing in one, or in both."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, heads, rows, 50, generator=g, dtype=torch.float64) * 5
    v = torch.randn(batch, heads, 50, dim, generator=g, dtype=torch.float64)
    logits[:, :, ::5, :20] = -INF
    logits[:, :, 1::4, 20:] = -INF
    found = []
    for part in (slice(0, 20), slice(20, 50), slice(0, 50)):
        lse = logits[..., part].logsumexp(-1)
        out = torch.nan_to_num(logits[..., part].softmax(-1)) @ v[:, :, part]
        found.append((out.transpose(1, 2).to(dtype), lse.float()))
    return (*found[0], *found[1]), found[2]


def check(form, given, expected, tolerance=None):
    name, device = form
    out, lse = (x.cpu() for x in merging.run(*(x.to(device) for x in given), name))
    tolerance = tolerance or TOLERANCE[given[0].dtype]
    assert out.dtype == given[0].dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out, expected[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, expected[1], atol=1e-5, rtol=1e-5)
    assert (out.transpose(1, 2)[lse == -INF] == 0).all()
    return out, lse


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["fp32", "half"])
@pytest.mark.parametrize(("rows", "heads", "dim"), [(37, 6, 24), (1, 1, 128), (129, 4, 80), (64, 3, 5)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_the_sum_is_the_whole(form, rows, heads, dim, dtype):
    _, lse = check(form, *parts(rows, heads, dim=dim, dtype=dtype))
    assert (lse == -INF).any() or rows < 6


@pytest.mark.parametrize("form", FORMS)
def test_slices_and_strides(form):
    given, whole = parts()
    expected = check(form, given, whole)
    out, lse, other, lse_other = given
    wide = torch.full((2, 60, 6, 24), float("nan"))
    wide[:, 9:46] = out
    sums = torch.full((2, 6, 60), float("nan"))
    sums[:, :, 9:46] = lse
    turned = other.transpose(1, 3).contiguous().transpose(1, 3)
    got = merging.run(
        wide.to(form[1])[:, 9:46], sums.to(form[1])[:, :, 9:46], turned.to(form[1]), lse_other.to(form[1]), form[0]
    )
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_extremes(form):
    (out, lse, other, lse_other), whole = parts()
    shift = torch.tensor([-3e4, 3e4])[:, None, None]
    check(form, (out, lse + shift, other, lse_other + shift), (whole[0], whole[1] + shift), 5e-3)  # what lse resolves
    far, _ = merging.run(*(x.to(form[1]) for x in (out, lse, other, lse_other - 1e30)), form[0])
    seen = lse > -INF
    assert torch.equal(far.cpu().transpose(1, 2)[seen], out.transpose(1, 2)[seen])
    lse[0, 1, 3] = float("nan")  # a real one is not hidden
    got, both = merging.run(*(x.to(form[1]) for x in (out, lse, other, lse_other)), form[0])
    assert both[0, 1, 3].isnan() and got[0, 3, 1].isnan().all() and both.isnan().sum() == 1


@pytest.mark.parametrize("form", FORMS)
def test_the_second_may_be_wider(form):
    (out, lse, other, lse_other), whole = parts(dtype=HALF)
    check(form, (out, lse, other.float(), lse_other), whole)


# ---- the choice ----


def test_the_choice(monkeypatch):
    given, _ = parts(dtype=torch.bfloat16)
    assert merging.choose(*given) == ("torch", "not triton: needs CUDA capability >= 8, this is cpu")
    with pytest.raises(ConfigError, match="merging by 'flex': allowed are 'torch' and 'triton'"):
        merging.run(*given, "flex")
    monkeypatch.setattr(merging, "too_old", lambda *_: None)
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    assert merging.choose(*given) == ("triton", "the fastest that fits")
    wide = [x.double() for x in given]
    assert merging.choose(*wide) == ("torch", "not triton: adds in float32")
    assert merging.run(*wide)[1].dtype == torch.float64
    given[0].requires_grad_()
    assert merging.choose(*given) == ("torch", "not triton: has no backward pass")
    with torch.no_grad():
        assert merging.choose(*given)[0] == "triton"


def test_import_is_light():
    code = "import sys, attnpatch.executors.merging; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@needs_triton
@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the fused form runs here itself")
def test_the_fused_form_in_tritons_interpreter():
    run_interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", __file__)
