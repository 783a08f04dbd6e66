"""Whether a row's query is like the one kept of an earlier step, which it replaces where it is not."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from attnpatch.errors import ConfigError
from attnpatch.executors.backends import HALF, capability, no_triton
from attnpatch.executors.launching import on, without_grad

WIDEST = 32768
"""Most numbers of a query that the one program of a row holds."""


class Pairs(NamedTuple):
    """A rotation of pairs of channels: channel d becomes x[d] * same[d] + x[partner[d]] * other[d]."""

    same: torch.Tensor  # fp32 [B|1, D]
    other: torch.Tensor  # fp32 [B|1, D], 0 where a channel is its own partner
    partner: torch.Tensor  # int32 [D]

    @classmethod
    def of(cls, matrix: torch.Tensor, partner: torch.Tensor) -> Pairs:
        """Of the matrix fp32 [B, D, D] (x @ matrix) whose column d has nothing outside the rows d and partner[d]."""
        d = torch.arange(matrix.shape[-1], device=matrix.device)
        other = matrix[:, partner.long(), d].masked_fill(partner == d, 0.0)
        return cls(matrix.diagonal(dim1=-2, dim2=-1).contiguous(), other, partner)

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, H, D] rotated, in fp32."""
        x = x.float()
        return x * self.same[:, None] + x[..., self.partner.long()] * self.other[:, None]


def partners(matrix: torch.Tensor) -> torch.Tensor | None:
    """int32 [D] for `Pairs` of all of matrix [N, D, D], or None where a column has more entries. Waits for the device.

    N rotations, so that an angle which happens to be none hides nothing.
    """
    some = (matrix != 0).any(0)  # [D, D]
    apart = some & ~torch.eye(some.shape[0], dtype=torch.bool, device=some.device)
    if bool((apart.sum(0) > 1).any()):
        return None
    own = torch.arange(some.shape[0], device=some.device)
    return torch.where(apart.any(0), apart.to(torch.uint8).argmax(0), own).to(torch.int32)


def choose(query: torch.Tensor) -> tuple[str, str]:
    """(backend, reason) for queries [B, N] or [B, H, D]. Never waits for the device."""
    if capability(query.device) < 8:
        return "torch", "not triton: needs CUDA capability >= 8"
    if query.dtype not in (*HALF, torch.float32) or query.shape[1:].numel() > WIDEST:
        return "torch", f"not triton: needs float16, bfloat16 or float32 and at most {WIDEST} numbers"
    why = no_triton()
    return ("triton", "the fastest that fits") if why is None else ("torch", f"not triton: {why}")


def _run_torch(
    query: torch.Tensor, kept: torch.Tensor, q_pos: torch.Tensor, threshold: float, above: bool,
    turn: Pairs | None, mean: bool, least: int, tally: torch.Tensor | None, scored: torch.Tensor | None, read: int,
) -> torch.Tensor:  # fmt: skip
    query = query.float()
    query = query.mean(1, keepdim=True) if mean else query
    query = query if turn is None else turn.turned(query)
    query, idle = query.flatten(1), q_pos < 0
    cosine = torch.nn.functional.cosine_similarity(query, kept, dim=-1)
    like = (cosine > threshold if above else cosine >= threshold) | idle
    kept.copy_(torch.where(like[:, None], kept, query))
    if least:
        kept.masked_fill_((~idle & (q_pos < least))[:, None], float("nan"))
    if tally is not None:
        tally += torch.stack([~idle, like & ~idle], -1)
    if scored is not None:
        scored += ~like * read
    return like


@without_grad
def run(
    query: torch.Tensor, kept: torch.Tensor, q_pos: torch.Tensor, threshold: float, *, above: bool = False,
    turn: Pairs | None = None, mean: bool = False, least: int = 0, tally: torch.Tensor | None = None,
    scored: torch.Tensor | None = None, read: int = 0, _backend: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """bool [B]: rows whose query has a cosine of `threshold` or more to the kept one, or that have no query now.

    query: [B, N], or [B, H, D] with all heads as one vector (mean: their mean as one of D), turned by `turn` first;
    kept: fp32 [B, N]; q_pos: int [B], -1 = no query. The other rows' queries are written over the kept ones.
    A kept row of NaN is like nothing. above: a cosine of just `threshold` is not enough.
    least: what is kept of a row with a query before this position is NaN afterwards. Counters, changed in
    place: tally int64 [B, 2], plus one where there is a query, plus one where it is like the kept one; scored int64
    [B], plus `read` where a row is not like.
    """
    name = _backend or choose(query)[0]
    if name == "torch":
        return _run_torch(query, kept, q_pos, threshold, above, turn, mean, least, tally, scored, read)
    if name != "triton":
        raise ConfigError(f"{name!r} is not a backend of likeness; allowed: triton, torch.")
    from attnpatch.executors._likeness_triton import launch

    with on(query.device):
        return launch(query, kept, q_pos, threshold, above, turn, mean, least, tally, scored, read)


def of_step(
    q: torch.Tensor, ctx: Any, kept: torch.Tensor, threshold: float, *, mean: bool = False, **more: Any
) -> torch.Tensor:  # fmt: skip
    """`run` for a step's queries q [B, Hq, 1, D] as they are before their rotation, those of other processes too."""
    turn = None if ctx.pairs is None else ctx.pairs()
    if turn is not None:
        query = ctx.shard.all(q)
    elif mean:
        query, mean = ctx.back(ctx.shard.all(q.float()).mean(1, keepdim=True)), False
    else:
        query = ctx.shard.all(ctx.back(q))
    return run(query[:, :, 0], kept, ctx.q_pos[:, -1], threshold, turn=turn, mean=mean, **more)
