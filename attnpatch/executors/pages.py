"""Attention over lists of key pages, one list per block of query rows (Selection with `bq` and `page` of 16 or more).

Set ATTNPATCH_BACKEND to one of fa4, fa4+triton, flex, triton, torch to force a backend; a call that it cannot do is an
error. The Triton form is that of `row_lists`: it takes what the block-sparse kernels of the libraries do not. In
fa4+triton it computes the columns beside the pages alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from attnpatch.errors import InputError, VersionError
from attnpatch.executors import merging, row_lists
from attnpatch.executors import pages_torch as torch_form
from attnpatch.executors.backends import capability, fa4, first_fit_once, here, no_cuda_half
from attnpatch.executors.pages_torch import Result, Stripe, stripe_of

RECOMPILE_LIMIT = 256
"""Forms of FlexAttention in one process; about six for each dtype, head dimension, group and block size."""


class _Call(NamedTuple):
    """All that the choice depends on: plain values, so that it is made once per kind of call."""

    device: str
    capability: int  # CUDA major version; 0 elsewhere
    dtype: torch.dtype
    dim: int
    page: int  # 0 = no lists
    bq: int  # 0 = one list for all rows, whose block may have any size
    columns: bool
    near: bool  # the selection's own sink or window
    holes: bool
    softcap: bool
    window: bool
    mask: bool
    want_lse: bool
    fine: row_lists.Call  # what the Triton form goes by


def _call(q: torch.Tensor, kv: Any, selection: Any, ctx: Any, want_lse: bool) -> _Call:
    index = selection.index
    if index is not None:
        rows = stripe_of(q, kv, selection).rows
        lists = -(-rows // selection.bq) if selection.bq else 1
        heads = (1, kv.k.shape[1], q.shape[1])
        if index.ndim != 4 or index.shape[0] not in (1, q.shape[0]) or index.shape[1] not in heads:
            raise InputError(f"Selection.index of shape {tuple(index.shape)}; expected [B|1, 1|Hkv|Hq, R, W].")
        if index.shape[2] != lists:
            raise InputError(f"{index.shape[2]} lists for {rows} query rows in blocks of {selection.bq}; give {lists}.")
        count = selection.count
        if count is not None and count.shape != index.shape[:3]:
            raise InputError(f"Selection.count of shape {tuple(count.shape)}; expected {tuple(index.shape[:3])}.")
    return _Call(
        device=q.device.type,
        capability=capability(q.device),
        dtype=q.dtype,
        dim=q.shape[3],
        page=selection.page if index is not None and index.shape[3] else 0,
        bq=selection.bq if index is not None and index.shape[2] > 1 else 0,
        columns=selection.columns is not None,
        near=bool(selection.sink or selection.window),
        holes=bool(kv.holes),
        softcap=ctx.softcap is not None,
        window=ctx.window is not None,
        mask=ctx.mask is not None,
        want_lse=want_lse,
        fine=row_lists.call(q, kv, ctx),
    )


# ---- what stands in the way of a backend, or None ----


def _not_plain(c: _Call) -> str | None:
    """What the block-sparse kernels share: causal lists of pages and nothing else."""
    if not c.page:
        return "needs lists of pages"
    if c.columns or c.near:
        return "takes no columns, sink or window beside the pages"
    if c.softcap or c.window:
        return "no soft-capping or sliding-window layers"
    return None


def _not_fa4(c: _Call) -> str | None:
    if why := no_cuda_half(c, capability=9, dim=128) or _not_plain(c):
        return why
    if c.dim not in (64, 96, 128):
        return f"needs a head dimension of 64, 96 or 128, this is {c.dim}"
    # the kernel's tile: on Hopper it shrinks to the page; later ones take two tiles of 128 query rows at once
    pages, rows = ((64, 128), 64) if c.capability == 9 else ((128,), 256)
    if c.page not in pages:
        return f"needs pages of {' or '.join(map(str, pages))} keys, these have {c.page}"
    if c.bq % rows:
        return f"needs query blocks of a multiple of {rows} rows, these have {c.bq}"
    return None if fa4() else "flash_attn.cute is not installed (pip install 'attnpatch[flash]')"


def _not_fa4_triton(c: _Call) -> str | None:
    """What keeps the pages from flash-attn-4, or the columns beside them from Triton."""
    if why := _not_fa4(c._replace(columns=False, near=False)):
        return why
    if c.near:
        return "takes no sink or window beside the pages"
    return _not_triton(c) if c.columns else "needs columns beside the pages"


def _not_flex(c: _Call) -> str | None:
    if c.device not in ("cuda", "cpu"):
        return f"needs CUDA, this is {c.device}"
    if c.holes or c.mask:
        return "no empty slots (padding or a ragged cache), no 4-D mask"
    if why := _not_plain(c):
        return why
    if c.page % 16 or c.bq % 16:
        return f"needs blocks of a multiple of 16, these are {c.bq} x {c.page}"
    if c.dtype == torch.float64:
        return "no float64"
    return "no log-sum-exp on a CPU" if c.device == "cpu" and c.want_lse else None


def _not_flex_unasked(c: _Call) -> str | None:
    return _not_flex(c) if c.device == "cuda" else "compiled for CUDA; on a CPU only when forced"


def _not_triton(c: _Call) -> str | None:
    if not c.page:
        return "needs lists of pages"
    return "no 4-D mask" if c.mask else row_lists.not_triton(c.fine)


def _not_torch(c: _Call) -> str | None:
    return None


# ---- lists as the block-sparse kernels want them ----


class _Blocks(NamedTuple):
    """int32 counts [B|1, 1|Hq, R] and pages [B|1, 1|Hq, R, ..]: those that need a token mask, those seen in full."""

    mask_count: torch.Tensor
    mask_index: torch.Tensor
    full_count: torch.Tensor
    full_index: torch.Tensor


def _split(selection: Any, heads: int, stripe: Stripe) -> _Blocks:
    """Pages ascend, so those that reach behind a block's first row are its last: a tail of the same list."""
    page, bq = selection.page, min(selection.bq or stripe.rows, stripe.rows)
    index = selection.index[..., : -(-stripe.end // page)]  # a kernel takes no list longer than the keys
    count = selection.count
    if index.shape[1] not in (1, heads):
        group = heads // index.shape[1]
        index = index.repeat_interleave(group, dim=1)
        count = None if count is None else count.repeat_interleave(group, dim=1)
    width = index.shape[3]
    row = stripe.first + bq * torch.arange(index.shape[2], device=index.device, dtype=torch.int32)[:, None]  # [R, 1]
    meant = index * page < (row + bq).clamp(max=stripe.end)  # what begins behind the last row is nothing
    if count is not None:
        meant = meant & (torch.arange(width, device=index.device, dtype=torch.int32) < count[..., None])
    partial = (meant & (index * page + (page - 1) > row)).sum(-1, dtype=torch.int32)
    full = meant.sum(-1, dtype=torch.int32) - partial
    tail = torch.arange(min(width, -(-bq // page) + 1), device=index.device)  # most pages that a block's rows touch
    tail_index = index.gather(-1, (full[..., None] + tail).clamp(max=width - 1))
    return _Blocks(partial, tail_index, full, index)


def _block_rows(selection: Any, stripe: Stripe) -> int:
    """Query rows of a kernel block; one list covers its rows in a block of any size, so take a fitting one."""
    return selection.bq if selection.bq and stripe.rows > selection.bq else -(-stripe.rows // 256) * 256


# ---- the backends: (q, kv, selection, ctx, want_lse) -> (out [B, rows, Hq, D], lse [B, Hq, rows] or None) ----


def _fa4_lists() -> Callable[..., Any]:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    return BlockSparseTensorsTorch


def _run_fa4(q: torch.Tensor, kv: Any, selection: Any, ctx: Any, want_lse: bool) -> Result:
    func = fa4()
    if func is None:
        raise VersionError("flash_attn.cute is not installed; pip install 'attnpatch[flash]'.")
    stripe = stripe_of(q, kv, selection)
    blocks = _split(selection, q.shape[1], stripe)
    result = func(
        q[:, :, stripe.start : stripe.start + stripe.rows].transpose(1, 2),
        kv.k[:, :, : stripe.end].transpose(1, 2),
        kv.v[:, :, : stripe.end].transpose(1, 2),
        softmax_scale=ctx.scaling,
        causal=True,  # bottom-right aligned: the stripe's last row sees the last key
        pack_gqa=False,  # lists may differ by query head
        block_sparse_tensors=_fa4_lists()(
            mask_block_cnt=blocks.mask_count,
            mask_block_idx=blocks.mask_index,
            full_block_cnt=blocks.full_count,
            full_block_idx=blocks.full_index,
            block_size=(_block_rows(selection, stripe), selection.page),
        ),
        **({"return_lse": True} if want_lse else {}),
    )
    out, lse = result[:2] if isinstance(result, tuple) else (result, None)
    return out, lse if want_lse else None


def _run_parts(
    q: torch.Tensor, kv: Any, selection: Any, ctx: Any, want_lse: bool, by_pages: Callable[..., Any], by_columns: str
) -> Result:
    """The pages by one form, the columns outside them by a backend of `row_lists`, and both added up.

    by_pages: (q, kv, selection, ctx, want_lse) -> (out, lse); rows whose list is empty as zeros with lse -inf.
    """
    out, lse = by_pages(q, kv, replace(selection, columns=None, distinct=False), ctx, True)
    out, lse = merging.run(out, lse, *row_lists.run_outside(q, kv, selection, ctx, by_columns))
    return out, lse if want_lse else None


def _run_fa4_triton(q: torch.Tensor, kv: Any, selection: Any, ctx: Any, want_lse: bool) -> Result:
    return _run_parts(q, kv, selection, ctx, want_lse, _run_fa4, "triton")


def _flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scale: float, options: Any, aux: Any) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    group = q.shape[1] != k.shape[1]
    return flex_attention(
        q, k, v, block_mask=mask, scale=scale, enable_gqa=group, kernel_options=options, return_aux=aux
    )


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    # fullgraph: an error, not the eager form that builds T x S, when the graph cannot be had
    return torch.compile(_flex, dynamic=True, fullgraph=True)


def _causal(offset: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Mask of a stripe whose first row is slot `offset`: a tensor, for a number would be compiled in."""

    def seen(b: torch.Tensor, h: torch.Tensor, row: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        return row + offset >= slot

    return seen


def _tile(block: int) -> int:
    """The largest power of two, at most 64, that divides a block."""
    return min(64, block & -block)


def _run_flex(q: torch.Tensor, kv: Any, selection: Any, ctx: Any, want_lse: bool) -> Result:
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask

    stripe = stripe_of(q, kv, selection)
    blocks, size = _split(selection, q.shape[1], stripe), (_block_rows(selection, stripe), selection.page)
    # torch 2.11's CUDA kernel reads both lists by the first's strides; the CPU kernel wants them as wide as the keys
    wide = -(-stripe.end // selection.page) if q.device.type == "cpu" else 0
    lists = [blocks.mask_index, blocks.full_index]
    wide = max(wide, *(x.shape[-1] for x in lists))
    mask_index, full_index = (F.pad(x, (0, wide - x.shape[-1])).contiguous() for x in lists)
    mask = BlockMask.from_kv_blocks(
        blocks.mask_count,
        mask_index,
        blocks.full_count,
        full_index,
        BLOCK_SIZE=size,
        mask_mod=_causal(torch.full((), stripe.first, device=q.device)),
        seq_lengths=(stripe.rows, stripe.end),
        compute_q_blocks=False,  # for a backward pass only, and not to be had of lists narrower than the keys
    )
    options: dict[str, Any] = {"FORCE_USE_FLEX_ATTENTION": True}  # few rows would go to the kernel for decoding
    if size[0] % 128 or size[1] % 128:
        options |= {"BLOCK_M": _tile(size[0]), "BLOCK_N": _tile(size[1])}
    # copies of what is sliced: other strides would be compiled anew
    query = q[:, :, stripe.start : stripe.start + stripe.rows].contiguous()
    keys, values = kv.k[:, :, : stripe.end].contiguous(), kv.v[:, :, : stripe.end].contiguous()
    aux = AuxRequest(lse=True) if want_lse else None
    # a constant scale is part of the kernel; a symbol would be an input of its own
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT, specialize_float=True):
        result = _compiled()(query, keys, values, mask, ctx.scaling, options, aux)
    out, lse = (result[0], result[1].lse) if want_lse else (result, None)
    return out.transpose(1, 2), lse


# ---- the choice ----

_WHY_NOT: dict[str, Callable[[_Call], str | None]] = {  # fastest first
    "fa4": _not_fa4,
    "fa4+triton": _not_fa4_triton,
    "flex": _not_flex_unasked,
    "triton": _not_triton,
    "torch": _not_torch,
}
_ASKED = {**_WHY_NOT, "flex": _not_flex}
"""Where one is named."""
_RUN: dict[str, Callable[[torch.Tensor, Any, Any, Any, bool], Result]] = {
    "fa4": _run_fa4,
    "fa4+triton": _run_fa4_triton,
    "flex": _run_flex,
    "triton": row_lists.run_triton,
    "torch": torch_form.run,
}
_chosen: dict[tuple[_Call, str | None], tuple[str, str]] = {}


def _decide(call: _Call, forced: str | None) -> tuple[str, str]:
    return first_fit_once(_chosen, _ASKED if forced == "flex" else _WHY_NOT, call, forced)


def choose(q: torch.Tensor, kv: Any, selection: Any, ctx: Any, want_lse: bool = False) -> tuple[str, str]:
    """(backend, reason) for this call: why this one, and why not each faster one. Never waits for the device."""
    return _decide(_call(q, kv, selection, ctx, want_lse), os.environ.get("ATTNPATCH_BACKEND") or None)


def backends(
    device: torch.device | None = None, dtype: torch.dtype = torch.bfloat16, dim: int = 128, forced: bool = False
) -> list[tuple[str, bool, str]]:
    """(name, usable, reason) of each backend, fastest first, for blocks of 128 x 128; device: None = this machine's.

    fa4+triton is asked with columns beside the pages, which it is for, the others without. forced: whether it would be
    usable if named.
    """
    device = device or here()
    call = _Call(
        device=device.type, capability=capability(device), dtype=dtype, dim=dim, page=128, bq=128,
        columns=False, near=False, holes=False, softcap=False, window=False, mask=False, want_lse=False,
        fine=row_lists.Call(device.type, capability(device), dtype, dim, True, False, False),
    )  # fmt: skip
    tests = _ASKED if forced else _WHY_NOT
    found = {name: why_not(call._replace(columns=name == "fa4+triton")) for name, why_not in tests.items()}
    return [(name, why is None, why or "usable") for name, why in found.items()]


def run(
    q: torch.Tensor, kv: Any, selection: Any, ctx: Any, want_lse: bool = False, _backend: str | None = None
) -> Result:
    """Attention of the query rows that the selection covers, over what it selects.

    q: [B, Hq, T, D]; kv, ctx: see `attnpatch.executors`; selection: `attnpatch.decisions.Selection`. Without kv.holes
    slots are positions (the layer is complete), and a row with q_pos = -1 comes out as anything finite.
    Returns out [B, rows, Hq, D] in q.dtype and lse [B, Hq, rows] fp32 (fp64 for fp64 inputs) or None, of the rows of
    `selection.rows` only. Raises InputError where lists and rows do not fit, ConfigError for a wrong forced backend.
    """
    call = _call(q, kv, selection, ctx, want_lse)
    name, _ = _decide(call, _backend or os.environ.get("ATTNPATCH_BACKEND") or None)
    return _RUN[name](q, kv, selection, ctx, want_lse)
