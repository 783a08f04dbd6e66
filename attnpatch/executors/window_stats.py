"""How a window of query rows attends: mean, variance and entropy of every column, in bounded memory."""

from __future__ import annotations

from typing import Any

import torch

from attnpatch.executors import column_sums
from attnpatch.executors.column_sums import matmul, operand


@torch.no_grad()
def run(
    queries: torch.Tensor, kv: Any, *, q_pos: torch.Tensor, scaling: float, softcap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(mean, variance, entropy) over the query rows of each slot's softmax probability, fp32 [B, Hq, S] each.

    queries: [B, Hq, w, D]; q_pos: int [B, w], true positions, rows with -1 do not count. The softmax runs over all
    visible slots (0 <= pos <= q_pos) in fp32. variance: unbiased, 0 for fewer than two rows. entropy: the sum over rows
    of -p ln(p + 1e-10). Empty slots get 0 whatever they hold. Columns are taken block by block.
    """
    (batch, heads, rows, _), (kv_heads, slots) = queries.shape, kv.k.shape[1:3]
    block = operand(queries.reshape(batch, kv_heads, -1, queries.shape[-1]))
    step = max(1, min(slots, column_sums.MAX_BLOCK // max(1, batch * heads * rows)))
    real = (q_pos >= 0)[:, None, None, :, None]  # [B, 1, 1, w, 1]
    n = real.sum(3)  # [B, 1, 1, 1]

    def logits(start: int) -> torch.Tensor:
        """[B, Hkv, G, w, step], -inf where nothing is seen."""
        keys = operand(kv.k[:, :, start : start + step]).transpose(-1, -2)
        x = matmul(block, keys).unflatten(2, (-1, rows)) * scaling
        if softcap is not None:
            x = torch.tanh(x / softcap) * softcap
        pos, row = kv.pos[:, :, None, None, start : start + step], q_pos[:, None, None, :, None]
        return x.masked_fill((pos < 0) | (pos > row), float("-inf"))

    lse = queries.new_full((batch, kv_heads, heads // kv_heads, rows, 1), float("-inf"), dtype=torch.float32)
    for start in range(0, slots, step):
        lse = torch.logaddexp(lse, logits(start).logsumexp(-1, keepdim=True))
    # +inf makes rows that see nothing zero
    lse = lse.masked_fill((lse == float("-inf")) | ~real, float("inf"))
    parts: list[list[torch.Tensor]] = [[], [], []]
    for start in range(0, slots, step):
        p = (logits(start) - lse).exp()
        mean = p.sum(3) / n.clamp(min=1)
        apart = ((p - mean[:, :, :, None]) * real).square().sum(3) / (n - 1).clamp(min=1)
        entropy = -(p * (p + 1e-10).log()).sum(3)
        for part, x in zip(parts, (mean, apart, entropy), strict=True):
            part.append(x.flatten(1, 2))
    mean, variance, entropy = (torch.cat(part, -1) for part in parts)
    return mean, variance, entropy
