"""attnpatch profile: measure what a model's heads do, once, into a folder that methods read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from attnpatch.cli import _common as c
from attnpatch.cli import picture as pictures
from attnpatch.errors import ConfigError
from attnpatch.profiling import KINDS

TOP = 10  # heads shown
REPEATS = 4  # of echo-heads' block
EMBEDDED = {"retrieval-heads": 2048, "semantic-heads": 2048, "echo-heads": 2048, "minference": 4096}
"""Default tokens for the embedded model, so that a CPU is done in minutes."""
_LABELS = {
    "sinks": "mean weight of the first token",
    "retrieval-heads": "retrieval score",
    "semantic-heads": "mass on the needle while it is copied",
    "echo-heads": "induction score",
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
    dtype: c.DtypeOption = None,
    device_map: c.DeviceOption = None,
    as_json: c.JsonOption = False,
) -> None:
    """Measure attention sinks, retrieval heads and the like, for methods that take a profile."""
    if what not in KINDS:
        raise ConfigError(f"--what {what!r} is not known; choose one of {', '.join(KINDS)}.")
    if out.is_file():
        raise ConfigError(f"--out {out} is a file; a profile is a folder, name another path.")
    if picture is not None:
        pictures.check(picture, "--picture")
    if text is not None and what == "echo-heads":
        raise ConfigError("--text: echo-heads reads random tokens; leave --text out.")
    words = None if text is None else c.read_text(text)
    loaded, tokenizer = c.load_model(model, dtype, device_map)
    from attnpatch.profiling import trials as needles

    if tokens is None and needles.wording(tokenizer) == "testbed":
        tokens = EMBEDDED.get(what)
    given = {name: x for name, x in (("trials", trials), ("tokens", tokens), ("text", words)) if x is not None}
    found = _measure(what, loaded, tokenizer, {**given, "seed": seed})
    found.save(out)
    if picture is not None:
        _draw(found, picture)
    _show(found, out, picture, as_json)


def _measure(what: str, model: Any, tokenizer: Any, options: dict[str, Any]) -> Any:
    from attnpatch import profiling

    if what == "echo-heads" and "tokens" in options:
        tokens = options.pop("tokens")
        if tokens < 2 * REPEATS:
            raise ConfigError(f"--tokens {tokens} is too small; a block of 2 tokens, {REPEATS} times, takes 8.")
        options |= {"block": tokens // REPEATS, "repeats": REPEATS}
    return getattr(profiling, what.replace("-", "_"))(model, tokenizer, **options)


def _draw(found: Any, path: Path) -> None:
    from attnpatch.profiling.reading import figures

    label = f"{_LABELS[found.kind]} (blank: not measured)"
    pictures.heat_map(path, figures(found).tolist(), f"{found.kind} of {_name(found)}", label, top=None)


def _name(found: Any) -> str:
    return f"{found.model['model_type']}, {found.model['layers']} layers x {found.model['heads']} heads"


def _show(found: Any, out: Path, picture: Path | None, as_json: bool) -> None:
    """The best heads, and what is said of all of them."""
    from attnpatch.profiling.reading import MAIN, figures, ranking

    score = figures(found)
    best = [(layer, head, float(score[layer, head])) for layer, head in ranking(found)[:TOP]]
    if as_json:
        heads = [{"layer": layer, "head": head, "score": round(x, 6)} for layer, head, x in best]
        shapes = {name: list(x.shape) for name, x in found.tensors.items()}
        return c.print_json(
            {"kind": found.kind, "folder": str(out), "model": found.model, "about": found.about, "tensors": shapes,
             "ranked_by": MAIN[found.kind], "top": heads, "picture": None if picture is None else str(picture)}
        )  # fmt: skip
    typer.echo(f"{found.kind} of {_name(found)}: {_summary(found)}")
    c.print_columns([("LAYER", "HEAD", MAIN[found.kind].upper()), *((str(a), str(b), f"{x:.3f}") for a, b, x in best)])
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
    banded = int((tensors["pattern"] == 1).sum())
    known = int((tensors["pattern"] >= 0).sum())
    return f"{banded} of {known} heads a_shape, the others vertical_slash; judged on {about['tokens']} tokens"
