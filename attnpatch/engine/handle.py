"""One handle per patched model: install, undo, refuse."""

from __future__ import annotations

import os
from inspect import signature
from typing import Any
from weakref import ref

import torch

from attnpatch.engine import compat
from attnpatch.engine.cache import LayerSummary, PatchCache, summarise
from attnpatch.engine.call import Call, Plan
from attnpatch.errors import InputError, PatchStateError, UnsupportedModeError
from attnpatch.executors.backends import check_forced
from attnpatch.profile import structure

_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
_COPY = "a patched model cannot be copied or pickled; call unpatch_model(model), copy it, then patch both."


class _Wrapped:
    """An instance-level replacement of a model method; knows how to refuse copying."""

    def __init__(self, handle: Handle, name: str) -> None:
        self.handle, self.name, self.original = handle, name, getattr(handle.model, name)
        self.__wrapped__ = self.original  # inspect.signature shows the original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.name != "generate":
            raise UnsupportedModeError(
                f"{self.name} (continuous batching, paged attention) replaces the attention and would drop the patch; "
                "use model.generate, or unpatch_model(model) first."
            )
        if self.handle.plan.writer is not None:
            return self.handle.generate_rewritten(args, kwargs)
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """generate with the given prompt, under the patches."""
        cache, kwargs = self.handle.prepare_generate(args, kwargs)
        # the cache goes in as an argument: generate would build its own otherwise
        kwargs[compat.cache_name()] = cache
        cache.generating = True
        try:
            result = self.original(*args, **kwargs)
        finally:
            cache.generating = False
        self.handle.summary = [summarise(layer) for layer in cache.layers]
        return result

    def __deepcopy__(self, memo: dict) -> Any:
        raise PatchStateError(_COPY)

    def __reduce__(self) -> Any:
        raise PatchStateError(_COPY)


class Handle:
    """What patch_model installed on one model, and how to take it away again."""

    def __init__(self, model: Any, decoder: Any, plan: Plan) -> None:
        self.model, self.decoder, self.plan = model, decoder, plan
        self.last_cache: Any = lambda: None  # weak reference to the newest cache, for status
        self.summary: list[LayerSummary] | None = None  # its figures after generate, when the cache is gone
        self.previous = decoder.config._attn_implementation
        self.positional = tuple(signature(type(decoder).forward).parameters)[1:]
        self.cache_name = compat.cache_name(type(decoder).forward)
        self._installed: list[str] = []

    def install(self) -> None:
        """Put everything in place, or nothing at all."""
        compat.acquire()
        try:
            self.decoder.set_attn_implementation(compat.NAME)
            self._hook = self.decoder.register_forward_pre_hook(self.before_forward, with_kwargs=True)
            for name in ("generate", "generate_batch", "init_continuous_batching"):
                if hasattr(self.model, name):
                    self._had = {**getattr(self, "_had", {}), name: self.model.__dict__.get(name)}
                    setattr(self.model, name, _Wrapped(self, name))
                    self._installed.append(name)
            self.model._attnpatch = self
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Leave no hook, attribute or registration behind."""
        if hasattr(self, "_hook"):
            self._hook.remove()
        if self.decoder.config._attn_implementation == compat.NAME:
            self.decoder.config._attn_implementation_internal = self.previous
        for name in self._installed:
            del self.model.__dict__[name]
            if self._had[name] is not None:
                setattr(self.model, name, self._had[name])
        self._installed.clear()
        self.model.__dict__.pop("_attnpatch", None)
        compat.release()

    def __deepcopy__(self, memo: dict) -> Any:
        raise PatchStateError(_COPY)

    def __reduce__(self) -> Any:
        raise PatchStateError(_COPY)

    def layer_summaries(self) -> list[LayerSummary] | None:
        """Figures of the newest cache, or None before the first forward (or once a bare forward's cache is gone)."""
        cache = self.last_cache()
        return [summarise(layer) for layer in cache.layers] if cache is not None else self.summary

    # ---- the decoder's pre-hook ------------------------------------------------------------------------------
    def before_forward(self, module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Check the inputs, find or make the cache, and add the per-call context."""
        if module.config._attn_implementation != compat.NAME:
            raise PatchStateError(
                f"the attention implementation was set to {module.config._attn_implementation!r} behind the patch; "
                "call unpatch_model(model) first, then set_attn_implementation, then patch_model again."
            )
        kwargs = {**dict(zip(self.positional, args, strict=False)), **kwargs}
        tap = kwargs.pop("attnpatch_tap", None)
        if module.training and torch.is_grad_enabled():
            raise UnsupportedModeError(
                "a patched model is for inference: call model.eval(), or train un-patched (unpatch_model(model))."
            )
        embeds = kwargs.get("inputs_embeds")
        inputs: Any = embeds if embeds is not None else kwargs.get("input_ids")
        check_inputs(inputs, kwargs.get("attention_mask"))
        if "ATTNPATCH_BACKEND" in os.environ:
            # input ids may still lie elsewhere than the layers
            place = next((p.device for p in module.parameters() if p.device.type == "cuda"), inputs.device)
            check_forced(place, module.dtype, structure(module.config)["head_dim"])
        cache = compat.take_cache(kwargs)
        self.check_cache(cache)
        use_cache = kwargs.get("use_cache")
        use_cache = getattr(module.config, "use_cache", True) if use_cache is None else use_cache
        if cache is not None or use_cache:
            cache = PatchCache(self.plan) if cache is None else cache
            self.last_cache, self.summary, kwargs[self.cache_name] = ref(cache), None, cache
        elif self.plan.selectors or any(self.plan.reweighters.values()):  # need cache layers; the model sees none
            cache = PatchCache(self.plan)
        kwargs["attnpatch"] = Call(self.plan, cache, inputs.shape[1])
        kwargs["attnpatch"].tap = tap
        return (), kwargs

    def check_cache(self, cache: Any) -> None:
        """Only this patched model's own caches can be right."""
        if cache is None:
            return
        if not isinstance(cache, PatchCache):
            raise UnsupportedModeError(
                f"a {type(cache).__name__} cannot be used with a patched model (nothing would be evicted); "
                "pass attnpatch.PatchCache(model), or no cache."
            )
        if cache.plan is not self.plan:
            raise PatchStateError("this PatchCache belongs to another patch or model; make one with PatchCache(model).")

    # ---- generate --------------------------------------------------------------------------------------------
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """model.generate under the patches, with the prompt as given."""
        return self.model.generate.run(*args, **kwargs)

    def generate_rewritten(self, args: tuple, kwargs: dict) -> Any:
        """generate from the prompt a method writes; what comes back begins with the given prompt, as ever."""
        writer: Any = self.plan.writer
        names = tuple(signature(self.model.generate.original).parameters)[1:]
        args, kwargs = args[:1], {**dict(zip(names, args[1:], strict=False)), **kwargs}
        ids = [x for x in (kwargs.pop("input_ids", None), kwargs.pop("inputs", None), *args[:1]) if x is not None]
        if len(ids) != 1 or kwargs.get("inputs_embeds") is not None or compat.take_cache(kwargs) is not None:
            raise UnsupportedModeError(
                f"{writer.name} writes a prompt of its own from the given one; pass input_ids [B, N], and neither "
                "inputs_embeds nor the cache of an earlier turn (attnpatch evaluate: --questions requests)."
            )
        given = ids[0]
        self.prepare_generate((given, *args[1:]), kwargs)  # refuses what it must before a long text is read
        prompt, kwargs = writer.prepare(self.model, given, kwargs)
        out = self.generate(prompt, *args[1:], **kwargs)
        rows = out if isinstance(out, torch.Tensor) else out.sequences
        given = given.to(rows.device).repeat_interleave(rows.shape[0] // given.shape[0], dim=0)
        whole = torch.cat([given, rows[:, prompt.shape[1] :]], dim=1)
        if out is rows:
            return whole
        out.sequences = whole
        return out

    def prepare_generate(self, args: tuple, kwargs: dict) -> tuple[PatchCache, dict]:
        """Refuse modes that cannot be right; the PatchCache, told where the prompt ends, and generate's keywords."""
        kwargs = {**kwargs}
        config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or self.model.generation_config
        for name in _ASSISTED:
            if kwargs.get(name) or getattr(config, name, None):
                raise UnsupportedModeError(
                    f"{name}: assisted decoding rolls the cache back, which an evicting patch cannot do; "
                    "generate without it, or unpatch_model(model) first."
                )
        implementation = kwargs.get("cache_implementation") or getattr(config, "cache_implementation", None)
        if implementation not in (None, "dynamic", "hybrid"):
            raise UnsupportedModeError(
                f"cache_implementation={implementation!r} is not supported under a patch yet; leave it out "
                "(the patch's own cache is used), or unpatch_model(model) first."
            )
        if kwargs.get("use_cache") is False or (kwargs.get("use_cache") is None and config.use_cache is False):
            raise UnsupportedModeError("use_cache=False keeps no KV, so there is nothing to patch; leave it out.")
        cache = compat.take_cache(kwargs)
        self.check_cache(cache)
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        given = ids if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        if isinstance(given, torch.Tensor):  # without any, generate starts from the BOS token
            check_inputs(given, kwargs.get("attention_mask"))
        length = max(x.shape[1] if x is not None else 0 for x in (ids, kwargs.get("inputs_embeds"),
                     _two_dim(kwargs.get("attention_mask"))))  # fmt: skip
        if ids is None and kwargs.get("inputs_embeds") is None:
            length = 1
        if cache is None:
            cache = PatchCache(self.plan)
        seen = cache.get_seq_length()
        if seen >= length and kwargs.get("inputs_embeds") is None:
            raise InputError(
                f"the cache holds {seen} tokens and generate was given {length}; pass the ids of all turns, or the new "
                "ones with an attention_mask over all turns."
            )
        cache.expect(length)
        return cache, {**kwargs, "cache_implementation": None}


def _two_dim(mask: Any) -> Any:
    return mask if mask is not None and mask.ndim == 2 else None


def check_inputs(inputs: Any, mask: Any) -> None:
    """Raise InputError for an empty prompt, and for a mask of another batch, too short or (if floating) with NaN.

    inputs: ids [B, T] or embeddings [B, T, hidden]. Integer and bool masks cost nothing.
    """
    if inputs is None or 0 in inputs.shape[:2]:
        raise InputError("the prompt is empty; pass at least one token.")
    if not isinstance(mask, torch.Tensor):
        return
    if mask.ndim == 2 and (mask.shape[0] != inputs.shape[0] or mask.shape[1] < inputs.shape[1]):
        raise InputError(
            f"attention_mask {tuple(mask.shape)} does not fit a prompt {tuple(inputs.shape[:2])}; "
            "pass one row for each of the batch, over all tokens, earlier turns included."
        )
    if mask.is_floating_point() and bool(torch.isnan(mask).any()):
        raise InputError("attention_mask holds NaN; pass 0 / 1 (or booleans): 1 for real tokens, 0 for padding.")
