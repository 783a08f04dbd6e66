"""What one forward call knows, and what a hook sees: `Plan`, `Call`, `KV`, `Ctx`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import torch

from attnpatch import breakeven
from attnpatch.engine.shards import WHOLE, Shard
from attnpatch.engine.tally import Tally
from attnpatch.errors import ConfigError, InputError
from attnpatch.executors import dense

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.breakeven import Limits
    from attnpatch.budget import Budget
    from attnpatch.engine.cache import PatchCache
    from attnpatch.engine.families import LayerFact
    from attnpatch.engine.layer import PatchLayer
    from attnpatch.engine.tap import Tap
    from attnpatch.patch import Patch


T = TypeVar("T")


class once(Generic[T]):
    """functools.cached_property without its lock, which torch.compile cannot trace on Python 3.11."""

    def __init__(self, make: Callable[[Any], T]) -> None:
        self.make, self.name, self.__doc__ = make, make.__name__, make.__doc__

    def __get__(self, owner: Any, kind: Any = None) -> T:
        if owner is None:
            return cast(T, self)
        value = owner.__dict__[self.name] = self.make(owner)
        return value


@dataclass(frozen=True, eq=False)
class Plan:
    """The composed methods of one patched model; shared by its caches, never copied."""

    patches: tuple[Patch, ...]
    facts: tuple[LayerFact, ...]
    covered: tuple[int, ...]  # layer indices the methods act on, ascending
    config: Any  # the decoder's config
    rope: Any = None  # Rope, where a method re-numbers positions
    shard: Shard = WHOLE  # heads of this process

    def __post_init__(self) -> None:
        for name, value in vars(type(self)).items():  # all at once, so that no compiled forward finds them missing
            if isinstance(value, once):
                getattr(self, name)

    def __deepcopy__(self, memo: dict) -> Plan:
        return self  # a copied cache still belongs to the same patched model

    @once
    def keeper(self) -> Patch | None:
        """The one method that decides what the cache keeps."""
        return next((p for p in self.patches if "keep" in p.hooks()), None)

    @once
    def keeps_at(self) -> frozenset[str]:
        """Events at which it is asked."""
        return self.keeper.evict_at if self.keeper is not None else frozenset()

    @once
    def writer(self) -> Patch | None:
        """The one method that puts another prompt in the place of generate's."""
        return next((p for p in self.patches if "prepare" in p.hooks()), None)

    @once
    def observers(self) -> dict[str, tuple[Patch, ...]]:
        """Phase -> the methods that look on."""
        return {phase: tuple(p for p in self.patches if phase in p.observe_at) for phase in ("prefill", "decode")}

    @once
    def acts_on_steps(self) -> bool:
        """Whether any hook runs during decoding."""
        looks = bool(self.observers["decode"]) or "step" in self.keeps_at
        return looks or "decode" in self.selectors or bool(self.reweighters["decode"])

    @once
    def selectors(self) -> dict[str, Patch]:
        """Phase -> the one method that chooses what is attended in it."""
        return {phase: p for p in self.patches for phase in p.phases}

    @once
    def reweighters(self) -> dict[str, tuple[Patch, ...]]:
        """Phase -> the methods that change its weights, in the order named."""
        return {phase: tuple(p for p in self.patches if phase in p.reweight_at) for phase in ("prefill", "decode")}

    @once
    def query_tail(self) -> int:
        return self.keeper.query_tail if self.keeper else 0

    @once
    def ordinal(self) -> dict[int, int]:
        """Layer index -> its place among the covered layers."""
        return {index: i for i, index in enumerate(self.covered)}


@dataclass
class KV:
    """What a layer holds. k, v: [B, Hkv, S, D]; pos: int32 [B, 1|Hkv, S] true positions, -1 = empty slot."""

    k: Tensor
    v: Tensor
    pos: Any  # Tensor wherever a hook or a mask reads it
    holes: bool = False
    complete: bool = True
    state: dict[str, Tensor] = field(default_factory=dict)  # [B] rows, or [B, H', S] tokens: follows every change
    rows: dict[str, Tensor] = field(default_factory=dict)  # [B, ...]: follows rows only (page summaries, kept lists)
    plain: dict[str, Any] = field(default_factory=dict)  # host values, cleared by reset
    clean: bool = False  # empty slots hold no NaN
    ordered: bool = False  # slots ascend without gaps, so a window is a range of slots
    aligned: bool = False  # entries lie in the slot of their position
    packed: Any = None  # the storage where heads hold different numbers of entries; k and v are then padded copies
    extra: Any = None  # `Virtual` that stands for entries that went, attended besides
    real: Any = None  # (queries, keys): int32 [B], tokens of each row where both lie in front, the newest keys last

    @property
    def S(self) -> int:
        """Slots held."""
        return self.k.shape[2]


@dataclass
class Ctx:
    """What a hook knows besides q and kv. Positions count a row's real tokens from 0."""

    layer: int  # among the covered layers
    n_layers: int
    phase: str  # "prefill" | "decode"
    event: str  # "chunk" | "prompt" | "step"
    q_pos: Any  # Tensor [B, T], -1 = padding, wherever a hook or a mask reads it
    prompt_len: tuple[int, ...]  # real prompt tokens of each row (whole prompt, also before its last chunk)
    scaling: float
    softcap: float | None = None
    window: int | None = None
    mask: Tensor | None = None
    tail: Tensor | None = None  # [B, Hq, w, D] last prompt queries
    tail_pos: Tensor | None = None  # [B, w], -1 = absent
    lse: Tensor | None = None  # [B, Hq, T]; in `reweight` after what earlier methods changed, elsewhere before
    out: Tensor | None = None  # [B, T, Hq, D], in `reweight` only
    turn: Any = None  # turn(x [B, H, T, D], by [B, T]): x as if `by` positions further on; for `needs_rope`
    back: Any = None  # back(x [B, H, 1, D]): x of this step's tokens as if at position 0, fp32; for `needs_rope`
    ragged: bool = True  # rows may hold different numbers of tokens (padding)
    pairs: Any = None  # pairs() -> `likeness.Pairs` of the turn that `back` is, or None where it is none of pairs
    bytes_per_token: float | None = None
    # numbers to show in status, by name: their mean, or of a pair of tensors the sum of one over that of the other
    report: dict[str, Any] = field(default_factory=dict)
    tally: Tally = cast(Tally, None)  # a method adds to `scored` what it reads to choose
    untouched: tuple[bool, ...] = ()  # rows that keep all they hold, whatever the budget
    at: Any = None  # at(j): KV of covered layer j as it is now, for decisions on earlier layers
    index: int = 0  # the layer's number in the model, as profiles count
    shard: Shard = cast(Shard, None)  # which of the layer's heads are here, under tensor parallelism

    def __post_init__(self) -> None:  # not as default values: torch.compile cannot trace those
        self.tally = Tally() if self.tally is None else self.tally
        self.shard = WHOLE if self.shard is None else self.shard

    def last_queries(self) -> tuple[Tensor, Tensor]:
        """`tail` and `tail_pos`. Raises ConfigError where there are none (a probe without them)."""
        if self.tail is None or self.tail_pos is None:
            raise ConfigError("window scoring needs the last prompt queries; pass tail=[B, Hq, w, D].")
        return self.tail, self.tail_pos

    @property
    def last_layer(self) -> bool:
        return self.layer == self.n_layers - 1

    @property
    def kept_whole(self) -> tuple[bool, ...]:
        """`untouched`, said of every row."""
        return self.untouched or (False,) * len(self.prompt_len)

    def capacity(self, budget: Budget) -> tuple[int, ...]:
        """Entries each row may keep under `budget`; all of them where the row is not to be touched."""
        return tuple(
            n if whole else budget.tokens(n, self.bytes_per_token)
            for n, whole in zip(self.prompt_len, self.kept_whole, strict=True)
        )

    def noise(self, pos: Tensor, seed: int) -> Tensor:
        """Uniform fp32 in [0, 1) of pos's shape, a function of seed, layer, head (dim 1) and position only.

        Equal in any batch, padding or chunking: a counter-based hash (splitmix64's finaliser on 63 bits).
        """
        head = torch.arange(pos.shape[1], device=pos.device)[None, :, None] + self.shard.first(pos.shape[1])
        fixed = (self.layer * 8_191_000_017 + seed * 1_000_000_000_039) % (2**61 - 1)  # any seed fits
        x = pos.long() + head * 1_000_003 + fixed
        for shift, factor in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB)):
            x = (x ^ ((x >> shift) & 0x3FFFFFFFF)) * factor
        return ((x >> 20) & 0xFFFFFF).float() / float(1 << 24)


class Call:
    """One forward pass: built by the decoder's pre-hook, handed to every layer's attention as a keyword.

    A call belongs to one thread and one cache, so threads stay independent.
    """

    def __init__(self, plan: Plan, cache: PatchCache | None, length: int) -> None:
        self.plan, self.cache, self.length = plan, cache, length
        self.before = cache.get_seq_length() if cache is not None else 0
        self.after = self.before + length
        self.padding: Tensor | None = None  # bool [B, after]
        self.custom: Tensor | None = None  # bool [B, 1, T, S] of the layer at work
        self.ready = False
        self.tap: Tap | None = None
        self._given: Tensor | None = None
        self._order: Tensor | None = None
        self._q_pos: Tensor | None = None
        self._lengths: dict[Any, Any] = {}
        self._limits: dict[Any, Limits | None] = {}
        self._plain: dict[Any, Tensor] = {}
        self.turns: dict[Any, Any] = {}  # see engine/turns.py
        self.event = cache.begin(length, self.before) if cache is not None else "prompt"

    @property
    def phase(self) -> str:
        return "decode" if self.event == "step" else "prefill"

    def read_mask(self, mask: Tensor | None) -> None:
        """Take the padding, a 2-D mask, from the mask function; the first layer's does for all.

        What was padding stays padding, whatever the mask says of it later. A new turn may take back the newest tokens
        of a row, as a batch does whose finished rows were fed pads: those entries are forgotten.
        """
        self.ready = True
        past = self.cache.mask if self.cache is not None else None  # bool [B, before]
        if (mask is None and past is None) or (mask is not None and mask.ndim == 4):
            return
        if mask is not None and mask.shape[1] < self.after:
            raise InputError(
                f"attention_mask covers {mask.shape[1]} tokens, but {self.after} have been seen; "
                "pass the mask of all tokens, earlier turns included."
            )
        if self.event == "step" and self.cache is not None and self.cache.grows_by_ones:
            return
        new = None if mask is None else mask[:, self.before : self.after].bool()
        # waits at a prompt chunk, never at a decode step or under compile
        wait = self.event != "step" and not torch.compiler.is_compiling() and mask is not None
        if mask is not None and not (self.cache is not None and self.cache.patched):
            past = mask[:, : self.before].bool()  # pads are stored, and the mask is all that tells them
        elif wait and self.before:
            past = self._take_back(mask[:, : self.before].bool(), past)  # type: ignore[index]
        if wait and (past is None or bool(past.all())) and bool(new.all()):  # type: ignore[union-attr]
            for layer in self.cache.patched if past is not None else ():  # type: ignore[union-attr]
                if layer.aligned:  # rows are full, which steps with a mask could not know
                    layer.count = layer.mask = None
            return
        if new is None:
            new = past.new_ones(past.shape[0], self.length)  # type: ignore[union-attr]
        past = new.new_ones(new.shape[0], self.before) if past is None else past.to(new.device)
        self.padding = torch.cat([past, new], dim=1)
        if self.cache is not None:
            self.cache.padded = True

    def take_4d(self, mask: Tensor) -> None:
        """A ready 4-D mask, bool or additive; full and sliding layers are given different ones."""
        if self._given is not mask:
            self._given, self.custom = mask, mask if mask.dtype == torch.bool else mask >= 0

    def _take_back(self, given: Tensor, past: Tensor | None) -> Tensor | None:
        """The mask of earlier tokens, bool [B, before], after rows took back their newest ones as `given` says."""
        known = torch.ones_like(given) if past is None else past.to(given.device)
        real = known & given
        n = real.sum(-1, keepdim=True, dtype=torch.int32)
        changed = torch.stack([(real != known).any(), (real != known & (known.cumsum(-1) <= n)).any()]).tolist()
        if changed[1]:
            raise InputError(
                "attention_mask hides tokens that were real in an earlier turn and are followed by real ones; "
                "only the newest tokens of a row can be taken back. Start a new cache to hide others."
            )
        if not changed[0]:
            return past
        for layer in self.cache.patched:  # type: ignore[union-attr]
            layer.forget(n, real)
        return real

    @once
    def total(self) -> Tensor:
        """int32 [B, 1] real tokens of each row up to and with this call. Only where there is padding."""
        return self.padding.sum(-1, keepdim=True, dtype=torch.int32)  # type: ignore[union-attr]

    @once
    def fresh(self) -> Tensor:
        """int32 [B, 1] real tokens of each row in this call. Only where there is padding."""
        return self.padding[:, self.before :].sum(-1, keepdim=True, dtype=torch.int32)  # type: ignore[index]

    def real(self, count: Tensor) -> tuple[Tensor, Tensor]:
        """`KV.real` of a layer with `count` int32 [B, 1] tokens in each row, this call's included."""
        fresh = torch.full_like(count, self.length) if self.padding is None else self.fresh.to(count.device)
        return fresh.flatten().contiguous(), count.flatten().contiguous()

    @once
    def slots(self) -> Tensor:
        """[B, T] slots of the new tokens where slots are positions. Only where there is padding."""
        t = torch.arange(self.length, device=self.padding.device)  # type: ignore[union-attr]
        return self.total.long() - self.fresh + t

    def limits(self, patch: Patch, q: Tensor) -> Limits | None:
        """What was measured of `patch` for q's device and dtype; looked up once a forward, for it may be in a file."""
        key = (breakeven.steps(patch.name) if self.event == "step" else patch.name, q.device, q.dtype)
        if key not in self._limits:
            self._limits[key] = breakeven.limits(*key)
        return self._limits[key]

    def row_lengths(self, layer: PatchLayer) -> Any:
        """`dense.row_lengths` of a layer, or None; layers that hold the same share it within the forward."""
        if layer.count is None:
            return None
        key = (id(layer.count), layer.keys.shape, layer.keys.device)  # the layer keeps `count` alive
        if key not in self._lengths:
            self._lengths[key] = dense.row_lengths(layer.count, layer.keys)
        return self._lengths[key]

    def q_pos(self, batch: int, device: torch.device) -> Tensor:
        """True positions [B, T], -1 for padding: in the fed order, or real tokens first where `order` moves them."""
        if self.padding is None:
            return self._counted(self.before, self.after, (batch, -1), torch.int64, device)
        if self._q_pos is None:
            t = torch.arange(self.length, device=self.padding.device)
            self._q_pos = torch.where(t < self.fresh, self.slots, -1)
        return self._q_pos.to(device)

    def positions(self, layer: PatchLayer) -> Tensor:
        """`layer.pos`; layers in which slots are positions share it within the forward."""
        if not layer.aligned or layer.count is not None:
            return layer.pos
        keys = layer.keys
        return self._counted(0, keys.shape[2], (keys.shape[0], 1, -1), torch.int32, keys.device)

    def _counted(self, first: int, end: int, shape: tuple[int, ...], dtype: Any, device: torch.device) -> Tensor:
        """first .. end - 1, expanded to `shape`; made once a forward, but that graphs keep their own."""
        key = (first, end, shape, dtype, device)
        known = None if torch.compiler.is_compiling() else self._plain.get(key)
        if known is None:
            known = torch.arange(first, end, device=device, dtype=dtype).expand(shape)
            if not torch.compiler.is_compiling():
                self._plain[key] = known
        return known

    def order(self, device: torch.device) -> Tensor | None:
        """[B, T] permutation that brings each row's real tokens to the front; None when nothing moves."""
        if self.padding is None or self.length == 1:
            return None
        if self._order is None:
            new = self.padding[:, self.before :]
            self._order = (~new).to(torch.uint8).argsort(dim=-1, stable=True)
        return self._order.to(device)

    @once
    def prompt_len(self) -> tuple[int, ...]:
        """Real tokens of each row's whole prompt. Waits for the device, at a prompt only and only when padded."""
        batch = self.cache.batch if self.cache is not None else 1
        end = max(self.after, self.cache.prompt_end if self.cache is not None else 0)
        if self.padding is None:
            return (end,) * batch
        missing = end - self.after
        return tuple(n + missing for n in self.padding.sum(-1).tolist())


def resolve_layers(layers: Sequence[int] | None, facts: Sequence[LayerFact]) -> tuple[int, ...]:
    """The user's layer list (negative counts from the end) -> indices that can be patched. Raises ConfigError."""
    n = len(facts)
    if layers is None:
        return tuple(f.index for f in facts if not f.reason)
    if isinstance(layers, str) or not isinstance(layers, Iterable) or not (layers := list(layers)):
        raise ConfigError(f"layers={layers!r} names no layer; give a list of 0..{n - 1}, or leave it out for all.")
    chosen = []
    for index in layers:
        if isinstance(index, bool) or not isinstance(index, int) or not -n <= index < n:
            raise ConfigError(f"layers={layers!r}: {index!r} is not a layer; the model has layers 0..{n - 1}.")
        chosen.append(index % n)
    if unfit := [i for i in chosen if facts[i].reason]:
        raise ConfigError(f"layer {unfit[0]} cannot be patched ({facts[unfit[0]].reason}); leave it out of layers.")
    return tuple(sorted(set(chosen)))
