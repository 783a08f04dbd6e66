"""The Triton kernel of `likeness`: one program a row. Imported at the first call only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n"])
def _kernel(
    QUERY, KEPT, QPOS, LIKE, query_batch, kept_batch, qpos_batch, threshold, n, N: tl.constexpr, ABOVE: tl.constexpr
):
    """LIKE uint8 [B]."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, N)
    new = tl.load(QUERY + row * query_batch + i, mask=i < n, other=0.0)
    old = tl.load(KEPT + row * kept_batch + i, mask=i < n, other=0.0)
    idle = tl.load(QPOS + row * qpos_batch) < 0
    norms = tl.sqrt(tl.sum(new * new, 0)) * tl.sqrt(tl.sum(old * old, 0))
    cosine = tl.sum(new * old, 0) / tl.maximum(norms, 1e-16)
    like = cosine >= threshold
    if ABOVE:
        like = cosine > threshold
    like = like | idle
    tl.store(KEPT + row * kept_batch + i, new, mask=(i < n) & (like == 0))
    tl.store(LIKE + row, like.to(tl.uint8))


def launch(query: torch.Tensor, kept: torch.Tensor, q_pos: torch.Tensor, threshold: float, above: bool) -> torch.Tensor:
    """As `likeness.run`."""
    like = torch.empty(query.shape[0], dtype=torch.bool, device=query.device)
    query, width = query.contiguous(), triton.next_power_of_2(query.shape[1])
    _kernel[(query.shape[0],)](
        query, kept, q_pos, like.view(torch.uint8), query.stride(0), kept.stride(0), q_pos.stride(0),
        float(threshold), query.shape[1], N=max(16, width), ABOVE=above, num_warps=8 if width > 1024 else 4,
    )  # fmt: skip
    return like
