"""Which methods and budgets fit a GPU: from the model's config, without weights, and from what was measured.

A plan adds up weights + KV + what the prefill works in + a reserve. Weights and KV are exact arithmetic. What a prefill
works in was measured on a Llama of 8B shape (`recipes/evidence/`) as bytes a token; for another shape it is scaled by
the widths of the layers that are live at the peak. Each figure's basis says which of this it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import TYPE_CHECKING, Any

from attnpatch import evidence
from attnpatch.errors import ConfigError
from attnpatch.patch import EvictPatch, Patch

if TYPE_CHECKING:
    import torch

COMPUTED, ASSUMED = "computed", "assumed"
LONGEST = 2**24
"""Most tokens that `longest_context` looks at."""
CHUNKS = tuple(2**n for n in range(20, 8, -1))
"""Prefill chunks tried, in tokens, the largest first."""
_SHAPE: dict[str, Any] = {
    "hidden": 4096,
    "inner": 14336,
    "heads": 32,
    "dim": 128,
    "itemsize": 2,
}  # of what evidence measured


@dataclass(frozen=True)
class Facts:
    """What a config tells. weights: bytes; entry: KV bytes of a token in a layer; window: tokens of each sliding layer.

    full: layers with full attention; hidden, inner: widths of the residual stream and of the MLP (of the experts that a
    token uses together); positions: longest trained prompt, None if the config does not say.
    """

    weights: int
    itemsize: int
    full: int
    window: tuple[int, ...]
    entry: int
    hidden: int
    inner: int
    heads: int
    dim: int
    positions: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def measured_shape(self) -> bool:
        """Whether a layer is as wide as the one that evidence measured."""
        return all(getattr(self, name) == value for name, value in _SHAPE.items())

    @property
    def mlp(self) -> int:
        """Bytes a token that the peak inside an MLP holds: gate, up and their product, four residual widths, rotary."""
        return self.itemsize * (3 * self.inner + 4 * self.hidden + 2 * self.dim) + 8


@dataclass(frozen=True)
class Ask:
    """What shall fit. memory, reserve: bytes of the GPU, and of what neither weights, KV nor activations explain."""

    context: int
    memory: int
    batch: int = 1
    new_tokens: int = 256
    reserve: int = 2**30

    def __post_init__(self) -> None:
        for name in ("context", "memory", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.new_tokens < 0 or self.reserve < 0:
            raise ConfigError("new_tokens and reserve must not be negative.")


@dataclass
class Row:
    """One method's plan. Bytes; tokens. fits None: cannot be told. prefill: "whole", "chunks of 8192" or "".

    largest_budget: most KV entries a layer and head that fit (None: the method has no budget); longest_context: prompt
    tokens that fit. first_token: (time over the stock model's, basis, source), where it was measured.
    """

    method: str
    settings: dict[str, Any]
    fits: bool | None = None
    prefill: str = ""
    needs: dict[str, Any] = field(default_factory=dict)
    kv: int = 0
    activations: int = 0
    total: int = 0
    largest_budget: int | None = None
    longest_context: int | None = None
    first_token: tuple[float, str, str] | None = None
    basis: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# ---- from the config ---------------------------------------------------------------------------------------------
def weight_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of parameters and buffers of the causal model of `config`, built without memory for them."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        except ValueError as error:
            raise ConfigError(f"the config is not one of a causal language model: {error}") from None
    return model.get_memory_footprint()


def facts_of(config: Any, dtype: torch.dtype, weights: int | None = None) -> Facts:
    """Facts of a transformers config. weights: bytes, where the files tell better (quantised weights)."""
    from attnpatch.engine.families import layer_facts

    text, notes = config.get_text_config(decoder=True), []
    if weights is None:
        weights = weight_bytes(config, dtype)
    layers = layer_facts(text)
    heads = text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    if experts := getattr(text, "num_experts_per_tok", None):
        inner = max(inner, experts * (getattr(text, "moe_intermediate_size", None) or inner))
        notes.append("mixture of experts: activations are a rough figure")
    if other := [x.kind for x in layers if x.kind not in ("full", "sliding")]:
        notes.append(f"{len(other)} layers without a KV cache ({other[0]}) are taken to hold nothing")
    return Facts(
        weights, dtype.itemsize, sum(x.kind == "full" for x in layers), tuple(x.window for x in layers if x.window),
        2 * kv_heads * dim * dtype.itemsize, text.hidden_size, inner, heads, dim,
        getattr(text, "max_position_embeddings", None), tuple(notes),
    )  # fmt: skip


# ---- what a method holds and works in ----------------------------------------------------------------------------
def kept(patch: Patch, length: int, facts: Facts) -> float | None:
    """KV entries a full layer and head after a prompt of `length`, the mean over layers; None = cannot be told."""
    if "prepare" in patch.hooks():
        return None
    if "keep" not in patch.hooks():
        return length
    if not isinstance(patch, EvictPatch):
        return None
    return min(length, patch.budget.tokens(length, max(1, facts.full) * facts.entry))


@cache
def _per_token() -> dict[str, list[tuple[float, float]]]:
    """Method -> (prompt tokens, bytes a token that a prefill needed besides KV) as measured."""
    peaks = evidence.prefill_peaks()
    return {name: [(n, (peak - kv) / n) for n, peak, kv in rows] for name, rows in peaks.items()}


_attention = cache(evidence.attention_peaks)


def working(patches: tuple[Patch, ...], facts: Facts, tokens: int, batch: int) -> tuple[float, str]:
    """(bytes that a prefill of `tokens` works in besides KV, basis)."""
    points = _per_token()
    own = next((p.name for p in patches if p.name in points), "dense" if patches else "stock")
    value, how = evidence.interpolate(points[own], tokens)
    measured_mlp = Facts(0, full=0, window=(), entry=0, **_SHAPE).mlp
    mlp = value * facts.mlp / measured_mlp
    attention = _attention_token(patches, facts, tokens)
    lengths = " and ".join(f"{int(n)}" for n, _ in sorted(points[own]))
    basis = f"{how} (8B shape, {own}, at {lengths} tokens)"
    if not facts.measured_shape:
        basis = f"{COMPUTED}: scaled by layer widths from what was {how} ({own}, at {lengths} tokens)"
    if batch > 1:
        basis += f"; {batch} rows as {batch} times one"
    return max(mlp, attention) * tokens * batch, basis


def _attention_token(patches: tuple[Patch, ...], facts: Facts, tokens: int) -> float:
    """Bytes a token at the peak inside a layer's attention, KV that the cache holds apart.

    The residual, its norm, q, k and v are live; beside them either rotation works (three more of q, or the rotated q
    and three more of k) or attention does (the rotated q and the workspace).
    """
    q = facts.itemsize * facts.heads * facts.dim
    k = facts.entry / 2
    space = max((_workspace(p.name, facts, tokens) for p in patches), default=q)
    return 2 * facts.itemsize * facts.hidden + q + 2 * k + max(3 * q, q + 3 * k, q + space)


def _workspace(name: str, facts: Facts, tokens: int) -> float:
    """Bytes a token of one layer's attention, output included; where measured, scaled by the width of the heads."""
    wide, points = facts.heads * facts.dim * facts.itemsize, _attention().get(name)
    if not points:
        return wide
    value, _ = evidence.interpolate([(n, peak / n) for n, peak in points], tokens)
    return value * wide / (_SHAPE["heads"] * _SHAPE["dim"] * _SHAPE["itemsize"])


@dataclass(frozen=True)
class Need:
    """Bytes at the peak of one way to run: KV at the peak, activations, all with weights and reserve."""

    kv: int
    activations: int
    total: int
    basis: str


def need(patches: tuple[Patch, ...], held: float, ask: Ask, facts: Facts, chunk: int | None, per_chunk: bool) -> Need:
    """What the prefill, or the decoding after it, needs at most.

    held: entries a full layer and head keep. chunk: prompt tokens of one forward, None = all. per_chunk: whether the
    held entries are all that stays after each chunk.
    """
    n, step = ask.context, ask.context if chunk is None else min(chunk, ask.context)
    row = ask.batch * facts.entry
    # a sliding layer's keys are a view of the whole forward's until the next one joins
    sliding = row * sum(min(n, window + step) for window in facts.window)
    stays = held if chunk is None or per_chunk else n
    # the layer at work: its whole prompt beside what it keeps, or old and new keys while they are joined
    layer = n if chunk is None and held < n else 0 if chunk is None else stays + step
    activations, basis = working(patches, facts, step, ask.batch)
    mask = 0 if chunk is None or patches else ask.batch * step * n  # stock SDPA's, bool
    grows = 0 if any("step" in p.evict_at for p in patches) else ask.new_tokens
    attention = row * (facts.full * stays + layer)
    ends = sum(min(n + ask.new_tokens, window) for window in facts.window)
    decode = row * ((facts.full + 1) * (held + grows) + ends)  # one layer twice: old keys, and joined with the new
    # a gathered layer's whole prompt is gone before its MLP, the peak of activations
    in_attention = attention + (
        _attention_token(patches, facts, step) * step * ask.batch if chunk is None else activations
    )
    prefill = max(in_attention, row * facts.full * stays + activations)
    kv = int(max(row * facts.full * stays + sliding, decode))
    peak = max(prefill + sliding + mask, decode)
    return Need(kv, int(max(0, peak - kv)), int(facts.weights + ask.reserve + peak), basis)


def ways(patches: tuple[Patch, ...], ask: Ask) -> list[tuple[str, dict[str, Any], int | None, bool]]:
    """(name, settings it needs, chunk, held after each chunk) of every way to run the prefill, the simplest first."""
    found: list[tuple[str, dict[str, Any], int | None, bool]] = [("whole", {}, None, False)]
    keeper = next((p for p in patches if "keep" in p.hooks()), None)
    already = keeper is not None and "chunk" in keeper.evict_at
    can = keeper is not None and any(f.name == "evict_per_chunk" for f in fields(keeper))
    for chunk in (c for c in CHUNKS if c < ask.context):
        name = f"chunks of {chunk}"
        found.append((name, {}, chunk, already))
    for chunk in (c for c in CHUNKS if c < ask.context and can and not already):
        found.append((f"chunks of {chunk}", {"evict_per_chunk": True}, chunk, True))
    return found


def best(patches: tuple[Patch, ...], held: float, ask: Ask, facts: Facts) -> tuple[Any, Need]:
    """(the first way that fits, or None, its need; without one, the smallest need of all)."""
    needs = []
    for way in ways(patches, ask):
        needs.append(need(patches, held, ask, facts, way[2], way[3]))
        if needs[-1].total <= ask.memory:
            return way, needs[-1]
    return None, min(needs, key=lambda x: x.total)


def plan(label: str, patches: tuple[Patch, ...], ask: Ask, facts: Facts) -> Row:
    """The row of one method (no patches: the dense model)."""
    row = Row(label, {p.name: p.hyperparameters() for p in patches})
    shares = [kept(p, ask.context, facts) for p in patches]
    if None in shares:
        row.notes.append("cannot be told: what it holds follows from the text or the heads, not from a budget")
        return row
    held = min([float(ask.context), *(s for s in shares if s is not None)])
    way, found = best(patches, held, ask, facts)
    row.fits = way is not None
    row.prefill, row.needs = (way[0], way[1]) if way else ("", {})
    row.kv, row.activations, row.total = found.kv, found.activations, found.total
    row.basis = {"weights": COMPUTED, "kv": COMPUTED, "activations": found.basis, "reserve": ASSUMED}
    if way and way[2] is not None:
        row.basis["activations"] += "; chunked prefill computed, not measured"
    if any("keep" in p.hooks() for p in patches):
        row.largest_budget = most(ask.context, lambda n: best(patches, n, ask, facts)[0] is not None)
    row.longest_context = longest_context(patches, ask, facts)
    row.first_token = speed(patches, ask.context)
    row.notes += notes(patches, ask, facts)
    return row


def most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest n of 0 .. limit that fits, by halving; fits(n) implies fits(n - 1)."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def longest_context(patches: tuple[Patch, ...], ask: Ask, facts: Facts) -> int:
    """Prompt tokens that fit, at most LONGEST."""

    def fits(length: int) -> bool:
        if not length:
            return True
        at = Ask(length, ask.memory, ask.batch, ask.new_tokens, ask.reserve)
        held = min([float(length), *(kept(p, length, facts) or 0 for p in patches)])
        return best(patches, held, at, facts)[0] is not None

    return most(LONGEST, fits)


def speed(patches: tuple[Patch, ...], context: int) -> tuple[float, str, str] | None:
    """(first-token time over the stock model's, basis, where measured) of one sparse prefill, or None."""
    points = evidence.first_token_ratios().get(patches[0].name) if len(patches) == 1 else None
    if points is None:
        return None
    value, how = evidence.interpolate(points, context)
    return round(value, 3), how, f"evidence/first_token.json: 8B shape, {evidence.machine('first_token')}"


def notes(patches: tuple[Patch, ...], ask: Ask, facts: Facts) -> list[str]:
    """What a reader must know beside the figures."""
    found = list(facts.notes)
    if facts.positions and ask.context > facts.positions:
        found.append(f"the config names {facts.positions} trained positions, fewer than asked for")
    for p in patches:
        if p.name in _per_token() or p.name in _attention():
            continue
        if p.needs_lse or "select" in p.hooks() or "reweight" in p.hooks():
            found.append(f"{p.name}: its own working memory and state were not measured and are left out")
    return found
