"""The lists of a stripe of query blocks, made from what a method chose: offsets, columns and single pairs of blocks."""

from __future__ import annotations

import torch

from attnpatch.errors import ConfigError
from attnpatch.executors.backends import capability, no_triton, too_old
from attnpatch.executors.launching import on
from attnpatch.executors.lists import pack
from attnpatch.executors.selecting import offsets_to_pairs, real_pairs

Lists = tuple[torch.Tensor, torch.Tensor]


def choose(offsets: torch.Tensor) -> tuple[str, str]:
    """(backend, reason) for these blocks. Never waits for the device."""
    device = offsets.device
    why = too_old(device.type, capability(device), 8) or no_triton()
    return ("triton", "the fastest that fits") if why is None else ("torch", f"not triton: {why}")


def _run_torch(
    offsets: torch.Tensor, columns: torch.Tensor | None, pairs: torch.Tensor | None, whole: torch.Tensor | None,
    end: torch.Tensor, block: int, first: int, last: int,
) -> Lists:  # fmt: skip
    chosen = offsets_to_pairs(offsets, first, last)  # [B, H, R, last]
    if columns is not None:
        chosen = chosen | columns[:, :, None, :last]
    if pairs is not None:
        chosen = chosen | pairs[..., :last]
    if whole is not None:
        chosen = chosen | whole[:, None, None, None]
    return pack(chosen & real_pairs(end, block, first, last))


def run(
    offsets: torch.Tensor, end: torch.Tensor, block: int, first: int, last: int, *,
    columns: torch.Tensor | None = None, pairs: torch.Tensor | None = None, whole: torch.Tensor | None = None,
    _backend: str | None = None,
) -> Lists:  # fmt: skip
    """Lists of query blocks first .. last - 1, as of `lists.pack`: index int32 [B, H, R, last], count int32 [B, H, R].

    Query block i reads key block j <= i where offset i - j is set, or column j, or pair (i - first, j), or where the
    batch row is read whole; a block that begins at or behind the end of its row reads nothing. offsets, columns: bool
    [B|1, H|1, n >= last]; pairs: bool [B|1, H|1, R, n >= last]; whole: bool [B]; end: int [B] keys of each row.
    """
    name = _backend or choose(offsets)[0]
    if name == "torch":
        return _run_torch(offsets, columns, pairs, whole, end, block, first, last)
    if name != "triton":
        raise ConfigError(f"{name!r} is not a backend of block_lists; allowed: triton, torch.")
    from attnpatch.executors._block_lists_triton import launch

    with on(offsets.device):
        return launch(offsets, columns, pairs, whole, end, block, first, last)
