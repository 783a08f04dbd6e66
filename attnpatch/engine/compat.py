"""Version gate, and the one place that registers with transformers."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import metadata
from inspect import signature
from typing import Any

from attnpatch.errors import VersionError

NAME = "attnpatch"  # must contain neither "flash", "sdpa", "paged" nor a slash: transformers matches substrings
OLDEST, BELOW = (5, 14), (6, 0)
CACHE_NAMES = ("cache", "past_key_values")  # what transformers calls the cache, since 5.24 and before
# the host's two, then the driver's and cuBLAS's own, which torch does not raise as OutOfMemoryError
_NO_MEMORY = ("can't allocate memory", "not enough memory", "cuda error: out of memory", "cublas_status_alloc_failed")
_users = 0


def check_versions() -> None:
    """Raise VersionError unless transformers is inside the tested range."""
    text = metadata.version("transformers")
    found = tuple(int(n) for n in re.findall(r"\d+", text)[:2])
    if not OLDEST <= found < BELOW:
        raise VersionError(
            f"transformers {text} is outside the tested range >=5.14,<6; "
            "run: python -m pip install 'transformers>=5.14,<6'."
        )


def cache_name(function: Callable | None = None) -> str:
    """What `function` (default: generate) calls its cache argument."""
    from transformers import GenerationMixin

    names = signature(function or GenerationMixin.prepare_inputs_for_generation).parameters
    return next(n for n in CACHE_NAMES if n in names)


def take_cache(kwargs: dict[str, Any]) -> Any:
    """Remove the cache from call keywords, under either name; None where there is none."""
    found = [kwargs.pop(n) for n in CACHE_NAMES if n in kwargs]
    return next((c for c in found if c is not None), None)


def output_cache(output: Any) -> Any:
    """The cache of a model's or generate's output."""
    return next(output[n] for n in CACHE_NAMES if n in output)


def acquire() -> None:
    """Register the attention and mask functions when the first model is patched."""
    global _users
    if _users == 0:
        from transformers import AttentionInterface, AttentionMaskInterface

        from attnpatch.engine.attention import attention, mask

        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, mask)
    _users += 1


def release() -> None:
    """Remove both registrations when the last model is un-patched, so that nothing is left behind."""
    global _users
    _users -= 1
    if _users == 0:
        from transformers import AttentionInterface, AttentionMaskInterface

        AttentionInterface._global_mapping.pop(NAME, None)
        AttentionMaskInterface._global_mapping.pop(NAME, None)


def input_device(model: Any) -> Any:
    """Where token ids belong; accelerate keeps the weights of an offloaded embedding on the meta device."""
    embedding = model.get_input_embeddings()
    device = embedding.weight.device
    return embedding._hf_hook.execution_device if device.type == "meta" else device


def pad_id(tokenizer: Any) -> int | None:
    """Token id to pad with: the tokenizer's own, else its end of text."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device, or the host, has no memory left."""
    import torch

    text = str(error).lower()
    told = isinstance(error, RuntimeError) and any(words in text for words in _NO_MEMORY)
    return told or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def greedy_options(model: Any) -> dict[str, Any]:
    """Arguments that make generate greedy whatever the model's generation_config says."""
    config = model.generation_config
    sampling = [
        k for k in ("temperature", "top_p", "top_k", "min_p", "typical_p") if getattr(config, k, None) is not None
    ]
    return {"do_sample": False, "num_beams": 1, **dict.fromkeys(sampling)}
