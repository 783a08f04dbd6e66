"""Dense causal attention by the fastest backend that is right for the call. `choose` says which one, and why.

Set ATTNPATCH_BACKEND to one of fa4, fa3, cudnn, flash, fa2, sdpa, torch to force a backend; a call it cannot do is an
error. A name that only another executor knows (see `backends.NAMES`) leaves the choice as it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from attnpatch.decisions import Selection
from attnpatch.errors import ConfigError, VersionError
from attnpatch.executors.backends import HALF, first_fit_once, here
from attnpatch.executors.backends import capability as _capability
from attnpatch.executors.backends import fa4 as _fa4
from attnpatch.executors.backends import no_cuda_half as _no_cuda_half
from attnpatch.executors.backends import older_flash as _older_flash
from attnpatch.executors.blocks import By, Result, pack, part_of, place, softmax, spans, visible, without_garbage
from attnpatch.executors.column_sums import matmul, operand, rows_per_block

SDPA_ROWS = 1024
"""Query rows (times heads per kv head) of one masked SDPA block."""
CUDNN_PAIRS = 32 * 8192**2
"""Causal square (batch * heads * T * T) from which cuDNN pays: below, planning (measured: 36 ms for each new length, on
one H200) takes longer than 32 layers gain by it over flash."""
TORCH_ROWS = 512
"""Most query rows of one eager block."""

_ALL = Selection()


class _Call(NamedTuple):
    """All that the choice depends on: plain values, so that it is made once per kind of call."""

    device: str
    capability: int  # CUDA major version; 0 elsewhere
    dtype: torch.dtype
    dim: int
    single: bool  # T == 1
    square: bool  # T == S
    holes: bool
    softcap: bool
    window: bool
    part: bool  # sink, window or skip of a Selection
    mask: bool
    want_lse: bool
    packed: bool = False  # padded, each row's tokens in front, the queries' own keys last
    wide: int = 0  # head dimension of the values; 0 = as the keys
    long: bool = True  # pays for a plan by cuDNN


def _call(q: torch.Tensor, kv: Any, selection: Any, ctx: Any, want_lse: bool) -> _Call:
    rows = q.shape[2]
    return _Call(
        device=q.device.type,
        capability=_capability(q.device),
        dtype=q.dtype,
        dim=q.shape[3],
        wide=kv.v.shape[3],
        single=rows == 1,
        square=rows == kv.k.shape[2],
        holes=bool(kv.holes),
        softcap=ctx.softcap is not None,
        window=ctx.window is not None,
        part=bool(selection.sink or selection.window or selection.skip),
        mask=ctx.mask is not None,
        want_lse=want_lse,
        packed=getattr(kv, "real", None) is not None,
        long=q.shape[0] * q.shape[1] * rows * rows >= CUDNN_PAIRS,
    )


# ---- what stands in the way of a backend, or None ----


def _not_fa4(c: _Call) -> str | None:
    if why := _no_cuda_half(c._replace(holes=c.holes and not c.packed), capability=9, dim=128):
        return why
    if why := _not_many(c):
        return why
    return None if _fa4(varlen=c.packed) else "flash_attn.cute is not installed (pip install 'attnpatch[flash]')"


def _not_many(c: _Call) -> str | None:
    if c.single:
        return "slower than flash for a single query"
    if c.window and not c.square:  # its window counts slots, and after an eviction slots are not positions
        return "its window counts slots, ours positions; the same only for a whole prompt"
    return None


def _not_older(c: _Call, version: int) -> str | None:
    if why := _no_cuda_half(c, capability=9 if version == 3 else 8, dim=256) or _not_many(c):
        return why
    if version == 3 and c.capability > 9:
        return f"is written for Hopper, this is capability {c.capability}"
    return None if _older_flash(version) else f"FlashAttention {version} is not installed"


def _not_cudnn(c: _Call) -> str | None:
    if why := _no_cuda_half(c, capability=9, dim=128):
        return why
    if c.single or not c.square:
        return "only for a whole prompt (T == S > 1)"
    if c.softcap or c.window or c.want_lse:
        return "no soft-capping, window or log-sum-exp"
    if not c.long:
        return "plans anew for every length, which takes longer than it gains on a prompt this short"
    return None if torch.backends.cudnn.is_available() else "cuDNN is not available in this torch build"


def _not_flash(c: _Call) -> str | None:
    if why := _no_cuda_half(c, capability=8, dim=256):
        return why
    return "no soft-capping or window" if c.softcap or c.window else None


def _not_sdpa(c: _Call) -> str | None:
    if c.device == "cuda" and c.single and (c.holes or c.mask or c.part):
        return "a masked single query is planned anew by cuDNN at every length; two small products are quicker"
    return "no soft-capping or log-sum-exp" if c.softcap or c.want_lse else None


def _not_torch(c: _Call) -> str | None:
    return None


def _rows(q: torch.Tensor, kv: Any, rows: slice, ctx: Any) -> tuple[torch.Tensor, Any, Any]:
    """Only the query rows of a slice, over the keys that causality leaves them."""
    start, stop, _ = rows.indices(q.shape[2])
    end = kv.k.shape[2] if kv.holes else kv.k.shape[2] - q.shape[2] + stop
    part, kv, ctx = q[:, :, start:stop], copy(kv), copy(ctx)
    kv.ordered, kv.real = getattr(kv, "ordered", q.shape[2] == kv.k.shape[2]), None
    kv.k, kv.v, kv.pos = kv.k[:, :, :end], kv.v[:, :, :end], None if kv.pos is None else kv.pos[..., :end]
    ctx.q_pos = None if ctx.q_pos is None else ctx.q_pos[:, start:stop]
    ctx.mask = None if ctx.mask is None else ctx.mask[:, :, start:stop, :end]
    return part, kv, ctx


# ---- the backends: (q, kv, ctx, want_lse) -> (out [B, T, Hq, D], lse [B, Hq, T] or None) ----


def _run_fa4(q: torch.Tensor, kv: Any, ctx: Any, want_lse: bool) -> Result:
    real = getattr(kv, "real", None)
    func = _fa4() if real is None else _fa4(varlen=True)
    if func is None:
        raise VersionError("flash_attn.cute is not installed; pip install 'attnpatch[flash]'.")
    result = func(
        q.transpose(1, 2),
        kv.k.transpose(1, 2),
        kv.v.transpose(1, 2),
        softmax_scale=ctx.scaling,
        causal=True,
        window_size=(None, None) if ctx.window is None else (ctx.window - 1, 0),
        softcap=0.0 if ctx.softcap is None else ctx.softcap,
        **({"return_lse": True} if want_lse else {}),
        **({} if real is None else {"seqused_q": real[0], "seqused_k": real[1]}),
    )
    out, lse = result[:2] if isinstance(result, tuple) else (result, None)
    if real is not None:  # what stands behind a row's tokens was not written
        pad = torch.arange(q.shape[2], device=q.device) >= real[0][:, None]  # [B, T]
        out = out.masked_fill(pad[..., None, None], 0.0)
        lse = None if lse is None else lse.masked_fill(pad[:, None], float("-inf"))
    return out, lse if want_lse else None


def _run_older(q: torch.Tensor, kv: Any, ctx: Any, want_lse: bool, version: int) -> Result:
    func = _older_flash(version)
    if func is None:
        raise VersionError(f"FlashAttention {version} is not installed; install it, or choose another backend.")
    result = func(
        *(x.transpose(1, 2) for x in (q, kv.k, kv.v)),
        softmax_scale=ctx.scaling,
        causal=True,  # bottom-right aligned
        window_size=(-1, -1) if ctx.window is None else (ctx.window - 1, 0),
        softcap=0.0 if ctx.softcap is None else ctx.softcap,
        **({"return_attn_probs": True} if want_lse else {}),
    )
    out, lse = result[:2] if isinstance(result, tuple) else (result, None)
    return out, lse if want_lse else None


def _run_cudnn(q: torch.Tensor, kv: Any, ctx: Any, want_lse: bool) -> Result:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = F.scaled_dot_product_attention(q, kv.k, kv.v, is_causal=True, scale=ctx.scaling, enable_gqa=True)
    return out.transpose(1, 2), None


def _run_flash(q: torch.Tensor, kv: Any, ctx: Any, want_lse: bool) -> Result:
    single = q.shape[2] == 1  # then all keys are visible and the heads can be packed as rows
    query = pack(q, kv.k.shape[1]) if single else q
    # the op itself: SDPA would prefer cuDNN, which plans anew for every length (tens of ms a decode step).
    # Its causality is bottom-right aligned, and it takes fewer kv heads.
    op = torch.ops.aten._scaled_dot_product_flash_attention
    out, lse, *_ = op(query, kv.k, kv.v, 0.0, not single, scale=ctx.scaling)
    return place(None, out, q, 0), lse.reshape(q.shape[:3]) if want_lse else None


def _run_sdpa(q: torch.Tensor, kv: Any, ctx: Any, want_lse: bool) -> Result:
    (heads, rows), (kv_heads, slots) = q.shape[1:3], kv.k.shape[1:3]
    group = heads // kv_heads
    plain = not kv.holes and ctx.mask is None and ctx.window is None and part_of(ctx) is None
    # elsewhere than on a CPU, is_causal may end in the math kernel, which builds T x S
    if plain and rows == slots and rows > 1 and q.device.type == "cpu":
        full = F.scaled_dot_product_attention(q, kv.k, kv.v, is_causal=True, scale=ctx.scaling, enable_gqa=group > 1)
        return full.transpose(1, 2), None
    # SDPA adds its mask, so NaN keys would leak too
    keys, values = without_garbage(kv.k, kv), without_garbage(kv.v, kv)
    out: torch.Tensor | None = None
    for span in spans(q, kv, ctx, max(1, SDPA_ROWS // group)):
        start, stop, first, end = span
        seen = None if plain and rows == 1 else visible(kv, ctx, span, slots - rows)
        if seen is not None:  # [B|1, 1|Hkv, r, keys] -> [.., G*r, keys]
            if stop - start > 1 and group > 1:
                seen = seen[:, :, None].expand(-1, -1, group, -1, -1).flatten(2, 3)
            elif seen.shape[2] == 1:
                seen = seen.expand(-1, -1, group * (stop - start), -1)
        part = F.scaled_dot_product_attention(
            pack(q[:, :, start:stop], kv_heads),
            keys[:, :, first:end],
            values[:, :, first:end],
            attn_mask=seen,
            scale=ctx.scaling,
        )
        if seen is not None and (kv.holes or ctx.mask is not None or part_of(ctx)):  # rows that see nothing
            part = part.masked_fill(~seen.any(-1, keepdim=True), 0.0)
        out = place(out, part, q, start)
    if out is None:
        raise ConfigError("attention over zero queries.")
    return out, None


def _run_torch(q: torch.Tensor, kv: Any, ctx: Any, want_lse: bool) -> Result:
    (batch, heads, rows, _), (kv_heads, slots) = q.shape, kv.k.shape[1:3]
    keys, values = operand(kv.k).transpose(-1, -2), operand(without_garbage(kv.v, kv))
    out: torch.Tensor | None = None
    logsums: list[torch.Tensor] = []
    for span in spans(q, kv, ctx, rows_per_block(batch, heads, slots, TORCH_ROWS)):
        start, stop, first, end = span
        block = pack(q[:, :, start:stop], kv_heads)  # [B, Hkv, G*r, D]
        logits = matmul(operand(block), keys[..., first:end]) * ctx.scaling
        if ctx.softcap is not None:
            logits = torch.tanh(logits / ctx.softcap) * ctx.softcap
        logits = logits.view(batch, kv_heads, -1, stop - start, end - first)
        probs, lse = softmax(logits, visible(kv, ctx, span, slots - rows), want_lse)
        # .to(): half probabilities where the product of halves is fp32; a no-op elsewhere
        part = matmul(probs.flatten(2, 3).to(values.dtype), values[:, :, first:end])
        out = place(out, part, q, start)
        if want_lse and lse is not None:
            logsums.append(lse.flatten(1, 2))  # [B, Hq, r]
    if out is None:
        raise ConfigError("attention over zero queries.")
    return out, torch.cat(logsums, dim=-1) if want_lse else None


# ---- the choice ----

_WHY_NOT: dict[str, Callable[[_Call], str | None]] = {  # fastest first
    "fa4": _not_fa4,
    "fa3": partial(_not_older, version=3),
    "cudnn": _not_cudnn,
    "flash": _not_flash,
    "fa2": partial(_not_older, version=2),  # as quick as torch's own, and knows soft-capping and windows
    "sdpa": _not_sdpa,
    "torch": _not_torch,
}
_RUN: dict[str, Callable[[torch.Tensor, Any, Any, bool], Result]] = {
    "fa4": _run_fa4,
    "fa3": partial(_run_older, version=3),
    "fa2": partial(_run_older, version=2),
    "cudnn": _run_cudnn,
    "flash": _run_flash,
    "sdpa": _run_sdpa,
    "torch": _run_torch,
}


_chosen: dict[tuple[_Call, str | None], tuple[str, str]] = {}


def _decide(call: _Call, forced: str | None) -> tuple[str, str]:
    return first_fit_once(_chosen, _WHY_NOT, call, forced)


def choose(q: torch.Tensor, kv: Any, ctx: Any, want_lse: bool = False) -> tuple[str, str]:
    """(backend, reason) for this call: why this one, and why not each faster one. Never waits for the device."""
    return _decide(_call(q, kv, _ALL, ctx, want_lse), os.environ.get("ATTNPATCH_BACKEND") or None)


def backends(
    device: torch.device | None = None, dtype: torch.dtype = torch.bfloat16, dim: int = 128
) -> list[tuple[str, bool, str]]:
    """(name, usable, reason) of each backend, fastest first, for a plain prompt; device: None = this machine's."""
    device = device or here()
    call = _Call(
        device=device.type, capability=_capability(device), dtype=dtype, dim=dim, single=False, square=True,
        holes=False, softcap=False, window=False, part=False, mask=False, want_lse=False,
    )  # fmt: skip
    return [(name, (why := why_not(call)) is None, why or "usable") for name, why_not in _WHY_NOT.items()]


def single(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, rows: tuple[torch.Tensor, ...] | None = None
) -> torch.Tensor | None:
    """The hot path of decoding: q [B, Hq, 1, D] over k, v [B, Hkv, S, D] -> [B, 1, Hq, D].

    rows: `row_lengths` of k where rows hold different numbers of keys; None = all S. What `run` computes by its "flash"
    and "sdpa" backends, with nothing around it; None where a backend is forced.
    """
    if "ATTNPATCH_BACKEND" in os.environ:
        return None
    batch, heads, _, dim = q.shape
    kv_heads = k.shape[1]
    packed = q.view(batch, kv_heads, -1, dim) if q.is_contiguous() else pack(q, kv_heads)  # [B, Hkv, G, D]
    if q.device.type != "cuda":
        seen = None if rows is None else rows[0].expand(-1, -1, packed.shape[2], -1)
        out = F.scaled_dot_product_attention(packed, k, v, attn_mask=seen, scale=scaling)
        return out.view(batch, 1, heads, -1)
    fits = q.dtype in HALF and dim % 8 == 0 and dim <= 256 and v.shape[3] == dim  # as in _run_flash
    if not fits or _capability(q.device) < 8:
        return None
    if rows is None:
        out = torch.ops.aten._scaled_dot_product_flash_attention(packed, k, v, 0.0, False, scale=scaling)[0]
        return out.reshape(batch, 1, heads, -1)
    starts, offsets, used = rows  # every (row, KV head) is a sequence of its own
    out = torch.ops.aten._flash_attention_forward(
        packed.flatten(0, 1), k.reshape(-1, 1, dim), v.reshape(-1, 1, v.shape[-1]),
        starts, offsets, 1, k.shape[2], 0.0, False, False, scale=scaling, seqused_k=used,
    )[0]  # fmt: skip
    return out.view(batch, 1, heads, -1)


def row_lengths(count: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """For `single`: count int32 [B, 1|Hkv] of k [B, Hkv, S, D] as the kernel here takes it; layers alike share it."""
    batch, kv_heads, slots, _ = k.shape
    if k.device.type != "cuda":
        return ((torch.arange(slots, device=k.device) < count[..., None, None]),)  # [B, 1|Hkv, 1, S]
    starts = torch.arange(batch * kv_heads + 1, device=k.device, dtype=torch.int32)
    # contiguous: what is expanded can stay a view with stride 0, which the kernel refuses
    return starts, starts * slots, count.expand(batch, kv_heads).flatten().contiguous()


def run(
    q: torch.Tensor, kv: Any, selection: Any, ctx: Any, want_lse: bool = False, _backend: str | None = None
) -> Result:
    """Attention of q [B, Hq, T, D] over kv without lists: all held keys, or those that sink, window and skip leave.

    out: [B, rows, Hq, D] in q.dtype (maybe a view); lse: [B, Hq, rows] fp32 (fp64 for fp64 inputs) or None; rows: those
    of selection.rows. See `attnpatch.executors` for kv and ctx.
    """
    if selection.rows is not None:
        q, kv, ctx = _rows(q, kv, selection.rows, ctx)
    call = _call(q, kv, selection, ctx, want_lse)
    if call.part:
        ctx = By(ctx, selection)
    name, _ = _decide(call, _backend or os.environ.get("ATTNPATCH_BACKEND") or None)
    return _RUN[name](q, kv, ctx, want_lse)
