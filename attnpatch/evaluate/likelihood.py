"""Log-likelihood and perplexity under a patch: prefill, then score, so that eviction is really seen.

One forward over a whole text would give the dense figure of every evicting method, since it evicts only when the
prompt is over. Here the context is the prompt, and the continuation follows on what the patch left of it. The context's
last token is fed with the continuation, so even the first scored token attends the compressed cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnpatch.errors import InputError
from attnpatch.evaluate import feeding
from attnpatch.evaluate.sample import Sample

if TYPE_CHECKING:
    from torch import Tensor

METRIC = "loglikelihood"  # of samples whose question is a continuation to be scored, not asked
CONTINUATION = 128


@dataclass(frozen=True)
class Scored:
    """A continuation's log-probabilities fp32 [M] on the CPU, whether greedy decoding would give it, and K and V bytes
    held and dense at its end."""

    logs: Tensor
    greedy: bool
    held: int = 0
    dense: int = 0


def score(
    model: Any, context: Sequence[int], continuations: Sequence[Sequence[int]], by_steps: bool | None = None
) -> list[Scored]:
    """Score each continuation of one context.

    The context is prefilled once and its cache copied, or prefilled again where it cannot be copied. by_steps: feed the
    continuation token by token, as decoding does; default: where a patch acts on decode steps. Raises InputError for an
    empty context or continuation.
    """
    import torch

    if not context or not continuations or not all(continuations):
        raise InputError("log-likelihood needs a context and continuations of at least one token each.")
    steps = _acts_on_steps(model) if by_steps is None else by_steps
    device = _device(model)
    scored: list[Scored] = []
    with torch.inference_mode():
        cache = _prompt(model, context, device)
        for i, continuation in enumerate(continuations):
            last = i == len(continuations) - 1
            mine = cache if last or cache is None else feeding.copied(cache)
            if mine is None and cache is not None:  # no copy: this one takes the cache, the next a new one
                mine, cache = cache, None
            elif cache is None:
                mine = _prompt(model, context, device)
            scored.append(_continue(model, mine, context, continuation, steps, device))
    return scored


def _device(model: Any) -> Any:
    from attnpatch.engine.compat import input_device
    from attnpatch.engine.families import unwrap

    return input_device(unwrap(model))


def _acts_on_steps(model: Any) -> bool:
    from attnpatch.engine.families import unwrap

    return feeding.is_patched(model) and unwrap(model)._attnpatch.plan.acts_on_steps


def _prompt(model: Any, context: Sequence[int], device: Any) -> Any:
    """The cache of all context tokens but the last; None for a context of one token."""
    if len(context) == 1:
        return None
    ids, mask = feeding.pad([context[:-1]], 0, device)
    return feeding.prefill(model, ids, mask)[0]


def _continue(
    model: Any, cache: Any, context: Sequence[int], continuation: Sequence[int], steps: bool, device: Any
) -> Scored:
    import torch

    fed = [context[-1], *continuation[:-1]]
    ids, target = torch.tensor([fed], device=device), torch.tensor(list(continuation), device=device)
    before = len(context) - 1
    if cache is None:
        logits = _alone(model, ids)
    else:
        parts = [ids[:, i : i + 1] for i in range(ids.shape[1])] if steps else [ids]
        rows, seen = [], before
        for part in parts:
            seen += part.shape[1]
            rows.append(feeding.forward(model, part, part.new_ones(1, seen), cache, keep=0))
        logits = torch.cat(rows, dim=1)  # [1, M, V]
    logs = logits[0].float().log_softmax(-1)  # [M, V]
    picked = logs.gather(-1, target[:, None])[:, 0]
    held, dense = (0, 0) if cache is None else feeding.bytes_of(cache)
    return Scored(picked.cpu(), bool((logs.argmax(-1) == target).all()), held, dense)


def _alone(model: Any, ids: Tensor) -> Tensor:
    """Logits of a text without a prompt before it."""
    from attnpatch.engine.families import unwrap

    return unwrap(model)(input_ids=ids, use_cache=False).logits


def perplexity(model: Any, ids: Sequence[int], context: int, continuation: int = CONTINUATION) -> dict[str, float]:
    """Perplexity of a text's windows: `context` tokens prefilled, the next `continuation` scored, and on from there.

    ids: the text. Returns perplexity, nats per token, tokens scored, windows. Raises InputError where no window fits.
    """
    if context < 1 or continuation < 1 or len(ids) < context + continuation:
        raise InputError(
            f"a text of {len(ids)} tokens has no window of {context} + {continuation} tokens; give a longer text, or "
            "smaller context and continuation."
        )
    import math

    total, count, number = 0.0, 0, 0
    for start in range(0, len(ids) - context - continuation + 1, context + continuation):
        middle, stop = start + context, start + context + continuation
        (found,) = score(model, ids[start:middle], [ids[middle:stop]])
        total, count, number = total - float(found.logs.sum()), count + len(found.logs), number + 1
    return {"perplexity": math.exp(total / count), "nats": total / count, "tokens": count, "windows": number}


def windows(
    tokenizer: Any, tokens: int, count: int, seed: int, text: str | None, continuation: int = CONTINUATION
) -> list[Sample]:
    """Samples of the task "perplexity": `count` windows of a text, `tokens` of context and a continuation each.

    Windows start at places drawn by `seed`. A sample's score is the continuation's mean log-likelihood in nats per
    token (higher is better). Raises InputError without a text, or with one that is too short.
    """
    import random

    if text is None:
        raise InputError("the task perplexity needs a text; give --text FILE.")
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    room = len(ids) - tokens - continuation
    if room < 0:
        raise InputError(
            f"the text has {len(ids)} tokens; a window takes {tokens} + {continuation}. Give a longer text or fewer "
            "--tokens."
        )
    rng = random.Random(f"perplexity-{tokens}-{seed}")
    starts = sorted(rng.sample(range(room + 1), min(count, room + 1)))
    if len(starts) < count:
        raise InputError(f"the text has only {len(starts)} windows; give a longer text or fewer --samples.")
    made = []
    for start in starts:
        middle = start + tokens
        parts = (tokenizer.decode(ids[start:middle]), tokenizer.decode(ids[middle : middle + continuation]))
        made.append(
            Sample(f"window-{start}", "perplexity", parts[0], (parts[1],), ((),), METRIC, 1, "{context}{question}")
        )
    return made
