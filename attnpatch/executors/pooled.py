"""Scores of a row's keys, each the highest of its neighbourhood: what a method lists keys by, with their context."""

from __future__ import annotations

import torch

from attnpatch.errors import ConfigError, InputError
from attnpatch.executors import top_slots
from attnpatch.executors.backends import capability, no_triton
from attnpatch.executors.launching import on, without_grad


def choose(scores: torch.Tensor) -> tuple[str, str]:
    """(backend, reason) for these scores. Never waits for the device."""
    if capability(scores.device) < 8:
        return "torch", "not triton: needs CUDA capability >= 8"
    if scores.dtype != torch.float32:
        return "torch", f"not triton: needs float32, this is {str(scores.dtype).removeprefix('torch.')}"
    why = no_triton()
    return ("triton", "the fastest that fits") if why is None else ("torch", f"not triton: {why}")


def _run_torch(scores: torch.Tensor, width: int, newest: torch.Tensor, own: bool) -> torch.Tensor:
    slot, last = torch.arange(scores.shape[-1], device=scores.device), newest[:, None, None]
    behind, mine = slot > last, slot == last  # [B, 1, S]
    scores = scores.masked_fill(slot >= last if own else behind, float("-inf"))
    if width > 1:
        scores = torch.nn.functional.max_pool1d(scores, width, 1, width // 2)
    scores = scores.masked_fill(behind, float("-inf"))
    return scores.masked_fill(mine, float("inf")) if own else scores


@without_grad
def run(
    scores: torch.Tensor, width: int, newest: torch.Tensor, *, own: bool = False, skip: torch.Tensor | None = None,
    bins: torch.Tensor | None = None, _backend: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """fp32 [B, H, S]: the highest of `width` neighbouring scores, among slots 0 .. newest[b]; -inf behind them.

    scores: fp32 [B, H, S]; width: odd; newest: int [B], -1 = a row without any. own: the score at `newest` counts
    nowhere, and +inf stands in its place. skip: bool [B], rows not read: what is returned of them is undefined.
    bins: zeroed ones of `top_slots.bins`, in which rows that do not skip are counted by the way.
    """
    if width < 1 or width % 2 == 0:
        raise InputError(f"a neighbourhood of {width} scores has no middle; give an odd width.")
    name = _backend or choose(scores)[0]
    if name == "torch":
        found = _run_torch(scores, width, newest, own)
        if bins is not None:
            top_slots.count_first(found, bins)
        return found
    if name != "triton":
        raise ConfigError(f"{name!r} is not a backend of pooled; allowed: triton, torch.")
    from attnpatch.executors._pooled_triton import launch

    with on(scores.device):
        return launch(scores.contiguous(), width, newest, own, skip, bins)
