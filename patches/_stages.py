"""InfiniteHiP's stages: chunks are scored by keys found by halving them, per query head, and the best are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnpatch.patches.infinitehip import InfiniteHiP
    from torch import Tensor

    from attnpatch.engine.call import Ctx

INDEXED = 3
"""First layers in which the keys of a chunk share a position where positions are re-numbered."""


def search(
    patch: InfiniteHiP, groups: list[tuple[Tensor, Tensor]], k: Tensor, end: Tensor, kept: list[int], reach: int,
    ctx: Ctx, due: int = 0, known: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """First slots int32 [B, R, M] of the chunks that each stage from `due` on keeps, ascending.

    groups: for each stage the queries [B, Hq, R, n, D] and the last slots int [B, R, n] that they score; end: int32
    [B, R], slots from here on are not searched; reach: chunks of the first stage; known: what stage due - 1 kept.
    Chunks at or behind `end` are none, and come last.
    """
    import torch

    from attnpatch.executors.lists import best

    lists, start = [], known
    for i in range(due, len(patch.chunks)):
        chunk = patch.chunks[i]
        if start is None:
            start = torch.arange(reach, dtype=torch.int32, device=k.device) * chunk + patch.sink
            start = start.expand(*end.shape, -1)
        else:
            start = start[..., None] + torch.arange(0, patch.chunks[i - 1], chunk, dtype=torch.int32,
                                                    device=k.device)  # fmt: skip
            start = start.flatten(-2)
        if start.shape[-1] > kept[i] // chunk:
            scores = _scores(patch, *groups[i], k, start, end, chunk, ctx)
            start = start.gather(-1, best(scores, kept[i] // chunk))
        lists.append(start)
    return lists


def _scores(
    patch: InfiniteHiP, mean: Tensor, limit: Tensor, k: Tensor, start: Tensor, end: Tensor, chunk: int, ctx: Ctx
) -> Tensor:
    """fp32 [B, R, M]: the highest score of a chunk, over heads and queries, by its representatives.

    start: int32 [B, R, M], chunks of `chunk` keys, -inf for those at or behind end [B, R]; others as in `search`.
    """
    import torch

    stop, meant = end[:, None, :, None], start < end[..., None]
    at, score = start[:, None].expand(-1, mean.shape[1], -1, -1), None  # [B, Hq, R, M]
    code, size, place, further = patch.representative == "code", chunk, None, None
    if patch.repositions and ctx.layer < INDEXED:  # the last chunk stands at 0, those before it further back
        place = torch.arange(1, start.shape[-1] + 1, device=k.device) - meant.sum(-1, keepdim=True)
    elif patch.repositions:
        one = torch.ones_like(limit.flatten(1)).expand(mean.shape[0], -1)
        further = ctx.turn(mean.flatten(2, 3), one).view_as(mean)
    if chunk == 1:
        score = _products(mean, limit, k, at.clamp(max=k.shape[2] - 1), ctx, place)
    while size > 1:
        size //= 2
        half = torch.stack([at, at + size], dim=-1)  # [B, Hq, R, M, 2]
        probe = torch.minimum(half + (size // 2 if code else 0), stop[..., None] - 1).clamp(min=0)
        both = None if place is None else place.repeat_interleave(2, dim=-1)
        found = _products(mean, limit, k, probe.flatten(-2), ctx, both).unflatten(-1, (-1, 2))
        left, right = found.masked_fill(half >= stop[..., None], float("-inf")).unbind(-1)
        rival = left if further is None else _products(further, limit, k, probe[..., 0], ctx)
        won = (rival > right) & (half[..., 0] < stop)
        at = torch.where(won, half[..., 0], half[..., 1])
        top = torch.maximum(left, right) if code else torch.where(won, left, right)
        score = top if score is None or not code else torch.maximum(score, top)
    return score.amax(dim=1).masked_fill(~meant, float("-inf"))  # type: ignore[union-attr]


def _products(mean: Tensor, limit: Tensor, k: Tensor, slot: Tensor, ctx: Ctx, place: Tensor | None = None) -> Tensor:
    """[B, Hq, R, L]: highest product of the keys at slot [B, Hq, R, L] with a query that may score them.

    place: int [B, R, L], positions that the keys are turned to, or None.
    """
    import torch

    from attnpatch.executors.row_lists import take

    keys = take(k, slot).to(mean.dtype)  # [B, Hq, R, L, D]
    if place is not None:
        keys = ctx.turn(keys.flatten(2, 3), place.clamp(max=0).flatten(1)).view_as(keys)
    dots = mean @ keys.transpose(-1, -2)  # [B, Hq, R, n, L]
    lowest = torch.finfo(torch.float32).min
    return torch.where(slot[:, :, :, None] <= limit[:, None, ..., None], dots, lowest).amax(3)
