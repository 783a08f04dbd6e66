"""Recognising models by structure, never by hub name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attnpatch.errors import UnsupportedModelError


@dataclass(frozen=True)
class LayerFact:
    """One decoder layer: its index, what its cache layer is, and why it cannot be patched ("" = it can).

    window: tokens that a sliding layer sees, itself included; not every family tells its attention.
    """

    index: int
    kind: str
    reason: str = ""
    window: int | None = None


def unwrap(model: Any) -> Any:
    """The transformers model inside a torch.compile or PEFT wrapper."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def inspect_model(model: Any) -> tuple[Any, tuple[LayerFact, ...]]:
    """(decoder, facts of each layer). Raises UnsupportedModelError naming what is missing."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers model; load one with AutoModelForCausalLM.from_pretrained."
        )
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; attnpatch patches decoder-only language models.")
    offloaded = any(hasattr(m, "_hf_hook") for m in model.modules())  # accelerate fills meta weights when they run
    if any(p.is_meta for p in model.parameters()) and not offloaded:
        raise UnsupportedModelError(f"{name} is on the meta device and has no weights; load the weights first.")
    decoder: Any = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    missing = [] if layers is not None and len(layers) else ["a decoder with `.layers`"]
    for layer in layers or ():
        attention = getattr(layer, "self_attn", None)
        for attr in ("layer_idx", "config", "num_key_value_groups"):
            if attention is not None and not hasattr(attention, attr):
                missing.append(f"`self_attn.{attr}`")
        if attention is not None and getattr(attention, "is_causal", True) is False:
            missing.append("causal attention")
        if "chunked_attention" in (getattr(decoder.config, "layer_types", None) or ()):
            missing.append("full or sliding-window attention (its attention is chunked)")
        if attention is not None and getattr(attention, "sinks", None) is not None:
            missing.append("attention without learned sinks")
    if not model._can_set_attn_implementation():
        missing.append("transformers' attention interface (set_attn_implementation)")
    if missing:
        raise UnsupportedModelError(
            f"{name} does not fit: it lacks {', '.join(dict.fromkeys(missing))}. Decoder-only models "
            "built like Llama, Qwen2, Qwen3, Mistral, Gemma2 or Gemma3 do; load one of those."
        )
    facts = layer_facts(decoder.config)
    if bare := [f.index for f in facts if f.kind == "full" and not hasattr(decoder.layers[f.index], "self_attn")]:
        raise UnsupportedModelError(
            f"{name} does not fit: layer {bare[0]} has no `self_attn`. Decoder-only models "
            "built like Llama, Qwen2, Qwen3, Mistral, Gemma2 or Gemma3 do; load one of those."
        )
    if not any(f.kind in ("full", "sliding") for f in facts):
        raise UnsupportedModelError(
            f"{name} does not fit: no layer keeps keys and values of attention (its layers are {facts[0].kind}). "
            "Decoder-only models built like Llama, Qwen2, Qwen3, Mistral, Gemma2 or Gemma3 do; load one of those."
        )
    return decoder, facts


def layer_facts(config: Any) -> tuple[LayerFact, ...]:
    """Facts of each layer of a decoder config, without a model."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    facts = []
    layer: Any
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) is DynamicLayer:
            facts.append(LayerFact(index, "full"))
        elif getattr(layer, "is_sliding", False):
            reason = "sliding window: it is bounded already and left alone"
            facts.append(LayerFact(index, "sliding", reason, layer.sliding_window))
        else:
            facts.append(LayerFact(index, type(layer).__name__, "no full attention cache: left alone"))
    return tuple(facts)
