"""Turning rotated queries to other positions, with the model's own frequencies and convention."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

from attnpatch.errors import UnsupportedModelError
from attnpatch.executors.likeness import partners

if TYPE_CHECKING:
    from torch import Tensor

_MOVING = ("dynamic", "longrope")  # frequencies that change with the length seen: a difference has no one angle

_REMEDY = (
    "so tokens cannot be re-numbered; use positions='original' (streamingllm), schedule='fixed' (recycled), "
    "positions='true' (infinitehip), or positions='true' and threshold=1.01 (tokenselect)."
)


class Rope:
    """Rotations compose, so a query at position p becomes one at p + d by a rotation of d."""

    def __init__(self, decoder: Any, layers: Sequence[int]) -> None:
        """layers: indices of those whose queries will be turned; each is tried once, on two tokens.

        Raises UnsupportedModelError where the rotation is missing, unknown, or has no fixed frequencies.
        """
        module: Any = getattr(decoder, "rotary_emb", None)
        self.module = module
        attentions = {i: decoder.layers[i].self_attn for i in layers}
        modules = {type(a).__module__ for a in attentions.values()}
        self.apply: Any = next((getattr(sys.modules[m], "apply_rotary_pos_emb", None) for m in modules), None)
        if attentions and (self.module is None or self.apply is None):
            raise UnsupportedModelError(
                f"{type(decoder).__name__} has no rotary embedding that attnpatch knows, {_REMEDY}"
            )
        kinds = getattr(self.module, "rope_type", "default")
        kinds = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
        if moving := kinds & set(_MOVING):
            raise UnsupportedModelError(
                f"rope type {sorted(moving)[0]!r} changes its frequencies with the length, {_REMEDY}"
            )
        by_layer = attentions and "layer_type" in signature(module.forward).parameters
        self.types = list(decoder.config.layer_types) if by_layer else None
        self._partners: dict[Any, Any] = {}  # layer type -> int32 [D] or None
        try:
            self.turned = {i for i, a in attentions.items() if self._depends_on_positions(decoder, a, i)}
        except (AttributeError, RuntimeError, TypeError) as error:
            raise UnsupportedModelError(
                f"the rotary embedding of {type(decoder).__name__} is of a form that attnpatch does not know, {_REMEDY}"
            ) from error

    def _depends_on_positions(self, decoder: Any, attention: Any, layer: int) -> bool:
        """Whether the layer rotates at all (some families leave some layers un-rotated)."""
        import torch

        weight = next(attention.parameters())
        device = next(self.module.buffers()).device if weight.is_meta else weight.device
        with torch.no_grad():
            x = torch.randn(1, 2, decoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
            x = x.to(device, decoder.dtype)
            at = torch.tensor([[[0, 1]], [[0, 9]]], device=device)
            near, far = (
                attention(hidden_states=x, position_embeddings=self.angles(x, layer, p), attention_mask=None)[0]
                for p in at
            )
            self.rotate(x.new_zeros(1, 1, 2, attention.head_dim), layer, at[0])
            kind = None if self.types is None else self.types[layer]
            if kind not in self._partners:
                both = self.matrix(layer, at[1].T * 7 + 1000, attention.head_dim)  # turns by 1000 and 1063
                self._partners[kind] = partners(both)
        return not torch.equal(near, far)

    def angles(self, x: Tensor, layer: int, pos: Tensor) -> tuple[Tensor, Tensor]:
        """The model's cos and sin [B, T, D], in x's dtype, at positions int [B, T]."""
        return self.module(x, pos) if self.types is None else self.module(x, pos, self.types[layer])

    def turn(self, x: Tensor, layer: int, by: Tensor) -> Tensor:
        """x [B, H, T, D] as if it stood `by` int [B, T] positions further on, in x's dtype; the angle is fp32."""
        return self.rotate(x, layer, by) if layer in self.turned else x

    def matrix(self, layer: int, by: Tensor, dim: int) -> Tensor:
        """R fp32 [B, D, D] with x @ R = x turned by `by` int [B, 1]."""
        import torch

        eye = torch.eye(dim, device=by.device)[None, :, None].expand(by.shape[0], -1, -1, -1)  # a vector as a head
        return self.rotate(eye, layer, by)[:, :, 0]

    def partner(self, layer: int, dim: int, device: Any) -> Tensor | None:
        """int32 [D]: the channel that each is rotated with (`likeness.partners`); None where more go into one."""
        kind = None if self.types is None else self.types[layer]
        found, key = self._partners[kind], (kind, device)
        if found is None or len(found) != dim:
            return None
        if key not in self._partners:  # brought there once: a CUDA graph may copy nothing from elsewhere
            self._partners[key] = found.to(device)
        return self._partners[key]

    def rotate(self, x: Tensor, layer: int, by: Tensor) -> Tensor:
        """`turn`, whether the layer rotates or not."""
        wide = x.float()
        cos, sin = self.angles(wide, layer, by)
        kind = f"{self.types[layer]}_" if self.types else ""
        scale = getattr(self.module, f"{kind}attention_scaling", 1.0)  # the queries carry it already
        return self.apply(wide, wide, cos / scale, sin / scale)[0].to(x.dtype)
