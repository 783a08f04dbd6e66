"""What text costs past the trained length: `python -m attnpatch.bench.past_window --model FOLDER --out FILE.json`.

The model itself writes the text: stories of half its trained length each, sampled one by one, a row of them behind each
other. Every method then reads rows of 1, 2 and 4 trained lengths in one forward; what counts are the tokens of the last
half length: the mean negative log likelihood (nats a token), the share whose best guess is right, and the difference to
dense in the same rows with its 95 % interval. Nobody needs far tokens for such text, so this says whether attention
stays in distribution, not whether anything far is found. Sizes of the methods follow from the trained length. `--tiny`
is a dry run on a random toy model. The model should be one of a short window: dense at 4 of them must fit.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from attnpatch.api import patched
from attnpatch.bench.measure import environment
from attnpatch.bench.shapes import random_model
from attnpatch.errors import ConfigError

FACTORS = (1, 2, 4)


def methods(window: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Label -> (patch, options) for a trained length; none attends more keys than three quarters of it and a chunk."""
    part = window // 16
    chosen = {"n_init": part // 2, "top_k": 6 * part, "n_local": 5 * part, "chunk": part}
    return {
        "longheads": ("longheads", {"window_size": 2 * part, "atten_length": 12 * part, "begin": 12 * part}),
        "tokenselect compact": ("tokenselect", {**chosen, "positions": "compact"}),
        "tokenselect true": ("tokenselect", {**chosen, "positions": "true"}),
    }


def written(model: Any, start: list[int], rows: int, tokens: int, window: int, seed: int) -> torch.Tensor:
    """int64 [rows, tokens]: stories that the model samples (temperature 0.8), each of half its trained length."""
    torch.manual_seed(seed)
    each = window // 2
    count = rows * -(-tokens // each)
    made = model.generate(
        torch.tensor([start] * count, device=model.device), max_new_tokens=each - len(start), do_sample=True,
        temperature=0.8, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0,
        attention_mask=torch.ones(count, len(start), dtype=torch.long, device=model.device),
    )  # fmt: skip
    return made.view(rows, -1)[:, :tokens]


@torch.inference_mode()
def read(model: Any, ids: torch.Tensor, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(negative log likelihood, whether the best guess is right), fp64 [rows] each, of each row's `last` tokens."""
    losses, right = [], []
    for row in ids:
        logits = model(row[None], logits_to_keep=last + 1).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, row[-last:]).double())
        right.append((logits.argmax(-1) == row[-last:]).double().mean())
    return torch.stack(losses).cpu(), torch.stack(right).cpu()


def interval(values: torch.Tensor) -> list[float]:
    """95 % normal interval of the mean of values [n]."""
    half = 1.96 * float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return [round(float(values.mean()) + sign * half, 4) for sign in (-1, 1)]


def measured(model: Any, ids: torch.Tensor, window: int) -> list[dict[str, Any]]:
    """A row a length and method."""
    found = []
    for factor in FACTORS:
        part, dense = ids[:, : factor * window], None
        for label, (patch, options) in {"dense": ("", {}), **methods(window)}.items():
            since = time.monotonic()
            if dense is None:
                loss, right = read(model, part, window // 2)
                dense = loss
            else:
                with patched(model, patch, **options):
                    loss, right = read(model, part, window // 2)
            found.append({
                "tokens": part.shape[1], "lengths": factor, "label": label, "patch": patch or None, "options": options,
                "n": len(part), "nll": round(float(loss.mean()), 4), "right": round(float(right.mean()), 4),
                "minus_dense": round(float((loss - dense).mean()), 4), "interval": interval(loss - dense),
                "seconds": round(time.monotonic() - since, 2),
            })  # fmt: skip
            print(f"{part.shape[1]:6} {label:20} nll {loss.mean():.3f} right {right.mean():.3f}", flush=True)
    return found


def load(args: argparse.Namespace) -> tuple[Any, list[int], int, str]:
    """(model, first tokens of a story, trained length, name)."""
    model: Any
    if args.tiny:
        model = random_model("tiny", dtype=torch.float32, device=args.device)
        return model, [1], args.window or 64, "random toy model: a dry run"
    if args.model is None:
        raise ConfigError("name a model with --model FOLDER, or give --tiny for a dry run.")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device).eval()
    window = args.window or model.config.get_text_config(decoder=True).max_position_embeddings
    start = AutoTokenizer.from_pretrained(args.model)(args.start, add_special_tokens=False).input_ids
    return model, start, window, Path(args.model).name


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="folder or hub id of a model with a short window")
    parser.add_argument("--window", type=int, help="trained length in tokens, at least 64; default: the model's own")
    parser.add_argument("--start", default="<|start_story|>", help="what a text of the model begins with")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="dry run on a random toy model")
    parser.add_argument("--commit", help="commit to record where git cannot tell")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure and write the JSON."""
    args = parse(argv)
    model, start, window, name = load(args)
    if window < 64 or window % 16 or args.rows < 1 or not start:
        raise ConfigError(
            f"a trained length of {window}, {args.rows} rows and {len(start)} first tokens do not fit; give --window, "
            "a multiple of 16 from 64 on, --rows from 1 on, and a --start of a token or more."
        )
    ids = written(model, start, args.rows, FACTORS[-1] * window, window, args.seed)
    body = {
        **environment(torch.device(args.device), args.commit),
        "what": f"text past the trained length of {window} tokens; model: {name}; its own samples, seed {args.seed}",
        "window": window, "counted_tokens": window // 2, "dtype": "float32", "tiny": args.tiny,
        "rows": measured(model, ids, window),
    }  # fmt: skip
    args.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
