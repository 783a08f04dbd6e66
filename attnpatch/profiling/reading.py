"""Reading profiles: heads in order, and runs put together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnpatch.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.profile import Profile

MAIN = {
    "sinks": "first",
    "retrieval-heads": "score",
    "semantic-heads": "score",
    "echo-heads": "induction",
    "layer-errors": "error",
    "minference": "mass",
}


def figures(profile: Profile, by: str | None = None) -> Tensor:
    """The tensor [layers, heads] of a profile that `by` names, or its kind's main one. Raises ConfigError.

    layer-errors: [layers, 1], for a whole layer stands in the place of a head.
    """
    if profile.kind == "layer-errors" and by in (None, "error") and "error" in profile.tensors:
        return profile.tensors["error"][:, None]
    allowed = [name for name, x in profile.tensors.items() if x.ndim == 2 and x.is_floating_point()]
    name = by or MAIN.get(profile.kind, "")
    if name not in allowed:
        raise ConfigError(f"a {profile.kind} profile cannot be ranked by {name!r}; allowed: {', '.join(allowed)}.")
    return profile.tensors[name]


def ranking(profile: Profile, by: str | None = None) -> list[tuple[int, int]]:
    """(layer, head) from the highest figure to the lowest; ties: the lower layer, then head. Skipped layers: absent.

    by: a tensor of the profile; default `first` (sinks), `score`, `induction` (echo-heads), `error` (layer-errors)
    or `mass` (minference).
    A tensor named kv ranks KV heads.
    """
    score = figures(profile, by)
    heads = score.shape[1]
    flat = score.flatten()
    order = flat.nan_to_num(float("-inf")).argsort(descending=True, stable=True)
    return [(int(i) // heads, int(i) % heads) for i in order if not bool(flat[i].isnan())]


def merged(first: Profile, second: Profile) -> Profile:
    """Two runs of trials (retrieval-heads, semantic-heads) as one. ConfigError where they do not fit."""
    import torch

    from attnpatch.profiling.decoding_heads import tensors

    if first.kind != second.kind or first.model != second.model or "trials" not in first.tensors:
        raise ConfigError(
            f"a {first.kind} and a {second.kind} profile cannot be merged; give two retrieval-heads or two "
            "semantic-heads profiles of one model."
        )
    differing = [k for k in ("count", "steps", "wording") if first.about.get(k) != second.about.get(k)]
    if differing:
        raise ConfigError(f"the profiles were made with another {differing[0]}; merge runs of the same settings.")
    trials = torch.cat([first.tensors["trials"], second.tensors["trials"]], dim=-1)
    about = {**first.about, **{k: first.about[k] + second.about[k] for k in ("made", "kept")}}
    about["merged"] = [x.about.get("merged", [x.about.get("seed")]) for x in (first, second)]
    return type(first)(first.kind, tensors(first.kind, trials, first.model["kv_heads"]), first.model, about)
