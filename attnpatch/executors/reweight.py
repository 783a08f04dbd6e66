"""Attention output after the weights of a few key columns changed: O(T * C) from (out, lse) and those columns alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from attnpatch.errors import ConfigError
from attnpatch.executors.backends import capability, differentiated, no_triton, too_old
from attnpatch.executors.column_sums import compute_dtype, matmul, operand, rows_per_block
from attnpatch.executors.lists import spread

LEAST = 1e-3
"""Smallest weight of a row's other keys that takes all that "give_back" frees (see `least`).

Weights come from a log-sum-exp that another kernel summed in another order, so 1 minus the listed ones is off by about
1e-6 in fp32; and a row without any other key must come out unchanged.
"""
RULES = ("renorm", "give_back")
SCALE = "scale_logit"  # only the torch form knows it

Result = tuple[torch.Tensor, torch.Tensor | None]


class _Columns(NamedTuple):
    """The listed columns of H' heads: Hkv where the heads of a group share them, else Hq. G = Hq / H'."""

    pos: torch.Tensor  # [B, H', C], -1 = unused or not held
    slot: torch.Tensor  # [B, H', C], some slot where pos is -1
    keys: torch.Tensor  # [B, H', D, C] as `operand`
    values: torch.Tensor  # [B, H', C, D] fp32
    factor: torch.Tensor  # [B|1, H', G, 1, C] fp32


def least(dtype: torch.dtype) -> float:
    """Below this weight of the other keys, the rounding of `out`, which grows as they do, would outweigh them."""
    return max(LEAST, 2 * float(torch.finfo(dtype).eps))


def _not_triton(q: torch.Tensor, ctx: Any) -> str | None:
    """What stands in the way of the fused form, or None."""
    if why := too_old(q.device.type, capability(q.device), 8):
        return why
    if q.dtype == torch.float64 or q.shape[3] > 256:
        return "takes neither float64 nor head dimensions above 256"
    if ctx.mask is not None:
        return "takes no 4-D mask"
    if differentiated(q):
        return "has no backward"
    return no_triton()


def choose(q: torch.Tensor, ctx: Any) -> tuple[str, str]:
    """(backend, reason) for this call: "triton" (one fused pass) or "torch". Never waits for the device."""
    why = _not_triton(q, ctx)
    return ("triton", "the fastest that fits") if why is None else ("torch", f"not triton: {why}")


def run(
    out: torch.Tensor, lse: torch.Tensor, q: torch.Tensor, kv: Any, decision: Any, ctx: Any, want_lse: bool = False,
    *, _backend: str | None = None,
) -> Result:  # fmt: skip
    """New (out [B, T, Hq, D] in out's dtype, lse [B, Hq, T] or None) from the attention of q [B, Hq, T, D] over kv.

    out, lse: of that attention; padding rows may hold anything. kv, ctx: see `attnpatch.executors`; besides, where
    `kv.aligned` slots are positions (otherwise kv.pos is searched). decision: a ColumnReweight.
    The new lse gives every column that was not listed its new weight exp(logit - lse).
    With a the old weight, every rule is out' = c * out + sum over columns of (a' - c * a) * v, where c is what happens
    to the weights of all other keys; rounding of a half-precision `out` is scaled by c with it.
    Raises ConfigError for an unknown rule.
    """
    if decision.rule not in (*RULES, SCALE):
        raise ConfigError(
            f"reweight rule {decision.rule!r} is not allowed; choose one of 'renorm', 'give_back', {SCALE!r}."
        )
    if decision.rule != SCALE and (_backend or choose(q, ctx)[0]) == "triton":
        from attnpatch.executors._reweight_triton import launch

        pos, slot = _find(kv, decision.columns, q.shape[1])
        new, rest = launch(out, lse, q, kv, pos, slot, decision, ctx, least(out.dtype), want_lse)
    else:
        new, rest = _run_torch(out, lse, q, kv, decision, ctx, want_lse)
    return new, None if rest is None else lse - rest.log()


def _run_torch(
    out: torch.Tensor, lse: torch.Tensor, q: torch.Tensor, kv: Any, decision: Any, ctx: Any, want_scale: bool
) -> Result:
    (batch, heads, rows, dim), columns = q.shape, _columns(q, kv, decision)
    step = rows_per_block(batch, heads, max(dim, columns.pos.shape[-1]), rows)
    new: list[torch.Tensor] = []
    scale: list[torch.Tensor] = []
    for start in range(0, rows, step):
        part = slice(start, start + step)
        rest, extra = _parts(q[:, :, part], lse[:, :, part], part, columns, decision, ctx, least(out.dtype))
        # [B, Hq, r(, D)] -> [B, r, Hq, D]
        new.append((out[:, part] * rest.transpose(1, 2)[..., None] + extra.transpose(1, 2)).to(out.dtype))
        scale += [rest] if want_scale else []
    if len(new) == 1:
        return new[0], scale[0] if want_scale else None
    return torch.cat(new, dim=1), torch.cat(scale, dim=2) if want_scale else None


def _parts(
    q: torch.Tensor, lse: torch.Tensor, part: slice, columns: _Columns, decision: Any, ctx: Any, floor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """For a block of query rows: c [B, Hq, r] and the sum of (a' - c * a) * v, [B, Hq, r, D]."""
    batch, heads, rows, dim = q.shape
    kept = columns.pos.shape[1]
    shape = (batch, kept, heads // kept, rows, -1)
    raw = matmul(operand(q.reshape(batch, kept, -1, dim)), columns.keys).view(shape) * ctx.scaling
    logits = _capped(raw, ctx.softcap)
    seen = _seen(columns, ctx, part, rows)  # [B, H', 1, r, C]
    if decision.rows is not None:
        seen = seen & decision.rows[:, :, part].reshape(shape)
    # also replaces the NaN of padding rows and empty slots
    norm = lse.to(logits.dtype).reshape(shape)
    a = torch.where(seen, (logits - norm).exp(), 0.0)
    if decision.rule == SCALE:
        scaled = torch.where(seen, _capped(raw * columns.factor, ctx.softcap) - norm, float("-inf"))
        high = (scaled.amax(-1, keepdim=True) - 30).clamp(min=0)  # a scaled logit may be beyond what exp can hold
        numerator, one = (scaled - high).exp(), (-high).exp()
        total = one + (numerator - one * a).sum(-1, keepdim=True)
        rest = one / total
        change = numerator / total - rest * a
    elif decision.rule == "renorm":
        more = (columns.factor - 1) * a
        rest = 1 / (1 + more.sum(-1, keepdim=True))  # c: [B, H', G, r, 1]
        change = more * rest
    else:
        left = (1 - a.sum(-1, keepdim=True)).clamp(min=0)
        freed = (1 - columns.factor) * a * left / left.clamp(min=floor) ** 2  # per unit of what is left
        rest = 1 + freed.sum(-1, keepdim=True)
        change = a - freed * left - rest * a
    extra = torch.matmul(change.flatten(2, 3), columns.values)  # [B, H', G*r, D]
    return rest.reshape(batch, heads, rows), extra.view(batch, heads, rows, -1)


def _capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _seen(columns: _Columns, ctx: Any, part: slice, rows: int) -> torch.Tensor:
    """bool [B, H', 1, r, C]: the rows of the block that see a column."""
    pos, row = columns.pos[:, :, None, :], ctx.q_pos[:, None, part, None]
    if ctx.mask is None:
        seen = (pos >= 0) & (pos <= row)
    else:
        slot = columns.slot[:, :, None].expand(-1, -1, rows, -1)
        mask = ctx.mask[:, :, part].expand(pos.shape[0], pos.shape[1], -1, -1)
        seen = (pos >= 0) & mask.gather(-1, slot)
    if ctx.window is not None:
        seen = seen & (row - pos < ctx.window)
    return seen[:, :, None]


def _find(kv: Any, columns: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions (-1 = not held) and slots of the listed positions [B|1, H, C]; an unused slot may be any number.

    Aligned and clean: as given, since causality hides what is not held yet. Else both [B, Hkv or Hq, C].
    """
    aligned, kv_heads = getattr(kv, "aligned", False), kv.k.shape[1]
    if aligned and getattr(kv, "clean", False):
        return columns, columns
    pos = columns.expand(kv.k.shape[0], kv_heads if columns.shape[1] in (1, kv_heads) else heads, -1)
    here = spread(kv.pos, pos.shape[0], pos.shape[1])  # [B, H', S]
    if aligned:
        slot = pos.clamp(0, kv.k.shape[2] - 1).long()
        held = here.gather(-1, slot) == pos
    else:
        match = here[:, :, None] == pos[..., None]  # [B, H', C, S]
        slot, held = match.to(torch.uint8).argmax(-1), match.any(-1)
    return pos.masked_fill(~held | (pos < 0), -1), slot


def _columns(q: torch.Tensor, kv: Any, decision: Any) -> _Columns:
    """Take the keys and values of the listed columns out."""
    (batch, heads), (kv_heads, slots) = q.shape[:2], kv.k.shape[1:3]
    pos, slot = _find(kv, decision.columns, heads)
    kept = kv_heads if pos.shape[1] in (1, kv_heads) else heads
    pos, slot = pos.expand(batch, kept, -1), slot.expand(batch, kept, -1).clamp(0, slots - 1).long()
    row = torch.arange(batch, device=q.device)[:, None, None]
    head = torch.arange(kept, device=q.device)[:, None] // (kept // kv_heads)
    keys, values = kv.k[row, head, slot], kv.v[row, head, slot].to(compute_dtype(q))  # [B, H', C, D]
    if not getattr(kv, "clean", False):  # no weight, but zero times NaN would be NaN
        values = values.masked_fill((pos < 0)[..., None], 0.0)
    factor = decision.factor.to(values.dtype)
    factor = factor.repeat_interleave(heads // factor.shape[1], dim=1).view(-1, kept, heads // kept, 1, pos.shape[-1])
    return _Columns(pos, slot, operand(keys).transpose(-1, -2), values, factor)
