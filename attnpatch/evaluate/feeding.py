"""How token ids get into a model, patched or not: a prefill by itself, a generation, a copy of a cache."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

from attnpatch.engine.compat import out_of_memory
from attnpatch.errors import AttnPatchError, UnsupportedModeError

if TYPE_CHECKING:
    from torch import Tensor


def is_patched(model: Any) -> bool:
    """Whether patch_model acted on the model."""
    from attnpatch.engine.families import unwrap

    return getattr(unwrap(model), "_attnpatch", None) is not None


def writes_prompts(model: Any) -> str | None:
    """Name of the active method that puts another prompt in the place of the given one."""
    from attnpatch.engine.families import unwrap

    handle = getattr(unwrap(model), "_attnpatch", None)
    return None if handle is None or handle.plan.writer is None else handle.plan.writer.name


def needs_own_rows(model: Any) -> bool:
    """Whether an active method makes of a row in a batch of conversations something else than of the row alone.

    It evicts or adds up at every step, the pads of finished rows included; it selects in prefill over whole caches,
    which a later turn of unequal rows is not; or it writes its own prompt.
    """
    from attnpatch.engine.families import unwrap

    handle = getattr(unwrap(model), "_attnpatch", None)
    if handle is None:
        return False
    plan = handle.plan
    selector = plan.selectors.get("prefill")
    whole = selector is not None and selector.needs_complete_kv
    return whole or plan.writer is not None or "step" in plan.keeps_at or bool(plan.reweighters["decode"])


def has_windows(model: Any) -> bool:
    """Whether layers attend a sliding window. It counts padding, so nothing may be padded behind the first turn."""
    from attnpatch.engine.families import inspect_model, unwrap

    return any(fact.kind != "full" for fact in inspect_model(unwrap(model))[1])


def pad(rows: Sequence[Sequence[int]], value: int, device: Any) -> tuple[Tensor, Tensor]:
    """Rows of ids, padded on the left: (ids, mask), int64 [B, N] both."""
    import torch

    width = max(map(len, rows))
    ids = torch.full((len(rows), width), value, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[i, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


def prefill(model: Any, ids: Tensor, mask: Tensor) -> tuple[Any, Tensor]:
    """Feed ids [B, N] as one prompt: (its cache, compressed where the patch compresses; last logits [B, V])."""
    from transformers import DynamicCache

    from attnpatch import PatchCache
    from attnpatch.engine.families import unwrap

    base = unwrap(model)
    if (writer := writes_prompts(base)) is not None:
        raise UnsupportedModeError(
            f"{writer} writes its prompt from text and question together, so no context can be prefilled before the "
            "question is known; use the query-aware protocol."
        )
    if is_patched(base):
        cache: Any = PatchCache(base, prompt_length=ids.shape[1])
    else:
        cache = DynamicCache(config=base.config.get_text_config(decoder=True))
    return cache, forward(base, ids, mask, cache)[:, -1]


def forward(model: Any, ids: Tensor, mask: Tensor, cache: Any, keep: int = 1) -> Tensor:
    """Logits [B, keep, V] (keep = 0: of all T) of ids [B, T] behind what the cache saw; mask [B, seen + T]."""
    from attnpatch.engine.compat import cache_name
    from attnpatch.engine.families import unwrap

    base = unwrap(model)
    names = signature(base.forward).parameters
    few = {"logits_to_keep": keep} if "logits_to_keep" in names else {}
    at = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    # an all-ones mask says nothing, and without it the attention stays on its fast path
    out = base(
        input_ids=ids, attention_mask=None if bool(mask.all()) else mask, position_ids=at, use_cache=True,
        **{cache_name(base.forward): cache}, **few,
    )  # fmt: skip
    return out.logits if few or not keep else out.logits[:, -keep:]


def generate(model: Any, ids: Tensor, mask: Tensor, tokens: int, pad_id: int, cache: Any = None) -> tuple[Tensor, Any]:
    """Greedy: (new ids int64 [B, <= tokens], the cache). ids and mask cover all that the cache saw, too."""
    from attnpatch.engine.compat import cache_name, greedy_options, output_cache

    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=tokens, pad_token_id=pad_id, return_dict_in_generate=True,
        **greedy_options(model), **({} if cache is None else {cache_name(): cache}),
    )  # fmt: skip
    return out.sequences[:, ids.shape[1] :], output_cache(out)


def copied(cache: Any) -> Any:
    """An independent copy of a cache, or None where it cannot be copied (state on the host, device events)."""
    try:
        return copy.deepcopy(cache)
    except (TypeError, ValueError, RuntimeError, NotImplementedError, AttnPatchError) as error:
        if out_of_memory(error):
            raise
        return None


def bytes_of(cache: Any) -> tuple[int, int]:
    """(bytes of K and V held, bytes the un-patched cache would hold) of a cache."""
    from attnpatch.engine.cache import summarise

    rows = [summarise(layer) for layer in cache.layers]
    return sum(r.bytes_held for r in rows), sum(r.bytes_dense for r in rows)


def ends(model: Any) -> set[int]:
    """Token ids that end a generation."""
    found = model.generation_config.eos_token_id
    return set() if found is None else {found} if isinstance(found, int) else set(found)
