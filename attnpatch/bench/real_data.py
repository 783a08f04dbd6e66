"""What methods do on texts and tasks written by others: `python -m attnpatch.bench.real_data --data FOLDER --out FILE`.

The embedded model, which only knows its own three tasks, on
- `sets:NAMES` (joined by +): files of public evaluation sets, dense and InfiniRetri on the same questions, as
  `attnpatch evaluate` asks them (prompts beyond --window tokens lose their middle, for both);
- `hidden:KIND:CHARACTERS:READER`: facts hidden in held-out books. KIND babi: the sentences of a bAbI story (qa1),
  spread over the text in their order; code: one sentence, asked for in the wording that the model was trained on.
  READER is `last` or a layer's number (InfiniRetri), or `dense-TOKENS` (the text's middle cut out until the prompt has
  so many). Counted: the sentence with the answer is in what the model answers from; right answers;
- `calibrate:PATCH:SEARCH:SET`: `attnpatch calibrate` on short tasks (several joined by +: a pool), half of the
  samples held out.

What is done is written at once and not run again; --seconds ends a run before its next text or part. FOLDER has the
sets in folders of their own (`longbench_mini`, `bamboo`, `babi`, `books`, `short_tasks`). `--parts` chooses some;
`--quick` is a dry run.
"""

from __future__ import annotations

import bz2
import json
import math
import random
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from attnpatch import retrieve, testbed
from attnpatch.bench.measure import Clock, environment, parser
from attnpatch.calibrating import calibrate, share_interval
from attnpatch.errors import ConfigError
from attnpatch.evaluate import formats, metrics, results, runner, stats
from attnpatch.evaluate.sample import Sample
from attnpatch.patch import get_patch
from attnpatch.retrieval import TEMPLATE

SETS = (
    "2wikimqa+multifieldqa_en", "hotpotqa+qasper", "narrativeqa+triviaqa", "passage_retrieval_en+trec",
    "altqa_4k+meetingqa_4k", "abshallu_4k+senhallu_4k", "paperqa_4k",
)  # fmt: skip
HIDDEN = tuple(
    f"{kind}:{place}"
    for place in ("32000:dense-4096", "32000:dense-12288", "32000:last", "32000:3", "128000:dense-4096", "128000:3",
                  "128000:last")
    for kind in ("babi", "code")
)  # fmt: skip
SHORT = ("sst2_validation", "superglue_boolq_val", "superglue_rte_val", "mmlu_test")
POOL = "sst2_validation+superglue_rte_val+mmlu_test"
CALIBRATED = (
    *(f"{patch}:supervised:{name}" for name in (*SHORT, POOL) for patch in ("zerotuning", "act")),
    *(f"{patch}:unsupervised:sst2_validation" for patch in ("zerotuning", "act")),
)
PARTS = (
    *(f"calibrate:{x}" for x in CALIBRATED), *(f"sets:{x}" for x in SETS), *(f"hidden:{x}" for x in HIDDEN),
)  # fmt: skip
TEMPLATES = {"babi": TEMPLATE, "code": "{context}\n\n{question}"}
HELD_OUT_BOOKS = ("books_06", "books_07")  # the shards that the embedded model was not trained on


class Bench:
    """One model, one folder of data."""

    def __init__(self, data: Path, samples: int, window: int, seed: int = 0) -> None:
        self.data, self.samples, self.window, self.seed = data, samples, window, seed
        self.model, self.tokenizer = testbed.load(torch.float32)
        self._books: list[str] = []

    def run(self, part: str, before: dict[str, Any], left: Callable[[], float]) -> dict[str, Any]:
        """The figures of a part, on top of those it had. Raises ConfigError for one that does not exist."""
        kind, *rest = part.split(":")
        if kind == "hidden" and len(rest) == 3:
            return self.hidden(rest[0], rest[1], rest[2], before.get("rows", []), left)
        if kind == "sets" and len(rest) == 1:
            return self.sets(*rest)
        if kind == "calibrate" and len(rest) == 3:
            return self.calibrate(*rest)
        raise ConfigError(f"--parts: {part!r} is no part; choose of {', '.join(PARTS)}.")

    def complete(self, part: dict[str, Any]) -> bool:
        """Whether nothing is left to do of a part."""
        return bool(part) and len(part.get("rows", range(self.samples))) >= self.samples

    def file(self, name: str) -> Path:
        """The one file of this name. Raises ConfigError."""
        found = sorted(self.data.glob(f"*/{name}.jsonl.gz"))
        if not found:
            raise ConfigError(f"--data: no folder of {self.data} holds {name}.jsonl.gz; name the folder of the sets.")
        return found[0]

    # ---- public sets -------------------------------------------------------------------------------------------
    def sets(self, names: str) -> dict[str, Any]:
        """Dense and InfiniRetri on the first samples of some files, each scored by its own metric."""
        few, samples = math.ceil(self.samples / 4), []
        for name in names.split("+"):
            found = formats.load(self.file(name))[:few]
            samples += [replace(s, task="pool", id=f"{name}-{s.id}") for s in found]
        runs = [runner.Run(results.DENSE), runner.Run("infiniretri", (get_patch("infiniretri")(),))]
        options = runner.Options(truncate="middle", max_length=self.window, chat=True, seed=self.seed)
        with tempfile.TemporaryDirectory() as folder:
            ledger = results.Ledger(Path(folder) / "out.json", {"seed": self.seed})
            runner.evaluate(self.model, self.tokenizer, samples, runs, options, ledger)
            (pool,) = ledger.write(samples, runs)["tasks"]
            answers = [[r["id"], r["run"], r["scores"][0], r["predictions"][0][:60]] for r in ledger.rows.values()]
        return {**{k: pool[k] for k in ("metric", "samples", "runs")}, "answers": answers}

    # ---- facts hidden in books ---------------------------------------------------------------------------------
    def hidden(
        self, kind: str, size: str, reader: str, rows: list[dict[str, Any]], left: Callable[[], float]
    ) -> dict[str, Any]:
        """Whether the fact reaches the prompt of the answer, and whether the answer is right."""
        samples = hidden_samples(kind, int(size), self.samples, self.seed, self.books(), self.data)
        for sample in samples[len(rows) :]:
            if rows and left() < 0:  # a part has a text at least
                break
            dense = reader.startswith("dense-")
            given, said, tokens = (
                self._truncated(sample, int(reader.removeprefix("dense-")))
                if dense
                else self._retrieved(sample, None if reader == "last" else int(reader))
            )
            rows.append({
                "id": sample.id, "kept": sample.meta["fact"] in given,
                "right": metrics.score(said, sample) == 100, "said": said[:60], "answer": sample.answers[0][0],
                "share": round(min(1, len(given) / len(sample.context)), 4), "tokens": tokens,
                "depth": sample.meta["depth"],
            })  # fmt: skip
        return {**{what: counted([r[what] for r in rows]) for what in ("kept", "right")}, "rows": rows}

    def books(self) -> list[str]:
        """Texts of the held-out shards."""
        for name in HELD_OUT_BOOKS if not self._books else ():
            with bz2.open(self.data / "books" / f"{name}.jsonl.bz2", "rt", encoding="utf-8") as file:
                self._books += [json.loads(line)["text"] for line in file.read().split("\n") if line]
        return self._books

    def _truncated(self, sample: Sample, window: int) -> tuple[str, str, int]:
        options = runner.Options(truncate="middle", max_length=window, chat=True)
        asked = runner.Runner(self.model, self.tokenizer, options)
        encoded = asked.encode(sample)
        (reply,) = asked.ask([encoded])
        return self.tokenizer.decode(encoded.whole()), reply.texts[0], reply.tokens

    def _retrieved(self, sample: Sample, layer: int | None) -> tuple[str, str, int]:
        found = retrieve(
            self.model, self.tokenizer, sample.context, sample.questions[0], layer=layer,
            max_new_tokens=sample.max_new_tokens, template=sample.template,
        )  # fmt: skip
        return found.context, found.answer, found.prompt_tokens

    # ---- short tasks -------------------------------------------------------------------------------------------
    def calibrate(self, patch: str, search: str, names: str) -> dict[str, Any]:
        """A search on one half of the samples of short tasks, its differences on the other."""
        files = [self.file(one) for one in names.split("+")]
        settings: dict[str, Any] = {"measure": "restricted"} if search == "supervised" else {}
        with tempfile.TemporaryDirectory() as folder:
            found = calibrate(
                self.model, self.tokenizer, patch, files, folder, search=search, count=8 * self.samples,
                seed=self.seed, batch_tokens=4096, **settings,
            ).as_dict()  # fmt: skip
        return {k: found[k] for k in ("metric", "summary", "searched", "held_out", "verdict", "trials", "notes")}


def hidden_samples(kind: str, size: int, count: int, seed: int, books: list[str], data: Path) -> list[Sample]:
    """`count` texts of about `size` characters with facts in them; the same for the same arguments."""
    rng = random.Random(f"{kind}-{seed}")
    stories = _stories(kind, data, rng)
    long = [b for b in books if len(b) > size + 4000]
    if not long:
        raise ConfigError(f"no book has {size + 4000} characters; give a smaller size.")
    return [_hidden(kind, next(stories), rng.choice(long), size, number, rng) for number in range(count)]


def _stories(kind: str, data: Path, rng: random.Random) -> Iterator[tuple[list[str], str, str, str]]:
    """(sentences, the one that holds the answer, question, answer)."""
    if kind == "code":
        from attnpatch.testbed.filler import ADJECTIVES, NOUNS

        while True:
            name, code = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}", str(rng.randrange(10_000, 100_000))
            fact = f"The code of {name} is {code}."
            yield [fact], fact, f"What is the code of {name}?", code
    if kind != "babi":
        raise ConfigError(f"{kind!r} cannot be hidden; choose babi or code.")
    (path,) = sorted((data / "babi").glob("qa1_*"))
    samples = formats.load(path)
    rng.shuffle(samples)
    for sample in samples:
        who = re.fullmatch(r"Where is (\w+)\?", sample.questions[0])
        lines = sample.context.split("\n")
        said = [x for x in lines if who and x.startswith(who[1] + " ")]
        if said and lines.count(said[-1]) == 1:
            yield lines, said[-1], sample.questions[0], sample.answers[0][0]


def _hidden(
    kind: str, story: tuple[list[str], str, str, str], book: str, size: int, number: int, rng: random.Random
) -> Sample:
    """One story, its sentences after sentence ends of a stretch of the book, in order."""
    lines, fact, question, answer = story
    start = rng.randrange(2000, len(book) - size)
    text = book[start : start + size]
    ends = [found.end() for found in re.finditer(r"(?<=[a-z]{3})[.!?](?= )", text)]
    if len(ends) <= len(lines):
        raise ConfigError(f"a stretch of {size} characters has {len(ends)} sentence ends, too few for the story.")
    made, at, depth = [], 0, 0.0
    for place, line in zip(sorted(rng.sample(ends, len(lines))), lines, strict=True):
        made += [text[at:place], " " + line]
        at, depth = place, place / size if line == fact else depth
    return Sample(
        id=f"{kind}-{number}", task=kind, context="".join([*made, text[at:]]).strip(), questions=(question,),
        answers=((answer,),), metric="string_match_all", max_new_tokens=12, template=TEMPLATES[kind],
        meta={"fact": fact, "depth": round(depth, 3)},
    )  # fmt: skip


def counted(hits: list[bool]) -> dict[str, Any]:
    """A share with its 95 % interval (Wilson)."""
    low, high, how = stats.interval([100.0 * h for h in hits], 0)
    return {"n": len(hits), "hits": sum(hits), "low": round(low, 1), "high": round(high, 1), "interval": how}


def paired(parts: dict[str, Any]) -> None:
    """Of each hidden part but the dense ones: the difference to dense on the same texts, added in place."""
    for name, part in parts.items():
        place, _, reader = name.rpartition(":")
        for dense in ("dense-4096", "dense-12288"):
            other = parts.get(f"{place}:{dense}")
            if not name.startswith("hidden:") or reader.startswith("dense-") or other is None:
                continue
            for what in ("kept", "right"):
                both = list(zip(part["rows"], other["rows"], strict=False))
                new, old = ([float(r[i][what]) for r in both] for i in (0, 1))
                low, high = share_interval(new, old)
                part.setdefault("over", {}).setdefault(dense, {})[what] = {
                    "n": len(both), "difference": (sum(new) - sum(old)) / len(both), "low": low, "high": high,
                }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Run the parts asked for that the file lacks, and write it after each."""
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, required=True, help="folder of the sets")
    arguments.add_argument("--parts", nargs="*", default=list(PARTS), metavar="PART", help="default: all")
    arguments.add_argument(
        "--samples", type=int, default=10, help="hidden texts of a part; of a set's file a quarter, of short tasks 8x"
    )
    arguments.add_argument("--window", type=int, default=8192, help="most tokens of a dense prompt of the sets")
    args = arguments.parse_args(argv)
    clock = Clock(torch.device("cpu"), args.seconds)
    bench = Bench(args.data, 2 if args.quick else args.samples, args.window)
    asked = {"samples": bench.samples, "window": bench.window, "seed": bench.seed}
    parts: dict[str, Any] = {}
    if args.out.exists():
        before = json.loads(args.out.read_text(encoding="utf-8"))
        if {k: before.get(k) for k in asked} != asked:
            raise ConfigError(f"{args.out} was begun with other settings; use those to go on, or name another file.")
        parts = before["parts"]
    body = {
        **environment(torch.device("cpu"), args.commit), "threads": torch.get_num_threads(), "dtype": "float32",
        "what": "the embedded model on data written by others", "quick": args.quick, **asked, "parts": parts,
    }  # fmt: skip
    for part in args.parts:
        if bench.complete(parts.get(part, {})):
            continue
        if clock.left() < 0:
            break
        parts[part] = bench.run(part, parts.get(part, {}), clock.left)
        paired(parts)
        args.out.write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(
            part, json.dumps({k: v for k, v in parts[part].items() if k not in ("rows", "answers")})[:600], flush=True
        )


if __name__ == "__main__":
    main()
