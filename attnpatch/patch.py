"""The base of every method, the registry, and the rules of composition."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cached_property, lru_cache
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from attnpatch.budget import Budget
from attnpatch.errors import ConfigError, UnsupportedModeError, did_you_mean

if TYPE_CHECKING:
    from attnpatch.decisions import ColumnReweight, KeepSet
    from attnpatch.engine.call import KV, Ctx
    from attnpatch.executors.constants import Constants

P = TypeVar("P", bound="type[Patch]")
_REGISTRY: dict[str, type[Patch]] = {}


def option(
    default: Any, help: str, choices: Sequence[Any] | None = None, low: float | None = None, high: float | None = None,
    odd: bool = False,
) -> Any:  # fmt: skip
    """A hyperparameter of a patch: default, one line of help, allowed values or bounds; odd: an odd pooling width."""
    return field(default=default, metadata={"help": help, "choices": choices, "low": low, "high": high, "odd": odd})


def same_option(cls: type[Patch], name: str) -> Any:
    """The hyperparameter `name` of `cls` with all that is said of it, for a search that takes it over."""
    f = next(f for f in fields(cls) if f.name == name)
    return option(f.default, **f.metadata)


@dataclass
class Patch:
    """Base of a method: typed hyperparameters plus hooks that return decisions.

    Hooks (each optional): `select(q, kv, ctx)` says which keys are attended (None = all, a Selection, or a generator of
    Selections, which gets each term's (out, lse) back); `reweight(q, kv, ctx) -> ColumnReweight | None`, after
    attention, changes the weights of a few columns; `observe(q, kv, ctx)` writes state; `keep(q, kv, ctx) -> KeepSet |
    None`, or a generator of KeepSets (also for earlier layers), says what stays. q: [B, Hq, T, D] as the model rotated
    it. Rows are left-aligned: real tokens first.
    One lives outside attention: `prepare(model, input_ids, kwargs) -> (input_ids, kwargs)` puts another prompt in the
    place of the one `generate` was given (int64 [B, N] both, kwargs are generate's own).
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    stage: ClassVar[str] = "evict"
    query_aware: ClassVar[bool] = False
    tensor_parallel: ClassVar[bool] = False  # decides alike where a process has some of a layer's heads (ctx.shard)
    needs_profile: ClassVar[bool] = False  # works with no model before it was given figures of its heads; see `fits`

    def __post_init__(self) -> None:
        for f in fields(self):
            _check_field(self.name, f, getattr(self, f.name))

    # ---- declared capabilities: read by the composer, the CLI and the refusals -------------------------------
    @property
    def evict_at(self) -> frozenset[str]:
        """Events at which `keep` is called: "chunk" (prompt not finished), "prompt" (its last chunk), "step"."""
        return frozenset()

    @property
    def phases(self) -> frozenset[str]:
        """Phases in which `select` is called: "prefill", "decode"."""
        return frozenset({"prefill"}) if "select" in self.hooks() else frozenset()

    @property
    def reweight_at(self) -> frozenset[str]:
        """Phases in which `reweight` is called: "prefill", "decode"."""
        return frozenset({"prefill", "decode"}) if "reweight" in self.hooks() else frozenset()

    @property
    def observe_at(self) -> frozenset[str]:
        """Phases in which `observe` is called: "prefill", "decode"."""
        return frozenset({"prefill", "decode"}) if "observe" in self.hooks() else frozenset()

    @property
    def needs_complete_kv(self) -> bool:
        """Whether `select` counts on slots being positions; where entries were evicted, attention is then dense."""
        return "select" in self.hooks()

    @property
    def merges(self) -> bool:
        """Whether several terms of `select` cover the same query rows."""
        return False

    @property
    def repositions(self) -> bool:
        """Whether a term of `select` rotates queries to other positions."""
        return False

    @property
    def needs_rope(self) -> bool:
        """Whether a hook turns queries (`ctx.turn`), or the engine does for it."""
        return self.repositions

    @property
    def query_tail(self) -> int:
        """How many of the last prompt queries the engine must hand to `keep` (0 = none)."""
        return 0

    @property
    def needs_lse(self) -> bool:
        """Whether `observe` reads `ctx.lse`."""
        return False

    def fits(self, config: Any) -> None:
        """Raise ConfigError unless calibrated values fit the model of this decoder config; called by patch_model."""

    @classmethod
    def searcher(cls) -> Any:
        """The `attnpatch.trials.Search` that `attnpatch calibrate` runs for this method, or None; a class."""
        return None

    @property
    def recompresses(self) -> bool:
        """Whether an already compressed cache is compressed again at a later turn."""
        return bool(getattr(self, "recompress", False))

    @classmethod
    def hooks(cls) -> frozenset[str]:
        """Names of the hooks this method defines."""
        return frozenset(
            h
            for h in ("select", "reweight", "observe", "keep", "prepare")
            if getattr(cls, h, None) is not getattr(Patch, h, None)
        )

    if TYPE_CHECKING:

        def select(self, q: Any, kv: KV, ctx: Ctx) -> Any: ...

        def reweight(self, q: Any, kv: KV, ctx: Ctx) -> ColumnReweight | None: ...

        def keep(self, q: Any, kv: KV, ctx: Ctx) -> KeepSet | None: ...

        def observe(self, q: Any, kv: KV, ctx: Ctx) -> None: ...

        def prepare(self, model: Any, input_ids: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]: ...

    @cached_property
    def constants(self) -> Constants:
        """Tables of this method's settings, and of prompt lengths, on the devices where it runs; no setting itself."""
        from attnpatch.executors.constants import Constants

        return Constants()

    def hyperparameters(self) -> dict[str, Any]:
        """Field name -> value, budgets as text."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: (str(v) if isinstance(v, Budget) else v) for k, v in values.items()}


@dataclass
class EvictPatch(Patch):
    """What every evicting method has in common."""

    budget: Any = option("0.25", "KV entries kept per head: tokens (1024), prompt ratio (0.25), bytes ('512MiB')")
    evict_per_chunk: bool = option(False, "hold the budget after every prefill chunk, not only at the prompt's end")
    recompress: bool = option(False, "compress again at the end of each later turn's prompt")

    def __post_init__(self) -> None:
        self.budget = Budget.parse(self.budget)
        super().__post_init__()

    @property
    def evict_at(self) -> frozenset[str]:
        return frozenset({"prompt", "chunk"} if self.evict_per_chunk else {"prompt"})


_BASE_TYPES: dict[str, Any] = {
    "int": int,
    "float": (int, float),
    "str": str,
    "bool": bool,
    "int | None": (int, type(None)),
    "float | None": (int, float, type(None)),
}


def _type_name(f: Field) -> str:
    """The annotation as text, with or without `from __future__ import annotations`."""
    return f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type))


def _check_field(patch: str, f: Field, value: Any) -> None:
    expected = _BASE_TYPES.get(_type_name(f))
    wrong_bool = isinstance(value, bool) and _type_name(f) != "bool"
    if expected and (wrong_bool or not isinstance(value, expected)):
        raise ConfigError(f"{patch}: {f.name}={value!r} has the wrong type; expected {_type_name(f)}.")
    choices, low = f.metadata.get("choices"), f.metadata.get("low")
    if choices and value not in choices:
        raise ConfigError(f"{patch}: {f.name}={value!r} is not allowed; choose one of {', '.join(map(repr, choices))}.")
    if low is not None and value is not None and not value >= low:
        raise ConfigError(f"{patch}: {f.name}={value!r} is too small; it must be at least {low}.")
    high = f.metadata.get("high")
    if high is not None and value is not None and not value <= high:
        raise ConfigError(f"{patch}: {f.name}={value!r} is too large; it must be at most {high}.")
    if f.metadata.get("odd") and value % 2 == 0:
        raise ConfigError(f"{patch}: {f.name}={value!r} is even; pooling needs an odd width.")


def register(name: str) -> Callable[[P], P]:
    """Class decorator: make a Patch dataclass known under `name`."""

    def add(cls: P) -> P:
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return add


@lru_cache(maxsize=1)
def _load_all() -> None:
    """Import every file of attnpatch.patches and every third-party entry point (neither imports torch)."""
    import pkgutil

    package = import_module("attnpatch.patches")
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            import_module(f"attnpatch.patches.{module.name}")
    for entry in metadata.entry_points(group="attnpatch.patches"):
        entry.load()


def list_patches() -> dict[str, type[Patch]]:
    """Name -> dataclass of every registered method, sorted. Imports neither torch nor transformers."""
    _load_all()
    return dict(sorted(_REGISTRY.items()))


def get_patch(name: str) -> type[Patch]:
    """The dataclass registered under `name`; ConfigError names the nearest and all allowed names."""
    known = list_patches()
    if name not in known:
        hint = did_you_mean(name.lower(), known)
        raise ConfigError(f"unknown patch {name!r}.{hint} Known patches: {', '.join(known)}.")
    return known[name]


def build(cls: type[Patch], values: dict[str, Any]) -> Patch:
    """Instantiate with an error that lists the allowed keywords."""
    allowed = {f.name for f in fields(cls) if f.init}
    if unknown := sorted(set(values) - allowed):
        hint = did_you_mean(unknown[0].lower(), allowed)
        raise ConfigError(
            f"{cls.name} has no hyperparameter {unknown[0]!r}; allowed: {', '.join(sorted(allowed))}.{hint}"
        )
    return cls(**values)


def compose(patches: Sequence[Patch]) -> tuple[Patch, ...]:
    """Check that the methods can work together: one owner a hook and phase, no method twice."""
    if not patches:
        raise ConfigError("no patch given; name one, e.g. 'snapkv' (attnpatch list shows all).")
    names = [p.name for p in patches]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"patch {name!r} is named twice; name it once.")
    owners = [p.name for p in patches if "keep" in p.hooks()]
    if len(owners) > 1:
        raise ConfigError(f"{owners[0]!r} and {owners[1]!r} both decide what the cache keeps (hook 'keep'); name one.")
    writers = [p.name for p in patches if "prepare" in p.hooks()]
    if len(writers) > 1:
        raise ConfigError(f"{writers[0]!r} and {writers[1]!r} both write the prompt (hook 'prepare'); name one.")
    for phase in ("prefill", "decode"):
        choosers = [p for p in patches if phase in p.phases]
        if len(choosers) > 1:
            first, second = (p.name for p in choosers[:2])
            off = next((f", or set {phase}=False on {p.name!r}" for p in choosers if hasattr(p, phase)), "")
            raise ConfigError(
                f"{first!r} and {second!r} both choose what {phase} attends (hook 'select'); name one{off}."
            )
        _check_chooser(choosers, patches, phase)
    return tuple(patches)


def refuse_parallel(patches: Sequence[Patch]) -> None:
    """Raise UnsupportedModeError for a method that cannot work on a part of a layer's heads."""
    for patch in patches:
        if not patch.tensor_parallel:
            able = [name for name, cls in list_patches().items() if cls.tensor_parallel is True]
            raise UnsupportedModeError(
                f"{patch.name!r} needs all heads of a layer in one process, tensor parallelism (tp_plan) gives each "
                f"process a part of them; load the model without tp_plan, or use one of {', '.join(able)}."
            )


def _check_chooser(choosers: list[Patch], patches: Sequence[Patch], phase: str) -> None:
    for chooser in choosers:
        for other in patches:
            if other is chooser:
                continue
            if "reweight" in other.hooks():
                raise ConfigError(
                    f"{other.name!r} changes the weights of keys that {chooser.name!r} may leave out of the {phase}; "
                    f"combine {other.name!r} with a method that only evicts (snapkv, pyramidkv, h2o)."
                )
            if other.needs_lse and "observe" in other.hooks():
                raise ConfigError(
                    f"{other.name!r} scores every query against every key, and {chooser.name!r} leaves keys out of the "
                    f"{phase}; combine {chooser.name!r} with a method that scores the last queries (snapkv, pyramidkv)."
                )
            if phase == "decode" and chooser.needs_complete_kv and "keep" in other.hooks():
                remedy = f"; set decode=False on {chooser.name!r}." if hasattr(chooser, "decode") else "; name one."
                raise ConfigError(
                    f"{chooser.name!r} needs the full cache in decode, which {other.name!r} evicts{remedy}"
                )


def describe(cls: type[Patch]) -> Iterator[tuple[str, str, Any, str]]:
    """(name, type, default, help) of each hyperparameter."""
    for f in fields(cls):
        default = f.default if f.default is not MISSING else None
        yield f.name, _type_name(f), default, f.metadata.get("help", "")
