"""attnpatch profile: measure what a model's heads do, once, into a folder that methods read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from attnpatch.cli import _common as c
from attnpatch.cli import picture as pictures
from attnpatch.errors import ConfigError
from attnpatch.profiling import KINDS

TOP = 10  # heads shown
REPEATS = 4  # of echo-heads' block
EMBEDDED = {
    "retrieval-heads": 2048,
    "semantic-heads": 2048,
    "echo-heads": 2048,
    "layer-errors": 1024,
    "minference": 4096,
}
"""Default tokens for the embedded model, so that a CPU is done in minutes."""
_LABELS = {
    "sinks": "mean weight of the first token",
    "retrieval-heads": "retrieval score",
    "semantic-heads": "mass on the needle while it is copied",
    "echo-heads": "induction score",
    "layer-errors": "share of the error that eviction makes",
    "minference": "attention mass retained",
}


def profile(
    what: Annotated[str, typer.Option("--what", help=f"What to measure: {', '.join(KINDS)}.")],
    model: c.ModelOption,
    out: Annotated[Path, typer.Option("--out", help="Folder to write: profile.json and profile.safetensors.")],
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Also write a heat map of layers and heads. PNG, SVG, PDF.")
    ] = None,
    trials: Annotated[
        int | None, typer.Option("--trials", min=1, help="Sequences or needle trials. Default: by what is measured.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=2, help="Tokens of the longest one. Default: by what is measured.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the texts, needles and random tokens.")] = 0,
    text: Annotated[
        str | None,
        typer.Option("--text", help="A UTF-8 text file to hide needles in or read. Default: built-in filler."),
    ] = None,
    semantic: Annotated[
        Path | None, typer.Option("--semantic", help="layer-errors: folder of a semantic-heads profile of the model.")
    ] = None,
    budget: Annotated[
        int | None, typer.Option("--budget", min=9, help="layer-errors: entries of the compressed cache. Default: 32.")
    ] = None,
    dtype: c.DtypeOption = None,
    device_map: c.DeviceOption = None,
    as_json: c.JsonOption = False,
) -> None:
    """Measure attention sinks, retrieval heads and the like, for methods that take a profile."""
    if what not in KINDS:
        raise ConfigError(f"--what {what!r} is not known; choose one of {', '.join(KINDS)}.")
    _check_folder(out)
    if picture is not None:
        pictures.check(picture, "--picture")
    if text is not None and what == "echo-heads":
        raise ConfigError("--text: echo-heads reads random tokens; leave --text out.")
    _check_layer_errors(what, semantic, budget)
    words = None if text is None else c.read_text(text)
    loaded, tokenizer = c.load_model(model, dtype, device_map)
    from attnpatch.profiling import trials as needles

    if tokens is None and needles.wording(tokenizer) == "testbed":
        tokens = EMBEDDED.get(what)
    given = {name: x for name, x in (("trials", trials), ("tokens", tokens), ("text", words),
             ("semantic", semantic), ("budget", budget)) if x is not None}  # fmt: skip
    found = _measure(what, loaded, tokenizer, {**given, "seed": seed})
    found.save(out)
    if picture is not None:
        _draw(found, picture)
    _show(found, out, picture, as_json)


def _check_folder(out: Path) -> None:
    """Raise ConfigError before the work rather than after it where no folder can be made; makes none."""
    if out.is_file():
        raise ConfigError(f"--out {out} is a file; a profile is a folder, name another path.")
    at = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not at.is_dir() or not os.access(at, os.W_OK):
        raise ConfigError(f"--out {out}: {at} is no folder that can be written to; name another path.")


def _check_layer_errors(what: str, semantic: Path | None, budget: int | None) -> None:
    """Raise ConfigError before the model is loaded: which heads choose must be known, and only there."""
    if what == "layer-errors":
        if semantic is None:
            raise ConfigError(
                "--what layer-errors evicts by a model's semantic heads; give --semantic FOLDER, made with: attnpatch "
                "profile --what semantic-heads."
            )
        from attnpatch.profile import Profile

        Profile.load(semantic, "semantic-heads")
    elif semantic is not None or budget is not None:
        given = "--semantic" if semantic is not None else "--budget"
        raise ConfigError(f"{given} is for --what layer-errors alone; leave it out.")


def _measure(what: str, model: Any, tokenizer: Any, options: dict[str, Any]) -> Any:
    from attnpatch import profiling

    if what == "echo-heads" and "tokens" in options:
        tokens = options.pop("tokens")
        if tokens < 2 * REPEATS:
            raise ConfigError(f"--tokens {tokens} is too small; a block of 2 tokens, {REPEATS} times, takes 8.")
        options |= {"block": tokens // REPEATS, "repeats": REPEATS}
    if what == "layer-errors":
        if "trials" in options:
            options["passages"] = options.pop("trials")
        return profiling.layer_errors(model, options.pop("semantic"), tokenizer, **options)
    return getattr(profiling, what.replace("-", "_"))(model, tokenizer, **options)


def _draw(found: Any, path: Path) -> None:
    from attnpatch.profiling.reading import figures

    label = f"{_LABELS[found.kind]} (blank: not measured)"
    across = "whole layer" if found.kind == "layer-errors" else "query head"
    pictures.heat_map(path, figures(found).tolist(), f"{found.kind} of {_name(found)}", label, top=None, across=across)


def _name(found: Any) -> str:
    return f"{found.model['model_type']}, {found.model['layers']} layers x {found.model['heads']} heads"


def _show(found: Any, out: Path, picture: Path | None, as_json: bool) -> None:
    """The best heads, and what is said of all of them."""
    from attnpatch.profiling.reading import MAIN, figures, ranking

    score = figures(found)
    best = [(layer, head, float(score[layer, head])) for layer, head in ranking(found)[:TOP]]
    whole = found.kind == "layer-errors"  # figures of layers, not of heads
    if as_json:
        heads = [{"layer": layer, **({} if whole else {"head": head}), "score": round(x, 6)} for layer, head, x in best]
        shapes = {name: list(x.shape) for name, x in found.tensors.items()}
        return c.print_json(
            {"kind": found.kind, "folder": str(out), "model": found.model, "about": found.about, "tensors": shapes,
             "ranked_by": MAIN[found.kind], "top": heads, "picture": None if picture is None else str(picture)}
        )  # fmt: skip
    typer.echo(f"{found.kind} of {_name(found)}: {_summary(found)}")
    rows: list[tuple[str, ...]] = [("LAYER", "HEAD", MAIN[found.kind].upper())]
    rows += [(str(a), str(b), f"{x:.3f}") for a, b, x in best]
    c.print_columns([(row[0], row[2]) for row in rows] if whole else rows)
    written = f"written to {out}" + (f", picture {picture}" if picture is not None else "")
    return typer.echo(written)


def _summary(found: Any) -> str:
    """One line on a whole profile."""
    about, tensors = found.about, found.tensors
    if found.kind == "sinks":
        rates = ", ".join(f"{rate:.1f} % at {epsilon}" for epsilon, rate in about["sink_rate"].items())
        return f"first token is a sink in {rates} (share of heads and {about['sequences']} sequences)"
    if found.kind == "retrieval-heads":
        strong = int((tensors["score"] >= 0.1).sum())
        return f"{strong} heads score 0.1 or more; {about['kept']} of {about['made']} trials answered"
    if found.kind == "semantic-heads":
        return f"{about['kept']} of {about['made']} trials answered"
    if found.kind == "echo-heads":
        return f"{about['block']} random tokens x {about['repeats']}, {about['trials']} time(s)"
    if found.kind == "layer-errors":
        return f"relative errors at {about['budget']} entries, {about['passages']} passages of {about['tokens']} tokens"
    banded = int((tensors["pattern"] == 1).sum())
    known = int((tensors["pattern"] >= 0).sum())
    return f"{banded} of {known} heads a_shape, the others vertical_slash; judged on {about['tokens']} tokens"
