"""Query heads taken out of a model for a while, to see what they were good for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from attnpatch.engine.families import inspect_model, unwrap
from attnpatch.errors import ConfigError, UnsupportedModelError

MODES, PHASES = ("zero", "uniform"), ("all", "decode")


@contextmanager
def masked(
    model: Any, heads: Iterable[tuple[int, int]], *, mode: str = "zero", phase: str = "all"
) -> Iterator[Any]:  # fmt: skip
    """`with masked(model, [(layer, head), ...]): ...` runs the model without these query heads.

    mode "zero": a head's output is zero before the output projection. "uniform": its query is zero, so that it attends
    uniformly to all it sees (the experiment of arXiv 2404.15574). phase "all", or "decode": forwards of one token only.
    Layers count as the model counts them; a patched model may be masked, and a masked model patched. Compile inside
    the block or not at all: a graph made before ignores it. Raises ConfigError, UnsupportedModelError.
    """
    if mode not in MODES or phase not in PHASES:
        raise ConfigError(f"mode={mode!r}, phase={phase!r}: allowed are modes {MODES} and phases {PHASES}.")
    decoder, _ = inspect_model(unwrap(model))
    config = decoder.config
    chosen: dict[int, list[int]] = {}
    for layer, head in heads:
        if not 0 <= layer < len(decoder.layers) or not 0 <= head < config.num_attention_heads:
            raise ConfigError(
                f"head ({layer}, {head}) is not there; the model has layers 0..{len(decoder.layers) - 1} and query "
                f"heads 0..{config.num_attention_heads - 1}."
            )
        chosen.setdefault(layer, []).append(head)
    hooks: list[Any] = []
    try:
        for layer, mine in chosen.items():
            hooks.append(_hook(decoder.layers[layer], layer, sorted(set(mine)), config, mode, phase))
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def _hook(layer: Any, index: int, heads: list[int], config: Any, mode: str, phase: str) -> Any:
    """A hook on the layer's output (or query) projection that zeroes the channels of `heads`."""
    name = "o_proj" if mode == "zero" else "q_proj"
    projection = getattr(getattr(layer, "self_attn", None), name, None)
    if projection is None:
        raise UnsupportedModelError(
            f"layer {index} has no self_attn.{name}, where mode={mode!r} takes a head out; "
            "mask heads of layers that have one."
        )
    listed = torch.tensor(heads)

    def without(x: Any) -> Any:  # [B, T, Hq * D]
        if phase == "decode" and x.shape[1] > 1:
            return x
        if x.shape[-1] % config.num_attention_heads:
            raise UnsupportedModelError(
                f"layer {index}: {x.shape[-1]} channels are not {config.num_attention_heads} heads; a model that is "
                "split over devices by heads cannot be masked, load it on one."
            )
        out = x.clone().unflatten(-1, (config.num_attention_heads, -1))
        out[..., listed.to(x.device, non_blocking=True), :] = 0
        return out.flatten(-2)

    if mode == "zero":
        return projection.register_forward_pre_hook(lambda _, args: (without(args[0]), *args[1:]))
    return projection.register_forward_hook(lambda _, args, out: without(out))
