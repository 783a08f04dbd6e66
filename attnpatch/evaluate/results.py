"""What a run leaves: a ledger that grows by sample, and the result file made from it.

OUT.json holds no times and no dates, so a run that was stopped and resumed gives the very file of one that was not.
OUT.samples.jsonl (one more a further process, OUT.samples.1.jsonl ...) opens with what was asked for; then one line a
run and sample.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attnpatch.errors import ConfigError, InputError
from attnpatch.evaluate import stats
from attnpatch.evaluate.likelihood import METRIC as LIKELIHOOD
from attnpatch.evaluate.sample import Sample
from attnpatch.whole import differences, write_json

DENSE = "dense"
FILES = ("profile", "pattern")  # hyperparameters that name some
Key = tuple[str, str, str]  # run, task, sample id


def check_out(out: Path) -> None:
    """Raise ConfigError for a result file that cannot be written."""
    if out.suffix != ".json" or out.is_dir():
        raise ConfigError(f"--out {str(out)!r} is not the name of a .json file; give one such as results.json.")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {str(out)!r}: there is no folder {str(out.parent)!r}; make it first.")


def named_files(patches: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """{"files": a short hash of each that a method's hyperparameters name}, so that other contents are another run."""
    found = {}
    for path in [Path(x) for values in patches.values() for key in FILES if (x := values.get(key)) is not None]:
        made = hashlib.sha256()
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.is_file() and file.suffix != ".jsonl":  # a calibration's log changes nothing
                made.update(file.name.encode() + file.read_bytes())
        found[str(path)] = made.hexdigest()[:16]
    return {"files": found} if found else {}


@contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """Raise ConfigError, naming `path`, where the file system refuses."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror or error}; check the folder, and that no second attnpatch evaluate has the same "
            "--out."
        ) from error


def ledgers(out: Path) -> list[Path]:
    """The ledger files beside a result file: the first process's, then others'."""
    first, start = out.with_suffix(".samples.jsonl"), f"{out.stem}.samples."
    found = {
        int(rank): path
        for path in out.parent.iterdir()
        if path.name.startswith(start) and (rank := path.name[len(start) :].removesuffix(".jsonl")).isdigit()
    }
    return [p for p in (first, *(found[rank] for rank in sorted(found))) if p.is_file()]


class Ledger:
    """The lines of one evaluation, on disk as they come.

    header: what was asked for; a ledger with another one is refused. rank: number of this process. Raises ConfigError.
    """

    def __init__(self, out: Path, header: dict[str, Any], rank: int = 0) -> None:
        check_out(out)
        self.out, self.header = out, json.loads(json.dumps(header))
        self.path = out.with_suffix(f".samples.{rank}.jsonl" if rank else ".samples.jsonl")
        self.rows: dict[Key, dict[str, Any]] = {}
        self.read()

    @property
    def files(self) -> list[Path]:
        """Ledger files of all processes there are."""
        return ledgers(self.out)

    def read(self) -> None:
        """Take over what all processes have written."""
        self.rows.clear()
        for path in self.files:
            for row in self._lines(path):
                key = (row["run"], row["task"], row["id"])
                if "failed" not in row or key not in self.rows:  # a failed sample may have gone well later
                    self.rows[key] = row

    def _lines(self, path: Path) -> Iterable[dict[str, Any]]:
        with on_disk(path):
            lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last line's end was cut off in writing
        for number, line in enumerate(lines):
            try:
                row = json.loads(line)
                found = row["header"] if number == 0 else (row["run"], row["task"], row["id"])
            except (ValueError, KeyError, TypeError):
                raise ConfigError(
                    f"{path}: line {number + 1} is no line of a ledger; start over with --fresh."
                ) from None
            if number == 0:
                self._check(path, found)
            else:
                yield row

    def _check(self, path: Path, found: Any) -> None:
        if other := differences(found, self.header):
            raise ConfigError(
                f"{path} belongs to another run ({other}); name another --out, or start over with --fresh."
            )

    @staticmethod
    def remove(out: Path) -> None:
        """Delete the ledgers beside a result file; one that somebody else deletes meanwhile is gone, too."""
        for path in ledgers(out):
            with on_disk(path):
                path.unlink(missing_ok=True)

    def has(self, key: Key) -> bool:
        """Whether this sample went well in that run."""
        return "failed" not in self.rows.get(key, {"failed": ""})

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows at once; a line is either whole or dropped at the next read."""
        fresh = [r for r in rows if not self.has((r["run"], r["task"], r["id"]))]
        self.rows.update({(r["run"], r["task"], r["id"]): r for r in fresh})
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in fresh)
        with on_disk(self.path):
            if not self.path.is_file() or not self._mend():
                text = json.dumps({"header": self.header}, ensure_ascii=False) + "\n" + text
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)

    def _mend(self) -> int:
        """Cut off a line whose writing was interrupted; the bytes that stay."""
        with self.path.open("rb+") as file:
            data = file.read()
            whole = data.rfind(b"\n") + 1
            file.truncate(whole)
        return whole

    def write(self, samples: Sequence[Sample], runs: Sequence[Any]) -> dict[str, Any]:
        """Make the result file from the ledger and return its content."""
        body = {**self.header, "tasks": summary(samples, [r.label for r in runs], self.rows, self.header["seed"])}
        with on_disk(self.out):
            write_json(self.out, body, ensure_ascii=False)
        return body


def check_samples(samples: Sequence[Sample]) -> None:
    """Raise InputError unless there are samples, and no id twice within a task."""
    if not samples:
        raise InputError("there are no samples; name a task with --task, or a file with --data.")
    seen: set[tuple[str, str]] = set()
    for sample in samples:
        key = (sample.task, sample.id)
        if key in seen:
            raise InputError(
                f"two samples of task {sample.task!r} are called {sample.id!r}; give each an id of its own."
            )
        seen.add(key)


def summary(
    samples: Sequence[Sample], labels: Sequence[str], rows: dict[Key, dict[str, Any]], seed: int
) -> list[dict[str, Any]]:
    """By task: of each run the mean score, its interval, and the paired difference to dense."""
    made = []
    for task in dict.fromkeys(s.task for s in samples):
        mine = [s for s in samples if s.task == task]
        metrics = sorted({s.metric for s in mine})
        made.append(
            {"task": task, "metric": "+".join(metrics), "samples": len(mine),
             "runs": [_line(label, task, mine, rows, seed) for label in labels]}
        )  # fmt: skip
    return made


def _line(label: str, task: str, samples: list[Sample], rows: dict[Key, dict[str, Any]], seed: int) -> dict[str, Any]:
    """One run on one task."""
    mine = [rows[label, task, s.id] for s in samples if (label, task, s.id) in rows]
    done = [r for r in mine if "failed" not in r]
    line: dict[str, Any] = {"run": label, "n": len(done)}
    if failed := {r["id"]: r["failed"] for r in mine if "failed" in r}:
        line["failed"] = failed
    if not done:
        return line
    scores = [_mean(r["scores"]) for r in done]
    low, high, how = stats.interval(scores, seed)
    line.update(score=_mean(scores), low=low, high=high, interval=how)
    if all(s.metric == LIKELIHOOD for s in samples):
        import math

        line["perplexity"] = math.exp(-_mean(scores))
    dense = [rows.get((DENSE, task, r["id"]), {"failed": ""}) for r in done]
    both = [(r, d) for r, d in zip(done, dense, strict=True) if "failed" not in d]
    # a method that writes its own prompt holds what that prompt needs: dense on the same sample is the whole
    whole = sum(d["kv_dense"] if r["kv_dense"] is None else r["kv_dense"] for r, d in both)
    if both and whole:
        line["kv_share"] = sum(r["kv_held"] for r, _ in both) / whole
    if label != DENSE and both:
        pairs = [(_mean(r["scores"]), _mean(d["scores"])) for r, d in both]
        line["over_dense"] = stats.paired([a for a, _ in pairs], [b for _, b in pairs], seed).as_dict()
    if all(s.metric == "bamboo_yes_no" for s in samples):
        from attnpatch.evaluate.metrics import yes_no_f1

        gold = {s.id: s.answers[0][0] for s in samples}
        line["whole_set"] = yes_no_f1([r["predictions"][0] for r in done], [gold[r["id"]] for r in done])
    if found := by_depth([(s, rows[label, task, s.id]) for s in samples if (label, task, s.id) in rows]):
        line["depths"] = found
    if cut := sum(bool(r["cut"]) for r in done):
        line["truncated"] = cut
    if notes := sorted({r["note"] for r in done if r["note"]}):
        line["notes"] = notes
    return line


def by_depth(pairs: Sequence[tuple[Sample, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Mean score by prompt length and tenth of the depth of the one needle; samples that tell no depth are left out.

    tokens: as asked for, or else of the prompt. depth: the middle of the tenth (0 start, 1 end of the context).
    """
    found: dict[tuple[int, int], list[float]] = {}
    for sample, row in pairs:
        places = sample.meta.get("depths", ())
        depth = sample.meta.get("depth", places[0] if len(places) == 1 else None)
        if isinstance(depth, (int, float)) and "failed" not in row:
            key = int(sample.meta.get("tokens", row["tokens"])), min(9, int(10 * depth))
            found.setdefault(key, []).append(_mean(row["scores"]))
    return [
        {"tokens": tokens, "depth": round(tenth / 10 + 0.05, 2), "n": len(scores), "score": _mean(scores)}
        for (tokens, tenth), scores in sorted(found.items())
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
