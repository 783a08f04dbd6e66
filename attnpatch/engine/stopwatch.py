"""Device time of choosing and computing, noted without waiting and read by `status`."""

from __future__ import annotations

import time
from typing import Any

import torch


class Stopwatch:
    """Time between pairs of marks by name: CUDA events on a GPU, else the wall clock."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self.spans: dict[str, list[tuple[Any, Any]]] = {}

    def mark(self) -> Any:
        """Now, on the device."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))  # not of the current device
        return event

    def note(self, name: str, since: Any) -> None:
        """From the mark `since` until now goes to `name`."""
        self.spans.setdefault(name, []).append((since, self.mark()))

    def seconds(self, name: str) -> float:
        """Sum of the spans of `name`. Waits for the device."""
        spans = self.spans.get(name, [])
        if not self.cuda:
            return sum(end - begin for begin, end in spans)
        for _, end in spans:
            end.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in spans) / 1e3

    def __deepcopy__(self, memo: Any) -> Stopwatch:
        copy = Stopwatch(self.device)  # marks are shared (events cannot be copied), the lists are not
        copy.spans = {name: list(spans) for name, spans in self.spans.items()}
        return copy
