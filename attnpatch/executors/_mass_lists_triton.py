"""The kernel of `mass_lists`: one program a query block and head reads its row once and writes its list, no map.

Imported when used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attnpatch.executors._mass_triton import BELOW, LOWEST, cut, upto
from attnpatch.executors.launching import rowwise, strides


@triton.jit(do_not_specialize=["first", "last", "block", "threshold"])
def _kernel(
    mass, table, end, index, count, mass_batch, mass_head, mass_row, table_head, end_batch,
    heads, first, last, block, threshold,
    TABLE: tl.constexpr, BLOCK: tl.constexpr, RULE: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    """index int32 [B, H, R, last] and count int32 [B, H, R], contiguous. Strides in elements."""
    r, head, batch = tl.program_id(0), tl.program_id(1) % heads, (tl.program_id(1) // heads).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + r
    mass += batch * mass_batch + head.to(tl.int64) * mass_head + r.to(tl.int64) * mass_row
    j, own = tl.arange(0, BLOCK), first + r
    real = own.to(tl.int64) * block < tl.load(end + batch * end_batch)
    x = tl.load(mass + j, mask=(j <= own) & real, other=0.0)
    other = (j > 0) & (j < own) & real
    share = threshold
    if TABLE:
        share = tl.load(table + head * table_head)
    # besides the first block and its own
    limit = tl.sum(x, axis=0) * share - tl.sum(tl.where(other, 0.0, x), axis=0)
    named = ((j == 0) | (j == own)) & real
    if limit > 0.0:
        x = tl.where(other, x, float("-inf"))
        edge, above, equal, take = cut(x, other, limit, RULE, LOWEST)
        named = named | upto(x, other, edge, equal, take, True)
    place = tl.cumsum(named.to(tl.int32), axis=0) - 1
    found = tl.sum(named.to(tl.int32), axis=0)
    tl.store(index + row * last + place, j, mask=named)
    tl.store(index + row * last + j, 0, mask=(j >= found) & (j < last))
    tl.store(count + row, found)


def launch(
    mass: torch.Tensor, end: torch.Tensor, block: int, first: int, threshold: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """index int32 [B, H, R, W] and count int32 [B, H, R], as `mass_lists.run`."""
    mass = rowwise(mass)
    batch, heads, rows, last = mass.shape
    index = torch.empty(mass.shape, dtype=torch.int32, device=mass.device)
    count = torch.empty(batch, heads, rows, dtype=torch.int32, device=mass.device)
    if not count.numel():
        return index, count
    table = threshold[:, 0] if isinstance(threshold, torch.Tensor) else None
    size = max(32, triton.next_power_of_2(last))
    _kernel[(rows, batch * heads)](
        mass, mass if table is None else table, end, index, count, *strides(mass, 3), *strides(table, 1),
        *strides(end, 1), heads, first, last, block, 0.0 if isinstance(threshold, torch.Tensor) else threshold,
        TABLE=table is not None, BLOCK=size, RULE=BELOW, LOWEST=LOWEST,
        num_warps=min(16, max(1, size // 1024)),
    )  # fmt: skip
    return index, count
