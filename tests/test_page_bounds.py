"""Page bounds by the fused form and by torch against naive."""

from __future__ import annotations

import pytest
import torch
from interpreter import DEVICE, FORMS, HALF, INTERPRETED, mend_interpreter, needs_triton, run_interpreted

from attnpatch.executors import naive, page_bounds

if INTERPRETED:
    mend_interpreter()


def problem(slots, group, dim, dtype, device):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 2 * group, 1, dim, generator=g).to(device, dtype)
    k = torch.randn(2, 2, slots, dim, generator=g).to(device, dtype)
    end = torch.tensor([slots, max(1, slots - 20)], device=device)
    filled = (torch.arange(slots, device=device) < end[:, None])[:, None]
    return q, k, end, filled


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["fp32", "half"])
@pytest.mark.parametrize(("group", "dim"), [(1, 32), (4, 64), (8, 48)])
@pytest.mark.parametrize(("slots", "page"), [(1, 16), (77, 16), (45, 1), (150, 2)])
def test_scores(slots, page, group, dim, dtype, form):
    backend, device = form
    q, k, end, filled = problem(slots, group, dim, dtype, device)
    bounds = page_bounds.summarise(k, page, filled)
    expected = naive.page_bounds(q, k, page, filled)  # [B, Hq, n]
    close = {"atol": 1e-4 if dtype == torch.float32 else 2e-2, "rtol": 1e-4 if dtype == torch.float32 else 2e-2}
    found = page_bounds.scores(q, bounds, page, end, _backend=backend)
    torch.testing.assert_close(found, expected, **close)
    last = torch.tensor([slots - 1, -1], device=device)
    largest = page_bounds.scores(q, bounds, page, end, last=last, largest=True, _backend=backend)
    wanted = expected.unflatten(1, (2, group)).amax(2)
    wanted[0, :, (slots - 1) // page] = float("inf")
    torch.testing.assert_close(largest, wanted, **close)
    full = page_bounds.summarise(k[:1], page)
    torch.testing.assert_close(page_bounds.scores(q[:1], full, page, _backend=backend), expected[:1], **close)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["fp32", "half"])
def test_add(dtype, form):
    backend, device = form
    _, k, end, filled = problem(77, 1, 48, dtype, device)
    before = (torch.arange(77, device=device) < end[:, None] - 1)[:, None]
    bounds = page_bounds.summarise(k, 16, before)
    idle = bounds.clone()
    page_bounds.add(bounds, k, 16, end - 1, _backend=backend)
    assert torch.equal(bounds, page_bounds.summarise(k, 16, filled))
    unchanged = idle.clone()
    page_bounds.add(idle, k, 16, torch.full_like(end, -1), _backend=backend)
    assert torch.equal(idle, unchanged)


def test_choice():
    q = torch.zeros(1, 2, 1, 16)
    assert page_bounds.choose(q, torch.zeros(1, 1, 3, 32)) == (
        "torch", "not triton: needs CUDA capability >= 8, this is cpu"
    )  # fmt: skip


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests above run the fused form")
@needs_triton
def test_the_fused_form_in_tritons_interpreter():
    run_interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", __file__)
