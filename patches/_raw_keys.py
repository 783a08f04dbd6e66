"""Keys before their rotation, and lists of them side by side, for methods that give keys other positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.engine.call import KV, Ctx

RAW, ROOM = "tokens_raw", 256
"""Name of the keys before their rotation, and slots they may grow by before they are copied."""


def raw_keys(kv: KV, ctx: Ctx) -> Tensor:
    """The keys before their rotation [B, Hkv, S, D], kept with the layer and brought up to date."""
    import torch

    old, done = kv.rows.get(RAW), kv.plain.get(RAW, 0)
    kv.plain[RAW] = kv.S  # slots that are there
    batch = kv.k.shape[0]
    if old is None or done > kv.S:
        old, done = kv.k[:, :, :0], 0
    if done == kv.S:
        return old[:, :, : kv.S]
    if old.shape[2] < kv.S:  # with room for the next ones
        new = kv.k.new_zeros(*kv.k.shape[:2], kv.S + ROOM, kv.k.shape[3])
        new[:, :, :done] = old[:, :, :done]
        old = kv.rows[RAW] = new
    if ctx.event == "step" and done == kv.S - 1:  # rows end at different slots
        at = ctx.q_pos[:, -1:].clamp(min=0)  # [B, 1]
        wide = at[:, None, :, None].expand(-1, kv.k.shape[1], -1, kv.k.shape[3])
        old.scatter_(2, wide, ctx.turn(kv.k.gather(2, wide), -at))
        return old[:, :, : kv.S]
    done = 0 if ctx.ragged else done
    at = torch.arange(done, kv.S, device=kv.k.device).expand(batch, -1)
    old[:, :, done : kv.S] = ctx.turn(kv.k[:, :, done:], -at)
    return old[:, :, : kv.S]


def side_by_side(
    first: int, chosen: Tensor, held: Tensor, near: Tensor | int, width: int, slots: int
) -> tuple[Tensor, Tensor]:
    """The first keys, the chosen ones and the last ones as lists int32 [..., M], ascending, and how many [...].

    chosen: int [..., n], between both, `slots` = none; held: int [...], keys of a row; near: int [...] or one of all,
    no more than width: its last ones. `slots` stands behind those that are meant.
    """
    import torch

    early = (held - near).clamp(min=0)[..., None]
    at = torch.arange(first, device=held.device).expand(*held.shape, -1)
    late = early + torch.arange(width, device=held.device)
    keys = torch.cat([
        torch.where(at < early, at, slots), chosen, torch.where(late < held[..., None], late, slots)
    ], dim=-1).sort(dim=-1).values.to(torch.int32)  # fmt: skip
    return keys, (keys < slots).sum(-1, dtype=torch.int32)
