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
    patch: InfiniteHiP, q: Tensor, limit: Tensor, k: Tensor, start: Tensor, end: Tensor, chunk: int, ctx: Ctx
) -> Tensor:
    """fp32 [B, R, M]: the highest score of a chunk, over heads and queries, by its representatives.

    start: int32 [B, R, M], chunks of `chunk` keys, -inf for those at or behind end [B, R]; others as in `search`.
    """
    import torch

    from attnpatch.executors import chunk_scores

    further = turn = place = None
    if patch.repositions and ctx.layer < INDEXED:  # the last chunk stands at 0, those before it further back
        meant = (start < end[..., None]).sum(-1, keepdim=True)
        place = (torch.arange(1, start.shape[-1] + 1, device=k.device) - meant).clamp(max=0)
        turn = ctx.turn
    elif patch.repositions:
        one = torch.ones_like(limit.flatten(1)).expand(q.shape[0], -1)
        further = ctx.turn(q.flatten(2, 3), one).view_as(q)
    return chunk_scores.run(
        q, limit, k, start, end, chunk=chunk, middle=patch.representative == "code", further=further, turn=turn,
        place=place,
    )  # fmt: skip
