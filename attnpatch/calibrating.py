"""calibrate: find what a method needs to know of a model and a task, and save it as a profile."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from attnpatch import __version__
from attnpatch.errors import ConfigError, InputError, PatchStateError
from attnpatch.patch import Patch, build, get_patch, list_patches
from attnpatch.samples import Sample, read_samples, split
from attnpatch.trials import HELD_OUT, METRICS, SEARCH, Log, Measured, Search, Trials, encode, fingerprint

_Z = 1.96


@dataclass(frozen=True)
class Change:
    """One measure without and with the method, over the same samples; low, high: 95 % interval of the difference."""

    metric: str
    samples: int
    before: float
    after: float
    difference: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """ "better", "worse", or "within noise" where the interval holds 0."""
        if self.low <= 0 <= self.high:
            return "within noise"
        return "better" if (self.difference > 0) != (self.metric == "entropy") else "worse"

    def __str__(self) -> str:
        return (
            f"{self.metric}: {self.before:.4f} -> {self.after:.4f}, difference {self.difference:+.4f} "
            f"[{self.low:+.4f}, {self.high:+.4f}], {self.verdict}"
        )


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found. Differences on the search's own samples flatter; those held out are what counts."""

    patch: str
    profile: Path
    search: str
    metric: str  # what the search went by
    summary: dict[str, Any]  # what was chosen
    searched: tuple[Change, ...]
    held_out: tuple[Change, ...]
    trials: int  # measurements in all
    resumed: int  # of them, found in the folder
    seconds: float
    notes: tuple[str, ...] = field(default=())

    @property
    def verdict(self) -> str:
        """The held-out samples' by the metric of the search."""
        return next(c.verdict for c in self.held_out if c.metric == self.metric)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""

        def rows(changes: tuple[Change, ...]) -> list[dict[str, Any]]:
            return [{**asdict(c), "verdict": c.verdict} for c in changes]

        data = {k: v for k, v in self.__dict__.items() if k not in ("searched", "held_out")}
        more = {"searched": rows(self.searched), "held_out": rows(self.held_out), "verdict": self.verdict}
        return {**data, "profile": str(self.profile), "seconds": round(self.seconds, 2), **more}

    def __str__(self) -> str:
        def block(title: str, changes: tuple[Change, ...]) -> list[str]:
            return [f"{title} ({changes[0].samples} samples)", *(f"  {c}" for c in changes)]

        chosen = ", ".join(f"{k} {v}" for k, v in self.summary.items())
        lines = [f"{self.patch}, {self.search} search by {self.metric}: {chosen}"]
        lines += block("searched on, so it flatters", self.searched) + block("held out", self.held_out)
        lines += [f"note: {note}" for note in self.notes]
        lines.append(f"{self.trials} trials ({self.resumed} of them found done), {self.seconds:.1f} s")
        return "\n".join([*lines, f'patch_model(model, "{self.patch}", profile="{self.profile}")'])


def calibrate(
    model: Any, tokenizer: Any, patch: str, samples: str | Path | Sequence[str | Path | Sample], out: str | Path, *,
    search: str = "supervised", count: int | None = None, held_out: float = 0.5, seed: int = 0, chat: bool = False,
    batch_tokens: int = 8192, callback: Callable[[str, str, int], None] | None = None, **settings: Any,
) -> Calibration:  # fmt: skip
    """Search what `patch` ("zerotuning", "act", "tca") needs on samples of a task; write a profile to the folder `out`.

    samples: a .jsonl file, `Sample`s (see attnpatch.samples), or several files: a pool of tasks, found and reported
    over all. count: how many are drawn, of each file (None = the method's usual number, or all there are); the share
    `held_out` of them is kept from the search and used for the report.
    search: "supervised" goes by right answers, "unsupervised" by the entropy of the next token. chat: prompts go
    through the chat template. batch_tokens: most tokens of a batch. callback(part, candidate, trials done) is called
    before each trial. settings: those of the method's search (`settings_of(patch)` names them).

    Each finished trial is appended to calibration.jsonl in `out`, so the same call goes on where one was interrupted.
    The model must be un-patched and is left so. Raises ConfigError (unknown patch, setting or search, a folder begun
    with other settings), InputError (samples that do not fit, with their line), PatchStateError.
    """
    from attnpatch.engine.compat import check_versions, pad_id
    from attnpatch.engine.families import unwrap
    from attnpatch.profile import Profile, structure

    started = time.monotonic()
    check_versions()
    searcher: Search = build(searcher_of(patch), settings)  # type: ignore[arg-type,assignment]
    _check(search, count, held_out, batch_tokens)
    base = unwrap(model)
    if hasattr(base, "_attnpatch"):
        raise PatchStateError("calibrate needs the un-patched model; call unpatch_model(model) first.")
    given = _sets(samples, search == "supervised")
    drawn = _drawn(given, count or searcher.samples, held_out, seed)
    parts = {name: encode(tokenizer, rows, chat) for name, rows in drawn.items()}
    metric = _metric(searcher, parts, search)
    about = {
        "attnpatch": __version__, "patch": patch, "search": search, "metric": metric,
        "samples": len(parts[SEARCH]), "held_out": held_out,
        "drawn": sum(map(len, parts.values())), "seed": seed, "chat": chat, "model": structure(base.config),
        "dtype": str(base.dtype).removeprefix("torch."), "settings": asdict(searcher), **fingerprint(base, parts),
    }  # fmt: skip
    pad = pad_id(tokenizer) or 0
    log = Log(Path(out), about)
    try:
        trials = Trials(base, parts, metric, log, batch_tokens, pad, callback)
        found = searcher.run(trials)
        changes = {
            part: compare(trials.measure({}, searcher.inert(), part), trials.measure(found.summary, found.patch, part))
            for part in (SEARCH, HELD_OUT)
        }
    finally:
        log.close()
    result = {part: [{**asdict(c), "verdict": c.verdict} for c in cs] for part, cs in changes.items()}
    extra = {"hyperparameters": found.hyperparameters, "found": found.summary, "result": result}
    folder = Profile(patch, found.tensors, structure(base.config), {**about, **extra}).save(out)
    found.notes += [f"{count} samples were asked for, {len(x)} are there" for x in given if (count or 0) > len(x)]
    found.notes += doubts(metric, changes[HELD_OUT], found.patch)
    seconds = time.monotonic() - started
    return Calibration(
        patch, folder, search, metric, found.summary, changes[SEARCH], changes[HELD_OUT], len(log.done), log.resumed,
        seconds, tuple(found.notes),
    )  # fmt: skip


def searcher_of(patch: str) -> type[Search]:
    """The search of a method. Raises ConfigError naming those that have one."""
    found = get_patch(patch).searcher() if "+" not in patch else None
    if found is None:
        able = ", ".join(name for name, cls in list_patches().items() if cls.searcher() is not None)
        raise ConfigError(f"{patch!r} has nothing to calibrate; choose one of {able}.")
    return found


def compare(before: Measured, after: Measured) -> tuple[Change, ...]:
    """Every measure that both have, with a paired 95 % interval."""
    changes = []
    for metric in METRICS:
        old, new = before.values(metric), after.values(metric)
        if old is not None and new is not None:
            low, high = (interval if metric == "entropy" else share_interval)(new, old)
            a, b = sum(old) / len(old), sum(new) / len(new)
            changes.append(Change(metric, len(old), a, b, b - a, low, high))
    return tuple(changes)


def doubts(metric: str, held_out: Sequence[Change], patch: Patch) -> list[str]:
    """What to be told before using the profile: a gain that does not hold, entropy that fell for nothing."""
    if not patch.reweight_at:
        return []  # it changes nothing, which the search has said
    verdicts = {c.metric: c.verdict for c in held_out}
    if verdicts[metric] != "better":
        return [f"the gain does not hold on the samples held out ({metric}: {verdicts[metric]}); do not count on it"]
    rights = {m: v for m, v in verdicts.items() if m != "entropy"}
    if metric == "entropy" and rights and "better" not in rights.values():
        listed = ", ".join(f"{m}: {v}" for m, v in rights.items())
        return [f"the entropy fell, but not to more right answers on the samples held out ({listed})"]
    return []


def share_interval(new: Sequence[float], old: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the difference of two shares over the same samples (values 0 or 1).

    Wald's for paired proportions with half a count added to each cell (Agresti and Min, 2005): it keeps a width where
    both agree everywhere.
    """
    won = sum(a > b for a, b in zip(new, old, strict=True)) + 0.5
    lost = sum(a < b for a, b in zip(new, old, strict=True)) + 0.5
    total = len(old) + 2
    middle, half = (won - lost) / total, _Z * math.sqrt(won + lost - (won - lost) ** 2 / total) / total
    return middle - half, middle + half


def interval(new: Sequence[float], old: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean difference over the same samples (2 or more): Student's, by Cornish-Fisher."""
    changes = [a - b for a, b in zip(new, old, strict=True)]
    n, mean = len(changes), sum(changes) / len(changes)
    error = math.sqrt(sum((x - mean) ** 2 for x in changes) / (n - 1) / n)
    free = n - 1
    t = _Z + (_Z**3 + _Z) / (4 * free) + (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * free**2)
    return mean - t * error, mean + t * error


def _check(search: str, count: int | None, held_out: float, batch_tokens: int) -> None:
    if search not in ("supervised", "unsupervised"):
        raise ConfigError(f"search={search!r} is not allowed; choose one of 'supervised', 'unsupervised'.")
    if count is not None and count < 4:
        raise ConfigError(f"count={count} is too small; at least 4 samples are needed, 2 of them held out.")
    if not 0 < held_out < 1:
        raise ConfigError(f"held_out={held_out} must lie between 0 and 1: the share of samples kept from the search.")
    if batch_tokens < 1:
        raise ConfigError(f"batch_tokens={batch_tokens} is too small; it must be at least 1.")


def _sets(samples: Any, labelled: bool) -> list[list[Sample]]:
    """The samples of each file; those given as such are one set."""
    paths: list[Any] = [samples] if isinstance(samples, (str, Path)) else list(samples)
    if paths and all(isinstance(x, (str, Path)) for x in paths):
        named = [Path(x).resolve() for x in paths]
        if twice := [x for x, file in zip(paths, named, strict=True) if named.count(file) > 1]:
            raise ConfigError(f"{twice[0]} is named twice; name each file of samples once.")
        return [read_samples(path, labelled) for path in paths]
    if wrong := [x for x in paths if not isinstance(x, Sample)]:
        raise InputError(
            f"samples holds a {type(wrong[0]).__name__}; give the path of a .jsonl file, several paths, or Samples."
        )
    if labelled and (bare := [i for i, x in enumerate(paths) if x.answer is None]):
        raise InputError(f"samples[{bare[0]}] has no answer, which a supervised search needs; search unsupervised.")
    return [paths]


def _drawn(given: list[list[Sample]], count: int | None, held_out: float, seed: int) -> dict[str, list[Sample]]:
    """Both parts, of every set its own share."""
    halves = zip(*(split(rows, count, held_out, seed) for rows in given), strict=True)
    return {part: [x for rows in half for x in rows] for part, half in zip((SEARCH, HELD_OUT), halves, strict=True)}


def _metric(searcher: Search, parts: dict[str, Any], search: str) -> str:
    """What the search goes by; "restricted" needs labels everywhere."""
    asked = getattr(searcher, "measure", None)
    if search == "unsupervised":
        if asked is not None:
            raise ConfigError(f"measure={asked!r} is for a supervised search; an unsupervised one goes by entropy.")
        return "entropy"
    metric = asked or searcher.metric
    if metric == "restricted" and any(not row.labels for rows in parts.values() for row in rows):
        if asked is not None:
            raise ConfigError("measure='restricted' needs samples with labels; give them, or measure='exact'.")
        return "exact"
    return metric
