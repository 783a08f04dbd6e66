"""What a method costs in answers: `python -m attnpatch.bench.quality --out FILE.json [--device cuda]`.

Every method answers the same prompts of the embedded model's tasks by greedy `generate`; an answer counts only if all
its tokens are right. Batches go through all methods in turn, so a run that stops early has equal counts for all; the
evicting methods share one dense prefill of a batch (`attnpatch.bench.shared`), which gives the answers of plain
`generate`. Without --methods all evicting ones run at the budgets of the table; methods that keep the whole cache
(`--methods flexprefill hip`) run with their recipe, or with some of its values changed (`hip:mask_k=1024,sink=4`);
evicting ones too take such values (`cake:window_size=8`). `--methods all` takes every method that needs no calibrated
values; one that needs some is named with its profile (`duoattention:profile=FOLDER`). The file keeps every answer, so
`--resume` goes on where an earlier run stopped, and adds the methods that it did not have, and `--table` prints it as a
table. `--tiny` is a dry run on a random toy model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml

from attnpatch import breakeven
from attnpatch.api import patched, resolve
from attnpatch.bench import shared
from attnpatch.bench.board import Method, Run, Tally, Task, markdown
from attnpatch.bench.measure import environment
from attnpatch.bench.shapes import SHAPES, random_model
from attnpatch.engine.compat import out_of_memory
from attnpatch.errors import ConfigError
from attnpatch.patch import list_patches
from attnpatch.report import status
from attnpatch.testbed import tasks

METHODS = ("snapkv", "pyramidkv", "h2o", "streamingllm", "random")
BUDGETS = (0.02, 0.05, 0.10, 0.25)
TASKS = (
    "needle:4096:1:200:64", "needle:4096:16:200:64", "vt:4096:4:200:64", "lines:4096:1:200:64",
    "needle:16384:1:100:16", "needle:16384:16:100:16",
)  # fmt: skip
SEED = 500_000


class Cases:
    """Prompts and answers of exactly equal prompt length, the same for every method."""

    def __init__(self, books: list[str] | None = None, encoder: Any = None) -> None:
        self.books, self.encoder = books, encoder  # None: the built-in filler, the packaged tokenizer

    def batch(self, task: Task, first: int, count: int) -> tuple[torch.Tensor, list[list[int]]]:
        """int64 [count, length] prompts and their answers, samples `first` and up."""
        pairs = [self.pair(task, SEED + first + i) for i in range(count)]
        return torch.tensor([prompt for prompt, _ in pairs]), [answer for _, answer in pairs]

    def pair(self, task: Task, seed: int) -> tuple[list[int], list[int]]:
        case = tasks.make(task.kind, task.length, keys=task.keys, seed=seed, text=self.books, tokenizer=self.encoder)
        return case.prompt_ids, case.answer_ids


class RandomCases(Cases):
    """Random ids in place of the tasks, for a dry run without the tokenizer."""

    def pair(self, task: Task, seed: int) -> tuple[list[int], list[int]]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, SHAPES["tiny"]["vocab_size"], (task.length + 3,), generator=generator).tolist()
        return ids[: task.length], ids[task.length :]


def correct(
    model: Any, methods: list[Method], prompts: torch.Tensor, wanted: list[list[int]], tally: Tally
) -> list[list[bool]]:
    """By method, whether each prompt is answered exactly; halves the batch when memory runs out.

    Adds to `tally`; a prefill that methods share is split evenly among them.
    """
    tried = Tally()  # a try that runs out of memory counts nothing
    try:
        hits = _correct(model, methods, prompts.to(model.device), wanted, tried)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        hits = None
    if hits is None:
        if len(prompts) == 1:
            raise ConfigError(f"one prompt of {prompts.shape[1]} tokens does not fit in memory.")
        torch.cuda.empty_cache()
        half = len(prompts) // 2
        parts = (correct(model, methods, prompts[s], wanted[s], tally) for s in (slice(half), slice(half, None)))
        return [first + second for first, second in zip(*parts, strict=True)]
    for method in methods:
        tally.seconds[method] += tried.seconds[method]
        tally.attended[method] += tried.attended[method]
    return [hits[m] for m in methods]


def _correct(
    model: Any, methods: list[Method], prompts: torch.Tensor, wanted: list[list[int]], tally: Tally
) -> dict[Method, list[bool]]:
    tokens, hits = max(map(len, wanted)), {}

    def count(method: Method, since: float, lines: list[list[int]], shared_seconds: float = 0.0) -> None:
        hits[method] = [line[: len(answer)] == answer for line, answer in zip(lines, wanted, strict=True)]
        tally.seconds[method] += time.monotonic() - since + shared_seconds

    patches = {m: m.patch(prompts.shape[1]) for m in methods if m.name != "dense"}
    for method in methods:
        if method.budget is None:
            since = time.monotonic()
            if method.name == "dense":
                count(method, since, shared.greedy(model, prompts, tokens).tolist())
                continue
            with patched(model, patches[method]):
                count(method, since, shared.greedy(model, prompts, tokens).tolist())
                tally.attended[method] += [
                    x.density.mean().item() for x in status(model).layers if x.density is not None
                ]
    groups: dict[Any, list[Method]] = {}
    for method, patch in ((m, p) for m, p in patches.items() if m.budget is not None):
        groups.setdefault(shared.kind(patch), []).append(method)
    for group in groups.values():
        since = time.monotonic()
        record = shared.record(model, [patches[m] for m in group], prompts)
        prefill = (time.monotonic() - since) / len(group)
        for method in group:
            since = time.monotonic()
            count(method, since, shared.answers(model, patches[method], record, tokens), prefill)
    return hits


def task_list(args: argparse.Namespace) -> list[Task]:
    """What is asked."""
    if args.tiny:
        return [Task("needle", 256, 1, 2, 2), Task("lines", 256, 1, 2, 2), Task("needle", 384, 2, 2, 2)]
    return args.tasks or [Task.parse(text) for text in TASKS]


def everything() -> list[str]:
    """Every registered method that needs no calibrated values and writes no prompt of its own."""
    names = []
    for name, cls in list_patches().items():
        if cls.needs_profile or {"reweight", "prepare"} & cls.hooks():
            continue
        with suppress(ConfigError):  # needs a profile
            names += [resolve(name)[0].name]
    return names


def method_list(args: argparse.Namespace) -> list[Method]:
    """Un-patched first, then what is asked: evicting methods at every budget, others once."""
    made, budgets = [Method("dense")], (0.10,) if args.tiny else args.budgets
    for text in everything() if args.methods == ["all"] else args.methods or METHODS:
        name, _, values = text.partition(":")
        changed = tuple(
            (key, yaml.safe_load(value)) for key, _, value in (x.partition("=") for x in values.split(",")) if key
        )
        patch = resolve(name, **dict(changed))[0]
        evicts = "keep" in patch.hooks() and hasattr(patch, "budget")  # runs at the budgets of the table
        if evicts and "budget" in dict(changed):
            raise ConfigError(f"{text!r}: an evicting method runs at the budgets of the table; give them as --budgets.")
        made += [Method(name, budget, changed) for budget in (budgets if evicts else [None])]
    return made


def read_books(paths: list[Path]) -> list[str] | None:
    """Texts of the given files and of the .txt files in the given folders; None without any path."""
    files = [f for path in paths for f in (sorted(path.glob("*.txt")) if path.is_dir() else [path])]
    if paths and not files:
        raise ConfigError(f"no .txt file in {', '.join(map(str, paths))}; name text files, or leave --books out.")
    if missing := [f for f in files if not f.is_file()]:
        raise ConfigError(f"{missing[0]} does not exist; name text files, or leave --books out.")
    return [f.read_text(encoding="utf-8", errors="replace") for f in files] or None


def load(args: argparse.Namespace, dtype: torch.dtype) -> tuple[Any, Cases, str]:
    """(model, cases, what they are)."""
    if args.tiny:
        model = random_model("tiny", dtype=dtype, device=args.device)
        return model, RandomCases(), "random toy model, random ids: a dry run"
    from attnpatch import testbed

    model = testbed.load()[0]
    books = read_books(args.books)
    return model.to(device=args.device, dtype=dtype).eval(), Cases(books), f"testbed, haystack: {haystack(books)}"


def haystack(books: list[str] | None) -> str:
    """A name of the texts by what they hold, so that --resume takes up no answers about others."""
    if not books:
        return "the built-in filler"
    digest = hashlib.sha256("\0".join(books).encode()).hexdigest()
    return f"{len(books)} text files, sha256 {digest[:16]}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="*", help=f"default: {' '.join(METHODS)}")
    shape = "KIND:TOKENS:KEYS:SAMPLES:BATCH"
    parser.add_argument("--tasks", nargs="*", type=Task.parse, metavar=shape, help=f"default: {' '.join(TASKS)}")
    parser.add_argument("--seconds", type=float, default=200, help="no new batch is started past this time")
    parser.add_argument("--books", type=Path, nargs="*", default=[], help="haystack: text files, or folders of .txt")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16 on a GPU")
    parser.add_argument("--budgets", type=float, nargs="*", default=BUDGETS, help="KV kept by the evicting ones")
    parser.add_argument("--resume", action="store_true", help="go on from the samples that --out holds already")
    parser.add_argument("--table", action="store_true", help="print the result as a Markdown table")
    parser.add_argument("--tiny", action="store_true", help="dry run on a random toy model")
    parser.add_argument("--commit", help="commit to record where git cannot tell")
    return parser.parse_args(argv)


def taken_up(run: Run, out: Path, asked: dict[str, str]) -> list[dict[str, Any]]:
    """Take up the rows of `out`; where and by which commit those were measured that are not asked now.

    Raises ConfigError unless it asked the same: `asked` and the tasks.
    """
    before = json.loads(out.read_text(encoding="utf-8"))
    if changed := [k for k, value in asked.items() if before.get(k) != value]:
        had, now = before.get(changed[0]), asked[changed[0]]
        raise ConfigError(
            f"{out} was asked otherwise ({changed[0]}: {had!r}, not {now!r}); give the same, or another --out."
        )
    run.restore(before["rows"])
    earlier: list[dict[str, Any]] = before.get("earlier", [])
    ours = {m.label for m in run.methods[1:]}.union(*(e["methods"] for e in earlier))
    if rest := [label for label in dict.fromkeys(r["label"] for r in before["rows"]) if label not in ours]:
        others = {r["label"] for rows in run.others.values() for r in rows}
        if others.intersection(rest):
            about = {k: before.get(k) for k in ("commit", "device", "versions", "seconds")}
            earlier = [*earlier, {**about, "methods": rest}]
    return earlier


def main(argv: list[str] | None = None) -> None:
    """Ask everything and write the JSON."""
    started = time.monotonic()
    args = parse(argv)
    device = torch.device(args.device)
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    model, cases, what = load(args, getattr(torch, dtype))
    methods = method_list(args)
    run = Run(task_list(args), methods)
    what = f"exact greedy answers; {what}; samples from seed {SEED}"
    earlier = taken_up(run, args.out, {"what": what, "dtype": dtype}) if args.resume and args.out.exists() else []

    def ask(task: Task, first: int, count: int, tally: Tally, asked: list[Method]) -> list[list[bool]]:
        return correct(model, asked, *cases.batch(task, first, count), tally)

    with breakeven.ignored():
        run.go(ask, started + args.seconds)
    body = {
        **environment(device, args.commit),
        "what": what,
        "dtype": dtype,
        "tiny": args.tiny,
        "stopped_early": run.stopped,
        "seconds": round(time.monotonic() - started, 2),
        "seconds_by_method": {m.label: round(sum(t.seconds[m] for t in run.tallies.values()), 2) for m in methods},
        **({"earlier": earlier} if earlier else {}),
        "rows": run.rows(),
    }
    args.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    if args.table:
        print(markdown(body["rows"]))
        return
    for row in body["rows"]:
        name = row["label"]
        task = f"{row['task']:7}{row['tokens']:6} keys={row['keys']:<3}"
        print(f"{task} {name:18} {row['correct']}/{row['n']}", flush=True)


if __name__ == "__main__":
    main()
