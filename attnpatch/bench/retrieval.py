"""InfiniRetri by the length of the text: `python -m attnpatch.bench.retrieval --out FILE.json [--seconds 600]`.

Time and peak memory of `retrieve` (passes and answer) on the embedded model at 64k to 1M tokens of filler with one
fact, the text given as a stream; time should be linear and memory flat. Where the authors' package `infini_retri` can
be imported, the same texts go through it too (its model: eager attention, same weights and dtype; its text: one
string), up to --package-tokens and after all of ours. Memory: CUDA's peak allocation above what was allocated before;
on a CPU, Linux' peak resident size above that before the first text. `--quick` is a dry run.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from attnpatch import retrieve, testbed
from attnpatch.bench.engine import peak_memory
from attnpatch.bench.measure import Clock, environment, parser
from attnpatch.patch import get_patch
from attnpatch.retrieval import TEMPLATE
from attnpatch.testbed.filler import filler

FULL, QUICK = (65536, 131072, 262144, 524288, 1048576), (1500, 3000)
QUESTION, FACT, ANSWER = "What is the code of amber fox?", " The code of amber fox is 48213.", "48213"
PARAGRAPHS = 2000  # characters that the text grows by


def document(tokenizer: Any, tokens: int, depth: float = 0.5, seed: int = 0) -> Iterator[str]:
    """Filler of about `tokens` tokens in small pieces, with the fact at `depth`; the same for the same arguments."""
    rng = random.Random(f"retrieval-{seed}")
    made, placed = 0, False
    while made < tokens:
        block = filler(PARAGRAPHS, rng)
        made += len(tokenizer(block, add_special_tokens=False, verbose=False)["input_ids"])
        if not placed and made >= depth * tokens:
            block, placed = block + FACT, True
        yield block


def resident_peak(run: Callable[[], Any], base: int) -> int | None:
    """Linux: the process's peak resident size during the run, above `base`; None elsewhere."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the earlier peak
    except OSError:
        run()
        return None
    run()
    return resident("VmHWM") - base


def resident(name: str) -> int:
    """Bytes of a field of Linux' /proc/self/status; 0 elsewhere."""
    if not Path("/proc/self/status").exists():
        return 0
    line = next(x for x in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def measured(run: Callable[[], tuple[str, dict[str, Any]]], clock: Clock, base: int) -> dict[str, Any]:
    """Seconds, peak memory, and what the run says of itself. A failure is a result too."""
    got: list[tuple[str, dict[str, Any]]] = []
    seconds: list[float] = []

    def timed() -> None:
        start = time.perf_counter()
        got.append(run())
        clock.wait()
        seconds.append(time.perf_counter() - start)

    try:
        peak = peak_memory(timed, clock) if clock.device.type == "cuda" else resident_peak(timed, base)
    except Exception as error:  # a measuring script: one failure must not lose the rest
        return {"failed": f"{type(error).__name__}: {error}"[:500]}
    answer, about = got[0]
    return {
        "seconds": round(seconds[0], 3),
        "peak_bytes": peak,
        "right": ANSWER in answer,
        "answer": answer[:200],
        **about,
    }


def ours(model: Any, tokenizer: Any, text: list[str], options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """One question through `retrieve`, the text as a stream of pieces."""
    found = retrieve(model, tokenizer, iter(text), QUESTION, **options)
    return found.answer, {
        "passes": found.passes, "characters": found.characters, "kept_sentences": len(found.sentences),
        "prompt_tokens": found.prompt_tokens, "kept_fact": ANSWER in found.context,
    }  # fmt: skip


def package() -> tuple[Any, str]:
    """(the authors' class, "") or (None, why it is not measured)."""
    try:
        from infini_retri import InfiniRetri
    except Exception as error:  # its own imports may be missing or too new
        return None, f"{type(error).__name__}: {error}"
    return InfiniRetri, ""


def theirs(
    cls: Any, model: Any, tokenizer: Any, text: list[str], options: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The same question and text through the authors' package, one string."""
    whole = "".join(text).strip()
    runner = cls(model=model, tokenizer=tokenizer, topk=options["topk"], answer_length=options["answer_length"],
                 window_length=options["window_length"])  # fmt: skip
    return runner.generate(whole, QUESTION, TEMPLATE, max_new_tokens=options["max_new_tokens"]), {}


def main(argv: list[str] | None = None) -> None:
    """Measure every length and write the JSON after each."""
    arguments = parser(__doc__)
    arguments.add_argument("--tokens", type=int, nargs="*", help="text lengths; default 64k to 1M")
    arguments.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: by device")
    arguments.add_argument("--package-tokens", type=int, default=65536, help="longest text for the authors' package")
    arguments.add_argument("--layer", type=int, help="layer that is read; default: as the method, the last")
    for name in ("window_length", "topk", "answer_length"):
        default = get_patch("infiniretri").__dataclass_fields__[name].default
        arguments.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    args = arguments.parse_args(argv)
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    model, tokenizer = testbed.load(dtype, device)
    options = {name: getattr(args, name) for name in ("window_length", "topk", "answer_length")}
    options |= {"layer": args.layer, "max_new_tokens": 16, **({"window_length": 300, "topk": 40} if args.quick else {})}
    cls, missing = package()
    eager: Any = None
    if cls is not None:
        eager = testbed.load(model.dtype, device)[0]
        eager.set_attn_implementation("eager")
    clock = Clock(device, args.seconds)
    body: dict[str, Any] = {
        **environment(device, args.commit), "threads": torch.get_num_threads(), "quick": args.quick,
        "what": "retrieve on the embedded model, passes and answer; filler with one fact in the middle",
        "dtype": str(model.dtype).removeprefix("torch."), "options": options, "package": missing or "infini_retri",
        "rows": [],
    }  # fmt: skip
    base = resident("VmRSS")
    # the text is made before the clock runs
    ours(model, tokenizer, list(document(tokenizer, 4 * options["window_length"])), options)  # warm-up
    rows = body["rows"]
    for tokens in args.tokens or (QUICK if args.quick else FULL):
        if rows and clock.left() < 0:
            body["stopped"] = f"out of time before {tokens} tokens"
            break
        text = list(document(tokenizer, tokens))
        rows.append({"tokens": tokens, "ours": measured(partial(ours, model, tokenizer, text, options), clock, base)})
        save(args.out, body, rows[-1])
    for row in rows if cls is not None else ():
        if row["tokens"] <= args.package_tokens and (clock.left() > 0 or row is rows[0]):
            run = partial(theirs, cls, eager, tokenizer, list(document(tokenizer, row["tokens"])), options)
            row["package"] = measured(run, clock, base)
            save(args.out, body, row)


def save(out: Path, body: dict[str, Any], row: dict[str, Any]) -> None:
    """Write the JSON and show the row that is new in it."""
    compare(row, body["rows"][0])
    out.write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(row, ensure_ascii=False), flush=True)


def compare(row: dict[str, Any], first: dict[str, Any]) -> None:
    """Add what P10 asks: time per token and peak against the first row, and the package's time over ours."""
    mine, start = row["ours"], first["ours"]
    if "failed" in mine or "failed" in start:
        return
    row["seconds_per_1k_tokens"] = round(mine["seconds"] / row["tokens"] * 1000, 5)
    row["time_per_token_over_first"] = round(mine["seconds"] / row["tokens"] / (start["seconds"] / first["tokens"]), 4)
    if mine["peak_bytes"] and start["peak_bytes"]:
        row["peak_over_first"] = round(mine["peak_bytes"] / start["peak_bytes"], 4)
    if "seconds" in row.get("package", {}):
        row["package_time_over_ours"] = round(row["package"]["seconds"] / mine["seconds"], 3)


if __name__ == "__main__":
    main()
