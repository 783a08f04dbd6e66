"""What every profile needs: observing a model's forwards, random ids, texts, and the account of how it was made."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from attnpatch.errors import ConfigError, InputError, UnsupportedModelError
from attnpatch.patch import Patch

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.profile import Profile


@dataclass
class Observer(Patch):
    """A method that only looks: `seen` holds one tensor per layer of the model, of the last forward. Not registered."""

    seen: dict[int, Any] = field(default_factory=dict)

    name = "profile"
    title = "profiling"
    stage = "observe"


@dataclass(frozen=True)
class Subject:
    """The model under observation: its base, decoder, counts, and the layers that are seen."""

    model: Any
    decoder: Any
    covered: tuple[int, ...]
    layers: int
    heads: int
    kv_heads: int
    device: Any

    def full(self, rows: Tensor, fill: float = float("nan")) -> Tensor:
        """rows [covered, ...] as [layers, ...] on the CPU, `fill` in the layers that are not seen."""
        whole = torch.full((self.layers, *rows.shape[1:]), fill, dtype=rows.dtype)
        whole[list(self.covered)] = rows.cpu()
        return whole

    def stacked(self, observer: Observer) -> Tensor:
        """What was seen in the last forward: [covered, ...] on the CPU."""
        return torch.stack([observer.seen[i].cpu() for i in self.covered])


@contextmanager
def observed(model: Any, observer: Observer) -> Iterator[Subject]:
    """The model with `observer` in its layers of full attention, without gradients. Raises UnsupportedModelError."""
    from attnpatch.api import patched
    from attnpatch.engine.compat import input_device
    from attnpatch.engine.families import inspect_model, unwrap
    from attnpatch.profile import structure

    base = unwrap(model)
    decoder, facts = inspect_model(base)
    covered = tuple(f.index for f in facts if not f.reason)
    if not covered:
        raise UnsupportedModelError(
            "every layer of this model uses a sliding window, so there is nothing to profile; take a model with at "
            "least one layer of full attention."
        )
    shape = structure(decoder.config)
    with patched(base, observer), torch.no_grad():
        yield Subject(
            base, decoder, covered, len(facts), shape["heads"], shape["kv_heads"], input_device(base)
        )  # fmt: skip


def run_prompt(subject: Subject, ids: Tensor, mask: Tensor | None = None, cache: Any = None) -> None:
    """One forward of ids [B, T] through the decoder, no logits; mask: int [B, T], 0 = padding, as ids on any device."""
    from attnpatch.engine.compat import cache_name

    given: dict[str, Any] = {"input_ids": ids.to(subject.device), "use_cache": True}
    if mask is not None:
        given["attention_mask"] = mask.to(subject.device)
        given["position_ids"] = (given["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)
    if cache is not None:
        given[cache_name(type(subject.decoder).forward)] = cache
    subject.decoder(**given)


def group_max(x: Tensor, kv_heads: int) -> Tensor:
    """[L, Hq] -> [L, Hkv], the largest of each group; NaN stays NaN."""
    return x.unflatten(1, (kv_heads, -1)).amax(-1)


def made(kind: str, subject: Subject, tensors: dict[str, Tensor], **about: Any) -> Profile:
    """The profile, with the versions that made it."""
    import transformers

    import attnpatch
    from attnpatch.profile import Profile, structure

    versions = {
        "attnpatch": attnpatch.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    dtype = str(subject.model.dtype).removeprefix("torch.")
    skipped = [i for i in range(subject.layers) if i not in subject.covered]
    return Profile(
        kind, tensors, structure(subject.decoder.config),
        {**about, "skipped_layers": skipped, "dtype": dtype, "versions": versions},
    )  # fmt: skip


def check_counts(**counts: int) -> None:
    """Raise ConfigError unless every count is a whole number of at least 1."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}={value!r} is out of range; give a whole number of at least 1.")


def ordinary_ids(tokenizer: Any, config: Any) -> Tensor:
    """int64 ids of the vocabulary without special and added tokens."""
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    size = min(len(tokenizer), config.get_text_config(decoder=True).vocab_size)
    return torch.tensor([i for i in range(size) if i not in special])


def draw(ids: Tensor, shape: Sequence[int], seed: int) -> Tensor:
    """Uniform draws from ids [n], int64 of `shape`; the same for the same seed."""
    where = torch.randint(len(ids), tuple(shape), generator=torch.Generator().manual_seed(seed))
    return ids[where]


def opening(tokenizer: Any) -> list[int]:
    """BOS, or the last token of a prompt "A" where the tokenizer defines none."""
    if tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id]
    return list(tokenizer("A", add_special_tokens=False)["input_ids"][-1:])


def long_text(tokenizer: Any, tokens: int, text: str | None, seed: int, start: float = 0.0) -> str:
    """Text of at least `tokens` tokens: `text` from the share `start` of it on, or filler where it is None.

    Raises InputError where the text is too short (it goes on from its own beginning if need be).
    """
    from attnpatch.testbed.filler import filler

    if text is None:
        return filler(8 * tokens + 200, random.Random(f"profile-{seed}"))
    text = text.strip()
    at = int(start * len(text))
    at = text.find(" ", at) + 1 if at else 0
    turned = text[at:] + ("\n\n" + text[:at] if at else "")
    known = len(tokenizer(turned[: 12 * tokens + 200], add_special_tokens=False, verbose=False)["input_ids"])
    if known < tokens:
        raise InputError(f"the text has about {known} tokens, {tokens} are needed; give a longer one, or fewer tokens.")
    return turned


def passages(tokenizer: Any, count: int, tokens: int, text: str | None, seed: int) -> Tensor:
    """int64 [count, tokens]: passages from evenly spaced places of the text, with the tokenizer's special tokens."""
    rows = []
    for i in range(count):
        part = long_text(tokenizer, tokens, text, seed * 100_003 + i, i / count)[: 12 * tokens + 200]
        rows.append(tokenizer(part, truncation=True, max_length=10**9, verbose=False)["input_ids"][:tokens])
        if len(rows[-1]) < tokens:
            raise InputError(f"a passage has {len(rows[-1])} tokens, {tokens} are needed; give a longer text.")
    return torch.tensor(rows)
