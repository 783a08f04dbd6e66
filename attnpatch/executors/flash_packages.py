"""FlashAttention 2 and 3 where their packages are installed: soft-capping, windows and log-sum-exp on CUDA.

Their contract: q [B, T, H, D], k and v [B, S, Hkv, D], causality bottom-right aligned, lse [B, H, T] natural and fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attnpatch.errors import VersionError

_found: dict[str, Callable[..., Any] | None] = {}  # a plain dict: torch.compile warns of lru_cache


def function(name: str) -> Callable[..., Any] | None:
    """flash_attn_func of the package behind "fa2" or "fa3", or None."""
    if name not in _found:
        try:
            if name == "fa3":
                from flash_attn_interface import flash_attn_func
            else:
                from flash_attn import flash_attn_func
        except ImportError:  # flash-attn-4 also lives below flash_attn, and has no such function there
            flash_attn_func = None
        _found[name] = flash_attn_func
    return _found[name]


def missing(name: str) -> str | None:
    """Why the package cannot be used, or None."""
    package = {"fa2": "flash_attn", "fa3": "flash_attn_interface"}[name]
    return None if function(name) else f"{package} is not installed"


def run(name: str, q: torch.Tensor, kv: Any, ctx: Any, want_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Dense causal attention by the package: out [B, T, Hq, D], lse [B, Hq, T] or None."""
    func = function(name)
    if func is None:
        raise VersionError(f"{missing(name)}; install it, or choose another backend.")
    result = func(
        q.transpose(1, 2),
        kv.k.transpose(1, 2),
        kv.v.transpose(1, 2),
        softmax_scale=ctx.scaling,
        causal=True,
        window_size=(-1, -1) if ctx.window is None else (ctx.window - 1, 0),
        softcap=0.0 if ctx.softcap is None else ctx.softcap,
        **({"return_attn_probs": True} if want_lse else {}),
    )
    out, lse = result[:2] if isinstance(result, tuple) else (result, None)
    return out, lse if want_lse else None
