"""Whether a row's query is like the one kept of an earlier step, which it replaces where it is not."""

from __future__ import annotations

import torch

from attnpatch.errors import ConfigError
from attnpatch.executors.backends import capability, no_triton
from attnpatch.executors.launching import on

WIDEST = 32768
"""Most numbers of a query that the one program of a row holds."""


def choose(query: torch.Tensor) -> tuple[str, str]:
    """(backend, reason) for queries [B, N]. Never waits for the device."""
    if capability(query.device) < 8:
        return "torch", "not triton: needs CUDA capability >= 8"
    if query.dtype != torch.float32 or query.shape[1] > WIDEST:
        return "torch", f"not triton: needs float32 and at most {WIDEST} numbers"
    why = no_triton()
    return ("triton", "the fastest that fits") if why is None else ("torch", f"not triton: {why}")


def _run_torch(
    query: torch.Tensor, kept: torch.Tensor, q_pos: torch.Tensor, threshold: float, above: bool
) -> torch.Tensor:
    cosine = torch.nn.functional.cosine_similarity(query, kept, dim=-1)
    like = (cosine > threshold if above else cosine >= threshold) | (q_pos < 0)
    kept.copy_(torch.where(like[:, None], kept, query))
    return like


@torch.no_grad()
def run(
    query: torch.Tensor, kept: torch.Tensor, q_pos: torch.Tensor, threshold: float, *, above: bool = False,
    _backend: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """bool [B]: rows whose query has a cosine of `threshold` or more to the kept one, or that have no query now.

    query, kept: fp32 [B, N]; q_pos: int [B], -1 = no query. The other rows' queries are written over the kept ones.
    A kept row of NaN is like nothing. above: a cosine of just `threshold` is not enough.
    """
    name = _backend or choose(query)[0]
    if name == "torch":
        return _run_torch(query, kept, q_pos, threshold, above)
    if name != "triton":
        raise ConfigError(f"{name!r} is not a backend of likeness; allowed: triton, torch.")
    from attnpatch.executors._likeness_triton import launch

    with on(query.device):
        return launch(query, kept, q_pos, threshold, above)
