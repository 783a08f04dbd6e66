"""The lists of a stripe of query blocks that hold a share of each block's estimated mass. `choose` says how."""

from __future__ import annotations

import torch

from attnpatch.errors import ConfigError
from attnpatch.executors import block_lists, lists
from attnpatch.executors.backends import capability, no_triton, too_old
from attnpatch.executors.block_lists import Lists
from attnpatch.executors.launching import on

MOST = 32768
"""Most key blocks of the fused form: a program holds a row."""


def choose(mass: torch.Tensor, early: torch.Tensor | None = None) -> tuple[str, str]:
    """(backend, reason) for this mass: "triton" (fused) or "torch" (step by step). Never waits for the device."""
    why = too_old(mass.device.type, capability(mass.device), 8)
    if why is None and mass.dtype != torch.float32:
        why = f"needs float32, this is {str(mass.dtype).removeprefix('torch.')}"
    if why is None and mass.shape[-1] > MOST:
        why = f"takes {MOST} key blocks, these are {mass.shape[-1]}"
    if why is None and early is not None:
        why = "looks back alike at every block"
    why = why or no_triton()
    return ("triton", "the fastest that fits") if why is None else ("torch", f"not triton: {why}")


def _run_torch(
    mass: torch.Tensor, end: torch.Tensor, block: int, first: int, threshold: torch.Tensor | float,
    early: torch.Tensor | None,
) -> Lists:  # fmt: skip
    last = mass.shape[3]
    i = torch.arange(first, last, device=mass.device)[:, None]  # [R, 1]
    j = torch.arange(last, device=mass.device)
    required = mass.sum(-1) * threshold  # [B, H, R]
    at_own = mass.diagonal(first, 2, 3)  # [B, H, R]
    at_forced = at_own + mass[..., 0].masked_fill(i[:, 0] == 0, 0.0)
    zero = j == 0
    chosen = lists.top_mass(mass.masked_fill((j >= i) | zero, float("-inf")), required, taken=at_forced)
    if early is not None:
        others = mass.masked_fill(j >= i, float("-inf"))
        chosen = torch.where(early[..., None], lists.top_mass(others, required, taken=at_own, lag=2), chosen)
    zero = zero.expand(1, 1, -1)
    return block_lists.run(zero, end, block, first, last, columns=zero, pairs=chosen)


@torch.no_grad()
def run(
    mass: torch.Tensor, end: torch.Tensor, block: int, first: int, threshold: torch.Tensor | float, *,
    early: torch.Tensor | None = None, _backend: str | None = None,
) -> Lists:  # fmt: skip
    """Lists of query blocks first .. W - 1, as of `lists.pack`: index int32 [B, H, R, W], count int32 [B, H, R].

    Query block i reads the first key block, its own, and the largest between, best first, until they hold `threshold`
    of the row's mass together, the one that crosses it included; ties go to the later block. A block that begins at or
    behind the end of its row reads nothing. mass: fp32 (fp64) [B, H, R, W], R the last of W, at least 0, and 0 above
    the diagonal; threshold: a number, or [H, 1] of mass's dtype; end: int [B] keys of each row.
    early: bool, broadcasts to [B, H, R]: blocks that are forced to read their own alone, and take one block more (the
    first chunk of XAttention's reference).
    """
    name = _backend or choose(mass, early)[0]
    if name == "torch":
        return _run_torch(mass, end, block, first, threshold, early)
    if name != "triton" or early is not None:
        raise ConfigError(
            f"lists of a share by {name!r}: allowed are 'torch', and 'triton' where no block looks back one more."
        )
    from attnpatch.executors._mass_lists_triton import launch

    with on(mass.device):
        return launch(mass, end, block, first, threshold)
