"""`line_sums` against the naive reference: the torch form, and the fused one on CUDA or in Triton's interpreter."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from interpreter import FORMS, HALF, INTERPRETED, mend_interpreter, needs_triton, run_interpreted
from selections import layer, noise

from attnpatch.errors import ConfigError
from attnpatch.executors import backends, line_sums, naive, selecting

if INTERPRETED:
    mend_interpreter()
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(HALF, id="half")]


def problem(rows, slots, lengths=None, *, group=2, kv_heads=2, dim=32, dtype=torch.float32, batch=None):
    """The probe of a prompt of `slots` tokens, batch rows of `lengths`; NaN in the empty slots."""
    batch = batch or len(lengths or [1])
    q, k, v = (x.to(dtype) for x in noise(slots, group * kv_heads, kv_heads, dim, batch=batch, scale=2.0))
    q, kv, ctx = layer(q, k, v, lengths)
    q, q_pos = selecting.probe_rows(q, ctx, rows, 0)
    return q, kv, {"q_pos": q_pos, "scaling": dim**-0.5, "newest": lengths is None}


def sums(form, q, kv, given):
    """What `form` computes on its device, brought back."""
    name, device = form
    kv = SimpleNamespace(k=kv.k.to(device), pos=kv.pos.to(device))
    given = {**given, "q_pos": given["q_pos"].to(device)}
    return [x.cpu() for x in line_sums.run(q.to(device), kv, **given, _backend=name)]


def check(form, q, kv, given):
    got = sums(form, q, kv, given)
    expected = naive.line_sums(q, kv, q_pos=given["q_pos"], scaling=given["scaling"])
    for a, e in zip(got, expected, strict=True):
        assert a.dtype == torch.float32 and a.shape == (q.shape[0], q.shape[1], kv.k.shape[2])
        # the product of halves is exact in fp32; only the order of sums differs
        torch.testing.assert_close(a, e, atol=2e-5, rtol=2e-5)
        voters = (given["q_pos"] >= 0).sum(-1)[:, None].expand(-1, q.shape[1])
        torch.testing.assert_close(a.sum(-1), voters.float(), atol=1e-4, rtol=0)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [None, [301, 140, 9, 0]], ids=["full", "ragged"])
@pytest.mark.parametrize("rows", [1, 16, 64, 100, 128])
@pytest.mark.parametrize("form", FORMS)
def test_matches_naive(form, rows, lengths, dtype):
    check(form, *problem(rows, 301, lengths, kv_heads=1, dtype=dtype))


@pytest.mark.parametrize("slots", [1, 100, 128, 129, 256])
@pytest.mark.parametrize("form", FORMS)
def test_edges_of_tiles(form, slots):
    check(form, *problem(min(slots, 128), slots, dtype=HALF))


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("form", FORMS)
def test_grouped_heads(form, group):
    check(form, *problem(33, 150, [150, 99], group=group, kv_heads=1 if group == 8 else 3, dtype=HALF))


@pytest.mark.parametrize("dim", [16, 24, 64, 96, 128, 256])
@pytest.mark.parametrize("form", FORMS)
def test_head_sizes(form, dim):
    check(form, *problem(40, 140, group=1, dim=dim, dtype=HALF))


@pytest.mark.parametrize("form", FORMS)
def test_positions_by_head_and_strides(form):
    q, kv, given = problem(20, 140, [140, 77])
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k = torch.cat([kv.k, kv.k], dim=2)[:, :, :140]
    expected = check(form, q, SimpleNamespace(k=k, pos=kv.pos), given)
    got = sums(form, q, SimpleNamespace(k=k, pos=kv.pos.repeat(1, 2, 1)), given)
    assert all(torch.equal(a, e) for a, e in zip(got, expected, strict=True))
    check(form, q, SimpleNamespace(k=k.transpose(2, 3).contiguous().transpose(2, 3), pos=kv.pos), given)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # the interpreter's maximum of such a row
def test_a_real_nan_is_not_hidden(form):
    q, kv, given = problem(20, 140)
    q[0, 3, 7] = float("nan")
    columns, diagonals = sums(form, q, kv, given)
    assert columns[0, 3, :128].isnan().all() and torch.isfinite(columns[0, :3]).all()
    assert diagonals[0, 3, :120].isnan().all() and torch.isfinite(diagonals[0, :3]).all()


@pytest.mark.parametrize("form", FORMS)
def test_large_logits_and_the_same_bits_again(form):
    q, kv, given = problem(64, 200, dtype=HALF)
    q = q * 100
    first, again = sums(form, q, kv, given), sums(form, q, kv, given)
    assert all(torch.isfinite(a).all() and torch.equal(a, b) for a, b in zip(first, again, strict=True))


# ---- the choice ----


@pytest.mark.parametrize(
    ("shape", "dtype", "why"),
    [
        ((1, 4, 128, 128), torch.bfloat16, None),
        ((1, 4, 1, 96), torch.float16, None),
        ((1, 4, 64, 128), torch.float32, "needs float16 or bfloat16, this is float32"),
        ((1, 4, 64, 100), torch.bfloat16, "multiple of 8 up to 256, this is 100"),
        ((1, 4, 129, 128), torch.bfloat16, "takes at most 128 rows, these are 129"),
    ],
)
def test_the_choice_on_cuda(shape, dtype, why, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    q = SimpleNamespace(shape=shape, dtype=dtype, device=torch.device("cuda", 0))
    name, reason = line_sums.choose(q, SimpleNamespace(k=q))
    assert (name == "triton" and why is None) or (name == "torch" and why in reason)
    assert "dtype" in line_sums.choose(q, SimpleNamespace(k=SimpleNamespace(dtype=torch.int8)))[1] or why
    monkeypatch.setattr(backends, "has_triton", lambda: False)
    assert "not triton" in line_sums.choose(q, SimpleNamespace(k=q))[1]


def test_a_backend_that_is_none_is_an_error():
    q, kv, given = problem(9, 9)
    assert line_sums.choose(q, kv) == ("torch", "not triton: needs CUDA capability >= 8, this is cpu")
    with pytest.raises(ConfigError, match="'cuda'"):
        line_sums.run(q, kv, **given, _backend="cuda")


def test_import_is_light():
    code = "import sys, attnpatch.executors.line_sums; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@needs_triton
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the fused form runs here itself")
def test_the_fused_form_in_tritons_interpreter():
    run_interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", __file__)
