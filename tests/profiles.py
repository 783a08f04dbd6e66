"""Helpers for the tests of profiling: eager attention of tiny models, and a tokenizer of single characters."""

from __future__ import annotations

import torch
from oracle import tiny

NAMES = ("llama", "qwen3", "gemma3")  # gemma3: three sliding layers, one full


def eager(model, ids):
    """Attention [L, Hq, T, T] of an un-patched eager model for one row of ids."""
    with torch.no_grad():
        return torch.stack(model(input_ids=ids[None], output_attentions=True).attentions)[:, 0].double()


def full_layers(name):
    return [3] if name == "gemma3" else [0, 1, 2, 3]


def uniform(name="llama", **overrides):
    """A tiny model whose queries are zero, so that it attends uniformly."""
    model = tiny(name, **overrides)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    return model


def characters():
    """A fast tokenizer with the 95 printable characters and the line break, one token each, without special tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "\n": 1, **{chr(32 + i): 2 + i for i in range(95)}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def random_ids(length, seed=0, rows=None):
    shape = (length,) if rows is None else (rows, length)
    return torch.randint(2, 97, shape, generator=torch.Generator().manual_seed(seed))


def head_profile(name, scores, kind="retrieval-heads", **overrides):
    """A profile of the tiny model `name` with these scores [L][Hkv] (echo-heads: of both kinds)."""
    from attnpatch.profile import Profile, structure

    scores = torch.tensor(scores, dtype=torch.float32)
    names = ("kv_induction", "kv_echo") if kind == "echo-heads" else ("kv_score",)
    return Profile(kind, {n: scores.clone() for n in names}, structure(tiny(name, **overrides).config), {})
