"""patch_model, unpatch_model, patched: one verb in place, one to undo it, one context manager."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnpatch.errors import ConfigError, PatchStateError
from attnpatch.patch import Patch, build, compose, get_patch, refuse_parallel

if TYPE_CHECKING:
    from attnpatch.budget import Budget
    from attnpatch.recipe import Recipe


def resolve(
    patch: str | Patch | Recipe | Path | Sequence[Any], budget: Budget | int | float | str | None = None, **values: Any
) -> tuple[Patch, ...]:
    """Name, "a+b", list, Patch, Recipe or recipe path plus hyperparameters -> composed patches. Raises ConfigError."""
    from attnpatch.recipe import Recipe, load_recipe

    if isinstance(patch, Path) or (isinstance(patch, str) and patch.endswith((".yaml", ".yml"))):
        patch = load_recipe(patch)
    if isinstance(patch, Recipe):
        parts: list[Any] = list(patch.build())
    elif isinstance(patch, str):
        parts = [name.strip() for name in patch.split("+")]
    elif isinstance(patch, Patch):
        parts = [patch]
    elif isinstance(patch, (list, tuple)):
        parts = list(patch)
    else:
        raise ConfigError(
            f"{patch!r} is not a patch; give a name ('snapkv'), 'a+b', a list, a Patch object, a Recipe or its path."
        )
    if wrong := [p for p in parts if not isinstance(p, (str, Patch))]:
        raise ConfigError(f"the list holds {wrong[0]!r}, which is no patch; list names ('snapkv') or Patch objects.")
    classes = [get_patch(p) if isinstance(p, str) else type(p) for p in parts]
    own = _assign(classes, budget, values)
    built = []
    for part, cls, mine in zip(parts, classes, own, strict=True):
        if isinstance(part, Patch):
            kept = {f.name: getattr(part, f.name) for f in fields(part)}
            built.append(build(cls, {**kept, **mine}) if mine else part)
        else:
            built.append(build(cls, mine))
    return compose(built)


def _assign(classes: list[type[Patch]], budget: Any, values: dict[str, Any]) -> list[dict[str, Any]]:
    """Give each keyword to the one patch that owns it; `snapkv={...}` addresses a patch by name."""
    own: list[dict[str, Any]] = [{} for _ in classes]
    if budget is not None:
        values = {"budget": budget, **values}
    names = [c.name for c in classes]
    for key, value in values.items():
        if key in names:
            if not isinstance(value, dict):
                raise ConfigError(f"{key}={value!r}: give the hyperparameters as a dict: {key}={{'name': value}}.")
            continue
        owners = [i for i, c in enumerate(classes) if key in {f.name for f in fields(c)}]
        if len(owners) > 1:
            raise ConfigError(
                f"{key!r} belongs to {' and '.join(repr(names[i]) for i in owners)}; "
                f"say which: {names[owners[0]]}={{{key!r}: {value!r}}}."
            )
        if not owners:
            allowed = sorted({f.name for c in classes for f in fields(c)})
            raise ConfigError(f"{'+'.join(names)} has no hyperparameter {key!r}; allowed: {', '.join(allowed)}.")
        own[owners[0]][key] = value
    for name, mine in zip(names, own, strict=True):
        if twice := sorted(mine.keys() & values.get(name, {}).keys()):
            raise ConfigError(f"{name}: {twice[0]!r} is given twice, bare and in {name}={{...}}; give it once.")
        mine.update(values.get(name, {}))
    return own


def patch_model(
    model: Any, patch: str | Patch | Recipe | Path | Sequence[Any], *,
    budget: Budget | int | float | str | None = None, layers: Sequence[int] | None = None, **hyperparameters: Any,
) -> Any:  # fmt: skip
    """Rewrite the attention of `model` in place with one or several methods, and return the model.

    patch: a name, "a+b", a list, a Patch object, a Recipe or a recipe path. With several patches, hyperparameters
    are given per patch: `snapkv={"window_size": 64}`. budget: tokens (1024), ratio (0.25) or bytes ("512MiB").
    layers: indices to act on; default all full-attention layers. Sliding-window layers are left alone.
    Raises ConfigError, UnsupportedModelError, PatchStateError or VersionError; the model is then unchanged.
    """
    patches = resolve(patch, budget, **hyperparameters)
    from attnpatch.engine.call import Plan, resolve_layers
    from attnpatch.engine.compat import NAME, check_versions
    from attnpatch.engine.families import inspect_model, unwrap
    from attnpatch.engine.handle import Handle
    from attnpatch.engine.rope import Rope
    from attnpatch.engine.shards import Shard

    check_versions()
    base = unwrap(model)
    if (handle := getattr(base, "_attnpatch", None)) is not None:
        raise PatchStateError(
            f"the model is already patched with {'+'.join(p.name for p in handle.plan.patches)}; "
            "call unpatch_model(model) first, or name both at once: patch_model(model, 'a+b')."
        )
    decoder, facts = inspect_model(base)
    if decoder.config._attn_implementation == NAME:
        raise PatchStateError("this model shares its config object with a patched one; load it with its own config.")
    covered = resolve_layers(layers, facts)
    for p in patches:
        p.fits(decoder.config)
    rope = Rope(decoder, covered) if any(p.needs_rope for p in patches) else None
    shard = Shard.of(base, decoder.config.num_attention_heads)
    if shard.size > 1:
        refuse_parallel(patches)
    plan = Plan(patches, facts, covered, decoder.config, rope, shard)
    Handle(base, decoder, plan).install()
    return model


def unpatch_model(model: Any) -> Any:
    """Undo patch_model: no hook, attribute or registration stays; logits are bit-identical to before."""
    from attnpatch.engine.families import unwrap

    handle = getattr(unwrap(model), "_attnpatch", None)
    if handle is None:
        raise PatchStateError("the model is not patched; call patch_model(model, ...) first.")
    handle.remove()
    return model


@contextmanager
def patched(model: Any, patch: Any, **kwargs: Any) -> Iterator[Any]:
    """`with patched(model, "snapkv", budget=1024): ...` patches inside the block only."""
    from attnpatch.engine.families import unwrap

    patch_model(model, patch, **kwargs)
    try:
        yield model
    finally:
        if hasattr(unwrap(model), "_attnpatch"):  # un-patched inside the block: an error of the block must come through
            unpatch_model(model)
