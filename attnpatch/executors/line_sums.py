"""How much attention each key column and each diagonal receives from the newest query rows, in bounded memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from attnpatch.executors import column_sums
from attnpatch.executors.column_sums import matmul, operand


@torch.no_grad()
def run(
    queries: torch.Tensor, kv: Any, *, q_pos: torch.Tensor, scaling: float, newest: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax mass of the rows per key column and per diagonal: (columns, diagonals), both fp32 [B, Hq, S].

    columns[j] sums P over the rows at slot j; diagonals[d] sums P where d = query position - key position. Each sums
    to the number of rows that count. fp64 inputs give fp64. Two passes over blocks of keys (log-sum-exp, then sums).

    queries: [B, Hq, w, D]; q_pos: int [B, w]: row i stands w - 1 - i before the last row, or is -1 and counts nothing.
    kv: `k` [B, Hkv, S, D], `pos` [B, 1|Hkv, S]; slots are positions; empty slots (pos -1) get 0 whatever they hold.
    newest: no row is -1 and no slot is empty, the rows are the last w slots: only those slots need a mask.
    Source: the probe of MInference (arXiv 2407.02490) and FlexPrefill (arXiv 2502.20766).
    """
    batch, heads, rows, dim = queries.shape
    kv_heads, slots = kv.k.shape[1], kv.k.shape[2]
    group = heads // kv_heads
    # newest row first: then a row's diagonal d lies at column (last - d) - its own index, for every batch row alike
    block = operand(queries.flip(2).reshape(batch, kv_heads, group * rows, dim))
    row = q_pos.flip(1)[:, None, None, :, None]  # [B, 1, 1, w, 1]
    keys = operand(kv.k).transpose(-1, -2)  # [B, Hkv, D, S]

    def logits(first: int, end: int) -> torch.Tensor:  # [B, Hkv, G, w, end - first]
        x = matmul(block, keys[..., first:end]).view(batch, kv_heads, group, rows, end - first).mul_(scaling)
        if not newest or end > slots - rows:
            pos = kv.pos[:, :, None, None, first:end]
            x.masked_fill_((pos < 0) | (pos > row), float("-inf"))  # also replaces the NaN of empty slots
        return x

    step = max(1, min(slots, column_sums.MAX_BLOCK // max(1, batch * heads * rows)))
    spans = [(first, min(first + step, slots)) for first in range(0, slots, step)]
    norm = torch.cat([logits(*span).logsumexp(-1, keepdim=True) for span in spans], -1).logsumexp(-1, keepdim=True)
    # +inf makes exp() zero for rows that see nothing, where -inf would make NaN
    norm = norm.masked_fill(norm == float("-inf"), float("inf"))
    columns = norm.new_empty(batch, kv_heads, group, slots)
    skewed = norm.new_zeros(batch, kv_heads, group, slots + rows - 1)  # entry e holds distance last - e
    for first, end in spans:
        mass = logits(first, end).sub_(norm).exp_()
        columns[..., first:end] = mass.sum(dim=3)
        # rows one longer than the next row's start: row i of the flat view is shifted right by i
        wide = F.pad(mass, (0, rows)).flatten(-2)[..., : rows * (end - first + rows - 1)]
        skewed[..., first : end + rows - 1] += wide.unflatten(-1, (rows, -1)).sum(dim=3)
    if newest:
        diagonals = skewed[..., :slots].flip(-1)
    else:
        entry = q_pos.amax(-1)[:, None] - torch.arange(slots, device=q_pos.device)  # [B, S]
        at = entry.clamp(min=0)[:, None, None].expand(-1, kv_heads, group, -1)
        diagonals = skewed.gather(-1, at).masked_fill((entry < 0)[:, None, None], 0.0)
    return columns.flatten(1, 2), diagonals.flatten(1, 2)
