"""ZeroTuning: rescale the attention that goes to the first token, head by head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

from attnpatch.errors import ConfigError
from attnpatch.patch import Patch, option, register

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.decisions import ColumnReweight
    from attnpatch.engine.call import KV, Ctx

_WANTED = "give a number above 0 (2 = twice the weight, 1 = as it is), or a list per layer of one such number per head"


@register("zerotuning")
@dataclass
class ZeroTuning(Patch):
    """ZeroTuning (arXiv 2505.11739, ICLR 2026; FeijiangHan/ZeroTuning). Calibration, in the prompt and in decoding.

    The weight of a row's first real token is multiplied by `gamma` in the chosen query heads and the row renormalised,
    which is the same as adding ln(gamma) to its logit. Above 1 all other differences flatten, below 1 they sharpen; a
    head that pays no attention to the first token is unaffected. Keys, values and the cache stay as they are.

    gamma and heads come from a search on samples of a task (the paper: score each head alone at gamma 2, keep the best
    40 per cent of the heads that move the same way, then search gamma; labels or next-token entropy as the measure).
    `attnpatch calibrate` runs that search and writes a `profile`.
    There is no default: what helps one task can hurt another. `heads` counts query heads and is the same in every
    layer, as released; a table gives every (patched layer, query head) its own factor. Where another method evicted
    the first token from a head, that head is left as it is. Methods that score keys (snapkv, h2o) score the attention
    before the change.

    mode "key_scale" multiplies the first token's logit instead, as if its key were scaled: another method, since what
    it does depends on the logit's sign and size. The paper names such a form for kernels that hide their weights.
    """

    gamma: Any = option(None, "factor on the first token's weight, above 0, or a table [layer][query head] of factors")
    heads: Any = option(None, "query heads that are scaled, in every layer; null = all")
    mode: str = option(
        "weight", "what gamma multiplies: the weight, or (key_scale, an experiment) the logit of the first token",
        choices=("weight", "key_scale"),
    )  # fmt: skip
    profile: Any = option(None, "folder with the factors that `attnpatch calibrate` found, in place of gamma")

    title = "ZeroTuning"
    paper = "arXiv 2505.11739"
    tensor_parallel = True
    stage = "calibrate"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._profiled: list[list[float]] | None = None  # [layer of the model][query head], once `fits` has read it
        if self.profile is not None:
            self.profile = str(self.profile) if isinstance(self.profile, PathLike) else self.profile
            if self.gamma is not None or self.heads is not None:
                raise ConfigError(f"{self.name}: the profile holds gamma and heads; leave them out, or the profile.")
            return
        if self.gamma is None:
            raise ConfigError(
                f"{self.name} needs gamma: which factor helps depends on model and task (2 to 4 for classification, "
                f"0.3 to 0.6 for questions, in the authors' demo); {_WANTED}, or a profile (attnpatch calibrate)."
            )
        if isinstance(self.gamma, (list, tuple)):
            self._check_table(self.gamma)
            if self.heads is not None:
                raise ConfigError(f"{self.name}: a gamma table names its heads itself (factor 1 = not); drop heads.")
        elif not _is_factor(self.gamma):
            raise ConfigError(f"{self.name}: gamma={self.gamma!r} is out of range; {_WANTED}.")
        if self.heads is not None and not (
            isinstance(self.heads, (list, tuple)) and all(type(h) is int and h >= 0 for h in self.heads)
        ):
            raise ConfigError(f"{self.name}: heads={self.heads!r} is no list of query heads such as [0, 10], or null.")

    def _check_table(self, table: Any) -> None:
        if not table or not all(isinstance(row, (list, tuple)) and row for row in table):
            raise ConfigError(f"{self.name}: the gamma table is empty or no list of lists; {_WANTED}.")
        for layer, row in enumerate(table):
            if len(row) != len(table[0]):
                raise ConfigError(f"{self.name}: gamma[{layer}] has {len(row)} heads, gamma[0] {len(table[0])}.")
            if bad := [x for x in row if not _is_factor(x)]:
                raise ConfigError(f"{self.name}: gamma[{layer}] holds {bad[0]!r}; {_WANTED}.")

    @classmethod
    def searcher(cls) -> Any:
        from attnpatch.patches._zerotuning_search import ZeroTuningSearch

        return ZeroTuningSearch

    def fits(self, config: Any) -> None:
        if self.profile is not None:
            from attnpatch.calibrated import load

            self._profiled = load(self, config, "gamma")
            if bad := [x for row in self._profiled for x in row if not _is_factor(x)]:
                raise ConfigError(f"profile {self.profile!r} is damaged (it holds the factor {bad[0]}); make it again.")

    @property
    def reweight_at(self) -> frozenset[str]:
        """Nowhere if nothing changes: the model then runs on the quick dense path."""
        if self.profile is not None:
            idle = self._profiled is not None and all(x == 1 for row in self._profiled for x in row)
            return frozenset() if idle else super().reweight_at
        rows = self.gamma if isinstance(self.gamma, (list, tuple)) else [[self.gamma]]
        nothing = self.heads is not None and not self.heads
        return frozenset() if nothing or all(x == 1 for row in rows for x in row) else super().reweight_at

    def reweight(self, q: Tensor, kv: KV, ctx: Ctx) -> ColumnReweight | None:
        if self.name not in kv.plain:  # the same at every call, and the host need not send it again
            kv.plain[self.name] = self._decision(q, ctx)
        return kv.plain[self.name]

    def _decision(self, q: Tensor, ctx: Ctx) -> ColumnReweight | None:
        import torch

        from attnpatch.decisions import ColumnReweight

        factors = ctx.shard.part(self._factors(ctx.shard.count(q.shape[1]), ctx), q.shape[1])
        if all(x == 1 for x in factors):
            return None
        first = torch.zeros(1, 1, 1, dtype=torch.int32, device=q.device)
        factor = torch.tensor(factors, dtype=torch.float32).to(q.device, non_blocking=True)
        return ColumnReweight(first, factor[None, :, None], "renorm" if self.mode == "weight" else "scale_logit")

    def _factors(self, heads: int, ctx: Ctx) -> list[float]:
        """The factor of each query head in this layer. ConfigError if the table or the heads do not fit the model."""
        if self.profile is not None:
            return self._from_profile(ctx)
        if isinstance(self.gamma, (list, tuple)):
            shape = (len(self.gamma), len(self.gamma[0]))
            if shape != (ctx.n_layers, heads):
                raise ConfigError(
                    f"{self.name}: the gamma table is {shape[0]} layers x {shape[1]} heads, the model has "
                    f"{ctx.n_layers} patched layers x {heads} query heads; give a table of that size, or one number."
                )
            return [float(x) for x in self.gamma[ctx.layer]]
        if self.heads is None:
            return [float(self.gamma)] * heads
        if beyond := [h for h in self.heads if h >= heads]:
            raise ConfigError(f"{self.name}: heads names head {beyond[0]}; the model has query heads 0..{heads - 1}.")
        return [float(self.gamma) if h in self.heads else 1.0 for h in range(heads)]

    def _from_profile(self, ctx: Ctx) -> list[float]:
        if self._profiled is None:
            raise ConfigError(f"{self.name}: a profile is read by patch_model, which knows the model; call that.")
        return self._profiled[ctx.index]


def _is_factor(x: Any) -> bool:
    """Whether x is a finite number above 0."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and x > 0 and math.isfinite(x)
