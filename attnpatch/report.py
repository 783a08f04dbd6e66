"""status(model): what is patched, what each layer holds, and what that saves, in bytes allocated."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from attnpatch.errors import PatchStateError


@dataclass
class LayerStatus:
    """One decoder layer. `positions`: held true positions int32 [B, Hkv, S], -1 = empty slot (None without a cache).

    note: why a selecting method ran dense here. backend: what computed its lists.
    density: share of the causal pages attended in prefill, fp32 [B, H].
    choosing, computing: seconds of the device in a selecting method's prefill, all calls together.
    report: what the method tells of itself, by name (a share of heads, a rate of hits).
    steps: decode steps under a selecting method; attended, scored: tokens of a step, mean over steps, rows and heads,
    and keys read to choose them (a page's bounds count as two; 0 where the method does not tell).
    bytes_read, bytes_read_dense: of K and V in those steps, all rows, and what dense steps would have read.
    """

    index: int
    kind: str
    covered: bool
    reason: str = ""
    seen: int = 0
    held: int = 0
    bytes_held: int = 0
    bytes_dense: int = 0
    positions: Any = field(default=None, repr=False)
    note: str = ""
    density: Any = field(default=None, repr=False)
    backend: str = ""
    choosing: float = 0.0
    computing: float = 0.0
    report: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    attended: float = 0.0
    scored: float = 0.0
    bytes_read: int = 0
    bytes_read_dense: int = 0

    @property
    def hit_rate(self) -> float | None:
        """Share of sparse steps that took an earlier choice again; None where the method keeps none."""
        return self.report.get("hit rate")

    @property
    def choice(self) -> str:
        """What prefill attended, in words."""
        if self.note or self.density is None:
            return f"; {self.note}" if self.note else ""
        low, high = self.density.min().item(), self.density.max().item()
        return f"; attended {self.density.mean().item():.1%} of the pages (heads {low:.1%} to {high:.1%})"

    @property
    def told(self) -> str:
        """What the method tells of itself, in words."""
        told = "".join(f"; {name} {value:.4g}" for name, value in self.report.items())
        if not self.steps:
            return told
        share = self.bytes_read / max(self.bytes_read_dense, 1)
        return (
            f"{told}; {self.steps} steps attended {self.attended:,.0f} and scored {self.scored:,.0f} tokens each, "
            f"{share:.1%} of the dense reading"
        )


@dataclass
class Status:
    """The state of a patched model and of the newest cache it filled."""

    patches: dict[str, dict[str, Any]]
    layers: list[LayerStatus]
    backend: str
    backend_reason: str
    note: str = ""

    @property
    def bytes_held(self) -> int:
        """Bytes allocated for K and V over all layers."""
        return sum(layer.bytes_held for layer in self.layers)

    @property
    def bytes_dense(self) -> int:
        """Bytes the un-patched cache would hold."""
        return sum(layer.bytes_dense for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; positions are left out."""
        layers = [{k: v for k, v in vars(layer).items() if k != "positions"} for layer in self.layers]
        for row in layers:
            row["hit_rate"] = row["report"].get("hit rate")
            row["density"] = None if row["density"] is None else row["density"].tolist()
        return {**{k: v for k, v in asdict(self).items() if k != "layers"}, "layers": layers,
                "bytes_held": self.bytes_held, "bytes_dense": self.bytes_dense}  # fmt: skip

    def __str__(self) -> str:
        lines = []
        for name, values in self.patches.items():
            lines.append(f"{name}: " + ", ".join(f"{k}={v}" for k, v in values.items()))
        skipped = [layer for layer in self.layers if not layer.covered]
        lines.append(f"layers: {len(self.layers) - len(skipped)} of {len(self.layers)} patched")
        lines += [f"  layer {layer.index} left alone: {layer.reason}" for layer in skipped]
        lines.append(f"backend: {self.backend} ({_grouped(self.backend_reason)})")
        lines += [f"lists: {text}" for text in dict.fromkeys(layer.backend for layer in self.layers) if text]
        for layer in self.layers:
            if layer.seen:
                share = layer.bytes_held / max(layer.bytes_dense, 1)
                lines.append(f"  layer {layer.index}: seen {layer.seen}, held {layer.held}, {layer.bytes_held:,} of "
                             f"{layer.bytes_dense:,} bytes ({share:.1%}){layer.choice}{layer.told}")  # fmt: skip
        if choosing := sum(layer.choosing for layer in self.layers):
            computing = sum(layer.computing for layer in self.layers)
            lines.append(f"prefill: {choosing:.3f} s in choosing, {computing:.3f} s in computing")
        if self.bytes_dense:
            share = self.bytes_held / self.bytes_dense
            lines.append(f"KV: {self.bytes_held:,} of {self.bytes_dense:,} bytes ({share:.1%})")
        return "\n".join([*lines, self.note] if self.note else lines)


def _grouped(reason: str) -> str:
    """'not a: w; not b: w' -> 'not a, b: w': what stands in the way of several backends is said once."""
    parts: dict[str, list[str]] = {}
    for part in reason.split("; "):
        name, _, why = part.removeprefix("not ").partition(": ")
        if part.startswith("not ") and why:
            parts.setdefault(why, []).append(name)
        else:
            parts[part] = []
    return "; ".join(f"not {', '.join(names)}: {why}" if names else why for why, names in parts.items())


def status(model: Any) -> Status:
    """What `patch_model` did to `model` and what the newest cache holds. Raises PatchStateError if not patched."""
    from attnpatch.engine.families import unwrap

    handle = getattr(unwrap(model), "_attnpatch", None)
    if handle is None:
        raise PatchStateError("the model is not patched; call patch_model(model, ...) first.")
    plan, held = handle.plan, handle.layer_summaries()
    layers = []
    for fact in plan.facts:
        covered = fact.index in plan.covered
        row = LayerStatus(fact.index, fact.kind, covered, fact.reason or ("" if covered else "not among layers="))
        if held is not None:
            _fill(row, held[fact.index])
        layers.append(row)
    backend, why = _backend(handle.model)
    return Status({p.name: p.hyperparameters() for p in plan.patches}, layers, backend, why, _note(plan, layers))


def _fill(row: LayerStatus, held: Any) -> None:
    """Take the figures of a cache layer, tensors to the CPU."""
    figures = dict(vars(held))
    watch, report, tally = (figures.pop(name) for name in ("watch", "report", "tally"))
    vars(row).update(figures)
    if tally is not None:
        vars(row).update(tally[0].figures(*tally[1:]))
    row.positions, row.density = (None if x is None else x.cpu() for x in (row.positions, row.density))
    row.report = {name: _number(x) for name, x in report.items()}
    if watch is not None:
        row.computing = watch.seconds("computing")
        row.choosing = watch.seconds("all") - row.computing


def _number(x: Any) -> float:
    """What a tensor, or a pair of them, told in `Ctx.report` comes to."""
    if isinstance(x, tuple):
        return float(x[0].sum()) / max(float(x[1].sum()), 1.0)
    return float(x.float().mean())


def _backend(model: Any) -> tuple[str, str]:
    """The dense executor's choice for a whole prompt on this model's device and dtype."""
    import torch

    from attnpatch.engine.call import KV, Ctx
    from attnpatch.executors import dense

    weight = next(model.parameters())
    attention = next(layer.self_attn for layer in model.get_decoder().layers if hasattr(layer, "self_attn"))
    dim = getattr(attention, "head_dim", 64)
    q = torch.empty(1, attention.num_key_value_groups, 2, dim, dtype=weight.dtype, device=weight.device)
    kv = KV(q[:, :1], q[:, :1], None)
    softcap = getattr(attention, "attn_logit_softcapping", None)
    ctx = Ctx(0, 1, "prefill", "prompt", None, (2,), 1.0, softcap)
    return dense.choose(q, kv, ctx)


def _note(plan: Any, layers: list[LayerStatus]) -> str:
    if not plan.covered:
        return "no layer can be patched (all use a sliding window): the model runs dense."
    if not any(layer.seen for layer in layers):
        return "no forward yet: nothing held."
    full = [layer for layer in layers if layer.covered]
    if plan.keeper is not None and full and full[0].seen and all(layer.held == layer.seen for layer in full):
        return "nothing was evicted: the prompt fits the budget (or has not ended), so attention is dense."
    return ""
