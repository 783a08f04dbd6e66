"""The kernel of `block_lists`: one program a query block and head writes its list, no map. Imported when used."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attnpatch.executors.launching import rowwise, strides


@triton.jit(do_not_specialize=["first", "last", "block"])
def _kernel(
    offsets, columns, pairs, whole, end, index, count,
    offsets_batch, offsets_head, columns_batch, columns_head, pairs_batch, pairs_head, pairs_row, end_batch,
    heads, first, last, block,
    COLUMNS: tl.constexpr, PAIRS: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """index int32 [B, H, R, last] and count int32 [B, H, R], contiguous; maps int8. Strides in elements."""
    r, head, batch = tl.program_id(0), tl.program_id(1) % heads, (tl.program_id(1) // heads).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + r
    index += row * last
    offsets += batch * offsets_batch + head.to(tl.int64) * offsets_head
    columns += batch * columns_batch + head.to(tl.int64) * columns_head
    pairs += batch * pairs_batch + head.to(tl.int64) * pairs_head + r.to(tl.int64) * pairs_row
    lane, i = tl.arange(0, BLOCK), first + r
    stop = i + 1
    if i.to(tl.int64) * block >= tl.load(end + batch * end_batch):
        stop = 0
    every = tl.full([], 0, tl.int8)
    if WHOLE:
        every = tl.load(whole + batch)
    found = tl.full([], 0, tl.int32)
    for at in range(0, stop, BLOCK):
        j = at + lane
        here = j < stop
        x = tl.load(offsets + i - j, mask=here, other=0) | every
        if COLUMNS:
            x = x | tl.load(columns + j, mask=here, other=0)
        if PAIRS:
            x = x | tl.load(pairs + j, mask=here, other=0)
        x = tl.where(here & (x != 0), 1, 0)
        place = found + tl.cumsum(x, axis=0) - 1
        tl.store(index + place, j, mask=x != 0)
        found += tl.sum(x, axis=0)
    for at in range(found, last, BLOCK):
        tl.store(index + at + lane, 0, mask=at + lane < last)
    tl.store(count + row, found)


def _bytes(x: torch.Tensor | None) -> torch.Tensor | None:
    """bool as int8, its last dimension contiguous."""
    return None if x is None else rowwise(x).view(torch.int8)


def launch(
    offsets: torch.Tensor, columns: torch.Tensor | None, pairs: torch.Tensor | None, whole: torch.Tensor | None,
    end: torch.Tensor, block: int, first: int, last: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """index int32 [B, H, R, last] and count int32 [B, H, R], as `block_lists.run`."""
    given = [x for x in (offsets, columns, pairs) if x is not None]
    batch, heads = max(end.shape[0], *(x.shape[0] for x in given)), max(x.shape[1] for x in given)
    index = torch.empty(batch, heads, last - first, last, dtype=torch.int32, device=offsets.device)
    count = torch.empty(batch, heads, last - first, dtype=torch.int32, device=offsets.device)
    if not count.numel():
        return index, count
    offsets_, columns_, pairs_ = (_bytes(x) for x in (offsets, columns, pairs))
    whole_ = None if whole is None else whole.expand(batch).contiguous().view(torch.int8)
    size = min(1024, max(32, triton.next_power_of_2(last)))
    _kernel[(last - first, batch * heads)](
        offsets_, *(offsets_ if x is None else x for x in (columns_, pairs_, whole_)), end, index, count,
        *strides(offsets_, 2), *strides(columns_, 2), *strides(pairs_, 3), *strides(end, 1), heads, first, last, block,
        COLUMNS=columns is not None, PAIRS=pairs is not None, WHOLE=whole is not None,
        BLOCK=size, num_warps=max(1, size // 256),
    )  # fmt: skip
    return index, count
