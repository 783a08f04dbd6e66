"""Reading the queries and keys of one layer from a forward that ends there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from attnpatch.engine.call import KV
from attnpatch.errors import ConfigError, PatchStateError, UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.engine.handle import Handle


class Taken(Exception):
    """What was wanted is read; the layers above need not run. Never leaves `read`."""


@dataclass
class Tap:
    """Where to read, and what was read: q [B, Hq, rows, D], kv (k, v [B, Hkv, T, D]) and q_pos [B, rows].

    As the layer attends with them: after RoPE and any norm; `scaling` and `softcap` are the layer's own.
    """

    layer: int  # of the decoder
    rows: slice
    ends: bool  # whether the forward may stop here
    q: Any = None
    kv: Any = None
    q_pos: Any = None
    scaling: float = 1.0
    softcap: float | None = None

    def take(self, q: Tensor, k: Tensor, v: Tensor, scaling: float, softcap: float | None) -> None:
        """Called by the attention function at `layer`. Raises Taken where the forward may stop."""
        pos = torch.arange(k.shape[2], device=k.device, dtype=torch.int32).expand(q.shape[0], -1)
        self.q, self.q_pos = q[:, :, self.rows], pos[:, self.rows]
        self.kv = KV(k, v, pos[:, None], ordered=True, aligned=True)
        self.scaling, self.softcap = scaling, softcap
        if self.ends:
            raise Taken


def layer_to_read(handle: Handle, layer: int | None) -> int:
    """The decoder layer that `layer` means: None = the last one with full attention; negative counts from the end."""
    full = [fact.index for fact in handle.plan.facts if not fact.reason]
    count = len(handle.plan.facts)
    if not full:
        raise UnsupportedModelError(
            "every layer of this model uses a sliding window, so none sees a whole chunk; take a model with at least "
            "one layer of full attention."
        )
    if layer is None:
        return full[-1]
    if not -count <= layer < count or layer % count not in full:
        raise ConfigError(f"layer={layer} cannot be read; allowed are the layers with full attention: {full}.")
    return layer % count


@torch.no_grad()
def read(handle: Handle, ids: Tensor, layer: int, rows: slice) -> Tap:
    """Queries of `rows` and all keys of `layer` for ids [B, T] without padding. No cache is kept, no logits are made.

    Lower layers run under the installed patches (a method that selects does; nothing is evicted).
    """
    # accelerate's offloading puts a layer's weights away only when its forward returns
    ends = not any(hasattr(module, "_hf_hook") for module in handle.decoder.modules())
    tap = Tap(layer, rows, ends)
    try:
        handle.decoder(input_ids=ids, use_cache=False, attnpatch_tap=tap)
    except Taken:
        pass
    if tap.q is None:
        raise PatchStateError(
            "the model was un-patched while it read; where several threads share a model, patch_model it before them."
        )
    return tap
