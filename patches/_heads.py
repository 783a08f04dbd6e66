"""Which KV heads keep the whole context: read from profiles, or from a published pattern."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnpatch.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.engine.call import KV, Ctx
    from attnpatch.profile import Profile

PATTERN = "full_attention_heads.tsv"
SCORES = {"retrieval-heads": "kv_score", "semantic-heads": "kv_score", "echo-heads": "kv_induction"}


def load(name: str, profile: Any, config: Any, kinds: tuple[str, ...]) -> Profile:
    """The profile that patch `name` was given (a folder, or a Profile), of one of `kinds`, for a model of `config`.

    Raises ConfigError: no profile there, damaged, of another kind, or made from another model.
    """
    from attnpatch.profile import Profile

    if isinstance(profile, (str, PathLike)):
        found = Profile.load(profile, *kinds)
    elif isinstance(profile, Profile):
        found = profile
    else:
        raise ConfigError(f"{name}: profile={profile!r} is no folder; make one with: attnpatch profile.")
    if found.kind not in kinds:
        raise ConfigError(
            f"{name}: the profile is of kind {found.kind!r}; allowed: {', '.join(kinds)}. Make one with: attnpatch "
            f"profile --what {kinds[0]}."
        )
    found.check(config)
    return found


def table(name: str, found: Profile, tensor: str, config: Any, by: str = "kv_heads") -> Tensor:
    """Figures [layers, heads] of a profile. Raises ConfigError where they are missing, of another shape or empty."""
    from attnpatch.profile import structure

    shape = structure(config)
    wanted = (shape["layers"], shape[by])
    x = found.tensors.get(tensor)
    if x is None or tuple(x.shape) != wanted:
        have = "no" if x is None else f"{tuple(x.shape)}"
        raise ConfigError(
            f"{name}: the {found.kind} profile is incomplete: {have} {tensor!r}, {wanted[0]} layers x {wanted[1]} "
            "heads are needed; make it again."
        )
    return x


def full_layers(config: Any) -> list[bool]:
    """Whether each layer of the model attends without a sliding window, as its configuration says."""
    config = config.get_text_config(decoder=True)
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [kind == "full_attention" for kind in types]


def read_pattern(name: str, path: Any, config: Any) -> Tensor:
    """A published head pattern, fp64 [layers, KV heads] clipped to 0..1; NaN in sliding-window layers.

    path: a tab-separated table, a row a layer and a column a KV head, or the folder with `full_attention_heads.tsv`.
    Raises ConfigError: not to be read, no table of numbers, or of another model.
    """
    import torch

    from attnpatch.profile import structure

    if not isinstance(path, (str, PathLike)):
        raise ConfigError(f"{name}: pattern={path!r} is no path; name a {PATTERN}, or the folder that holds it.")
    source, shape = Path(path), structure(config)
    source = source / PATTERN if source.is_dir() else source
    try:
        lines = source.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{name}: pattern {str(path)!r} cannot be read ({error}); name a {PATTERN}, or the folder that holds it."
        ) from None
    try:
        rows = [[float(x) for x in line.split("\t")] for line in lines if line.strip()]
    except ValueError as error:
        raise ConfigError(f"{name}: pattern {str(source)!r} is no table of numbers ({error}); get it again.") from None
    widths = {len(row) for row in rows}
    if len(rows) != shape["layers"] or widths != {shape["kv_heads"]}:
        have = f"{len(rows)} layers x {'/'.join(map(str, sorted(widths))) or 0} KV heads"
        raise ConfigError(
            f"{name}: pattern {str(source)!r} is of another model ({have}; this one has {shape['layers']} x "
            f"{shape['kv_heads']}); name the pattern of this model, or use profile= instead."
        )
    found = torch.tensor(rows, dtype=torch.float64)
    if not bool(found.isfinite().all()):
        raise ConfigError(f"{name}: pattern {str(source)!r} holds values that are no numbers; get it again.")
    found = found.clamp(0, 1)
    found[[i for i, full in enumerate(full_layers(config)) if not full]] = float("nan")
    return found


def weakest(scores: Tensor, share: float) -> Tensor:
    """bool [L, Hkv]: the round(share x heads) lowest scores of all layers together; NaN are not counted, and False.

    Ties: the lower layer, then the lower head, is the weaker.
    """
    import torch

    flat = scores.flatten()
    known = int((~flat.isnan()).sum())
    order = flat.nan_to_num(nan=float("inf"), posinf=float("inf")).argsort(stable=True)
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[order[: round(share * known)]] = True
    return (chosen & ~flat.isnan()).view_as(scores)


def by_layer(chosen: Tensor, scores: Tensor) -> list[tuple[int, ...] | None]:
    """The heads that bool [L, H] names, layer by layer; None where a layer was not measured (NaN in scores)."""
    known = [not bool(row.isnan().any()) for row in scores]
    return [tuple(row.nonzero().flatten().tolist()) if k else None for row, k in zip(chosen, known, strict=True)]


def of_layer(name: str, heads: Any, kv: KV, ctx: Ctx) -> tuple[int, ...]:
    """heads[layer of the model], those in this process. Raises ConfigError where nothing was measured of that layer."""
    found: tuple[int, ...] | None = heads[ctx.index]
    if found is None:
        raise ConfigError(
            f"{name}: the profile says nothing of layer {ctx.index}, which attends the whole context; leave that layer "
            "out with layers=, or make the profile again."
        )
    return tuple(ctx.shard.here(found, kv_heads(kv)))


def kv_heads(kv: KV) -> int:
    """KV heads of a layer, those in this process."""
    return kv.k.shape[1] if kv.packed is None else kv.packed.count.shape[1]


def sink_recent(kv: KV, heads: tuple[int, ...], sink: int, recent: Any) -> Tensor:
    """bool [B, Hkv, S]: what stays. `heads` keep the first `sink` and the last `recent` (int, or int [B]) entries.

    All other KV heads keep all.
    """
    import torch

    count = kv_heads(kv)
    pos = kv.pos.expand(-1, count, -1)  # [B, Hkv, S]
    other = torch.tensor([h not in heads for h in range(count)], device=pos.device)[:, None]
    if isinstance(recent, torch.Tensor):
        recent = recent.to(pos.device)[:, None, None]
    newest = pos.amax(-1, keepdim=True)
    return (pos >= 0) & (other | (pos < sink) | (pos > newest - recent))


def oldest(kv: KV, sink: int, most: Any, limit: int) -> Tensor:
    """At a decode step over packed storage: of steady heads that hold more than `most`, the oldest entry but the sinks.

    most: int, or int [B]. limit: what such a head holds at most without it. Slots int64 [B, Hkv, 1], -1 = none.
    Never waits for the device.
    """
    import torch

    packed = kv.packed
    pos = packed.padded("pos", limit + 1)  # [B, Hkv, limit + 1]: what such heads hold
    if isinstance(most, torch.Tensor):
        most = most[:, None, None]
    over = packed.steady[:, None] & (packed.count[..., None] > most)
    far = torch.iinfo(pos.dtype).max
    first = pos.masked_fill(pos < sink, far).argmin(-1, keepdim=True)  # empty slots lie at -1
    return torch.where(over, first, -1)
