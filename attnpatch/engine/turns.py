"""The turns of a forward's new tokens back to position 0, which its layers share (`Call.turns`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attnpatch.executors.likeness import Pairs

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.engine.call import Call

AHEAD = 32
"""Decode steps whose turns are made at once: some forty operations, for one step or for many."""


def unturned(call: Call, x: Tensor, index: int) -> Tensor:
    """x [B, H, 1, D] of this step's tokens in layer `index`, turned back to position 0, in fp32.

    The layers share the turn, a matrix: to build it takes longer than to apply it.
    """
    if index not in call.plan.rope.turned:
        return x.float()
    return (x[:, :, 0].float() @ _matrix(call, x, index))[:, :, None]


def pairs(call: Call, x: Tensor, index: int) -> Pairs | None:
    """The same turn as `Pairs`; None where it is none, or no rotation of pairs of channels."""
    rope = call.plan.rope
    if index not in rope.turned:
        return None
    key = "pairs", _kind(call, x, index)
    if key not in call.turns:
        partner = rope.partner(index, x.shape[3], x.device)
        call.turns[key] = None if partner is None else _new_pairs(call, x, index, partner)
    return call.turns[key]


def _new_pairs(call: Call, x: Tensor, index: int, partner: Tensor) -> Pairs:
    """Steps in which all rows stand at one position take theirs from those of AHEAD steps, made at once."""
    now, cache = call.before, call.cache
    if call.padding is not None or cache is None or call.length > 1 or torch.compiler.is_compiling():
        return Pairs.of(_matrix(call, x, index), partner)
    key = _kind(call, x, index)
    first, known = cache.turns.get(key, (0, None))
    if known is None or not 0 <= now - first < AHEAD:
        at = torch.arange(now, now + AHEAD, device=x.device)
        first, known = cache.turns[key] = now, Pairs.of(call.plan.rope.matrix(index, -at[:, None], x.shape[3]), partner)
    row = slice(now - first, now - first + 1)
    return Pairs(known.same[row], known.other[row], partner)


def _kind(call: Call, x: Tensor, index: int) -> Any:
    """What layers that turn alike have in common, and x [B, H, 1, D] with it."""
    types = call.plan.rope.types
    return None if types is None else types[index], x.shape[0], x.shape[3], x.device


def _matrix(call: Call, x: Tensor, index: int) -> Tensor:
    """fp32 [B, D, D] that turns x [B, H, 1, D] of layer `index` back."""
    key = "matrix", _kind(call, x, index)
    if key not in call.turns:
        call.turns[key] = call.plan.rope.matrix(index, -call.q_pos(x.shape[0], x.device), x.shape[3])
    return call.turns[key]
