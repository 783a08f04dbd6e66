"""retrieve: a question about a text of any length, answered from the sentences that the model looks at."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attnpatch.errors import InputError
from attnpatch.retrieval import Pass, Sentence

BLOCK = 1 << 18
"""Characters read from a file at once."""


@dataclass(frozen=True)
class Retrieval:
    """What `retrieve` found: the answer, the sentences it was given in document order, and what that took."""

    answer: str
    sentences: tuple[Sentence, ...]
    question: str
    passes: int
    characters: int  # of the text
    prompt_tokens: int  # of the final prompt

    @property
    def context(self) -> str:
        """The kept text."""
        return "".join(s.text for s in self.sentences)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data = asdict(self)
        data["sentences"] = [{k: v for k, v in s.items() if k != "ids"} for s in data["sentences"]]
        return data

    def __str__(self) -> str:
        return self.answer


def text_blocks(text: Any) -> tuple[Iterator[str], int | None]:
    """(blocks of text, characters or bytes in all where known) of a string, a path, or anything that gives strings."""
    if isinstance(text, str):
        return iter([text]), len(text)
    if isinstance(text, os.PathLike):
        path = Path(text)
        if not path.is_file():
            raise InputError(f"{path} is no file; give the path of a UTF-8 text file, or the text itself as a string.")
        return _file_blocks(path), path.stat().st_size
    if isinstance(text, Iterable) and not isinstance(text, (bytes, bytearray)):
        return _checked(text), None
    raise InputError(
        f"text is a {type(text).__name__}; give a string, a path (pathlib.Path), or an iterable of strings."
    )


def _file_blocks(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        yield from stream_blocks(file, str(path))


def stream_blocks(file: Any, name: str) -> Iterator[str]:
    """Blocks of an open text file. Raises InputError where it is not UTF-8 text."""
    try:
        while block := file.read(BLOCK):
            if "\0" in block:
                raise InputError(f"{name} holds NUL bytes, so it is no text; convert it to UTF-8 text first.")
            yield block
    except UnicodeDecodeError:
        raise InputError(f"{name} is not UTF-8 text; convert it first.") from None


def _checked(blocks: Iterable[Any]) -> Iterator[str]:
    for block in blocks:
        if not isinstance(block, str):
            raise InputError(f"the text's iterator gave a {type(block).__name__}; it must give strings.")
        yield block


def retrieve(
    model: Any, tokenizer: Any, text: Any, question: str | None = None, *,
    callback: Callable[[Pass], None] | None = None, progress: bool = False, **options: Any,
) -> Retrieval:  # fmt: skip
    """Answer a question from a text of any length with InfiniRetri (arXiv 2502.12962); keeps a few sentences at a time.

    text: a string; a pathlib.Path (UTF-8, read as a stream: memory does not grow with it); or an iterable of strings.
    question: None takes the last 512 characters of a string. options: hyperparameters of `infiniretri`
    (`attnpatch explain infiniretri`), such as window_length, topk, template, max_new_tokens (0 = sentences only).
    callback: called with a `Pass` after each forward. progress: draw a bar on stderr.
    The model may be patched with other methods, which then act in the passes' prefill and on the final prompt; it is
    left as it was. Greedy unless temperature is above 0. Raises InputError (no text, not text, no question),
    ConfigError, UnsupportedModelError, and whatever patch_model raises.
    """
    from attnpatch.api import patched, resolve
    from attnpatch.engine.families import unwrap

    blocks, size = text_blocks(text)
    if question is None:
        if not isinstance(text, str):
            raise InputError("a text that is read as a stream needs a question; pass question=...")
        question = text[-512:]
    base = unwrap(model)
    handle = getattr(base, "_attnpatch", None)
    if handle is None:
        method: Any = resolve("infiniretri", **options)[0]
        with patched(base, method):
            return _answer(base._attnpatch, method, tokenizer, blocks, question, _shown(callback, progress, size))
    active = next((p for p in handle.plan.patches if p.name == "infiniretri"), "infiniretri")
    method = resolve(active, **options)[0]
    return _answer(handle, method, tokenizer, blocks, question, _shown(callback, progress, size))


def _answer(handle: Any, method: Any, tokenizer: Any, blocks: Iterator[str], question: str, report: Any) -> Retrieval:
    import torch

    from attnpatch.engine.compat import greedy_options, input_device, pad_id

    model, seen = handle.model, [0, 0]

    def note(done: Pass) -> None:
        seen[0] = done.number
        report(done)

    def counted() -> Iterator[str]:
        for block in blocks:
            seen[1] += len(block)
            yield block

    try:
        prompt, kept = method.read(handle, tokenizer, counted(), question, note)
    finally:
        report(None)
    ids = prompt.whole("".join(s.text for s in kept))
    answer = ""
    if method.max_new_tokens:
        fed = torch.tensor([ids], device=input_device(model))
        warm = method.temperature > 0
        sampling = {"do_sample": True, "temperature": method.temperature} if warm else greedy_options(model)
        single = {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False}
        pad = pad_id(tokenizer)
        with torch.no_grad():
            out = handle.generate(fed, attention_mask=torch.ones_like(fed), max_new_tokens=method.max_new_tokens,
                                  pad_token_id=pad, **{**single, **sampling})  # fmt: skip
        answer = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).rpartition("</think>")[2].strip()
    return Retrieval(answer, tuple(kept), question, seen[0], seen[1], len(ids))


def _shown(callback: Any, progress: bool, size: int | None) -> Callable[[Pass | None], None]:
    """What each pass is told to: the callback, and a bar on stderr; None ends the bar."""
    bar: Any = None
    if progress:
        from rich.console import Console
        from rich.progress import Progress, TextColumn

        bar = Progress(*Progress.get_default_columns(), TextColumn("{task.fields[note]}"), console=Console(stderr=True))
        bar.start()
        task = bar.add_task("reading", total=size, note="")

    def report(done: Pass | None) -> None:
        if done is None:
            if bar is not None:
                bar.stop()
            return
        if bar is not None:
            bar.update(task, completed=done.read, note=f"pass {done.number}, {len(done.kept)} sentences kept")
        if callback is not None:
            callback(done)

    return report
