"""The Triton kernels of `page_bounds`: scores of all pages, and a new key's bounds. Imported at the first call only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attnpatch.executors._follow_triton import follow
from attnpatch.executors.launching import chained, power_of_2, rowwise


@triton.jit(do_not_specialize=["pages"])
def _scores(
    Q, BOUNDS, END, LAST, OUT, q_batch, q_head, bounds_batch, bounds_head, bounds_page, end_batch, last_batch,
    pages, heads,
    CHAINED: tl.constexpr,
    SIZE: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, HAS_END: tl.constexpr, HAS_LAST: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """OUT fp32 [B, heads * GROUP, pages], or [B, heads, pages] where LARGEST."""
    follow(CHAINED)
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    batch, head = batch.to(tl.int64), head.to(tl.int64)
    m, n, d = tl.arange(0, M), tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, WIDE)
    real = (m < GROUP)[:, None] & (d < D)[None, :]
    q = tl.load(Q + batch * q_batch + (head * GROUP + m)[:, None] * q_head + d[None, :], mask=real, other=0.0)
    at = BOUNDS + batch * bounds_batch + head * bounds_head + n.to(tl.int64)[:, None] * bounds_page + d[None, :]
    inside = (n < pages)[:, None] & (d < D)[None, :]
    low = tl.load(at, mask=inside, other=0.0)  # [N, D]
    high = tl.load(at + D, mask=inside, other=0.0)
    if HAS_END:  # pages without a key hold infinities, and get -inf below
        low = tl.where(low == float("inf"), 0.0, low).to(q.dtype)
        high = tl.where(high == float("-inf"), 0.0, high).to(q.dtype)
    zero = tl.zeros_like(q)  # minimum and maximum of bf16 come out as fp32
    total = tl.dot(tl.minimum(q, zero).to(q.dtype), tl.trans(low), input_precision="ieee")
    total = tl.dot(tl.maximum(q, zero).to(q.dtype), tl.trans(high), total, input_precision="ieee")  # [M, N]
    if HAS_END:
        end = tl.load(END + batch * end_batch)
        total = tl.where((n * SIZE < end)[None, :], total, float("-inf"))
    if HAS_LAST:
        last = tl.load(LAST + batch * last_batch)
        own = (n == last // SIZE) & (last >= 0)
        total = tl.where(own[None, :], float("inf"), total)
    if LARGEST:
        best = tl.max(tl.where((m < GROUP)[:, None], total, float("-inf")), 0)
        tl.store(OUT + (batch * heads + head) * pages + n, best, mask=n < pages)
    else:
        row = (batch * heads + head) * GROUP + m
        tl.store(OUT + row[:, None] * pages + n[None, :], total, mask=(m < GROUP)[:, None] & (n < pages)[None, :])


@triton.jit
def _add(
    BOUNDS, K, SLOT, bounds_batch, bounds_head, bounds_page, k_batch, k_head, k_slot, slot_batch, heads,
    CHAINED: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program a row and KV head."""
    follow(CHAINED)
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    batch, head = batch.to(tl.int64), head.to(tl.int64)
    slot = tl.load(SLOT + batch * slot_batch).to(tl.int64)
    d = tl.arange(0, WIDE)
    real = (d < D) & (slot >= 0)
    key = tl.load(K + batch * k_batch + head * k_head + slot * k_slot + d, mask=real, other=0.0)
    at = BOUNDS + batch * bounds_batch + head * bounds_head + slot // SIZE * bounds_page + d
    low, high = tl.load(at, mask=real, other=0.0), tl.load(at + D, mask=real, other=0.0)
    tl.store(at, tl.minimum(low, key), mask=real)
    tl.store(at + D, tl.maximum(high, key), mask=real)


def scores(
    q: torch.Tensor, bounds: torch.Tensor, page: int, end: torch.Tensor | None, last: torch.Tensor | None, largest: bool
) -> torch.Tensor:
    """As `page_bounds.scores`."""
    (batch, heads, _, dim), (_, kv_heads, pages, _) = q.shape, bounds.shape
    q, bounds = rowwise(q), rowwise(bounds)
    group, block = heads // kv_heads, 64 if dim * q.element_size() <= 256 else 32
    out = torch.empty(batch, kv_heads if largest else heads, pages, dtype=torch.float32, device=q.device)
    _scores[(-(-pages // block), batch * kv_heads)](
        q, bounds, q if end is None else end, q if last is None else last, out, *q.stride()[:2], *bounds.stride()[:3],
        0 if end is None else end.stride(0), 0 if last is None else last.stride(0), pages, kv_heads,
        SIZE=page, D=dim, WIDE=max(16, power_of_2(dim)), GROUP=group,
        M=max(16, power_of_2(group)), N=block, HAS_END=end is not None, HAS_LAST=last is not None,
        LARGEST=largest, num_warps=4, **chained(q.device),
    )  # fmt: skip
    return out


def add(bounds: torch.Tensor, k: torch.Tensor, page: int, slot: torch.Tensor) -> None:
    """As `page_bounds.add`."""
    (batch, heads, _, dim), k = k.shape, rowwise(k)
    _add[(batch * heads,)](
        bounds, k, slot, *bounds.stride()[:3], *k.stride()[:3], slot.stride(0), heads,
        SIZE=page, D=dim, WIDE=max(16, power_of_2(dim)), num_warps=4 if dim > 64 else 1,
        **chained(k.device),
    )  # fmt: skip
