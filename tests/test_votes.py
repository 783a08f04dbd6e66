"""votes against a plain softmax; the Triton form on CUDA, else in the interpreter's own process."""

from __future__ import annotations

import pytest
import torch
from interpreter import DEVICE, FORMS, HALF, INTERPRETED, mend_interpreter, needs_triton, run_interpreted

from attnpatch.errors import ConfigError, InputError
from attnpatch.executors import votes

if INTERPRETED:
    mend_interpreter()

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def problem(slots, ends, *, group=4, kv_heads=2, dim=32, dtype=torch.float32, device="cpu"):
    """q, k, end; NaN where a row holds nothing."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(len(ends), kv_heads * group, 1, dim, generator=g)
    k = torch.randn(len(ends), kv_heads, slots, dim, generator=g)
    end = torch.tensor(ends)
    k = torch.where((torch.arange(slots) < end[:, None])[:, None, :, None], k, float("nan"))
    return q.to(device, dtype), k.to(device, dtype), end.to(device)


def expected(q, k, end, first, scaling, softcap, reduce, heads):
    out = torch.full((q.shape[0], heads, k.shape[2]), float("-inf"))
    per, group = q.shape[1] // heads, q.shape[1] // k.shape[1]
    for b, n in enumerate(end.tolist()):
        if n <= first:
            continue
        for i in range(heads):
            probs = []
            for h in range(i * per, (i + 1) * per):
                logits = k[b, h // group, first:n].double() @ q[b, h, 0].double() * scaling
                probs.append((logits if softcap is None else torch.tanh(logits / softcap) * softcap).softmax(0))
            both = torch.stack(probs)
            out[b, i, first:n] = {"sum": both.sum(0), "mean": both.mean(0), "max": both.amax(0)}[reduce].float()
    return out


def check(form, q, k, end, first=0, scaling=0.3, softcap=None, reduce="sum", heads=1):
    later = (end + 9)[:, None].expand(-1, 2)[:, -1]  # as q_pos, not contiguous
    options = {"first": first, "scaling": scaling, "softcap": softcap, "reduce": reduce, "heads": heads}
    found = votes.run(q, k, end=later, late=9, _backend=form[0], **options)
    wanted = expected(*(x.cpu() for x in (q, k, end)), first, scaling, softcap, reduce, heads)
    tolerance = TOLERANCE[q.dtype]
    torch.testing.assert_close(found.cpu(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize(("reduce", "heads"), [("sum", 1), ("max", 2), ("mean", 2)])
def test_reductions(form, reduce, heads, group):
    q, k, end = problem(301, [301, 140, 3], group=group, device=form[1])
    check(form, q, k, end, reduce=reduce, heads=heads)
    check(form, q, k, end, 7, 1.0, 2.0, reduce, heads)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["fp32", "half"])
@pytest.mark.parametrize("dim", [64, 96, 256])
def test_long_odd_lengths(form, dim, dtype):
    q, k, end = problem(1501, [1501, 0], dim=dim, dtype=dtype, kv_heads=1, group=20, device=form[1])
    check(form, q, k, end, 128, 0.05)


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_are_skipped_do_not_touch_the_others(form):
    q, k, end = problem(301, [301, 140], device=form[1])
    whole = votes.run(q, k, end=end, _backend=form[0])
    part = votes.run(q, k, end=end, skip=torch.tensor([True, False], device=form[1]), _backend=form[0])
    assert torch.equal(part[1], whole[1])


def test_choice_and_refusals():
    q, k, end = problem(40, [40])
    assert votes.choose(q, k) == ("torch", "not triton: needs CUDA capability >= 8, this is cpu")
    with pytest.raises(ConfigError, match="'nonsense' is not a backend of votes"):
        votes.run(q, k, end=end, _backend="nonsense")
    for wrong in ({"heads": 3}, {"reduce": "median"}):
        with pytest.raises(InputError, match="give one query, a divisor of the heads, and one of sum, max, mean"):
            votes.run(q, k, end=end, **wrong)
    with pytest.raises(InputError, match="counts its scores in `zero`; give it"):
        votes.run(q, k, end=end, count=True)


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests above run the fused form")
def test_the_fused_form_in_tritons_interpreter():
    run_interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", __file__)
