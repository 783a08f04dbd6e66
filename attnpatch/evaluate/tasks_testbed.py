"""The embedded model's own tasks as samples: the wording, tokens and answers it was trained on.

With the chat template a prompt has exactly the tokens asked for.
"""

from __future__ import annotations

from typing import Any

from attnpatch.errors import ConfigError
from attnpatch.testbed import tasks

from .sample import Sample

KINDS = {
    "testbed:needle": ("needle", 1),
    "testbed:multikey": ("needle", 16),
    "testbed:vt": ("vt", 4),
    "testbed:kv": ("lines", 1),
}


def case(task: str, name: str, tokenizer: Any, tokens: int, seed: int, text: str | None) -> Sample:
    """One case of ``task`` (a key of ``KINDS``, or "testbed:turns").

    Raises:
        ConfigError: the tokenizer is not the embedded model's, or ``tokens`` is too small.
    """
    try:
        if task == "testbed:turns":
            talk = tasks.turns(tokens, questions=4, keys=16, seed=seed, text=text, tokenizer=tokenizer)
            context, turns, longest, meta = talk.context, talk.turns, 16, {}
        else:
            kind, keys = KINDS[task]
            made = tasks.make(kind, tokens, keys=keys, seed=seed, text=text, tokenizer=tokenizer)
            context, turns, longest = made.context, ((made.question, made.answer_text),), len(made.answer_ids)
            meta = {} if kind == "vt" else {"depth": round(made.depth, 4)}
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"{task} with tokens={tokens}: {error}.") from error
    return Sample(
        id=name,
        task=task,
        context=context,
        questions=tuple(question for question, _ in turns),
        answers=tuple((answer,) for _, answer in turns),
        metric="exact_match",
        max_new_tokens=longest,
        template="{context}{question}",
        meta=meta,
    )
