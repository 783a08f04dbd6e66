"""How much attention each key column and each diagonal receives from the newest query rows, in bounded memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from attnpatch.errors import ConfigError
from attnpatch.executors import column_sums
from attnpatch.executors.backends import capability, no_triton, not_half, too_old
from attnpatch.executors.column_sums import matmul, operand

FUSED_ROWS = 128
"""Most query rows of the fused form."""


def _not_triton(queries: torch.Tensor, kv: Any) -> str | None:
    """What stands in the way of the fused form, or None."""
    rows, dim = queries.shape[2:]
    if why := too_old(queries.device.type, capability(queries.device), 8) or not_half(queries.dtype):
        return why
    if kv.k.dtype != queries.dtype:
        return "needs queries and keys of one dtype"
    if dim % 8 or dim > 256:
        return f"needs a head dimension that is a multiple of 8 up to 256, this is {dim}"
    if rows > FUSED_ROWS:
        return f"takes at most {FUSED_ROWS} rows, these are {rows}"
    return no_triton()


def choose(queries: torch.Tensor, kv: Any) -> tuple[str, str]:
    """(backend, reason) for this call: "triton" (fused) or "torch" (blocks of logits). Never waits for the device."""
    why = _not_triton(queries, kv)
    return ("triton", "the fastest that fits") if why is None else ("torch", f"not triton: {why}")


@torch.no_grad()
def run(
    queries: torch.Tensor, kv: Any, *, q_pos: torch.Tensor, scaling: float, newest: bool = False,
    _backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Softmax mass of the rows per key column and per diagonal: (columns, diagonals), both fp32 [B, Hq, S].

    columns[j] sums P over the rows at slot j; diagonals[d] sums P where d = query position - key position. Each sums
    to the number of rows that count. fp64 inputs give fp64. Two passes over blocks of keys (log-sum-exp, then sums).

    queries: [B, Hq, w, D]; q_pos: int [B, w]: row i stands w - 1 - i before the last row, or is -1 and counts nothing.
    kv: `k` [B, Hkv, S, D], `pos` [B, 1|Hkv, S]; slots are positions; empty slots (pos -1) get 0 whatever they hold.
    newest: no row is -1 and no slot is empty, the rows are the last w slots: only those slots need a mask.
    Source: the probe of MInference (arXiv 2407.02490) and FlexPrefill (arXiv 2502.20766).
    """
    name, slots = _backend or choose(queries, kv)[0], kv.k.shape[2]
    if name == "torch":
        columns, skewed = _run_torch(queries, kv, q_pos, scaling, newest)
    elif name == "triton":
        from attnpatch.executors._line_sums_triton import launch

        columns, skewed = launch(queries, kv.k, kv.pos, q_pos, scaling)
    else:
        raise ConfigError(f"line sums by {name!r}: allowed are 'torch' and 'triton'.")
    if newest:
        return columns, skewed[..., :slots].flip(-1)
    entry = q_pos.amax(-1)[:, None] - torch.arange(slots, device=q_pos.device)  # [B, S]
    at = entry.clamp(min=0)[:, None].expand(-1, queries.shape[1], -1)
    return columns, skewed.gather(-1, at).masked_fill((entry < 0)[:, None], 0.0)


def _run_torch(
    queries: torch.Tensor, kv: Any, q_pos: torch.Tensor, scaling: float, newest: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns [B, Hq, S], and the diagonals [B, Hq, S + w - 1] by the sum of slot and row, newest row 0."""
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
    return columns.flatten(1, 2), skewed.flatten(1, 2)
