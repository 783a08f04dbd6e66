"""Lists of a CPU call computed by several threads at once."""

from __future__ import annotations

import pytest
import torch
from selections import layer, noise

from attnpatch.decisions import Selection
from attnpatch.executors import pages_torch
from attnpatch.executors.threads import on_all_threads


@pytest.fixture
def threads():
    """Two threads; what was set before comes back."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def problem(batch=2, heads=4, slots=300, page=32):
    q, kv, ctx = layer(*noise(slots, heads, 2, 16, batch=batch))
    blocks = -(-slots // page)
    chosen = torch.rand(batch, heads, blocks, blocks, generator=torch.Generator().manual_seed(3)) < 0.4
    chosen |= torch.eye(blocks, dtype=torch.bool)
    index = chosen.int().sort(dim=-1, descending=True, stable=True).indices.int()
    return q, kv, ctx, Selection(index=index, count=chosen.sum(-1).int(), page=page, bq=page)


@pytest.mark.parametrize("guard", [torch.inference_mode, torch.no_grad], ids=["inference", "no_grad"])
def test_threads_compute_what_one_does(threads, guard):
    with guard():
        q, kv, ctx, selection = problem()
        both = pages_torch.run(q, kv, selection, ctx, True)
        torch.set_num_threads(1)
        alone = pages_torch.run(q, kv, selection, ctx, True)
    assert all(torch.equal(a, b) for a, b in zip(both, alone, strict=True))
    assert both[0].is_inference() == (guard is torch.inference_mode)


def test_gradients_go_through_one_thread(threads):
    q, kv, ctx, selection = problem()
    q.requires_grad_()
    pages_torch.run(q, kv, selection, ctx, False)[0].sum().backward()
    assert q.grad is not None and q.grad.abs().sum() > 0


def test_a_worker_computes_alone_and_the_number_comes_back(threads):
    seen = []
    on_all_threads(lambda: seen.append((torch.get_num_threads(), torch.is_grad_enabled())))
    assert seen == [(1, False)] * 2 and torch.get_num_threads() == 2


def test_what_a_worker_raises_is_raised(threads):
    def fails():
        raise ValueError("worker")

    with pytest.raises(ValueError, match="worker"):
        on_all_threads(fails)
    assert torch.get_num_threads() == 2
