"""Attention over packed storage: heads hold different numbers of entries, and none is padded to the longest.

`choose` says which backend computes a call, and why. Set ATTNPATCH_BACKEND to flash, triton or torch to force one.
`packed` is `attnpatch.engine.ragged.Packed`, or anything with its k, v, pos, start, cap, count and widest.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from attnpatch.errors import ConfigError, InputError
from attnpatch.executors import column_sums
from attnpatch.executors.backends import ListCall, first_fit_once, no_cuda_lists, not_half, too_old
from attnpatch.executors.blocks import Result
from attnpatch.executors.column_sums import matmul, operand
from attnpatch.executors.launching import on

PAGE = 64
"""Slots of a piece in the torch form."""


class _Call(NamedTuple):
    """All that the choice depends on."""

    keys: ListCall
    single: bool  # T == 1
    softcap: bool
    want_lse: bool


def _call(q: torch.Tensor, packed: Any, ctx: Any, want_lse: bool) -> _Call:
    return _Call(ListCall.of(q, packed), q.shape[2] == 1, ctx.softcap is not None, want_lse)


def _not_flash(c: _Call) -> str | None:
    keys = c.keys
    if why := too_old(keys.device, keys.capability, 8) or not_half(keys.dtype):
        return why
    if keys.dim % 8 or keys.dim > 256 or not keys.alike:
        return "needs a head dimension that is a multiple of 8 up to 256, the same for keys and values"
    if not c.single:
        return "only for one query per row: the rows of a padded turn have different numbers"
    if keys.grad:
        return "no gradients here"
    return "no soft-capping or log-sum-exp" if c.softcap or c.want_lse else None


def _not_triton(c: _Call) -> str | None:
    return no_cuda_lists(c.keys)


def _not_torch(c: _Call) -> str | None:
    return None


def _run_flash(q: torch.Tensor, packed: Any, ctx: Any, want_lse: bool) -> Result:
    (batch, heads, _, dim), kv_heads = q.shape, packed.count.shape[1]
    pairs = batch * kv_heads
    starts = torch.arange(pairs + 1, device=q.device, dtype=torch.int32)
    offsets = torch.cat([packed.start.flatten(), packed.start.new_full((1,), packed.k.shape[0])]).to(torch.int32)
    # every pair is a sequence of its own: one query of G heads over `count` keys
    out = torch.ops.aten._flash_attention_forward(
        q.reshape(pairs, -1, dim), packed.k[:, None], packed.v[:, None], starts, offsets, 1, packed.widest,
        0.0, False, False, scale=ctx.scaling, seqused_k=packed.count.flatten(),
    )[0]  # fmt: skip
    return out.reshape(batch, 1, heads, dim), None


def _run_triton(q: torch.Tensor, packed: Any, ctx: Any, want_lse: bool) -> Result:
    from attnpatch.executors import _ragged_triton

    with on(q.device):
        return _ragged_triton.launch(q, packed, ctx, want_lse)


def _pieces(packed: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every pair cut into pieces of PAGE: the pair of each piece [P], its slots [P, PAGE], which are entries.

    P is known from what was allocated, so the host need not wait; some pieces may be empty.
    """
    pairs = packed.count.numel()
    most = packed.k.shape[0] // PAGE + pairs
    behind = ((packed.cap.flatten() + PAGE - 1) // PAGE).cumsum(0)  # pieces up to and with each pair
    piece = torch.arange(most, device=packed.k.device)
    pair = torch.searchsorted(behind, piece, right=True).clamp(max=pairs - 1)
    first = torch.where(pair > 0, behind[(pair - 1).clamp(min=0)], 0)
    local = (piece - first)[:, None] * PAGE + torch.arange(PAGE, device=packed.k.device)
    entry = local < packed.count.flatten()[pair][:, None]
    return pair, torch.where(entry, packed.start.flatten()[pair][:, None] + local, 0), entry


def _run_torch(q: torch.Tensor, packed: Any, ctx: Any, want_lse: bool) -> Result:
    (batch, heads, rows, dim), kv_heads = q.shape, packed.count.shape[1]
    pair, slots, entry = _pieces(packed)
    keys, values = operand(packed.k[slots]), operand(packed.v[slots].masked_fill(~entry[..., None], 0))
    pos = packed.pos[slots]  # [P, PAGE]
    packs = q.reshape(batch * kv_heads, heads // kv_heads, rows, dim)
    width = keys.shape[0] * (heads // kv_heads) * max(PAGE, dim)
    step = max(1, min(rows, column_sums.MAX_BLOCK // max(1, width)))
    outs, logsums = [], []
    for start in range(0, rows, step):
        block = packs[:, :, start : start + step]  # [pairs, G, r, D]
        r = block.shape[2]
        logits = _product(operand(block.flatten(1, 2)[pair]), keys.transpose(1, 2)) * ctx.scaling
        if ctx.softcap is not None:
            logits = torch.tanh(logits / ctx.softcap) * ctx.softcap
        logits = logits.unflatten(1, (-1, r))  # [P, G, r, PAGE]
        seen = entry[:, None, :]
        if ctx.q_pos is not None:
            row = ctx.q_pos.repeat_interleave(kv_heads, 0)[pair, start : start + step]  # [P, r]
            seen = seen & (pos[:, None, :] <= row[..., None])
        logits = logits.masked_fill(~seen[:, None], float("-inf"))
        out, lse = _merged(logits, values, pair, batch * kv_heads)
        outs.append(out)
        logsums.append(lse)
    out = torch.cat(outs, 2).reshape(batch, heads, rows, -1).transpose(1, 2).to(q.dtype)
    return out, torch.cat(logsums, 2).reshape(batch, heads, rows) if want_lse else None


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [P, R, N] @ b [P, N, M] with an fp32 (fp64) result."""
    return matmul(a[None], b[None])[0]


def _merged(logits: torch.Tensor, values: torch.Tensor, pair: torch.Tensor, pairs: int) -> Any:
    """out [pairs, G, r, D] and lse [pairs, G, r] from the pieces: logits [P, G, r, N], values [P, N, D]."""
    top = logits.amax(-1)  # [P, G, r]
    shape = (pairs, *top.shape[1:])
    highest = top.new_full(shape, float("-inf"))
    highest = highest.scatter_reduce(0, pair[:, None, None].expand_as(top), top, "amax")
    base = highest.masked_fill(highest == float("-inf"), 0.0)  # a row that sees nothing
    weights = (logits - base[pair][..., None]).exp()
    mass = top.new_zeros(shape).index_add(0, pair, weights.sum(-1))
    part = _product(weights.flatten(1, 2).to(values.dtype), values).unflatten(1, top.shape[1:])
    out = part.new_zeros(*shape, part.shape[-1]).index_add(0, pair, part)
    return out / mass.masked_fill(mass == 0, 1.0)[..., None], base + mass.log()


_WHY_NOT: dict[str, Callable[[_Call], str | None]] = {  # fastest first
    "triton": _not_triton,  # at 128k on one H200 0.46 to 0.68 times flash's time
    "flash": _not_flash,
    "torch": _not_torch,
}
_RUN: dict[str, Callable[[torch.Tensor, Any, Any, bool], Result]] = {
    "flash": _run_flash,
    "triton": _run_triton,
    "torch": _run_torch,
}


_chosen: dict[tuple[_Call, str | None], tuple[str, str]] = {}


def _decide(call: _Call, forced: str | None) -> tuple[str, str]:
    return first_fit_once(_chosen, _WHY_NOT, call, forced)


def choose(q: torch.Tensor, packed: Any, ctx: Any, want_lse: bool = False) -> tuple[str, str]:
    """(backend, reason) for this call. Never waits for the device."""
    return _decide(_call(q, packed, ctx, want_lse), os.environ.get("ATTNPATCH_BACKEND"))


def run(
    q: torch.Tensor, packed: Any, ctx: Any, want_lse: bool = False, _backend: str | None = None
) -> Result:  # fmt: skip
    """Attention of q [B, Hq, T, D] over the entries of each KV head whose position is not after the query's.

    ctx: `scaling`, `softcap`, `q_pos` int [B, T], -1 = padding; with one query it may be None: all entries are seen.
    Returns out [B, T, Hq, D] in q.dtype and lse [B, Hq, T] (fp32, natural; fp64 for fp64 inputs) or None; a row without
    keys as zeros with lse -inf (a padding row of a single-query call may hold anything).
    Raises InputError where shapes do not fit, ConfigError on a 4-D mask, a window or an unfit forced backend.
    """
    batch, kv_heads = packed.count.shape
    if q.shape[0] != batch or q.shape[1] % kv_heads or q.shape[3] != packed.k.shape[1]:
        raise InputError(f"q {tuple(q.shape)} does not fit packed storage of {batch} rows, {kv_heads} KV heads.")
    if q.shape[2] > 1 and ctx.q_pos is None:
        raise InputError("several queries over packed storage need their positions; give ctx.q_pos [B, T].")
    if ctx.mask is not None or ctx.window is not None:
        raise ConfigError("packed storage takes no 4-D mask and no sliding window; run the call on a padded copy.")
    name, _ = _decide(_call(q, packed, ctx, want_lse), _backend or os.environ.get("ATTNPATCH_BACKEND"))
    return _RUN[name](q, packed, ctx, want_lse)
