"""Result files -> records. A file is known by what it holds, not by its name."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnpatch.errors import ConfigError
from attnpatch.reporting.records import Cell, Grid, Records, Score, Time
from attnpatch.reporting.trace import KIND, Trace

READS = (
    "results of attnpatch evaluate, of attnpatch bench, measurements such as recipes/evidence/quality.json, "
    "first_token.json, prefill.json and decode.json, traces of attnpatch report --save-trace, and status of a model as "
    "JSON"
)
DENSE = "dense"


def read(paths: Sequence[Path]) -> Records:
    """All files' records. Raises ConfigError that names the file: absent, damaged, or of no known kind."""
    found, seen = Records(), set()
    for path in paths:
        if path.resolve() in seen:
            raise ConfigError(f"{path} is named twice; name each result file once.")
        seen.add(path.resolve())
        body, before = _load(path), _drawn(found)
        try:
            kind = _take(body, path, found)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ConfigError(
                f"{path} is damaged ({type(error).__name__}: {error}); write it again. What is read: {READS}."
            ) from error
        if kind is None:
            raise ConfigError(f"{path} holds no results that a report knows; it reads {READS}.")
        if _drawn(found) == before:
            kind += "; not drawn: perplexities, or scores at the whole KV only"
        found.files.append((path.name, kind, _facts(body)))
    return found


def _drawn(found: Records) -> int:
    """How many records a chart shows."""
    below = sum(s.share is not None and s.share < 1 for s in found.scores)
    return below + len(found.cells) + len(found.times) + len(found.grids) + len(found.traces)


def _load(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name the .json files in it.")
    if not path.is_file():
        raise ConfigError(f"there is no result file {str(path)!r}; check the path.")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # bad UTF-8 is a ValueError
        raise ConfigError(f"{path} is not JSON, or was cut off in writing; a report reads {READS}.") from None
    if not isinstance(body, dict):
        raise ConfigError(f"{path} holds no results that a report knows; it reads {READS}.")
    return body


def _take(body: dict[str, Any], path: Path, found: Records) -> str | None:
    """Add the file's records; what kind of file it is, None for an unknown one."""
    rows = body.get("rows")
    first: Any = rows[0] if isinstance(rows, list) and rows else {}
    if body.get("kind") == KIND:
        found.traces.append(Trace.from_dict(body))
        return "eviction trace"
    if isinstance(body.get("tasks"), list) and "runs" in body:
        _evaluation(body, found)
        return "evaluation"
    if isinstance(rows, list) and "grid" in body and "variants" in body:
        _bench(body, found)
        return "benchmark"
    if isinstance(first, dict) and "accuracy" in first:
        _quality(body, path, found)
        return "answers"
    if isinstance(first, dict) and isinstance(first.get("times"), dict) and ("tokens" in first or "keys" in first):
        _times(body, path, found)
        return "times"
    if isinstance(body.get("layers"), list) and "patches" in body and "bytes_held" in body:
        _status(body, path, found)
        return "status"
    return None


def _facts(body: dict[str, Any]) -> str:
    parts = [body.get(k) for k in ("model", "what", "protocol", "dtype", "device")]
    commit = body.get("commit")
    return ", ".join([str(p) for p in parts if p] + ([f"commit {str(commit)[:7]}"] if commit else []))


def number(value: Any) -> float:
    """A finite number; raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


# ---- answers -----------------------------------------------------------------------------------------------------
def _evaluation(body: dict[str, Any], found: Records) -> None:
    """attnpatch evaluate: KV kept was measured; depths where the task has one needle."""
    settings = {run["label"]: run["patches"] for run in body["runs"]}
    asked = body.get("generated") or {}
    made = set(asked.get("names") or ())
    where = f"{_short(body.get('model'))}, {body.get('protocol', 'query-aware')}"
    for task in body["tasks"]:
        name = str(task["task"])
        length = f", {asked['tokens']} tokens" if name in made and asked.get("tokens") else ""
        for run in task["runs"]:
            if "score" not in run:
                continue
            label = str(run["run"])
            if "perplexity" not in run:
                low, high = number(run["low"]), number(run["high"])
                share = run.get("kv_share", 1.0 if label == DENSE else None)
                found.scores.append(
                    Score(f"{name}{length} ({where})", label, number(run["score"]), low, high, int(run["n"]),
                          None if share is None else number(share))
                )  # fmt: skip
            for cell in run.get("depths", ()):
                found.cells.append(
                    Cell(f"{name} ({where})", _with_budget(label, settings.get(label, {})), int(cell["tokens"]),
                         number(cell["depth"]), number(cell["score"]), int(cell["n"]))
                )  # fmt: skip


def _with_budget(label: str, patches: dict[str, Any]) -> str:
    budgets = [str(v["budget"]) for v in patches.values() if v.get("budget") is not None]
    return f"{label}, budget {', '.join(budgets)}" if budgets else label


def _short(model: Any) -> str:
    return Path(str(model)).name or str(model)


def _quality(body: dict[str, Any], path: Path, found: Records) -> None:
    """Exact answers of attnpatch.bench.quality: shares of 1; the budget asked for, or the share of pages attended."""
    for row in body["rows"]:
        keys = int(row.get("keys", 1))
        group = f"{row['task']}, {int(row['tokens'])} tokens, {keys} key{'s' if keys > 1 else ''} ({path.stem})"
        method, label = str(row["method"]), str(row.get("label", row["method"]))
        score, low, high = (100 * number(row[k]) for k in ("accuracy", "low", "high"))
        kept, attended = _asked(row, method), row.get("attended")
        places: list[tuple[str, float | None, str]]
        if method == DENSE:
            places = [(DENSE, 1.0, "asked"), (DENSE, 1.0, "attended")]
        elif kept is not None:
            places = [(method, kept, "asked")]
        else:
            places = [(label, None if attended is None else number(attended), "attended")]
        for run, share, axis in places:
            found.scores.append(Score(group, run, score, low, high, int(row["n"]), share, axis))


def _asked(row: dict[str, Any], method: str) -> float | None:
    """Share of the prompt that the budget of a method that evicts names; None for others, whose budget is of reads."""
    from attnpatch.patch import list_patches

    budget, cls = row.get("budget"), list_patches().get(method)
    if budget is None or cls is None or "keep" not in cls.hooks():
        return None
    value = number(budget)
    return value if isinstance(budget, float) and value <= 1 else min(1.0, value / int(row["tokens"]))


# ---- times -------------------------------------------------------------------------------------------------------
def _bench(body: dict[str, Any], found: Records) -> None:
    """attnpatch bench: time to the first token, and of one decode step."""
    where = f"{_short(body.get('model'))}, {body.get('device', '')}"
    for row in body["rows"]:
        if "failed" in row:
            continue
        tokens, batch, label = int(row["tokens"]), int(row["batch"]), str(row["label"])
        first = row["first_token_ms"]
        found.times.append(_time(f"time to the first token, batch {batch} ({where})", label, tokens, first))
        if rate := row.get("decode_tokens_per_s"):
            step = {k: 1e3 * batch / number(rate[old]) for k, old in
                    (("median", "median"), ("min", "max"), ("max", "min"))}  # fmt: skip
            found.times.append(_time(f"time of a decode step, batch {batch} ({where})", label, tokens, step))


def _time(group: str, label: str, tokens: int, times: dict[str, Any]) -> Time:
    if tokens < 1:
        raise ValueError(f"{tokens} tokens")
    if "median" in times:
        return Time(group, label, tokens, *(number(times[k]) for k in ("median", "min", "max")))
    return Time(group, label, tokens, *(number(times[k]) for k in ("median_ms", "p10_ms", "p90_ms")))


def _times(body: dict[str, Any], path: Path, found: Records) -> None:
    """Measurements of attnpatch.bench: whole times, not the parts spent choosing."""
    group = f"{body.get('what', path.stem)} ({body.get('device', 'device not told')})"
    for row in body["rows"]:
        tokens = int(row["tokens"] if "tokens" in row else row["keys"])
        for label, times in row["times"].items():
            if not label.endswith((" choosing", " column sums")):
                found.times.append(_time(group, label.removesuffix(" total"), tokens, times))


# ---- layers and heads --------------------------------------------------------------------------------------------
def _status(body: dict[str, Any], path: Path, found: Records) -> None:
    """`status(model).as_dict()` as JSON: the share of pages attended, first row of the batch."""
    rows = [(int(x["index"]), x.get("density")) for x in body["layers"]]
    shares = tuple(tuple(number(v) for v in density[0]) if density else () for _, density in rows)
    if any(shares):
        title = f"{path.name}: {'+'.join(map(str, body['patches']))}"
        found.grids.append(Grid(title, "share of causal pages attended", shares, tuple(i for i, _ in rows)))
