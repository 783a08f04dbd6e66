"""What the Triton kernels' launches share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from attnpatch.executors.backends import capability

P = ParamSpec("P")
R = TypeVar("R")
_HERE = nullcontext()


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes `device` the current one: Triton launches there, which need not be where a spread model's layer lies."""
    if torch.compiler.is_compiling():
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return _HERE
    return torch.cuda.device(device)


def without_grad(compute: Callable[P, R]) -> Callable[P, R]:
    """`torch.no_grad()` as a decorator, at next to no cost where nothing is recorded anyhow, as in a decode step."""

    @wraps(compute)
    def quiet(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_grad_enabled():
            return compute(*args, **kwargs)
        with torch.no_grad():
            return compute(*args, **kwargs)

    return quiet


def power_of_2(n: int) -> int:
    """The smallest one that is no less than n >= 1. `triton.next_power_of_2` is made for kernels, and slow outside."""
    return 1 << (n - 1).bit_length()


def rowwise(x: torch.Tensor) -> torch.Tensor:
    """x with its last dimension contiguous, as the kernels read it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(x: torch.Tensor | None, dims: int) -> list[int]:
    """Strides of the first dimensions, 0 where there is one entry (or no tensor) for all."""
    if x is None:
        return [0] * dims
    return [0 if n == 1 else step for n, step in zip(x.shape[:dims], x.stride(), strict=False)]


CHAINED = True
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
