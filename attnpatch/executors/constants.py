"""Numbers that the host knows, on the device without a copy at every call: a CUDA graph captures none from the host."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

MOST = 1024
"""Tensors that one `Constants` keeps; beyond, the oldest goes (what a graph captured stays)."""


class Constants:
    """Small tensors, each copied to a device at its first use, which must not be within a capture.

    A copy is not waited for, so another stream makes its own; a capture, before which all streams are done, takes any.
    Copied or pickled, it is empty.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, tuple[int, torch.Tensor]] = {}  # -> (stream that copied it, tensor)
        self._captured: dict[Hashable, list[torch.Tensor]] = {}

    def __reduce__(self) -> tuple[type[Constants], tuple[()]]:
        return Constants, ()

    def of(self, values: Any, device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """`torch.tensor(values, dtype=dtype)` on the device; values: numbers, in lists or tuples of equal lengths."""
        return self.get((_frozen(values), dtype), device, lambda: torch.tensor(values, dtype=dtype))

    def get(self, key: Hashable, device: torch.device, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The tensor that `make` gives on the CPU, a function of `key` alone, on the device. Nobody writes into it."""
        key, stream, capturing = (key, device), 0, False
        if device.type == "cuda":
            stream, capturing = (
                torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()
            )  # fmt: skip
        found = self._made.get(key)
        if found is not None and capturing:
            self._captured.setdefault(key, []).append(found[1])  # the graph reads this memory at every replay
            return found[1]
        if found is None or found[0] != stream:
            with torch.inference_mode(False):  # what inference made cannot be differentiated through later
                # a blocking copy would wait for the device
                found = stream, make().to(device, non_blocking=True)
            self._made[key] = found
            for old in list(self._made)[:-MOST]:
                self._made.pop(old, None)
        return found[1]


def _frozen(values: Any) -> Hashable:
    return tuple(_frozen(x) for x in values) if isinstance(values, (list, tuple)) else values
