"""The kernel of `lists.pack`: one program a row writes its list, nothing wider than the map. Imported when used."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attnpatch.executors.launching import on


@triton.jit
def _kernel(chosen, index, count, n, width, BLOCK: tl.constexpr, TRIM: tl.constexpr):
    """index int32 [rows, width] and count int32 [rows] of chosen int8 [rows, n]; TRIM: width may be too small."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    drop = tl.full([], 0, tl.int32)
    if TRIM:
        for at in range(0, n, BLOCK):
            x = tl.load(chosen + row * n + at + lane, mask=at + lane < n, other=0)
            drop += tl.sum(x.to(tl.int32), axis=0)
        drop = tl.maximum(drop - width, 0)
    found = -drop
    for at in range(0, n, BLOCK):
        x = tl.load(chosen + row * n + at + lane, mask=at + lane < n, other=0).to(tl.int32)
        place = found + tl.cumsum(x, axis=0) - 1
        tl.store(index + row * width + place, at + lane, mask=(x != 0) & (place >= 0))
        found += tl.sum(x, axis=0)
    for at in range(0, width, BLOCK):
        tl.store(index + row * width + at + lane, 0, mask=(at + lane >= found) & (at + lane < width))
    tl.store(count + row, found)


def launch(chosen: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """index int32 [..., width] and count int32 [...] of chosen bool [..., n], as `lists.pack`."""
    n, shape = chosen.shape[-1], chosen.shape[:-1]
    index = torch.empty(*shape, width, dtype=torch.int32, device=chosen.device)
    count = torch.empty(shape, dtype=torch.int32, device=chosen.device)
    if count.numel():
        block = min(2048, max(32, triton.next_power_of_2(n)))
        with on(chosen.device):
            _kernel[(count.numel(),)](
                chosen.contiguous().view(torch.int8), index, count, n, width,
                BLOCK=block, TRIM=width < n, num_warps=max(1, block // 512),
            )  # fmt: skip
    return index, count
