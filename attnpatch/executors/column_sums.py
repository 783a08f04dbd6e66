"""How much attention each key slot receives from a set of query rows, in bounded memory. Plain torch, any device."""

from __future__ import annotations

from typing import Any

import torch

MAX_BLOCK = 64 * 2**20
"""Most logits (elements) held at once."""


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _mixed(x: torch.Tensor) -> bool:
    """Whether half operands can be multiplied straight into an fp32 result (a CUDA-only, forward-only kernel)."""
    if x.device.type != "cuda" or x.dtype not in (torch.float16, torch.bfloat16):
        return False
    return not (torch.is_grad_enabled() and x.requires_grad)


def operand(x: torch.Tensor) -> torch.Tensor:
    """x as `matmul` wants it: as it is where the product is fp32 anyway, else upcast. Do this once, not per block."""
    return x if _mixed(x) else x.to(compute_dtype(x))


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [B, H, R, N] @ b [B, H, N, M] with an fp32 (fp64) result, for operands from `operand`."""
    if a.dtype == b.dtype and _mixed(a) and _mixed(b):
        out = torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32)
        return out.unflatten(0, a.shape[:2])
    dtype = compute_dtype(b)
    return torch.matmul(a.to(dtype), b.to(dtype))


def rows_per_block(batch: int, heads: int, slots: int, most: int) -> int:
    """Query rows whose logits over `slots` keys fit MAX_BLOCK, between 1 and `most`."""
    return max(1, min(most, MAX_BLOCK // max(1, batch * heads * slots)))


@torch.no_grad()
def run(
    queries: torch.Tensor,
    kv: Any,
    *,
    q_pos: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    lse: torch.Tensor | None = None,
    newest: bool = False,
) -> torch.Tensor:
    """Sum over the query rows of the softmax probability of each slot, over all visible slots: fp32 [B, Hq, S].

    queries: [B, Hq, w, D]; q_pos: int [B, w], true positions, rows with -1 contribute nothing.
    kv: see `attnpatch.executors`; a slot is visible where 0 <= pos <= q_pos; empty slots get 0 whatever they hold.
    lse: fp [B, Hq, w] natural log-sum-exp of the scaled soft-capped logits over the same slots; saves one pass.
    newest: the rows are the newest w tokens in order and no slot is empty, so only the last w slots need a mask.
    Without holes, w == S means the rows are the slots themselves (whole-prompt scoring): later columns are skipped.
    """
    batch, heads, rows, dim = queries.shape
    kv_heads, slots = kv.k.shape[1], kv.k.shape[2]
    group = heads // kv_heads
    triangular = rows == slots and not kv.holes
    step = rows_per_block(batch, heads, slots, rows)
    keys = operand(kv.k).transpose(-1, -2)  # [B, Hkv, D, S]
    total = queries.new_zeros((batch, kv_heads, group, slots), dtype=torch.float32)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        width = stop if triangular else slots
        block = operand(queries[:, :, start:stop].reshape(batch, kv_heads, group * (stop - start), dim))
        logits = matmul(block, keys[..., :width]).view(batch, kv_heads, group, stop - start, width).mul_(scaling)
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        if newest and lse is None and not triangular:
            late = logits[..., max(0, slots - rows) :]
            hidden = kv.pos[:, :, None, None, max(0, slots - rows) :] > q_pos[:, None, None, start:stop, None]
            late.masked_fill_(hidden, float("-inf"))
            total += torch.softmax(logits, dim=-1).sum(dim=3)
            continue
        pos, row = kv.pos[:, :, None, None, :width], q_pos[:, None, None, start:stop, None]
        # also replaces the NaN logits of empty slots and padding rows
        logits.masked_fill_((pos < 0) | (pos > row), float("-inf"))
        if lse is None:
            norm = torch.logsumexp(logits, dim=-1, keepdim=True)  # [B, Hkv, G, r, 1]
        else:
            norm = lse[:, :, start:stop].to(logits.dtype).reshape(batch, kv_heads, group, stop - start, 1)
        # +inf makes exp() zero for rows that see nothing, where -inf (or a given NaN) would make NaN
        norm = norm.masked_fill((norm == float("-inf")) | (row < 0), float("inf"))
        total[..., :width] += logits.sub_(norm).exp_().sum(dim=3)
    return total.flatten(1, 2)


def group_mean(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Mean over the query heads that share a kv head: [B, Hq, S] -> [B, Hkv, S]."""
    return x.unflatten(1, (kv_heads, -1)).mean(dim=2)


def group_max(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Maximum over the query heads that share a kv head: [B, Hq, S] -> [B, Hkv, S]."""
    return x.unflatten(1, (kv_heads, -1)).amax(dim=2)
