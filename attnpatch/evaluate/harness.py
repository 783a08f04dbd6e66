"""lm-evaluation-harness on a patched model: a model class for it, and its own command line with that class in it.

`loglikelihood` prefills the context under the patch and then scores the continuation (`likelihood.score`), so eviction
is seen; the harness's own single forward would give the dense figures. `generate_until` is the harness's own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from attnpatch.errors import ConfigError, UnsupportedModeError, VersionError

if TYPE_CHECKING:
    from attnpatch.patch import Patch

NAME = "attnpatch"
OWN = ("--model", "-M")  # options of lm_eval that this command sets


def base_class() -> Any:
    """lm_eval's class of transformers models. Raises VersionError where lm_eval is missing."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise VersionError(
            f"lm-evaluation-harness cannot be imported ({error}); install it: pip install 'attnpatch[lm-eval]'."
        ) from None
    return HFLM


def lm_class(patches: Sequence[Patch]) -> Any:
    """A subclass of lm_eval's HFLM whose model is patched; no patches = dense, scored in the same way.

    It takes HFLM's arguments: `lm_class(patches)(pretrained=model_or_path, tokenizer=..., batch_size=4)`. One sequence
    at a time is scored; generation runs in batches as ever.
    """
    chosen = list(patches)

    class PatchedLM(base_class()):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            from attnpatch.api import patch_model

            super().__init__(*args, **kwargs)
            for patch in chosen:
                if getattr(patch, "tokenizer", self.tokenizer) is None:
                    patch.tokenizer = self.tokenizer  # type: ignore[attr-defined]
            if chosen:
                patch_model(self.model, chosen)

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            given, _ = super()._encode_pair(context, continuation)
            return at_the_seam(given, self.tok_encode(context + continuation), self.prefix_token_id)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
            return score_requests(self, requests)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            if keeper := [p.name for p in chosen if "keep" in p.hooks()]:
                raise UnsupportedModeError(
                    f"loglikelihood_rolling scores a text with no prompt before it, so {keeper[0]} would evict "
                    "nothing; use attnpatch evaluate --task perplexity --text FILE, which prefills and then scores."
                )
            return super().loglikelihood_rolling(requests, disable_tqdm)

    return PatchedLM


def at_the_seam(context: list[int], whole: list[int], start: int) -> tuple[list[int], list[int]]:
    """(context, continuation) of a text's ids, cut before the first token that is not the context's own.

    lm_eval cuts by the context's number of tokens, which loses text, or all of it, where a token spans the seam (as in
    vocabularies with tokens of several words). start: the context of a text that has no token of its own there.
    """
    from attnpatch.evaluate.encoding import common

    alike = min(common([context, whole]), len(whole) - 1) if whole else 0
    return (whole[:alike], whole[alike:]) if alike else ([start], whole)


def score_requests(lm: Any, requests: Sequence[tuple[Any, list[int], list[int]]]) -> list[tuple[float, bool]]:
    """(summed log-probability, greedy) of each (key, context ids, continuation ids), in the order given.

    Requests of one context share its prefill. What is longer than the model's positions loses tokens from the left, as
    lm_eval does it.
    """
    from attnpatch.evaluate import likelihood

    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (_, ids, continuation) in enumerate(requests):
        room = max(1, lm.max_length + 1 - len(continuation))
        groups.setdefault(tuple(ids[-room:]), []).append(number)
    found: dict[int, tuple[float, bool]] = {}
    for context, members in groups.items():
        scored = likelihood.score(lm.model, context, [requests[i][2] for i in members])
        for number, s in zip(members, scored, strict=True):
            found[number] = (float(s.logs.sum()), s.greedy)
            if requests[number][0] is not None:
                lm.cache_hook.add_partial("loglikelihood", requests[number][0], found[number])
    return [found[i] for i in range(len(requests))]


def run(model: str, patches: Sequence[Patch], arguments: Sequence[str]) -> None:
    """lm_eval's own command line on `model` under `patches`; `arguments` are lm_eval's. Raises ConfigError."""
    if taken := [a for a in arguments if a.partition("=")[0] in OWN]:
        raise ConfigError(f"{taken[0]} is lm_eval's choice of a model class, which this command makes; leave it out.")
    made = lm_class(patches)  # says at once where lm_eval is missing
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model

    register_model(NAME)(made)
    before = sys.argv
    sys.argv = ["lm-eval", "run", "--model", NAME, *with_model(model, list(arguments))]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


def with_model(model: str, arguments: list[str]) -> list[str]:
    """The arguments with pretrained=MODEL before them; lm_eval merges it with further --model_args."""
    for i, argument in enumerate(arguments):
        if argument.partition("=")[0] not in ("--model_args", "-a"):
            continue
        values = [argument.partition("=")[2]] if "=" in argument else _values(arguments[i + 1 :])
        if any(part.partition("=")[0].strip() == "pretrained" for value in values for part in value.split(",")):
            raise ConfigError(f"{argument} names the model again; name it with this command's own --model.")
    return ["--model_args", f"pretrained={model}", *arguments]


def _values(arguments: list[str]) -> list[str]:
    """What follows an option up to the next one."""
    return list(takewhile(lambda a: not a.startswith("-"), arguments))
