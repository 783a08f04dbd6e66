"""An eviction trace: which tokens of one prompt each layer kept, and what became of the needle. Plain values only."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

KIND = "attnpatch eviction trace"
VERSION = 1
ALL, NONE = "9", "0"


@dataclass
class Layer:
    """One decoder layer after the prompt.

    kept: one digit a prompt token, 0 = no KV head holds it, 9 = all do, between: some; "" where the layer was left
    alone (`reason` says why). heads: tokens held by each KV head. needle: of the needle's tokens, how many each KV
    head holds. density: share of the causal pages that prefill attended, by list. look: of the attention of the last
    prompt tokens in the dense model, the share on the needle, in the query head that gave it most; best, worst: ranks
    (1 = first) of the needle's strongest and weakest token in that look, in the KV head that ranks the weakest highest.
    """

    index: int
    reason: str = ""
    note: str = ""
    kept: str = ""
    heads: list[int] = field(default_factory=list)
    needle: list[int] = field(default_factory=list)
    density: list[float] | None = None
    look: float | None = None
    best: int | None = None
    worst: int | None = None

    def check(self, count: int, needle: bool) -> None:
        """Raise ValueError where the layer does not fit a prompt of `count` tokens."""
        name = f"layer {self.index}"
        if self.kept and (len(self.kept) != count or set(self.kept) - set("0123456789")):
            raise ValueError(f"{name} does not say of each of the {count} tokens whether it was kept")
        if bool(self.kept) != bool(self.heads) or (needle and len(self.needle) != len(self.heads)):
            raise ValueError(f"{name} does not say what each head holds")
        figures = [*self.heads, *self.needle, *(self.density or ()), self.look, self.best, self.worst]
        if not all(isinstance(x, (int, float)) or x is None for x in figures):
            raise ValueError(f"{name} holds figures that are no numbers")
        if not isinstance(self.reason, str) or not isinstance(self.note, str):
            raise ValueError(f"{name} has a note that is no text")


@dataclass
class Trace:
    """One prompt under a method. tokens: the text of each prompt token. needle: [start, end) token spans."""

    model: str
    patches: dict[str, dict[str, Any]]
    tokens: list[str]
    layers: list[Layer]
    needle: list[tuple[int, int]] = field(default_factory=list)
    dense: str = ""  # what the dense model answered
    patched: str = ""
    expected: str = ""
    note: str = ""
    window: int = 0  # how many last prompt tokens `look` is of

    @property
    def name(self) -> str:
        return "+".join(self.patches)

    @property
    def evicts(self) -> bool:
        """Whether some head let go of a token."""
        return any(n < len(self.tokens) for layer in self.layers for n in layer.heads)

    @property
    def needle_tokens(self) -> int:
        return sum(b - a for a, b in self.needle)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` reads it back."""
        return {"kind": KIND, "version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, body: dict[str, Any]) -> Trace:
        """Raises ValueError, KeyError or TypeError on values that do not fit together."""
        if body["version"] != VERSION:
            raise ValueError(f"traces of version {body['version']} are not known, this attnpatch reads {VERSION}")
        known = {f.name for f in fields(cls)} - {"layers", "needle"}
        layers = [Layer(**row) for row in body["layers"]]
        spans = [(int(a), int(b)) for a, b in body["needle"]]
        made = cls(layers=layers, needle=spans, **{k: body[k] for k in known})
        made.check()
        return made

    def check(self) -> None:
        """Raise ValueError or TypeError where the parts do not fit together."""
        count = len(self.tokens)
        if not self.layers or not count:
            raise ValueError("there are no layers or no tokens")
        texts = [self.model, self.dense, self.patched, self.expected, self.note, *self.tokens, *self.patches]
        if not all(isinstance(t, str) for t in texts) or not all(isinstance(v, dict) for v in self.patches.values()):
            raise ValueError("a token or an answer is no text")
        if any(not 0 <= a < b <= count for a, b in self.needle):
            raise ValueError("the needle lies outside the prompt")
        for layer in self.layers:
            layer.check(count, bool(self.needle))


def verdict(trace: Trace) -> list[str]:
    """What happened to the needle and why, in sentences."""
    seen = [layer for layer in trace.layers if layer.kept]
    if not seen:
        return ["No layer was patched: every layer ran dense."]
    count = len(trace.tokens)
    said = [_kept(seen, count)]
    shares = [share for layer in trace.layers for share in layer.density or ()]
    if shares:
        said.append(f"Prefill attended {sum(shares) / len(shares):.1%} of the causal pages on average.")
    if trace.needle:
        said += _needle(trace, seen)
    if trace.note:
        said.append(trace.note)
    return said


def _kept(seen: list[Layer], count: int) -> str:
    heads = [n for layer in seen for n in layer.heads]
    if min(heads) >= count:  # as `Trace.evicts` says
        return f"Nothing was evicted: every layer holds all {count} tokens after the prompt."
    low, high = min(heads), max(heads)
    held = f"{low}" if low == high else f"{low} to {high}"
    return f"After the prompt a head holds {held} of {count} tokens ({sum(heads) / len(heads) / count:.1%} on average)."


def _needle(trace: Trace, seen: list[Layer]) -> list[str]:
    size = trace.needle_tokens
    held = [n for layer in seen for n in layer.needle]
    whole, nothing = sum(n == size for n in held), sum(n == 0 for n in held)
    part = len(held) - whole - nothing
    said = [
        f"The needle has {size} tokens. Of {len(held)} KV heads, {whole} keep all of it, {part} a part, {nothing} none."
    ]
    if whole == len(held):
        return [*said, "The needle is whole everywhere: if the answer is wrong, eviction of the needle is not why."]
    said += _why(trace, seen, size)
    if trace.expected:
        right = [trace.expected.strip() in text for text in (trace.dense, trace.patched)]
        said.append(
            f"The dense model answers {'right' if right[0] else 'wrong'}, the patched one "
            f"{'right' if right[1] else 'wrong'}; expected was {trace.expected.strip()!r}."
        )
    return said


def by_position(seen: list[Layer]) -> tuple[int, int] | None:
    """(first, last) where every layer and head kept just the first and the last tokens; else None."""
    texts = {layer.kept for layer in seen}
    if len(texts) != 1:
        return None
    kept = texts.pop()
    first, last = len(kept) - len(kept.lstrip(ALL)), len(kept) - len(kept.rstrip(ALL))
    return (
        (first, last)
        if 0 < last < len(kept) and kept == ALL * first + NONE * (len(kept) - first - last) + ALL * last
        else None
    )


def _why(trace: Trace, seen: list[Layer], size: int) -> list[str]:
    if ends := by_position(seen):
        return [
            f"Why: the method keeps the first {ends[0]} and the last {ends[1]} tokens whatever they say, and the "
            f"needle (from token {trace.needle[0][0]} on) lies between them."
        ]
    told = [layer for layer in seen if layer.worst is not None and layer.best is not None]
    if not told:
        return []
    clear = [layer for layer in told if layer.worst <= max(layer.heads) and layer.look is not None]  # type: ignore[operator]
    blind = [layer for layer in told if layer.best > max(layer.heads)]  # type: ignore[operator]
    even = size / len(trace.tokens)
    top = max(told, key=lambda layer: layer.look or 0.0)
    said = [
        f"Why: methods that evict by attention judge by the last prompt tokens. In the dense model the last "
        f"{trace.window} of them give the needle at most {top.look or 0.0:.2%} of their attention (layer {top.index}; "
        f"an even spread would give it {even:.2%})."
    ]
    if blind:
        said.append(
            f"In {len(blind)} of {len(told)} layers ({_list(blind)}) no head ranks even one token of the needle among "
            "as many as it may hold."
        )
    if not clear:
        near = min(told, key=lambda layer: layer.worst or 0)
        said.append(
            f"In no layer does a head rank all its tokens so high: the weakest has rank {near.worst} at best (layer "
            f"{near.index}), and {max(near.heads)} tokens are held there. A method that pools votes over neighbours "
            "may still keep it whole."
        )
    else:
        said.append(
            f"In {len(clear)} of {len(told)} layers ({_list(clear)}) some head ranks all of it among as many as it may "
            "hold."
        )
    return said


def _list(layers: list[Layer]) -> str:
    names = [str(layer.index) for layer in layers]
    return ", ".join(names if len(names) <= 8 else [*names[:8], "..."])
