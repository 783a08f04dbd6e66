"""Turning rotated queries to other positions, with the model's own frequencies and convention."""

from __future__ import annotations

import sys
from inspect import signature
from typing import TYPE_CHECKING, Any

from attnpatch.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor

_MOVING = ("dynamic", "longrope")  # frequencies that change with the length seen: a difference has no one angle


class Rope:
    """Rotations compose, so a query at position p becomes one at p + d by a rotation of d."""

    def __init__(self, decoder: Any) -> None:
        """Raises UnsupportedModelError where the rotation is missing or has no fixed frequencies."""
        self.module = getattr(decoder, "rotary_emb", None)
        attention = type(decoder.layers[0].self_attn)
        self.apply = getattr(sys.modules[attention.__module__], "apply_rotary_pos_emb", None)
        if self.module is None or self.apply is None:
            raise UnsupportedModelError(
                f"{type(decoder).__name__} has no rotary embedding that attnpatch knows, so tokens cannot be "
                "re-numbered; use positions='original' (streamingllm) or schedule='fixed' (recycled)."
            )
        kinds = getattr(self.module, "rope_type", "default")
        kinds = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
        if moving := kinds & set(_MOVING):
            raise UnsupportedModelError(
                f"rope type {sorted(moving)[0]!r} changes its frequencies with the length, so tokens cannot be "
                "re-numbered; use positions='original' (streamingllm) or schedule='fixed' (recycled)."
            )
        by_layer = "layer_type" in signature(self.module.forward).parameters
        self.types = list(decoder.config.layer_types) if by_layer else None

    def turn(self, x: Tensor, layer: int, by: Tensor) -> Tensor:
        """x [B, H, T, D] as if it stood `by` int [B, T] positions further on, in x's dtype; the angle is fp32."""
        kind = self.types[layer] if self.types else None
        module: Any = self.module
        wide = x.float()
        cos, sin = module(wide, by) if kind is None else module(wide, by, kind)  # [B, T, D]
        scale = getattr(module, f"{kind}_attention_scaling" if kind else "attention_scaling", 1.0)
        apply: Any = self.apply
        return apply(wide, wide, cos / scale, sin / scale)[0].to(x.dtype)  # the queries carry the scale already
