"""PyramidKV: SnapKV's choice, with more entries in low layers and fewer in high ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from attnpatch.patches.snapkv import SnapKV

from attnpatch.patch import option, register

if TYPE_CHECKING:
    from attnpatch.engine.call import Ctx


def pyramid(
    base: int, n_layers: int, room: int, beta: float, rounding: str = "exact", window: int = 0
) -> list[int]:  # fmt: skip
    """Selected entries k_l of each layer (window excluded), non-increasing, from `base` on average.

    room: N - W, the most a layer can select; window: W. "exact" sums to base * n_layers; "reference" reproduces the
    reference's floored integer step, whose sum is larger. PyramidKV spec steps 2-5.
    """
    if n_layers == 1:
        return [min(base, room)]
    if rounding == "reference":
        if room + window < 2 * base:  # the reference's gate N < 2 base: uniform
            return [base] * n_layers
        low = int(base // beta)
        high = 2 * base - low
        if high >= room:
            high, low = room, 2 * base - room
        step = (high - low) // (n_layers - 1)
        return [high - layer * step for layer in range(n_layers)]
    top = base / beta
    bottom = 2 * base - top
    if bottom >= room:
        bottom, top = room, 2 * base - room
    real = [bottom - layer * (bottom - top) / (n_layers - 1) for layer in range(n_layers)]
    whole = [int(x + 1e-9) for x in real]
    missing = base * n_layers - sum(whole)
    # leftover units go to the largest fractional parts, ties to the lower layer
    for layer in sorted(range(n_layers), key=lambda i: (-round(real[i] - whole[i], 9), i))[:missing]:
        whole[layer] += 1
    return whole


@register("pyramidkv")
@dataclass
class PyramidKV(SnapKV):
    """PyramidKV (arXiv 2406.02069; Zefan-Cai/KVCache-Factory). `budget` is the mean entries per layer.

    Layers that cannot be patched (sliding window) do not count. A row whose prompt fits the mean budget stays dense.
    """

    window_size: int = option(8, "last prompt queries that vote; their entries are always kept", low=1)
    beta: float = option(20.0, "steepness: the top layer selects base / beta entries", low=1)
    rounding: str = option("exact", "integer budgets: exact sum, or the reference's", choices=("exact", "reference"))

    title = "PyramidKV"
    paper = "arXiv 2406.02069"
    tensor_parallel = True

    def capacities(self, ctx: Ctx) -> tuple[int, ...]:
        rows = []
        for n, mean in zip(ctx.prompt_len, super().capacities(ctx), strict=True):
            room = n - self.window_size
            if n <= mean:
                rows.append(n)
                continue
            k = pyramid(mean - self.window_size, ctx.n_layers, room, self.beta, self.rounding, self.window_size)
            rows.append(k[ctx.layer] + self.window_size)
        return tuple(rows)
