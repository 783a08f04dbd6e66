"""The slots with the highest scores of each row, in order of the slots: what a list of pages or tokens needs.

`choose` says how. The Triton form sorts nothing: a histogram of bits finds the k-th highest score, at memory speed.
"""

from __future__ import annotations

import torch

from attnpatch.decisions import ranked
from attnpatch.errors import ConfigError, InputError
from attnpatch.executors.backends import capability, no_triton, too_old
from attnpatch.executors.launching import on, without_grad

Result = tuple[torch.Tensor, torch.Tensor]


def choose(scores: torch.Tensor) -> tuple[str, str]:
    """(backend, reason) for these scores. Never waits for the device."""
    why = too_old(scores.device.type, capability(scores.device), 8)
    if why is None and scores.dtype != torch.float32:
        why = f"needs float32, this is {str(scores.dtype).removeprefix('torch.')}"
    why = why or no_triton()
    return ("triton", "the fastest that fits") if why is None else ("torch", f"not triton: {why}")


def bins(shape: torch.Size, n: int, device: torch.device) -> torch.Tensor | None:
    """What `run` counts in for rows [...] = shape of n fp32 scores, not zeroed; None where it needs nothing."""
    if choose(torch.empty(0, device=device))[0] != "triton":
        return None
    from attnpatch.executors._top_slots_triton import BINS, PASSES, SHORT

    return None if n <= SHORT else torch.empty(*shape, PASSES, BINS, dtype=torch.int32, device=device)


def count_first(scores: torch.Tensor, bins: torch.Tensor) -> None:
    """Add scores fp32 [..., n] to bins [..., passes, BINS] by their first digit, in place."""
    bits = scores.view(torch.int32)
    digit = ((bits ^ ((bits >> 31) | -(2**31))) >> 24) & 255
    bins[..., 0, :].scatter_add_(-1, digit.long(), (scores > float("-inf")).to(torch.int32))


def _run_torch(scores: torch.Tensor, k: int, most: torch.Tensor | None) -> Result:
    n = scores.shape[-1]
    index = ranked(scores, min(k, n))
    meant = scores.gather(-1, index) != float("-inf")
    if most is not None:
        meant = meant & (torch.arange(index.shape[-1], device=index.device) < most[..., None])
    index = torch.where(meant, index, n).sort(dim=-1).values.to(torch.int32)
    return torch.nn.functional.pad(index, (0, k - index.shape[-1]), value=n), meant.sum(-1, dtype=torch.int32)


@without_grad
def run(
    scores: torch.Tensor, k: int, most: torch.Tensor | None = None, *, old: Result | None = None,
    skip: torch.Tensor | None = None, bins: torch.Tensor | None = None, counted: bool = False,
    _backend: str | None = None,
) -> Result:  # fmt: skip
    """The k best slots of each row, ascending, and how many: int32 [..., k], packed left, n behind; int32 [...].

    scores: fp32 [..., n]; ties go to the later slot, -inf is never chosen. most: int, broadcasts to [...], no more than
    so many in a row. skip: bool, broadcasts to [...], rows whose scores are not read, which keep `old`, an earlier
    result: it is overwritten and returned. bins: of the function of that name, zeroed (but for
    rows that skip) by whatever made the scores, which saves a launch; counted: it made the first pass, too
    (`count_first`). Never waits for the device.
    """
    if (old is None) != (skip is None):
        raise InputError("top_slots takes `old` and `skip` together, or neither.")
    if counted and bins is None:
        raise InputError("top_slots cannot go on from a first pass without the bins it counted in; give `bins`.")
    name = _backend or choose(scores)[0]
    shape = scores.shape[:-1]
    if name == "torch":
        new = _run_torch(scores, k, most)
        if old is None or skip is None:
            return new
        skip = skip.expand(shape)
        old[0].copy_(torch.where(skip[..., None], old[0], new[0]))
        old[1].copy_(torch.where(skip, old[1], new[1]))
        return old
    if name != "triton":
        raise ConfigError(f"{name!r} is not a backend of top_slots; allowed: triton, torch.")
    from attnpatch.executors._top_slots_triton import launch

    if old is None:
        old = (
            torch.empty(*shape, k, dtype=torch.int32, device=scores.device),
            torch.empty(shape, dtype=torch.int32, device=scores.device),
        )
    with on(scores.device):
        launch(scores, k, most, skip, *old, bins, counted)
    return old
