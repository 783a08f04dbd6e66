"""Independent oracle: full KV kept, eager maths, evicted entries masked per layer, row and KV head.

`record` runs a patched model and notes which true positions each layer still held before every forward;
`OracleModel` replays the same forwards on the stock eager model with those entries masked.
"""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import attnpatch
from attnpatch.engine.compat import cache_name, output_cache  # noqa: F401  (tests take both from here)

CACHE = cache_name()  # the keyword of this transformers release
COMMON = dict(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=512, initializer_range=0.25,
    pad_token_id=0, bos_token_id=1, eos_token_id=None, tie_word_embeddings=False,
)  # fmt: skip
CONFIGS = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral_sw": ("mistral", {"sliding_window": 16}),
    "gemma2": ("gemma2", {"sliding_window": 16, "query_pre_attn_scalar": 16}),
    "gemma3": (
        "gemma3_text",
        {
            "sliding_window": 16,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        },
    ),
}
FULL = [name for name in CONFIGS if name != "mistral_sw"]


def tiny(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides):
    """A tiny random model whose logits move by 1 to 10 when a mask is wrong."""
    kind, extra = CONFIGS[name]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**COMMON, **extra, **overrides})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval()


def positions(cache) -> list[torch.Tensor | None]:
    """Held true positions [B, Hkv, S] of each layer, None for layers left alone."""
    held = []
    for layer in cache.layers:
        full = hasattr(layer, "pos") and layer.is_initialized
        held.append(layer.pos.expand(-1, layer.keys.shape[1], -1).clone() if full else None)
    return held


class Oracle:
    """Stock eager model fed token by token groups, with per-layer evicted entries masked."""

    def __init__(self, model) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.mask_2d = None
        self.held = None  # list per layer: visible[b, h, fed column] bool, or None
        self.handles = []

    def forward(self, ids, mask_2d, held=None):
        """ids [B, T]; mask_2d [B, seen + T]; held: positions per layer before this forward (None = nothing evicted)."""
        seen = self.cache.get_seq_length()
        real = mask_2d.bool()
        pos = torch.where(real, real.long().cumsum(-1) - 1, -1)  # [B, seen + T]
        layers = self.model.get_decoder().layers
        groups = layers[0].self_attn.num_key_value_groups
        hooks = []

        def hook_for(index):
            def hook(module, args, kwargs):
                mask = kwargs["attention_mask"]
                if held is None or held[index] is None or mask is None:
                    return None
                kept = held[index]  # [B, Hkv, S]
                old = pos[:, None, :seen]  # [B, 1, seen]
                visible = (kept[:, :, None, :] == old[..., None]).any(-1) & (old >= 0)  # [B, Hkv, seen]
                extra = torch.zeros(visible.shape[0], visible.shape[1], 1, mask.shape[-1], dtype=mask.dtype)
                extra[..., :seen].masked_fill_(~visible[:, :, None], torch.finfo(mask.dtype).min)
                both = mask + extra.repeat_interleave(groups, 1)
                kwargs["attention_mask"] = both.clamp(min=torch.finfo(mask.dtype).min)
                return args, kwargs

            return hook

        for index, layer in enumerate(layers):
            hooks.append(layer.self_attn.register_forward_pre_hook(hook_for(index), with_kwargs=True))
        position_ids = pos[:, seen:].clamp(min=0)
        try:
            with torch.no_grad():
                out = self.model(
                    input_ids=ids, attention_mask=mask_2d, position_ids=position_ids, **{CACHE: self.cache},
                )  # fmt: skip
        finally:
            for h in hooks:
                h.remove()
        return out.logits


def run_both(name, patch, feeds, masks=None, dtype=torch.float32, prompt_ends=None, **hyper):
    """Feed `feeds` (list of ids [B, T]) to the patched model and to the oracle.

    Returns (worst logit difference at real tokens, cache). prompt_ends[i]: tokens at which the prompt of feed i ends.
    """
    stock, model = tiny(name, dtype), tiny(name, dtype)
    attnpatch.patch_model(model, patch, **hyper)
    cache, oracle, worst = attnpatch.PatchCache(model), Oracle(stock), 0.0
    fed = 0
    for i, ids in enumerate(feeds):
        fed += ids.shape[1]
        mask = torch.ones(ids.shape[0], fed, dtype=torch.long) if masks is None else masks[:, :fed]
        held = positions(cache) if i else None
        if prompt_ends is not None:
            cache.expect(prompt_ends[i])
        expected = oracle.forward(ids, mask, held)
        pos = mask.cumsum(-1) - 1
        with torch.no_grad():
            got = model(
                input_ids=ids, attention_mask=mask if masks is not None else None,
                position_ids=pos[:, -ids.shape[1]:].clamp(min=0), **{CACHE: cache},
            ).logits  # fmt: skip
        real = mask[:, -ids.shape[1] :].bool()
        worst = max(worst, (got - expected)[real].abs().max().item())
    attnpatch.unpatch_model(model)
    return worst, cache
