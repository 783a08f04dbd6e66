"""What the Triton kernels' launches share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from attnpatch.executors.backends import capability


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes `device` the current one: Triton launches there, which need not be where a spread model's layer lies."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def rowwise(x: torch.Tensor) -> torch.Tensor:
    """x with its last dimension contiguous, as the kernels read it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(x: torch.Tensor | None, dims: int) -> list[int]:
    """Strides of the first dimensions, 0 where there is one entry (or no tensor) for all."""
    if x is None:
        return [0] * dims
    return [0 if x.shape[i] == 1 else x.stride(i) for i in range(dims)]


CHAINED = False
"""Whether the kernels of a decode step follow one another by programmatic dependent launch, where the GPU has it."""


def chained(device: torch.device) -> dict[str, bool]:
    """What launches a kernel on `device` that begins by `_follow_triton.follow`."""
    if not CHAINED or torch.compiler.is_compiling() or capability(device) < 9:
        return {"CHAINED": False}
    return {"CHAINED": True, "launch_pdl": True}


_processors: dict[torch.device, int] = {}


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 8 elsewhere, where the kernels are only interpreted."""
    if device.type != "cuda":
        return 8
    if device not in _processors:
        _processors[device] = torch.cuda.get_device_properties(device).multi_processor_count
    return _processors[device]
