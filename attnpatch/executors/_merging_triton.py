"""The fused form of `merging`: every number is read once and written once. Imported only when it is used."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attnpatch.executors.launching import on, rowwise

ELEMENTS = 4096
"""Numbers of an output that a program writes."""


@triton.jit(do_not_specialize=["rows"])
def _kernel(
    out, other, lse, lse_other, merged, both, rows, heads,
    out_b, out_t, out_h, other_b, other_t, other_h, lse_b, lse_h, lse_t, lse_other_b, lse_other_h, lse_other_t,
    D: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """merged [B, rows, heads, D], both [B, heads, rows]; a program takes BLOCK neighbours of rows * heads."""
    batch = tl.program_id(1).to(tl.int64)
    i, d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDE)
    row, head = (i // heads).to(tl.int64), i % heads
    inside = i < rows * heads
    mask = inside[:, None] if D == WIDE else inside[:, None] & (d < D)[None, :]
    at = batch * out_b + row * out_t + head * out_h
    mine = tl.load(out + at[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    at = batch * other_b + row * other_t + head * other_h
    theirs = tl.load(other + at[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    a = tl.load(lse + batch * lse_b + head * lse_h + row * lse_t, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(lse_other + batch * lse_other_b + head * lse_other_h + row * lse_other_t, mask=inside, other=0.0)
    b = b.to(tl.float32)
    top = tl.maximum(a, b)
    top = tl.where(top == float("-inf"), 0.0, top)  # a row that sees nothing
    total = tl.exp(a - top) + tl.exp(b - top)
    some = total != 0.0
    norm = top + tl.log(tl.where(some, total, 1.0))
    x = mine * tl.exp(a - norm)[:, None] + theirs * tl.exp(b - norm)[:, None]
    place = (batch * rows * heads + i)[:, None] * D + d[None, :]
    tl.store(merged + place, x.to(merged.dtype.element_ty), mask=mask)
    tl.store(both + (batch * heads + head) * rows + row, tl.where(some, norm, float("-inf")), mask=inside)


def launch(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, lse_other: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, r, Hq, D], lse fp32 [B, Hq, r]) as `merging.run`."""
    batch, rows, heads, dim = out.shape
    out, other = rowwise(out), rowwise(other)
    merged = torch.empty(batch, rows, heads, dim, dtype=out.dtype, device=out.device)
    both = torch.empty(batch, heads, rows, dtype=torch.float32, device=out.device)
    wide = triton.next_power_of_2(dim)
    block = max(1, ELEMENTS // wide)
    if both.numel():
        with on(out.device):
            _kernel[(triton.cdiv(rows * heads, block), batch)](
                out, other, lse, lse_other, merged, both, rows, heads, *out.stride()[:3], *other.stride()[:3],
                *lse.stride(), *lse_other.stride(), D=dim, WIDE=wide, BLOCK=block, num_warps=4,
            )  # fmt: skip
    return merged, both
