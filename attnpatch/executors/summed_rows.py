"""Attention probabilities of a few query rows, summed over the query heads, in bounded memory."""

from __future__ import annotations

from typing import Any

import torch

from attnpatch.executors.column_sums import matmul, operand, rows_per_block


@torch.no_grad()
def run(
    queries: torch.Tensor, kv: Any, *, q_pos: torch.Tensor, scaling: float, softcap: float | None = None
) -> torch.Tensor:
    """Softmax probability of each slot for each row, summed over the query heads: fp32 [B, w, S] (fp64 for fp64).

    queries: [B, Hq, w, D]; q_pos: int [B, w], true positions, a row with -1 is zero. kv: `k` [B, Hkv, S, D] and `pos`
    [B, 1|Hkv, S]; a slot is visible where 0 <= pos <= q_pos; empty slots get 0 whatever they hold.
    Source: InfiniRetri (arXiv 2502.12962): heads are summed, not averaged.
    """
    batch, heads, rows, dim = queries.shape
    kv_heads, slots = kv.k.shape[1], kv.k.shape[2]
    group = heads // kv_heads
    step = rows_per_block(batch, heads, slots, rows)
    keys = operand(kv.k).transpose(-1, -2)  # [B, Hkv, D, S]
    pos, parts = kv.pos[:, :, None, None, :], []
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        block = operand(queries[:, :, start:stop].reshape(batch, kv_heads, group * (stop - start), dim))
        logits = matmul(block, keys).view(batch, kv_heads, group, stop - start, slots).mul_(scaling)
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        row = q_pos[:, None, None, start:stop, None]
        logits.masked_fill_((pos < 0) | (pos > row), float("-inf"))  # also replaces the NaN of empty slots
        norm = logits.logsumexp(-1, keepdim=True)
        # +inf makes exp() zero for rows that see nothing, where -inf would make NaN
        norm = norm.masked_fill(norm == float("-inf"), float("inf"))
        parts.append(logits.sub_(norm).exp_().sum(dim=(1, 2)))
    return torch.cat(parts, dim=1)
