"""Trials: what a candidate patch does to a model's answers, measured over samples and written down as it goes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from attnpatch.errors import ConfigError, InputError
from attnpatch.patch import Patch, _check_field
from attnpatch.samples import Sample
from attnpatch.whole import differences

if TYPE_CHECKING:
    from torch import Tensor

LOG = "calibration.jsonl"
SEARCH, HELD_OUT = "search", "held out"  # the two parts of the samples
METRICS = ("exact", "restricted", "entropy")


@dataclass(frozen=True)
class Encoded:
    """A sample as token ids; labels: first token of each label, right: which of them is the answer's."""

    prompt: list[int]
    answer: list[int]
    labels: list[int]
    right: int


@dataclass(frozen=True)
class Measured:
    """One candidate, sample by sample. exact: the answer is what greedy decoding gives; restricted: its label has the
    highest logit among the labels'; entropy: of the next token after the prompt, nats. None = cannot be told."""

    entropy: list[float]
    exact: list[bool] | None = None
    restricted: list[bool] | None = None

    def values(self, metric: str) -> list[float] | None:
        """Numbers by sample."""
        found = getattr(self, metric)
        return None if found is None else [float(x) for x in found]

    def mean(self, metric: str) -> float | None:
        """Mean over the samples."""
        found = self.values(metric)
        return None if found is None else sum(found) / len(found)


@dataclass
class Found:
    """What a search ends with: the chosen patch, and what its profile is to hold (see attnpatch.profile)."""

    patch: Patch
    tensors: dict[str, Tensor]
    hyperparameters: dict[str, Any]  # the profile brings these along
    summary: dict[str, Any]
    notes: list[str]


@dataclass
class Search:
    """Base of a method's search: typed settings (made with `attnpatch.patch.option`), checked when built."""

    name: ClassVar[str] = ""
    samples: ClassVar[int] = 100  # drawn by default, held-out ones included
    metric: ClassVar[str] = "exact"  # of a supervised search

    def __post_init__(self) -> None:
        for f in fields(self):
            _check_field(self.name, f, getattr(self, f.name))

    def run(self, trials: Trials) -> Found:
        """Search; every candidate goes through `trials.measure`, so that an interrupted search can go on."""
        raise NotImplementedError

    def inert(self) -> Patch:
        """The method, changing nothing: the baseline then runs through the same executors."""
        raise NotImplementedError


class Log:
    """calibration.jsonl: the settings on the first line, a finished trial on each other. Begun or gone on with."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Raises ConfigError where the folder's log was made with other settings, or is damaged."""
        if folder.is_file():
            raise ConfigError(f"{folder} is a file; the profile is a folder, name another path.")
        self.path = folder / LOG
        self.done: dict[str, Any] = {}
        settings = json.loads(json.dumps(settings))  # as they come back from the file
        whole = self._read() if self.path.exists() else b""
        lines = whole.splitlines()
        if len(lines) == 1 and self._differing(lines[0], settings):  # nothing was measured with those, so begin anew
            lines, whole = [], b""
        if lines:
            self._compare(lines[0], settings)
            for number, line in enumerate(lines[1:], 2):
                self._take(number, line)
        else:
            folder.mkdir(parents=True, exist_ok=True)
        self.file: Any = self.path.open("r+b" if whole else "wb")
        self.file.truncate(len(whole))  # a line that was cut off is gone
        self.file.seek(len(whole))
        self.resumed = len(self.done)
        if not lines:
            self._write({"settings": settings})

    def _read(self) -> bytes:
        """The whole lines of the file; what was being written when a run was stopped is left out."""
        data = self.path.read_bytes()
        return data[: data.rfind(b"\n") + 1]

    def _differing(self, line: bytes, settings: dict[str, Any]) -> str:
        """What the log was begun with where that is not `settings`, in words."""
        try:
            before = json.loads(line)["settings"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{self.path} is damaged (line 1); delete it, or name another folder.") from None
        return differences(before, settings)

    def _compare(self, line: bytes, settings: dict[str, Any]) -> None:
        if other := self._differing(line, settings):
            raise ConfigError(
                f"{self.path} was begun with other settings ({other}); use those to go on, or name another folder."
            )

    def _take(self, number: int, line: bytes) -> None:
        try:
            row = json.loads(line)
            self.done[row["key"]] = row["value"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{self.path} is damaged (line {number}); delete it, or name another folder.") from None

    def put(self, key: str, value: Any) -> None:
        """Write a finished trial down."""
        self.done[key] = value
        self._write({"key": key, "value": value})

    def _write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class Trials:
    """Measures candidates on one model. `metric`: what the search goes by; accuracies are better high, entropy low.

    progress(part, candidate, done): told before each measurement.
    """

    def __init__(
        self, model: Any, parts: dict[str, list[Encoded]], metric: str, log: Log, batch_tokens: int = 8192,
        pad: int = 0, progress: Callable[[str, str, int], None] | None = None,
    ) -> None:  # fmt: skip
        import torch

        from attnpatch.engine.call import resolve_layers
        from attnpatch.engine.families import inspect_model

        self.model, self.parts, self.metric, self.log = model, parts, metric, log
        self.batch_tokens, self.pad, self.progress = batch_tokens, pad, progress
        decoder, facts = inspect_model(model)
        self.config = decoder.config.get_text_config(decoder=True)
        self.covered = resolve_layers(None, facts)  # the layers that patches act on, in the model's numbering
        if not self.covered:
            raise ConfigError("the model has no full-attention layer that could be patched, so nothing to calibrate.")
        self.heads = int(self.config.num_attention_heads)
        exact = next(model.parameters()).dtype in (torch.float32, torch.float64)
        self.least = (1e-6 if exact else 1e-4) if metric == "entropy" else 0.0  # smaller changes are rounding

    def measure(self, candidate: dict[str, Any], patch: Patch, part: str = SEARCH) -> Measured:
        """What `patch` does over a part of the samples; `candidate` names it in the log, where it may be already."""
        return Measured(**self.remember(f"{part}: {json.dumps(candidate)}", lambda: asdict(self.run(patch, part))))

    def remember(self, key: str, compute: Callable[[], Any]) -> Any:
        """The logged value of `key`, or the new one, JSON data."""
        if key not in self.log.done:
            if self.progress is not None:
                part, _, candidate = key.partition(": ")
                self.progress(part, candidate, len(self.log.done))
            self.log.put(key, compute())
        return self.log.done[key]

    def gain(self, measured: Measured, base: Measured) -> float:
        """How much better than `base` by the metric; 0 where the difference is rounding."""
        new, old = (cast(float, x.mean(self.metric)) for x in (measured, base))  # the samples were checked for it
        change = old - new if self.metric == "entropy" else new - old
        return change if abs(change) > self.least else 0.0

    def tensor(self, by_covered: Sequence[Sequence[float]], rest: float) -> Tensor:
        """A value for each covered layer and query head -> fp32 [layers, heads] of the whole model."""
        import torch

        whole = torch.full((self.config.num_hidden_layers, self.heads), rest)
        whole[list(self.covered)] = torch.tensor(by_covered, dtype=torch.float32)
        return whole

    def layers(self, text: Any, name: str) -> list[int]:
        """ "0-10,15" in the model's numbering -> places among the covered layers; None = all. Raises ConfigError."""
        if text is None:
            return list(range(len(self.covered)))
        chosen: set[int] = set()
        for piece in str(text).split(","):
            low, _, high = piece.strip().partition("-")
            if not low.isdigit() or not (high or low).isdigit():
                raise ConfigError(f"{name}: layers={text!r} is no list of layers; write for example 0-10,15.")
            chosen |= set(range(int(low), int(high or low) + 1))
        if unfit := sorted(chosen - set(self.covered)):
            raise ConfigError(f"{name}: layer {unfit[0]} cannot be patched; allowed: {_ranges(self.covered)}.")
        return [self.covered.index(x) for x in sorted(chosen)]

    def run(self, patch: Patch, part: str = SEARCH) -> Measured:
        """Feed a part's prompts under `patch`, in batches of like length, padded on the left."""
        import torch

        from attnpatch.api import patched

        rows = self.parts[part]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
        found: list[Any] = [None] * len(rows)
        with patched(self.model, patch), torch.inference_mode():
            for batch in self._batches(order, rows):
                for i, result in zip(batch, self._fitting([rows[i] for i in batch]), strict=True):
                    found[i] = result
        exact, restricted, entropy = (list(x) for x in zip(*found, strict=True))
        return Measured(entropy, *(None if None in x else x for x in (exact, restricted)))

    def _batches(self, order: list[int], rows: list[Encoded]) -> Iterator[list[int]]:
        batch: list[int] = []
        for i in order:  # ascending lengths, so the newest is the longest
            if batch and (len(batch) + 1) * len(rows[i].prompt) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(i)
        yield batch

    def _fitting(self, rows: list[Encoded]) -> list[tuple[Any, Any, float]]:
        """One batch, halved where memory runs out."""
        import torch

        from attnpatch.engine.compat import out_of_memory

        try:
            return feed(self.model, rows, self.pad)
        except (RuntimeError, MemoryError) as error:
            if len(rows) == 1 or not out_of_memory(error):
                raise
        torch.cuda.empty_cache()
        half = len(rows) // 2
        return [*self._fitting(rows[:half]), *self._fitting(rows[half:])]


def _ranges(numbers: Sequence[int]) -> str:
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}"
    return ", ".join(map(str, numbers))


def feed(model: Any, rows: list[Encoded], pad: int) -> list[tuple[bool | None, bool | None, float]]:
    """(exact, restricted, entropy) of each row under the patches of `model`; one prefill, then a step a further token.

    Only the last row of logits is computed. Answers are fed as given: greedy decoding gives an answer if and only if
    each token of it has the highest logit after those before.
    """
    import torch

    from attnpatch.engine.cache import PatchCache
    from attnpatch.engine.compat import cache_name, input_device

    device, width = input_device(model), max(len(r.prompt) for r in rows)
    ids = torch.tensor([[pad] * (width - len(r.prompt)) + r.prompt for r in rows], device=device)
    lengths = torch.tensor([len(r.prompt) for r in rows], device=device)[:, None]
    mask = (torch.arange(width, device=device) >= width - lengths).long()  # [B, width]
    cache, name = PatchCache(model), cache_name()

    def logits(ids: Any, mask: Any) -> Any:
        pos = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = model(input_ids=ids, attention_mask=mask, position_ids=pos, logits_to_keep=1, **{name: cache})
        return out.logits[:, -1].float().to(device)  # [B, V]

    last = logits(ids, mask)
    entropy = torch.special.entr(last.softmax(-1)).sum(-1).tolist()
    restricted = [
        bool(last[b, r.labels].argmax() == r.right) if r.labels and r.answer else None for b, r in enumerate(rows)
    ]
    right = torch.tensor([bool(r.answer) for r in rows], device=device)
    for step in range(max(len(r.answer) for r in rows)):
        more = torch.tensor([len(r.answer) > step for r in rows], device=device)
        token = torch.tensor([r.answer[step] if len(r.answer) > step else pad for r in rows], device=device)
        right &= (last.argmax(-1) == token) | ~more
        if not any(len(r.answer) > step + 1 and ok for r, ok in zip(rows, right.tolist(), strict=True)):
            break
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        last = logits(token[:, None], mask)
    exact = [ok if r.answer else None for r, ok in zip(rows, right.tolist(), strict=True)]
    return list(zip(exact, restricted, entropy, strict=True))


def encode(tokenizer: Any, samples: Sequence[Sample], chat: bool) -> list[Encoded]:
    """Samples as token ids; chat: through the chat template, as the user's message. Raises InputError."""
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ConfigError("the model's tokenizer has no chat template; feed the prompts as they are.")

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=not chat, verbose=False)["input_ids"]

    made = []
    for s in samples:
        text = s.prompt
        if chat:
            message = [{"role": "user", "content": s.prompt}]
            text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        prompt = ids(text)
        if not prompt:
            raise InputError(f"{_of(s)} has no tokens in its prompt; give some text.")
        whole = {label: ids(text + label) for label in {*s.labels, s.answer} if label}
        cut = _seam(prompt, list(whole.values()), s)
        after = {label: tokens[cut:] for label, tokens in whole.items()}
        prompt = next(iter(whole.values()), prompt)[:cut]
        labels = [after[label][0] for label in s.labels]
        if len(set(labels)) < len(labels):
            raise InputError(
                f"{_of(s)}: two of its labels {', '.join(map(repr, s.labels))} begin with the same token, so they "
                "cannot be told apart by the first; choose others."
            )
        right = s.labels.index(s.answer) if s.answer in s.labels else 0
        made.append(Encoded(prompt, after[s.answer] if s.answer else [], labels, right))
    return made


def _seam(prompt: list[int], whole: list[list[int]], sample: Sample) -> int:
    """Where the prompt's tokens end: before its last one, or with it in another form, where it takes a blank along."""
    alike = whole if len(whole) > 1 else [*whole, prompt]
    cut = next((i for i, found in enumerate(zip(*alike, strict=False)) if len(set(found)) > 1), min(map(len, alike)))
    cut = min(cut, len(prompt))
    if cut < max(1, len(prompt) - 1) or any(len(tokens) <= cut for tokens in whole):
        raise InputError(
            f"{_of(sample)}: its prompt is cut into other tokens when an answer follows; end the prompt without a "
            "blank, and begin the answer and the labels with one."
        )
    return cut


def _of(sample: Sample) -> str:
    return (
        f"the sample of line {sample.line}{' of ' + sample.file if sample.file else ''}"
        if sample.line
        else f"the sample {sample.prompt[:40]!r}"
    )


def fingerprint(model: Any, parts: dict[str, list[Encoded]]) -> dict[str, str]:
    """What tells these weights and these samples from others: two short hashes."""
    data = hashlib.sha256(json.dumps({k: [asdict(r) for r in rows] for k, rows in parts.items()}).encode())
    return {"weights": weights_hash(model), "data": data.hexdigest()[:16]}


def weights_hash(model: Any) -> str:
    """A short hash of some values of every weight."""
    import torch

    weights = hashlib.sha256()
    for name, x in model.named_parameters():
        weights.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
        x = x.detach()
        if not x.is_meta and type(x) is torch.Tensor:  # neither offloaded nor a quantised or sharded form
            some = x.flatten()[:: max(1, x.numel() // 8)]
            weights.update(some.to("cpu", torch.float64).numpy().tobytes())
    return weights.hexdigest()[:16]
