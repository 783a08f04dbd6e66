"""Dense and patched on the same samples: batches, turns, requests, out of memory, resume by sample."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from attnpatch.engine.compat import out_of_memory
from attnpatch.errors import ConfigError, InputError
from attnpatch.evaluate import feeding, likelihood
from attnpatch.evaluate.encoding import Encoded, Encoder, positions
from attnpatch.evaluate.results import DENSE, Ledger, check_samples, named_files
from attnpatch.evaluate.sample import Sample

if TYPE_CHECKING:
    from attnpatch.patch import Patch

REFILL = "the cache cannot be copied: the context is prefilled again for each question"


@dataclass(frozen=True)
class Run:
    """One thing to measure: composed patches under a label; none = dense."""

    label: str
    patches: tuple[Patch, ...] = ()

    @property
    def reads_on(self) -> bool:
        """Whether its method reads texts of any length, beyond the model's window."""
        return any(p.stage == "retrieve" for p in self.patches)

    def as_dict(self) -> dict[str, Any]:
        """Its methods' hyperparameters, and hashes of the files that some of them name."""
        patches = {p.name: p.hyperparameters() for p in self.patches}
        return {"label": self.label, "patches": patches, **named_files(patches)}


@dataclass(frozen=True)
class Options:
    """How samples are asked. Names and values as the command line has them; `None` = the model's, the sample's own.

    protocol: query-aware (context and question are one prompt) | query-agnostic (the context is prefilled and
    compressed before the question comes as a second turn). questions: of several of one context, "turns" go on in one
    conversation, "requests" are asked each for itself: query-agnostic on a fresh copy of the prefilled cache,
    query-aware with a prefill each.
    """

    protocol: str = "query-aware"
    chat: bool | None = None
    batch: int = 1
    truncate: str = "refuse"
    questions: str = "turns"
    max_new_tokens: int | None = None
    max_length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ConfigError(f"batch={self.batch}: give at least 1.")
        for name in ("max_new_tokens", "max_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name}={value}: give at least 1, or leave it out.")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Reply:
    """What a model said to one sample's questions."""

    texts: list[str]
    tokens: int
    new_tokens: int
    held: int = 0
    dense: int | None = 0
    note: str = ""
    scores: list[float] | None = None  # where the score is no metric of a text


class _Talk:
    """One sample's conversation: its ids so far, its answers and their tokens."""

    def __init__(self, one: Encoded) -> None:
        self.one, self.history, self.texts, self.count = one, list(one.head), [], 0  # type: ignore[var-annotated]

    def turn(self, number: int, ends: set[int], first: bool) -> list[int]:
        """What is fed for this question. first: nothing was, not even the context."""
        if number == 0:
            self.history += self.one.asks[0]
            return self.history if first else self.one.asks[0]
        fed = len(self.history) - 1  # generate does not feed the last token
        self.history = _follow(self.history, self.one.later[number], ends)
        return self.history[fed:]

    def answered(self, row: list[int], text: str) -> None:
        self.history, self.count = self.history + row, self.count + len(row)
        self.texts.append(text)


class Runner:
    """Asks one model."""

    def __init__(self, model: Any, tokenizer: Any, options: Options) -> None:
        from attnpatch.engine.compat import input_device
        from attnpatch.engine.families import unwrap

        self.model, self.tokenizer, self.options = unwrap(model), tokenizer, options
        limit = options.max_length or positions(self.model)
        o = options
        self.encoder = Encoder(tokenizer, o.chat, o.protocol, o.truncate, limit, o.questions)
        self.unlimited = Encoder(tokenizer, o.chat, o.protocol, questions=o.questions)
        self.plain = Encoder(tokenizer, False, "query-aware", o.truncate, limit, o.questions)  # text to be scored
        self.device = input_device(self.model)
        self.ends, self.windows = feeding.ends(self.model), feeding.has_windows(self.model)
        first_end = min(self.ends, default=0)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else first_end

    # ---- encoding --------------------------------------------------------------------------------------------
    def new_tokens(self, sample: Sample) -> int:
        return self.options.max_new_tokens or sample.max_new_tokens

    def encode(self, sample: Sample, whole: bool = False) -> Encoded:
        """Its prompts; whole: as long as they are, for a method that reads texts of any length."""
        if sample.metric == likelihood.METRIC:
            return self.plain.encode(sample, 0)
        several = len(sample.questions) if self.options.questions == "turns" else 1
        encoder = self.unlimited if whole else self.encoder
        return encoder.encode(sample, self.new_tokens(sample) * several)

    # ---- asking ----------------------------------------------------------------------------------------------
    def ask(self, batch: Sequence[Encoded]) -> list[Reply]:
        """Replies to samples, under whatever patches the model has now; several where `batches` puts them together."""
        import torch

        torch.manual_seed(self.options.seed)
        one = batch[0]
        with torch.inference_mode():
            if one.sample.metric == likelihood.METRIC:
                return [self._score(one)]
            if len(one.sample.questions) == 1:
                return self._rows(batch, [0] * len(batch))
            if self.options.questions == "turns":
                return self._turns(batch)
            return [self._requests(one)]

    def _score(self, one: Encoded) -> Reply:
        (found,) = likelihood.score(self.model, one.head, [one.asks[0]])
        scores = [float(found.logs.mean())]
        return Reply([], len(one.head), len(found.logs), found.held, found.dense, scores=scores)

    def _rows(self, batch: Sequence[Encoded], which: Sequence[int], cache: Any = None) -> list[Reply]:
        """One question of each sample, in one batch; `cache` may hold the (single) sample's prefilled context."""
        pairs = list(zip(batch, which, strict=True))
        uneven = len({len(e.asks[q]) for e, q in pairs}) > 1
        if self.windows and uneven and self.options.protocol == "query-agnostic":
            return [self._rows([e], [q])[0] for e, q in pairs]  # padded questions would fill the window
        tokens = max(self.new_tokens(e.sample) for e in batch)
        if self.options.protocol == "query-aware":
            ids, mask = self._pad([e.whole(q) for e, q in pairs])
        else:
            heads, head_mask = self._pad([e.head for e, _ in pairs])
            if cache is None:
                cache, _ = feeding.prefill(self.model, heads, head_mask)
            asks, ask_mask = self._pad([e.asks[q] for e, q in pairs])
            ids, mask = _join(heads, asks), _join(head_mask, ask_mask)
        new, cache = feeding.generate(self.model, ids, mask, tokens, self.pad_id, cache)
        held, dense, note = self._held(cache)
        replies = []
        for (e, q), row in zip(pairs, new.tolist(), strict=True):
            row = self._ended(row[: self.new_tokens(e.sample)])
            share = None if dense is None else dense // len(pairs)
            replies.append(Reply([self._text(row)], len(e.whole(q)), len(row), held // len(pairs), share, note))
        return replies

    def _turns(self, batch: Sequence[Encoded]) -> list[Reply]:
        """All questions in one conversation on one cache; the model's own answers stay in it.

        Rows that differ in length are padded on the left of each turn. What a row was fed behind the end of its answer,
        while others still answered, is taken back by the next turn's mask.
        """
        if len(batch) > 1 and not self._go_together(batch):
            return [reply for e in batch for reply in self._turns([e])]
        talks, cache = [_Talk(e) for e in batch], None
        limits = [self.new_tokens(e.sample) for e in batch]
        ids, mask = self._pad([e.head for e in batch])
        if self.options.protocol == "query-agnostic":
            cache, _ = feeding.prefill(self.model, ids, mask)
        for number in range(len(batch[0].sample.questions)):
            parts, part_mask = self._pad([t.turn(number, self.ends, cache is None) for t in talks])
            ids, mask = (parts, part_mask) if cache is None else (_join(ids, parts), _join(mask, part_mask))
            new, cache = feeding.generate(self.model, ids, mask, max(limits), self.pad_id, cache)
            rows = [self._ended(row[:most]) for row, most in zip(new.tolist(), limits, strict=True)]
            ids, mask = _join(ids, new[:, :-1]), _join(mask, self._fed([len(r) for r in rows], new.shape[1]))
            for talk, row in zip(talks, rows, strict=True):
                talk.answered(row, self._text(row))
        held, dense, note = self._held(cache)
        share = None if dense is None else dense // len(batch)
        return [Reply(t.texts, len(t.history) - t.count, t.count, held // len(batch), share, note) for t in talks]

    def _go_together(self, batch: Sequence[Encoded]) -> bool:
        """Whether several conversations can be one batch, each with the answers it gets alone."""
        alike = len({len(e.sample.questions) for e in batch}) == 1
        return alike and not self.windows and not feeding.needs_own_rows(self.model)

    def _fed(self, lengths: Sequence[int], width: int) -> Any:
        """Mask int64 [B, width - 1] of generated tokens that were fed: all of a row's answer but its last."""
        import torch

        at = torch.arange(width - 1, device=self.device)
        return (at < torch.tensor(lengths, device=self.device)[:, None] - 1).long()

    def _requests(self, one: Encoded) -> Reply:
        """Each question for itself, on a fresh copy of the prefilled cache where there is one."""
        questions, refilled, replies = len(one.sample.questions), False, []
        agnostic = self.options.protocol == "query-agnostic"
        cache = feeding.prefill(self.model, *self._pad([one.head]))[0] if agnostic else None
        for number in range(questions):
            last = number == questions - 1
            mine = cache if last or cache is None else feeding.copied(cache)
            if cache is not None and mine is None:  # this one takes the cache, later ones prefill
                mine, cache, refilled = cache, None, True
            replies += self._rows([one], [number], mine)
        notes = [replies[-1].note, REFILL if refilled else ""]
        return Reply(
            [r.texts[0] for r in replies], replies[-1].tokens, sum(r.new_tokens for r in replies), replies[-1].held,
            replies[-1].dense, "; ".join(n for n in notes if n),
        )  # fmt: skip

    def _held(self, cache: Any) -> tuple[int, int | None, str]:
        """(bytes held, bytes dense or None where only the dense run can say, note)."""
        if not feeding.is_patched(self.model):
            return *feeding.bytes_of(cache), ""
        from attnpatch.report import status

        report = status(self.model)
        dense = None if feeding.writes_prompts(self.model) else report.bytes_dense
        return report.bytes_held, dense, report.note

    def _pad(self, rows: Sequence[Sequence[int]]) -> Any:
        return feeding.pad(rows, self.pad_id, self.device)

    def _ended(self, row: list[int]) -> list[int]:
        """A row's ids up to the first that ends it, the end included."""
        return next((row[: i + 1] for i, t in enumerate(row) if t in self.ends), row)

    def _text(self, row: list[int]) -> str:
        return self.tokenizer.decode(row, skip_special_tokens=True)


def _join(a: Any, b: Any) -> Any:
    import torch

    return torch.cat([a, b], dim=1)


def _follow(history: list[int], turn: list[int], ends: set[int]) -> list[int]:
    """A further turn after an answer; the answer's end is not said twice, and in raw text not at all."""
    if history[-1] in ends:
        history = history[:-1]
    return history + turn


# ---- a whole evaluation --------------------------------------------------------------------------------------
def batches(encoded: Sequence[Encoded], size: int, turns: bool = True) -> Iterator[list[Encoded]]:
    """Neighbours of one task with as many questions, up to `size`.

    Likelihoods go alone, and so do samples with several questions unless they are asked in turns.
    """
    held: list[Encoded] = []
    for e in encoded:
        alone = (len(e.sample.questions) > 1 and not turns) or e.sample.metric == likelihood.METRIC
        if held and (alone or len(held) == size or _kind(held[0]) != _kind(e)):
            yield held
            held = []
        held.append(e)
        if alone:
            yield held
            held = []
    if held:
        yield held


def _kind(e: Encoded) -> tuple[str, int]:
    return e.sample.task, len(e.sample.questions)


def evaluate(
    model: Any, tokenizer: Any, samples: Sequence[Sample], runs: Sequence[Run], options: Options, ledger: Ledger,
    shard: tuple[int, int] = (0, 1), progress: Callable[[Run, int, int], None] | None = None,
) -> None:  # fmt: skip
    """Ask every sample in every run; each answer goes to the ledger as it comes, and what is there is not asked again.

    runs: the first is dense, what the others are compared with. shard: (rank, processes); this process takes each
    n-th batch. All prompts are built first, so one that does not fit is refused before anything runs. Where memory
    runs out the batch is halved; a single sample that does not fit is noted in the ledger as failed, and the rest goes
    on. Break-even limits measured on this machine are ignored: the methods themselves are measured. Raises ConfigError,
    InputError, and what patch_model raises; KeyboardInterrupt leaves the ledger good for the next call.
    """
    from attnpatch import breakeven

    check_samples(samples)
    check_metrics(samples)
    runner = Runner(model, tokenizer, options)
    work = list(batches([runner.encode(s) for s in samples], options.batch, options.questions == "turns"))[
        shard[0] :: shard[1]
    ]
    total, at = sum(map(len, work)), 0
    with breakeven.ignored():
        for batch in work:
            for run in runs:
                if not all(ledger.has((run.label, e.sample.task, e.sample.id)) for e in batch):
                    asked = [runner.encode(e.sample, whole=True) for e in batch] if run.reads_on else batch
                    with _patched(model, run, tokenizer):
                        ledger.add(_asked(runner, asked, run.label))
                if progress is not None:
                    progress(run, at + len(batch), total)
            at += len(batch)


def _patched(model: Any, run: Run, tokenizer: Any) -> AbstractContextManager[Any]:
    from attnpatch.api import patched

    for patch in run.patches:
        if getattr(patch, "tokenizer", tokenizer) is None:  # a method that reads text
            patch.tokenizer = tokenizer  # type: ignore[attr-defined]
    return patched(model, list(run.patches)) if run.patches else nullcontext()


def _asked(runner: Runner, batch: list[Encoded], label: str) -> list[dict[str, Any]]:
    """Ledger rows of a batch; halves it where memory runs out."""
    start = time.perf_counter()
    try:
        replies = runner.ask(batch)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        replies = None
    if replies is None:  # outside the handler, so that the failed try's tensors are free
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(batch) > 1:
            half = len(batch) // 2
            return _asked(runner, batch[:half], label) + _asked(runner, batch[half:], label)
        sample = batch[0].sample
        why = f"out of memory with a prompt of {batch[0].longest} tokens"
        return [{"run": label, "task": sample.task, "id": sample.id, "failed": why}]
    seconds = (time.perf_counter() - start) / len(batch)
    return [_row(e, r, label, seconds) for e, r in zip(batch, replies, strict=True)]


def _row(e: Encoded, reply: Reply, label: str, seconds: float) -> dict[str, Any]:
    sample = e.sample
    return {
        "run": label, "task": sample.task, "id": sample.id,
        "scores": reply.scores if reply.scores is not None else scored(sample, reply.texts),
        "predictions": reply.texts, "tokens": reply.tokens, "new_tokens": reply.new_tokens, "cut": e.cut,
        "kv_held": reply.held, "kv_dense": reply.dense, "note": reply.note, "seconds": round(seconds, 3),
    }  # fmt: skip


def check_metrics(samples: Sequence[Sample]) -> None:
    """Raise InputError for a sample whose metric is not known."""
    from attnpatch.evaluate import metrics

    known = {*metrics.METRICS, likelihood.METRIC}
    for sample in samples:
        if sample.metric not in known:
            raise InputError(
                f"sample {sample.id!r} of task {sample.task!r} names an unknown metric {sample.metric!r}; known: "
                f"{', '.join(sorted(known))}."
            )
        if sample.metric == "unscored":
            metrics.unscored("", (), sample)  # says why, before anything is generated


def scored(sample: Sample, texts: Sequence[str]) -> list[float]:
    """Score 0..100 of each answer."""
    from attnpatch.evaluate import metrics

    judge = metrics.METRICS[sample.metric]
    return [float(judge(text, accepted, sample)) for text, accepted in zip(texts, sample.answers, strict=True)]


def dense_first(runs: Sequence[Run]) -> list[Run]:
    """The runs with dense in front. Raises ConfigError where two have one label."""
    made = [Run(DENSE), *(r for r in runs if r.label != DENSE)]
    labels = [r.label for r in made]
    if doubled := next((x for x in labels if labels.count(x) > 1), None):
        raise ConfigError(f"{doubled!r} is named twice; name it once, or give one of them by a recipe of another name.")
    return made
