"""Scores of chunks of keys by representatives that are found by halving them: what InfiniteHiP's stages choose by."""

from __future__ import annotations

from collections.abc import Callable

import torch

from attnpatch.errors import ConfigError
from attnpatch.executors import column_sums
from attnpatch.executors.backends import HALF, capability, no_triton, too_old
from attnpatch.executors.column_sums import compute_dtype
from attnpatch.executors.launching import on, power_of_2, without_grad
from attnpatch.executors.row_lists import take

Turn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def parts(q: torch.Tensor, k: torch.Tensor, further: bool) -> int:
    """Matrices of k's dtype that the Triton form makes of a block's queries: means of halves need two each."""
    return (1 if q.dtype == k.dtype else 2) * (2 if further else 1)


def large(device: torch.device) -> bool:
    """Whether a multiprocessor has the shared memory of a data centre's GPU since Hopper, 227 KB."""
    return capability(device) in (9, 10)


def choose(q: torch.Tensor, k: torch.Tensor, further: bool = False, placed: bool = False) -> tuple[str, str]:
    """(backend, reason) for queries [B, Hq, R, n, D] and keys [B, Hkv, S, D], as `run` takes them. Never waits."""
    if why := too_old(k.device.type, capability(k.device), 8):
        return "torch", f"not triton: {why}"
    if placed:
        return "torch", "not triton: turns no keys to other positions"
    dim = k.shape[-1]
    if k.dtype not in (*HALF, torch.float32) or q.dtype not in (k.dtype, torch.float32) or dim > 256:
        return "torch", (
            "not triton: needs keys of float16, bfloat16 or float32, queries of the same or means in float32, and head "
            "dimension up to 256"
        )
    held = max(16, power_of_2(q.shape[3])) * max(16, power_of_2(dim)) * k.element_size() * parts(q, k, further) / 1024
    fits = 32 if k.dtype not in HALF else 128 if large(k.device) else 64
    if held > fits:
        return "torch", f"not triton: holds at most {fits} KB of a block's queries at once here, not {held:.0f}"
    why = no_triton()
    return ("triton", "the fastest that fits") if why is None else ("torch", f"not triton: {why}")


def _products(
    q: torch.Tensor, limit: torch.Tensor, k: torch.Tensor, slot: torch.Tensor, turn: Turn | None = None,
    place: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """[B, Hq, R, L]: highest product of the keys at slot [B, Hq, R, L] with a query that may score them.

    place: int [B, R, L], positions that `turn` turns the keys to, or None.
    """
    dtype = compute_dtype(q)
    keys = take(k, slot).to(dtype)  # [B, Hq, R, L, D]
    if turn is not None and place is not None:
        keys = turn(keys.flatten(2, 3), place.flatten(1)).view_as(keys)
    dots = q.to(dtype) @ keys.transpose(-1, -2)  # [B, Hq, R, n, L]
    lowest = torch.finfo(torch.float32).min
    return torch.where(slot[:, :, :, None] <= limit[:, None, ..., None], dots, lowest).amax(3)


def _descend(
    q: torch.Tensor, limit: torch.Tensor, k: torch.Tensor, start: torch.Tensor, end: torch.Tensor, chunk: int,
    middle: bool, further: torch.Tensor | None, turn: Turn | None, place: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """As `run`, all blocks at once."""
    stop, meant = end[:, None, :, None], start < end[..., None]
    at, score, size = start[:, None].expand(-1, q.shape[1], -1, -1), None, chunk  # [B, Hq, R, M]
    both = None if place is None else place.repeat_interleave(2, dim=-1)
    if chunk == 1:
        score = _products(q, limit, k, at.clamp(max=k.shape[2] - 1), turn, place)
    while size > 1:
        size //= 2
        half = torch.stack([at, at + size], dim=-1)  # [B, Hq, R, M, 2]
        probe = torch.minimum(half + (size // 2 if middle else 0), stop[..., None] - 1).clamp(min=0)
        found = _products(q, limit, k, probe.flatten(-2), turn, both).unflatten(-1, (-1, 2))
        left, right = found.masked_fill(half >= stop[..., None], float("-inf")).unbind(-1)
        rival = left if further is None else _products(further, limit, k, probe[..., 0])
        won = (rival > right) & (half[..., 0] < stop)
        at = torch.where(won, half[..., 0], half[..., 1])
        top = torch.maximum(left, right) if middle else torch.where(won, left, right)
        score = top if score is None or not middle else torch.maximum(score, top)
    return score.amax(dim=1).masked_fill(~meant, float("-inf"))  # type: ignore[union-attr]


def _run_torch(
    q: torch.Tensor, limit: torch.Tensor, k: torch.Tensor, start: torch.Tensor, end: torch.Tensor, chunk: int,
    middle: bool, further: torch.Tensor | None, turn: Turn | None, place: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Block after block, as many at once as gathered keys fit MAX_BLOCK."""
    batch, heads, lists, samples, dim = q.shape
    step = column_sums.rows_per_block(batch, heads, 2 * max(1, start.shape[-1]) * max(dim, samples), lists)
    scores = []
    for begin in range(0, lists, step):
        part = slice(begin, begin + step)
        more = None if further is None else further[:, :, part]
        places = None if place is None else place[:, part]
        scores.append(_descend(
            q[:, :, part], limit[:, part], k, start[:, part], end[:, part], chunk, middle, more, turn, places
        ))  # fmt: skip
    return scores[0] if len(scores) == 1 else torch.cat(scores, dim=1)


@without_grad
def run(
    q: torch.Tensor, limit: torch.Tensor, k: torch.Tensor, start: torch.Tensor, end: torch.Tensor, *, chunk: int,
    middle: bool = True, further: torch.Tensor | None = None, turn: Turn | None = None,
    place: torch.Tensor | None = None, _backend: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """fp32 [B, R, M] (fp64 for fp64): the highest score of a chunk, over query heads; -inf at or behind `end`.

    q: [B, Hq, R, n, D], the queries of block r, of k's dtype or means of such in fp32; limit: int [B, R, n], the last
    slot that each may score (negative: none, it is not looked at); k: [B, Hkv, S, D]; start: int32 [B, R, M], first
    slots of chunks of `chunk` keys, a power of two; end: int32 [B, R], slots from here on (at most S) are not read.
    Each query head halves a chunk down to one key: a key of each half is scored, by its highest product in fp32 with a
    query of the block, and the better half kept, of equal ones the later; a half at or behind `end` never is.
    middle: the key is a half's middle one, and the chunk's score the highest met; else a half's first, and the last
    winner's score. Either is taken before `end`.
    further: queries like q, by which left halves are compared instead of by q.
    turn, place: keys of chunk m are turned by turn(keys [B, H, N, D], int [B, N]) to place int [B, R, M] first.
    """
    if chunk < 1 or chunk & (chunk - 1):
        raise ConfigError(f"chunk={chunk} does not halve down to one key; give a power of two.")
    if (turn is None) != (place is None):
        raise ConfigError("chunk_scores: keys are turned to places by turn; give both turn and place, or none.")
    name = _backend or choose(q, k, further is not None, turn is not None)[0]
    if name == "torch":
        return _run_torch(q, limit, k, start, end, chunk, middle, further, turn, place)
    if name != "triton":
        raise ConfigError(f"{name!r} is not a backend of chunk_scores; allowed: triton, torch.")
    if turn is not None:
        raise ConfigError(
            "chunk_scores: the backend 'triton' turns no keys to other positions; use 'torch', or leave out turn and "
            "place."
        )
    from attnpatch.executors._chunk_scores_triton import launch

    with on(k.device):
        return launch(q, limit, k, start, end, chunk, middle, further)
