"""PatchCache: the cache of a patched model, and what its layers hold in figures."""

from __future__ import annotations

from collections.abc import Generator
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import DynamicCache

from attnpatch.engine.layer import PatchLayer
from attnpatch.engine.slots import allocated
from attnpatch.errors import InputError, PatchStateError, UnsupportedModeError
from attnpatch.switches import switch

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.decisions import KeepSet
    from attnpatch.engine.call import KV, Plan


@dataclass
class LayerSummary:
    """What a cache layer holds: tokens, bytes, true positions int32 [B, Hkv, S] (None for stock layers).

    density: share of the causal pages that prefill attended, fp32 [B, H] (None unless a method listed pages).
    watch: `Stopwatch` of a selecting method's prefill ("all" of it, and "computing").
    report: what the method told of itself (`Ctx.report`). tally: (`Tally`, rows, bytes of a token's keys, its values).
    """

    seen: int = 0
    held: int = 0
    bytes_held: int = 0
    bytes_dense: int = 0
    positions: Tensor | None = None
    note: str = ""
    density: Tensor | None = None
    backend: str = ""
    watch: Any = None
    report: dict[str, Any] = field(default_factory=dict)
    tally: Any = None


def summarise(layer: Any) -> LayerSummary:
    """Figures of one layer, without its keys and values, so that the cache itself can be freed."""
    if not getattr(layer, "is_initialized", False):
        return LayerSummary()
    keys, values, seen = layer.keys, layer.values, layer.get_seq_length()
    slot = keys.shape[3] * keys.element_size() + values.shape[3] * values.element_size()
    slot *= keys.shape[0] * keys.shape[1]
    if not isinstance(layer, PatchLayer):
        held = allocated(keys, values)  # a sliding layer keeps a view of the last chunk's whole keys until it grows
        return LayerSummary(seen, keys.shape[2], held, held)
    positions = layer.pos.expand(-1, keys.shape[1], -1)
    density = None if layer.pages is None else layer.pages / layer.grid
    return LayerSummary(
        seen, layer.held, layer.bytes_held(), seen * slot, positions, layer.note, density, layer.backend, layer.watch,
        dict(layer.report), (copy(layer.tally), keys.shape[0], keys.shape[1] * keys.shape[3] * keys.element_size(),
                             values.shape[1] * values.shape[3] * values.element_size()),
    )  # fmt: skip


class PatchCache(DynamicCache):
    """The cache of a patched model. `PatchCache(model)` for users who keep one over several turns.

    prompt_length: total tokens of the coming prompt when it is fed in several forwards by hand (generate sets it).
    """

    def __init__(self, model: Any, *, prompt_length: int | None = None) -> None:
        from attnpatch.engine.call import Plan

        self.plan: Plan = model if isinstance(model, Plan) else _plan_of(model)
        super().__init__(config=self.plan.config)
        patchable = {f.index for f in self.plan.facts if not f.reason}
        self.layers = [PatchLayer() if i in patchable else layer for i, layer in enumerate(self.layers)]
        self.turn = 0
        self.prompt_end = prompt_length or 0
        self.batch = 1
        self.padded = False  # some token fed so far was padding
        self.turns: dict[Any, Any] = {}  # `turns.pairs` of the next steps: (first position, `Pairs`), by kind of layer
        self.generating = self._in_prompt = False

    @property
    def mask(self) -> Tensor | None:
        """The last padding mask, bool [B, seen]; None = nothing was padded, or no layer can be patched."""
        return next((layer.mask for layer in self.patched), None)

    @property
    def patched(self) -> list[PatchLayer]:
        """The layers that may evict or select."""
        return [layer for layer in self.layers if isinstance(layer, PatchLayer)]

    @property
    def grows_by_ones(self) -> bool:
        """Whether the mask of a decode step is known to be all ones: nothing was padded, and generate appends ones."""
        return self.generating and not self.padded

    def expect(self, prompt_length: int) -> None:
        """Declare where the coming prompt ends, counted in all tokens seen: eviction waits for its last chunk."""
        self.prompt_end = prompt_length

    def begin(self, length: int, before: int) -> str:
        """The event of a forward of `length` tokens: "chunk", "prompt" or "step"."""
        after = before + length
        prompt = before < self.prompt_end or length > 1 or before == 0
        if not prompt:
            return "step"
        if not self._in_prompt:
            self.turn += 1
            for layer in self.patched:
                layer.tail = None
        self._in_prompt = after < self.prompt_end
        return "chunk" if self._in_prompt else "prompt"

    def view(self, layer: int) -> KV:
        """What covered layer `layer` holds now."""
        held: Any = self.layers[self.plan.covered[layer]]
        view: KV = held.view()
        view.pos = held.pos
        return view

    def decide(self, decision: Any, layer: int) -> None:
        """Apply what `keep` said in covered layer `layer`: None, a KeepSet, or a generator of them, one by one."""
        for each in decision if isinstance(decision, Generator) else (decision,):
            if each is not None:
                self.apply(each, layer)

    def apply(self, keep: KeepSet, layer: int) -> None:
        """Apply what the method said in covered layer `layer`, to the layer it names."""
        named = layer if keep.layer is None else keep.layer
        if not 0 <= named <= layer:
            raise InputError(f"KeepSet for layer {named}; layer {layer} may decide for layers 0..{layer}.")
        target: Any = self.layers[self.plan.covered[named]]
        if switch("ATTNPATCH_DEBUG", False):  # waits for the device
            keep.validate(target.keys.shape[0], target.keys.shape[1], target.held)
        target.keep(keep, self.turn)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens (a negative count) in every layer, or raise and leave every layer as it was."""
        layer: Any
        for layer in self.layers:
            if isinstance(layer, PatchLayer):
                layer.check_crop(tokens_to_remove)
            elif getattr(layer, "is_sliding", False) and layer.get_seq_length() >= layer.get_max_length():
                raise UnsupportedModeError(
                    "a sliding-window layer has let go of what a crop would bring back; start a new PatchCache."
                )
        super().crop(tokens_to_remove)
        if not self._in_prompt:
            self.prompt_end = min(self.prompt_end, self.get_seq_length())

    def reset(self) -> None:
        super().reset()
        self.turn, self.prompt_end, self._in_prompt, self.padded = 0, 0, False, False

    def activate_past_recording(self) -> None:
        PatchLayer.activate_past_recording(self.layers[0])  # type: ignore[arg-type]


def _plan_of(model: Any) -> Plan:
    from attnpatch.engine.families import unwrap

    handle = getattr(unwrap(model), "_attnpatch", None)
    if handle is None:
        raise PatchStateError("PatchCache(model) needs a patched model; call patch_model(model, ...) first.")
    return handle.plan
