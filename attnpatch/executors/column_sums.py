"""How much attention each key slot receives from a set of query rows, in bounded memory. `choose` says how."""

from __future__ import annotations

from typing import Any

import torch

from attnpatch.errors import ConfigError
from attnpatch.executors.backends import HALF, capability, no_triton, too_old

MAX_BLOCK = 64 * 2**20
"""Most logits (elements) held at once by the torch form."""
FUSED_ROWS = 64
"""Fewest query rows that fill a tile of the fused form."""


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _mixed(x: torch.Tensor) -> bool:
    """Whether half operands can be multiplied straight into an fp32 result (a CUDA-only, forward-only kernel)."""
    if x.device.type != "cuda" or x.dtype not in HALF:
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


def _not_triton(queries: torch.Tensor, kv: Any, lse: torch.Tensor | None) -> str | None:
    """What stands in the way of the fused form, or None."""
    rows, dim = queries.shape[2:]
    if lse is None:
        return "needs the rows' log-sum-exp"
    if why := too_old(queries.device.type, capability(queries.device), 8):
        return why
    if queries.dtype not in HALF or kv.k.dtype != queries.dtype:
        return f"needs float16 or bfloat16, this is {str(queries.dtype).removeprefix('torch.')}"
    if dim % 8 or dim > 256:
        return f"needs a head dimension that is a multiple of 8 up to 256, this is {dim}"
    if rows < FUSED_ROWS:
        return f"needs {FUSED_ROWS} rows to fill a tile, these are {rows}"
    return no_triton()


def choose(queries: torch.Tensor, kv: Any, lse: torch.Tensor | None) -> tuple[str, str]:
    """(backend, reason) for this call: "triton" (fused) or "torch" (blocks of logits). Never waits for the device."""
    why = _not_triton(queries, kv, lse)
    return ("triton", "the fastest that fits") if why is None else ("torch", f"not triton: {why}")


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
    _backend: str | None = None,
) -> torch.Tensor:
    """Sum over the query rows of the softmax probability of each slot, over all visible slots: fp32 [B, Hq, S].

    queries: [B, Hq, w, D]; q_pos: int [B, w], true positions, rows with -1 contribute nothing.
    kv: see `attnpatch.executors`; a slot is visible where 0 <= pos <= q_pos; empty slots get 0 whatever they hold.
    lse: fp [B, Hq, w] natural log-sum-exp of the scaled soft-capped logits over the same slots; saves one pass, and is
      what the fused form needs. A row with -inf contributes nothing.
    newest: the rows are the newest w tokens in order and no slot is empty, so only the last w slots need a mask.
    Without holes, w == S means the rows are the slots themselves (whole-prompt scoring): later columns are skipped.
    """
    name = _backend or choose(queries, kv, lse)[0]
    if name == "torch":
        return _run_torch(queries, kv, q_pos, scaling, softcap, lse, newest)
    if name != "triton" or lse is None:
        raise ConfigError(f"column sums by {name!r}: allowed are 'torch', and 'triton' where lse is given.")
    from attnpatch.executors._column_sums_triton import launch

    return launch(queries, kv.k, kv.pos, q_pos, lse, scaling, softcap, newest)


def _run_torch(
    queries: torch.Tensor, kv: Any, q_pos: torch.Tensor, scaling: float, softcap: float | None,
    lse: torch.Tensor | None, newest: bool,
) -> torch.Tensor:  # fmt: skip
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
        first = max(0, slots - rows) if newest and not triangular else 0  # earlier slots are visible to all rows
        pos, row = kv.pos[:, :, None, None, first:width], q_pos[:, None, None, start:stop, None]
        # also replaces the NaN logits of empty slots and padding rows
        logits[..., first:].masked_fill_((pos < 0) | (pos > row), float("-inf"))
        if first and lse is None:  # no row is empty
            total += torch.softmax(logits, dim=-1).sum(dim=3)
            continue
        if lse is None:
            norm = torch.logsumexp(logits, dim=-1, keepdim=True)  # [B, Hkv, G, r, 1]
        else:
            norm = lse[:, :, start:stop].to(logits.dtype).reshape(batch, kv_heads, group, stop - start, 1)
        # +inf makes exp() zero for rows that see nothing, where -inf (or a given NaN) would make NaN
        norm = norm.masked_fill((norm == float("-inf")) | (row < 0), float("inf"))
        total[..., :width] += logits.sub_(norm).exp_().sum(dim=3)
    return total.flatten(1, 2)


def group_mean(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Mean over the query heads that share a kv head, in fp32: [B, Hq, S] -> [B, Hkv, S]."""
    return x.unflatten(1, (kv_heads, -1)).mean(dim=2, dtype=torch.float32)


def group_max(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Maximum over the query heads that share a kv head: [B, Hq, S] -> [B, Hkv, S]."""
    return x.unflatten(1, (kv_heads, -1)).amax(dim=2)
