"""Work that many short calls make up, one thread of torch's a worker."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def on_all_threads(work: Callable[[], None]) -> None:
    """Run `work` at once on as many threads as torch uses, each of which computes alone; without gradients.

    For calls so short that waking the other threads costs more than they help. Raises what a worker raises.
    """
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()
    if threads == 1:
        work()
        return

    def alone() -> None:
        torch.set_num_threads(1)  # of this thread, and of those that begin later
        with torch.inference_mode(inference), torch.no_grad():
            work()

    try:
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(alone) for _ in range(threads)]:
                done.result()
    finally:
        torch.set_num_threads(threads)
