"""A long context without its prefill: what `attnpatch bench --filled` measures decoding on.

The first tokens of the prompt are read for real, under the method itself, so that what lies in the cache is of the kind
it stores. Their keys and values are then repeated up to the last `TAIL` tokens, and `generate` reads those for real,
too: the method sees a prompt's end and decides as ever. What is attended means nothing; what is read, and how long it
takes, is that of a context of this length.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from attnpatch import PatchCache
from attnpatch.bench.shared import _UNPADDED, observes
from attnpatch.engine.compat import cache_name
from attnpatch.engine.layer import PatchLayer
from attnpatch.errors import ConfigError, UnsupportedModeError
from attnpatch.patch import Patch

HEAD, TAIL = 2048, 128  # tokens at the start and at the end that are read


def check(length: int) -> None:
    """Raise ConfigError for a prompt too short to have a middle."""
    if length <= TAIL + 1:
        raise ConfigError(f"--filled reads the last {TAIL} tokens of a prompt; give --lengths above {TAIL + 1}.")


def check_patch(patch: Patch) -> None:
    """Raise UnsupportedModeError where a method would not hold what it was never shown."""
    why = ""
    if "prepare" in patch.hooks():
        why = "it writes a prompt of its own"
    elif "keep" in patch.hooks() and patch.evict_at != {"prompt"}:
        why = "it evicts before the prompt ends"
    elif "keep" in patch.hooks() and observes(patch):
        why = "it decides by what it observed of every token"
    elif patch.query_tail > TAIL:
        why = f"it looks at more than {TAIL} last queries"
    if why:
        raise UnsupportedModeError(f"{patch.name} cannot be measured with --filled: {why}; leave --filled out.")


@torch.inference_mode()
def cache_of(model: Any, ids: torch.Tensor, patches: tuple[Patch, ...]) -> Any:
    """A cache that has seen all but the last `TAIL` of ids [B, N], for `generate` to go on with.

    patches: what the model is patched with now; none = as it is. Raises UnsupportedModeError for methods that cannot be
    measured so, and for models with layers that do not attend to everything.
    """
    for patch in patches:
        check_patch(patch)
    length = ids.shape[1]
    end = length - TAIL
    head = min(HEAD, end)
    cache: Any = DynamicCache(config=model.config.get_text_config(decoder=True))
    if patches:
        cache = PatchCache(model, prompt_length=length)
    model(input_ids=ids[:, :head], **{cache_name(model.forward): cache}, use_cache=True, logits_to_keep=1)
    for layer in cache.layers:
        repeat(layer, end - head)
    return cache


def repeat(layer: Any, more: int) -> None:
    """`more` tokens behind those that a layer holds: the same again, from the first."""
    patched = isinstance(layer, PatchLayer)
    if not patched and type(layer) is not DynamicLayer:
        raise UnsupportedModeError(
            f"--filled needs layers that attend to all tokens; this model has a {type(layer).__name__}. Leave --filled "
            "out."
        )
    if patched and (not layer.complete or any(t.ndim == 3 for t in layer.state.values())):
        raise UnsupportedModeError("--filled needs a method that keeps the whole prompt; leave --filled out.")
    if not more:
        return
    slots = torch.arange(more, device=layer.keys.device) % layer.keys.shape[2]
    k, v = layer.keys[:, :, slots], layer.values[:, :, slots]  # [B, Hkv, more, D]
    if patched:
        layer.append(k, v, _UNPADDED)
    else:
        layer.update(k, v)
