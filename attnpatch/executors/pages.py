"""Attention over lists of key pages, one list per block of query rows (Selection with `bq` and `page` of 16 or more).

Set ATTNPATCH_BACKEND to one of fa4, flex, torch to force a backend; a call it cannot do is an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from attnpatch.errors import InputError, VersionError
from attnpatch.executors import naive
from attnpatch.executors.backends import capability, fa4, first_fit, no_cuda_half
from attnpatch.executors.column_sums import MAX_BLOCK, compute_dtype, matmul, operand, rows_per_block
from attnpatch.executors.dense import _eager, _pack, _without_garbage
from attnpatch.executors.lists import unpack

ROWS = 128
"""Most query rows that the torch backend computes at once; also the block of a call without lists."""

Result = tuple[torch.Tensor, torch.Tensor | None]


class _Call(NamedTuple):
    """All that the choice depends on: plain values, so that it is made once per kind of call."""

    device: str
    capability: int  # CUDA major version; 0 elsewhere
    dtype: torch.dtype
    dim: int
    page: int  # 0 = no lists
    bq: int  # 0 = one list for all rows, whose block may have any size
    beside: bool  # columns, sink or window
    holes: bool
    softcap: bool
    window: bool
    mask: bool
    want_lse: bool


class _Stripe(NamedTuple):
    """The query rows of a call that the selection covers."""

    start: int  # first row
    rows: int
    first: int  # slot of the first row

    @property
    def end(self) -> int:
        """Keys that the last row can see."""
        return self.first + self.rows


def _stripe(q: torch.Tensor, kv: Any, selection: Any) -> _Stripe:
    start, stop, step = (selection.rows or slice(None)).indices(q.shape[2])
    if stop <= start or step != 1:
        raise InputError(f"Selection.rows={selection.rows} of {q.shape[2]} query rows; give some, with step 1.")
    return _Stripe(start, stop - start, kv.k.shape[2] - q.shape[2] + start)


def _call(q: torch.Tensor, kv: Any, selection: Any, ctx: Any, want_lse: bool) -> _Call:
    index = selection.index
    if index is not None:
        rows = _stripe(q, kv, selection).rows
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
        beside=selection.columns is not None or bool(selection.sink or selection.window),
        holes=bool(kv.holes),
        softcap=ctx.softcap is not None,
        window=ctx.window is not None,
        mask=ctx.mask is not None,
        want_lse=want_lse,
    )


# ---- what stands in the way of a backend, or None ----


def _not_plain(c: _Call) -> str | None:
    """What the block-sparse kernels share: causal lists of pages and nothing else."""
    if not c.page:
        return "needs lists of pages"
    if c.beside:
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
    return "compiled for CUDA; on a CPU only when forced" if c.device != "cuda" else _not_flex(c)


def _not_torch(c: _Call) -> str | None:
    return None


# ---- lists as the block-sparse kernels want them ----


class _Blocks(NamedTuple):
    """int32 counts [B|1, 1|Hq, R] and pages [B|1, 1|Hq, R, ..]: those that need a token mask, those seen in full."""

    mask_count: torch.Tensor
    mask_index: torch.Tensor
    full_count: torch.Tensor
    full_index: torch.Tensor


def _split(selection: Any, heads: int, stripe: _Stripe) -> _Blocks:
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


def _block_rows(selection: Any, stripe: _Stripe) -> int:
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
    stripe = _stripe(q, kv, selection)
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

    stripe = _stripe(q, kv, selection)
    blocks, size = _split(selection, q.shape[1], stripe), (_block_rows(selection, stripe), selection.page)
    mask = BlockMask.from_kv_blocks(
        blocks.mask_count,
        blocks.mask_index,
        blocks.full_count,
        blocks.full_index,
        BLOCK_SIZE=size,
        mask_mod=_causal(torch.full((), stripe.first, device=q.device)),
        seq_lengths=(stripe.rows, stripe.end),
        compute_q_blocks=False,  # for a backward pass only, and not to be had of lists narrower than the keys
    )
    options: dict[str, Any] = {"FORCE_USE_FLEX_ATTENTION": True}  # few rows would go to the kernel for decoding
    if size[0] % 128 or size[1] % 128:
        options |= {"BLOCK_M": _tile(size[0]), "BLOCK_N": _tile(size[1])}
    query = q[:, :, stripe.start : stripe.start + stripe.rows]
    keys, values = kv.k[:, :, : stripe.end], kv.v[:, :, : stripe.end]
    result = _compiled()(query, keys, values, mask, ctx.scaling, options, AuxRequest(lse=True) if want_lse else None)
    out, lse = (result[0], result[1].lse) if want_lse else (result, None)
    return out.transpose(1, 2), lse


def _steps(selection: Any, rows: int, most: int) -> Iterator[tuple[int, int, int]]:
    """(list, first row, end row) of blocks of at most `most` rows that share a list."""
    bq = selection.bq if selection.bq and selection.index is not None else rows
    for start in range(0, rows, bq):
        stop = min(start + bq, rows)
        for at in range(start, stop, most):
            yield start // bq, at, min(at + most, stop)


def _run_torch(q: torch.Tensor, kv: Any, selection: Any, ctx: Any, want_lse: bool) -> Result:
    plain = not kv.holes and ctx.softcap is None and ctx.window is None and ctx.mask is None
    return (_gathered if plain and q.device.type == "cpu" else _masked)(q, kv, selection, ctx, want_lse)


def _masked(q: torch.Tensor, kv: Any, selection: Any, ctx: Any, want_lse: bool) -> Result:
    """Any selection on any device, block by block of query rows with a mask over all keys: costs as much as dense."""
    (batch, heads, length, _), (kv_heads, slots) = q.shape, kv.k.shape[1:3]
    stripe = _stripe(q, kv, selection)
    pos, q_pos = kv.pos, ctx.q_pos
    if not kv.holes:  # slots say it all, and positions need not exist
        pos = torch.arange(slots, device=q.device).expand(batch, 1, -1)
        q_pos = pos[:, 0, slots - length :]
    keys, values = operand(kv.k).transpose(-1, -2), operand(_without_garbage(kv.v, kv))
    outs: list[torch.Tensor] = []
    logsums: list[Any] = []
    for which, start, stop in _steps(selection, stripe.rows, rows_per_block(batch, heads, slots, ROWS)):
        rows = slice(stripe.start + start, stripe.start + stop)
        end = slots if kv.holes or ctx.mask is not None else stripe.first + stop
        part, held = selection, SimpleNamespace(k=kv.k[:, :, :end], pos=pos[..., :end])
        if selection.index is not None:
            count = selection.count if selection.count is None else selection.count[:, :, which : which + 1]
            part = replace(selection, index=selection.index[:, :, which : which + 1], count=count, bq=0)
        mask = None if ctx.mask is None else ctx.mask[:, :, rows, :end]
        seen = naive.visible(held, q_pos[:, rows], ctx.window, mask)
        seen = naive._per_query_head(seen, heads) & naive.selected(part, held, q_pos[:, rows], heads)  # [B, Hq, r, end]
        logits = matmul(operand(_pack(q[:, :, rows], kv_heads)), keys[..., :end]) * ctx.scaling
        if ctx.softcap is not None:
            logits = torch.tanh(logits / ctx.softcap) * ctx.softcap
        probs, lse = _eager(logits.view(batch, heads, 1, stop - start, end), seen, True)
        probs = probs.view(batch, kv_heads, -1, end)  # [B, Hkv, G*r, end]
        outs.append(matmul(probs.to(values.dtype), values[:, :, :end]).view(batch, heads, stop - start, -1))
        logsums.append(lse)  # [B, Hq, 1, r]
    out = torch.cat(outs, dim=2).to(q.dtype).transpose(1, 2)
    return out, torch.cat(logsums, dim=-1).squeeze(2) if want_lse else None


class _Lists:
    """The slots that each (row, list head) of a CPU call attends, list by list."""

    def __init__(self, selection: Any, stripe: _Stripe) -> None:
        given = [x for x in (selection.index, selection.columns) if x is not None]
        self.heads = max((x.shape[1] for x in given), default=1)
        self.page, self.sink, self.window = selection.page, selection.sink, selection.window
        self.columns, self.pages = selection.columns, None
        if selection.index is not None:
            self.pages = unpack(selection.index, selection.count, -(-stripe.end // selection.page))
        self.within = torch.arange(self.page)

    def _of(self, x: torch.Tensor, b: int, head: int) -> torch.Tensor:
        return x[b if x.shape[0] > 1 else 0, head * x.shape[1] // self.heads]

    def slots(self, b: int, head: int, which: int, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Ascending slots below `end` that some row of first .. end - 1 attends, window aside all of the rows.

        Second: bool [end], the slots that need no window; None where there is none.
        """
        listed = torch.empty(0, dtype=torch.long)
        if self.pages is not None:
            pages = self._of(self.pages, b, head)[which].nonzero()  # [n, 1]
            listed = (pages * self.page + self.within).flatten()
            listed = listed[: torch.searchsorted(listed, end)]
        if self.columns is None and not self.sink and not self.window:
            return listed, None
        always = torch.zeros(end, dtype=torch.bool)
        always[listed] = True
        if self.columns is not None:
            columns = self._of(self.columns, b, head).long()
            always[columns[(columns >= 0) & (columns < end)]] = True
        always[: self.sink] = True
        near = always.clone()
        if self.window:
            near[max(0, first - self.window + 1) :] = True
        return near.nonzero().flatten(), always


def _bias(
    zeros: torch.Tensor, slots: torch.Tensor, first: int, always: torch.Tensor | None, window: int
) -> torch.Tensor:
    """Additive mask [G*r, n]: -inf where a slot is behind the row, or before its window and there for the window only.

    zeros: [G, r, N >= n] scratch, of which the last n columns are used: so nothing but the diagonal is written.
    """
    rows = zeros.shape[1]
    bias, row = zeros[..., zeros.shape[2] - slots.shape[0] :], torch.arange(first, first + rows)[:, None]
    tail = slots[-rows:]  # only the block's own rows can lie behind a row
    bias[..., bias.shape[2] - tail.shape[0] :] = torch.where(tail > row, float("-inf"), 0.0)
    if window and always is not None:
        low, high = torch.searchsorted(slots, torch.tensor([first - window + 1, first + rows - window])).tolist()
        edge = slots[low:high]
        bias[..., low:high].masked_fill_((row - edge >= window) & ~always[edge], float("-inf"))
    return bias.flatten(0, 1)


def _gathered(q: torch.Tensor, kv: Any, selection: Any, ctx: Any, want_lse: bool) -> Result:
    """CPU: the keys of each list are gathered and attended by all query rows and heads that share it.

    A loop over lists, heads too: lists differ in length, and padding them would cost more than the calls.
    """
    (batch, heads, _, dim), kv_heads = q.shape, kv.k.shape[1]
    stripe = _stripe(q, kv, selection)
    lists = _Lists(selection, stripe)
    # kv heads that share a list, and query heads that share it on each of them
    spread, group = max(1, kv_heads // lists.heads), heads // max(kv_heads, lists.heads)
    most = max(1, min(ROWS, selection.bq or ROWS, MAX_BLOCK // (4 * group * stripe.end)))
    out = q.new_zeros(batch, stripe.rows, heads, dim)
    lse = q.new_full((batch, heads, stripe.rows), float("-inf"), dtype=compute_dtype(q))
    fresh = torch.is_grad_enabled() and (q.requires_grad or kv.k.requires_grad or kv.v.requires_grad)
    scratch = q.new_zeros(group, most, stripe.end)
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # SDPA, which hides the log-sum-exp
    for which, start, stop in _steps(selection, stripe.rows, most):
        first, end = stripe.first + start, stripe.first + stop
        for b, head in ((b, h) for b in range(batch) for h in range(lists.heads)):
            listed, always = lists.slots(b, head, which, first, end)
            if not len(listed):
                continue
            zeros = torch.zeros_like(scratch) if fresh else scratch
            bias = _bias(zeros[:, : stop - start], listed, first, always, selection.window)
            at, kv_at = head * spread * group, head * kv_heads // lists.heads
            mine, kv_mine = slice(at, at + spread * group), slice(kv_at, kv_at + spread)
            part, logsum = op(
                q[b, mine, stripe.start + start : stripe.start + stop].reshape(1, spread, -1, dim),
                kv.k[b, kv_mine].index_select(1, listed)[None],
                kv.v[b, kv_mine].index_select(1, listed)[None],
                0.0,
                False,
                attn_mask=bias,
                scale=ctx.scaling,
            )
            blind = 0 if selection.window else max(0, int(listed[0]) - first)  # rows before the first slot listed
            part, logsum = part.view(spread * group, -1, dim), logsum.view(spread * group, -1)
            out[b, start + blind : stop, mine] = part[:, blind:].transpose(0, 1)
            lse[b, mine, start + blind : stop] = logsum[:, blind:]
            if selection.window and not fresh:
                scratch[..., stripe.end - len(listed) :] = 0
    return out, lse if want_lse else None


# ---- the choice ----

_WHY_NOT: dict[str, Callable[[_Call], str | None]] = {  # fastest first
    "fa4": _not_fa4,
    "flex": _not_flex_unasked,
    "torch": _not_torch,
}
_RUN: dict[str, Callable[[torch.Tensor, Any, Any, Any, bool], Result]] = {
    "fa4": _run_fa4,
    "flex": _run_flex,
    "torch": _run_torch,
}
_chosen: dict[tuple[_Call, str | None], tuple[str, str]] = {}


def _decide(call: _Call, forced: str | None) -> tuple[str, str]:
    """The choice, made once per kind of call."""
    if (call, forced) not in _chosen:
        why_not = {**_WHY_NOT, "flex": _not_flex} if forced == "flex" else _WHY_NOT
        _chosen[call, forced] = first_fit(why_not, call, forced)
    return _chosen[call, forced]


def choose(q: torch.Tensor, kv: Any, selection: Any, ctx: Any, want_lse: bool = False) -> tuple[str, str]:
    """(backend, reason) for this call: why this one, and why not each faster one. Never waits for the device."""
    return _decide(_call(q, kv, selection, ctx, want_lse), os.environ.get("ATTNPATCH_BACKEND") or None)


def backends() -> list[tuple[str, bool, str]]:
    """(name, usable, reason) of each backend here, fastest first, for bf16, head size 128 and blocks of 128 x 128."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    call = _Call(
        device=device.type, capability=capability(device), dtype=torch.bfloat16, dim=128, page=128, bq=128,
        beside=False, holes=False, softcap=False, window=False, mask=False, want_lse=False,
    )  # fmt: skip
    return [(name, (why := why_not(call)) is None, why or "usable") for name, why_not in _WHY_NOT.items()]


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
