"""ACT: shrink the attention sinks that are not the first token, in listed heads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

from attnpatch.errors import ConfigError, UnsupportedModeError
from attnpatch.patch import Patch, option, register

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.decisions import ColumnReweight
    from attnpatch.engine.call import KV, Ctx

_WANTED = "give {layer: [query heads]}, a list per layer of its heads, or 'all'"


@register("act")
@dataclass
class ACT(Patch):
    """ACT, Attention Calibration Technique (arXiv 2406.15765, ICML 2024; GATECH-EIC/ACT).

    A key is a sink of a head if its mean weight, over the queries that can see it, exceeds the threshold. Every sink
    but the first token keeps `beta` of its weight in every row; what is freed goes to the row's other keys in
    proportion to their weights, the first token among them. Keys, values and the cache stay as they are.

    heads: found by a search with labelled samples (each head alone, kept if accuracy rises), which `attnpatch
    calibrate` runs and writes to a `profile`. There is no default: shrinking sinks helps in some heads and
    hurts in others. Layers count the patched ones from 0, heads are query heads. "all" leaves out the first
    `skip_first` and last `skip_last` layers; a list is taken as it is.

    Sinks are found at each prompt from that prompt's queries, and apply to all its rows. decode "frozen" keeps them
    while decoding; "running" counts every query since the start, decoded ones too, and finds them anew at each step
    (also the way to feed a prompt in chunks: a chunk's rows then follow the queries so far); "off" changes the prompt
    only. The released code overwrites a weight with 1 while decoding; that is not done here. A row whose other keys
    hold less than 0.1 % of its weight (1.6 % in bfloat16) gives them less than what the rule frees: a sum of rounding
    errors would be blown up.
    """

    heads: Any = option(None, "calibrated heads: {layer: [query heads]}, a list per layer of its heads, or 'all'")
    beta: float = option(0.4, "share of a sink's weight that it keeps, 0 to 1", low=0)
    threshold: float = option(0.1, "absolute: a sink's mean weight exceeds this", low=0)
    threshold_mode: str = option("absolute", "how sinks are cut off", choices=("absolute", "alpha_over_n"))
    alpha: float = option(5.0, "alpha_over_n: a sink's mean weight exceeds alpha / tokens so far", low=0)
    min_queries: int = option(1, "fewest queries that must see a sink", low=1)
    skip_first: int = option(2, "heads='all': first layers that are left alone", low=0)
    skip_last: int = option(1, "heads='all': last layers that are left alone", low=0)
    decode: str = option("frozen", "which sinks apply while decoding", choices=("frozen", "running", "off"))
    max_sinks: int = option(64, "running: most sinks of a head while decoding, the strongest", low=1)
    profile: Any = option(
        None, "folder with the heads that `attnpatch calibrate` found, and the settings they were found with"
    )
    strict: bool = option(False, "spare the first sink in order of position instead of the first token, as released")

    title = "ACT"
    paper = "arXiv 2406.15765"
    tensor_parallel = True
    stage = "calibrate"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta > 1:
            raise ConfigError(f"{self.name}: beta={self.beta} must lie in 0..1; 1 changes nothing.")
        self._profiled: list[list[bool]] | None = None  # [layer of the model][query head], once `fits` has read it
        if self.profile is not None:
            self.profile = str(self.profile) if isinstance(self.profile, PathLike) else self.profile
            if self.heads is not None:
                raise ConfigError(f"{self.name}: the profile holds the heads; leave heads out, or the profile.")
            return
        if self.heads is None:
            raise ConfigError(
                f"{self.name} needs heads: which ones help depends on model and task; {_WANTED}, or a profile "
                "(attnpatch calibrate)."
            )
        if self.heads == "all":
            return
        rows = list(self.heads.values()) if isinstance(self.heads, dict) else self.heads
        layers = list(self.heads) if isinstance(self.heads, dict) else []
        good = isinstance(rows, (list, tuple)) and all(_counts(row) for row in [layers, *rows])
        if not good:
            raise ConfigError(f"{self.name}: heads={self.heads!r} does not fit; {_WANTED}.")

    @classmethod
    def searcher(cls) -> Any:
        from attnpatch.patches._act_search import ACTSearch

        return ACTSearch

    def fits(self, config: Any) -> None:
        if self.profile is not None:
            from attnpatch.calibrated import load

            self._profiled = load(self, config, "heads")

    @property
    def reweight_at(self) -> frozenset[str]:
        """Nowhere if nothing changes: the model then runs on the quick dense path."""
        if self.profile is not None:
            named = self._profiled is None or any(map(any, self._profiled))
        else:
            named = self.heads == "all" or any(self.heads.values() if isinstance(self.heads, dict) else self.heads)
        if not named or self.beta == 1:
            return frozenset()
        return frozenset({"prefill"}) if self.decode == "off" else super().reweight_at

    def reweight(self, q: Tensor, kv: KV, ctx: Ctx) -> ColumnReweight | None:
        import torch

        from attnpatch.decisions import ColumnReweight

        if self.name not in kv.plain:
            kv.plain[self.name] = _Listed.of(
                ctx.shard.here(self._heads(ctx.shard.count(q.shape[1]), ctx), q.shape[1]), q, kv
            )
        listed = kv.plain[self.name]
        if listed is None:
            return None
        if ctx.phase == "decode" and self.decode == "frozen":
            sinks = self._frozen(kv)
        else:
            self._refuse(ctx)
            sinks = kv.rows["act_sinks"] = self._sinks(q, kv, ctx, listed)
        if not sinks.shape[-1]:
            return None
        return ColumnReweight(sinks, torch.full_like(sinks, self.beta, dtype=torch.float32), "give_back")

    def _heads(self, n_heads: int, ctx: Ctx) -> list[int]:
        """The calibrated query heads of this layer. ConfigError if the list does not fit the model."""
        if self.profile is not None:
            if self._profiled is None:
                raise ConfigError(f"{self.name}: a profile is read by patch_model, which knows the model; call that.")
            return [h for h, chosen in enumerate(self._profiled[ctx.index]) if chosen]
        if self.heads == "all":
            inside = self.skip_first <= ctx.layer < ctx.n_layers - self.skip_last
            return list(range(n_heads)) if inside else []
        listed = self.heads if isinstance(self.heads, dict) else dict(enumerate(self.heads))
        if beyond := [layer for layer in listed if layer >= ctx.n_layers]:
            raise ConfigError(
                f"{self.name}: heads names layer {max(beyond)}, the model has patched layers 0..{ctx.n_layers - 1}; "
                f"{_WANTED} of this model."
            )
        chosen = sorted(set(listed.get(ctx.layer, ())))
        if chosen and chosen[-1] >= n_heads:
            raise ConfigError(
                f"{self.name}: heads names head {chosen[-1]} in layer {ctx.layer}, the model has query heads "
                f"0..{n_heads - 1}; {_WANTED} of this model."
            )
        return chosen

    def _frozen(self, kv: KV) -> Tensor:
        if "act_sinks" not in kv.rows:
            raise UnsupportedModeError(
                f"{self.name}: the sinks found at the prompt are gone after crop(); feed the next prompt before "
                "decoding, or use decode='running' or decode='off'."
            )
        return kv.rows["act_sinks"]

    def _refuse(self, ctx: Ctx) -> None:
        if ctx.mask is not None:
            raise UnsupportedModeError(
                f"{self.name}: sinks are column means of causal attention, which a 4-D attention mask is not; "
                "pass the padding as a 2-D mask."
            )
        if ctx.event == "chunk" and self.decode != "running":
            raise UnsupportedModeError(
                f"{self.name}: sinks need the weights of the whole prompt; feed it in one forward "
                "(no prefill_chunk_size), or use decode='running'."
            )

    def _sinks(self, q: Tensor, kv: KV, ctx: Ctx, listed: _Listed) -> Tensor:
        """Positions of the sinks of each head, int32 [B, Hq, C], -1 = none. Waits for the device at a prompt."""
        import torch

        means, seen_by = self._means(q, kv, ctx, listed)  # [B, n, P], [B, 1, P]
        cut: Any = self.threshold
        if self.threshold_mode == "alpha_over_n":
            cut = self.alpha / (ctx.q_pos.amax(-1) + 1).clamp(min=1)[:, None, None]
        sink = (means > cut) & (seen_by >= self.min_queries)
        if self.strict:
            sink = sink & (sink.cumsum(-1) > 1)
        else:
            sink[..., 0] = False
        width = min(self.max_sinks, sink.shape[-1]) if ctx.phase == "decode" else int(sink.sum(-1).max())
        best = means.masked_fill(~sink, -1.0).topk(width, dim=-1)
        found = torch.where(best.values >= 0, best.indices, -1).to(torch.int32)  # [B, n, C]
        return found.new_full((q.shape[0], q.shape[1], width), -1).index_copy_(1, listed.heads, found)

    def _means(self, q: Tensor, kv: KV, ctx: Ctx, listed: _Listed) -> tuple[Tensor, Tensor]:
        """Mean weight of each position over the queries counted, fp32 [B, n, P], and how many they are, [B, 1, P]."""
        import torch

        sums = _by_position(_column_sums(q, kv, ctx, listed), kv, ctx, listed)  # [B, n, P]
        end = (ctx.q_pos.amax(-1) + 1)[:, None, None]
        since = end - (ctx.q_pos >= 0).sum(-1)[:, None, None]
        if self.decode == "running":
            if "act_sums" in kv.rows:
                earlier, since = kv.rows["act_sums"], kv.rows["act_since"]
                sums[..., : earlier.shape[-1]] += earlier
            kv.rows["act_sums"], kv.rows["act_since"] = sums, since
        at = torch.arange(sums.shape[-1], device=q.device)
        seen_by = end - torch.maximum(at, since)
        return sums / seen_by.clamp(min=1), seen_by


class _Listed(NamedTuple):
    """The n calibrated query heads of a layer, as indices on its device."""

    heads: Tensor  # [n]
    kv_heads: Tensor  # [n] the KV head of each
    few: bool  # at most half of the layer's

    @classmethod
    def of(cls, heads: list[int], q: Tensor, kv: KV) -> _Listed | None:
        import torch

        if not heads:
            return None
        group = q.shape[1] // kv.k.shape[1]
        own, theirs = (torch.tensor(x).to(q.device, non_blocking=True) for x in (heads, [h // group for h in heads]))
        return cls(own, theirs, 2 * len(heads) <= q.shape[1])


def _column_sums(q: Tensor, kv: KV, ctx: Ctx, listed: _Listed) -> Tensor:
    """Attention that each slot received from the rows of this call, fp32 [B, n, S]."""
    from attnpatch.executors import column_sums

    lse = ctx.lse
    if listed.few:  # each with a copy of its keys: cheap beside the sums of heads that nobody asked for
        pos = kv.pos if kv.pos.shape[1] == 1 else kv.pos[:, listed.kv_heads]
        kv = replace(kv, k=kv.k[:, listed.kv_heads], pos=pos)
        q, lse = q[:, listed.heads], None if lse is None else lse[:, listed.heads]
    sums = column_sums.run(
        q, kv, q_pos=ctx.q_pos, scaling=ctx.scaling, softcap=ctx.softcap, lse=lse, newest=not ctx.ragged
    )
    return sums if listed.few else sums[:, listed.heads]


def _by_position(sums: Tensor, kv: KV, ctx: Ctx, listed: _Listed) -> Tensor:
    """[B, n, S] by slot -> [B, n, P] by position."""
    known = kv.plain.get("act_positions", 0)  # at least as many as there are positions; the host never asks the device
    known = kv.plain["act_positions"] = known + 1 if ctx.phase == "decode" else max(ctx.prompt_len)
    if kv.aligned:
        return sums
    pos = kv.pos if kv.pos.shape[1] == 1 else kv.pos[:, listed.kv_heads]
    index = pos.clamp(min=0).long().expand_as(sums)  # an empty slot adds nothing
    return sums.new_zeros(*sums.shape[:2], known).scatter_add_(-1, index, sums)


def _counts(row: Any) -> bool:
    """Whether row is a list of whole numbers from 0."""
    return isinstance(row, (list, tuple)) and all(type(x) is int and x >= 0 for x in row)
