"""Random models of real shapes, built on the device: time and memory need no trained weights."""

from __future__ import annotations

import copy
from typing import Any

import torch

from attnpatch.errors import ConfigError

SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
    },
    "llama-1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""Llama 3.1 8B, Llama 3.2 1B, and a toy for dry runs."""


def shape_config(shape: str, layers: int | None = None, structured: bool = False) -> Any:
    """The LlamaConfig of `shape`; arguments and errors as of `random_model`."""
    from transformers import LlamaConfig

    if shape not in SHAPES:
        raise ConfigError(f"unknown shape {shape!r}; allowed: {', '.join(SHAPES)}.")
    if layers is not None and layers < 1:
        raise ConfigError(f"layers={layers} must be at least 1, or None for the shape's own.")
    values = {**SHAPES[shape], **({} if layers is None else {"num_hidden_layers": layers})}
    return LlamaConfig(
        **values,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        attention_bias=structured,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def random_model(
    shape: str = "llama-8b",
    *,
    layers: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cuda",
    structured: bool = False,
) -> Any:
    """A Llama of `shape` with small normal weights (seed 0), made on `device`, in eval mode.

    layers: number of decoder layers; None = the shape's own. structured: queries and keys are noise of unit variance
    plus one vector that all heads of a layer share, so that a method that looks for a pattern finds one. Raises
    ConfigError for an unknown shape.
    """
    from transformers import AutoModelForCausalLM

    config = shape_config(shape, layers, structured)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    if structured:
        _share_a_vector(model)
    return model.to(device).eval()


@torch.no_grad()
def _share_a_vector(model: Any) -> None:
    """Weights and biases of the query and key projections as `random_model` promises."""
    for layer in model.get_decoder().layers:
        vector: Any = None
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            heads = projection.out_features // model.config.head_dim
            if vector is None:
                vector = torch.randn_like(projection.bias[: model.config.head_dim])
            projection.weight.normal_(std=projection.in_features**-0.5)
            projection.bias.copy_(vector.repeat(heads))


def twin(model: Any) -> Any:
    """A second model over the same weights, so that two patches can be compared step by step."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)
