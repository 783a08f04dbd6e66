"""InfiniRetri: read a text chunk by chunk and keep the sentences that the question's rows look at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from attnpatch.errors import ConfigError, InputError
from attnpatch.patch import Patch, option, register
from attnpatch.retrieval import (
    TEMPLATE,
    Chunk,
    Pass,
    Prompt,
    Sentence,
    check_template,
    chunks,
    encoded,
    fit,
    last_paragraph,
    resplit,
    split,
    user_text,
)  # fmt: skip

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.engine.handle import Handle


@register("infiniretri")
@dataclass
class InfiniRetri(Patch):
    """InfiniRetri (arXiv 2502.12962; the authors' package infini-retri 0.0.3). Retrieval, for texts of any length.

    The text is read in chunks. Each pass puts the sentences kept so far and the next chunk into the template with the
    question, runs the model up to its last layer with full attention, and sums that layer's attention probabilities of
    the question's rows over the heads. Sums over `answer_length` neighbouring tokens, rows weighted by the square of
    how much they look at the question itself, score the tokens; every sentence with one of the `topk` best stays, in
    document order. What is dropped is gone. The answer is generated from the kept sentences. Time grows with the
    text's length, memory does not.

    `attnpatch.retrieve(model, tokenizer, text, question)` gives the answer and the sentences. Under `patch_model(model,
    "infiniretri", tokenizer=tok)`, `model.generate(ids, question="...")` does the same with any prompt; without
    `question` the prompt's last paragraph is the question. Rows of a batch are read one after the other. The ids that
    come back begin with the given prompt. Other methods may be composed: they act in the prefill of the passes (those
    that choose what is attended) and on the final prompt.

    It finds facts. Counting, summaries and facts that only a later one makes relevant lose by design, and text without
    。！？.?! or blank lines becomes one long sentence. faithful=True repeats the package's passes: also for a text of
    one chunk, kept sentences decoded, joined with the next chunk and split anew, and an empty system message for chat
    templates without that role.
    """

    window_length: int = option(1024, "new tokens read in each pass", low=1)
    topk: int = option(300, "best tokens of each pass; their sentences stay", low=1)
    answer_length: int = option(8, "neighbouring tokens whose scores are summed, about the answer's length", low=1)
    use_question_weight: bool = option(True, "weigh each row by how much it looks at the question")
    add_prompt: bool = option(True, "the rows go on to the prompt's end, not only to the question's")
    layer: int | None = option(None, "decoder layer whose attention is read; null = the last with full attention")
    min_retrieve_tokens: int | None = option(
        None, "a text of at most so many tokens is kept whole; null = window_length", low=0
    )
    max_retained_tokens: int | None = option(
        None, "most tokens kept between passes; null = what the model's window leaves", low=1
    )
    max_new_tokens: int = option(128, "most tokens of the answer (of generate, unless the call says)", low=0)
    temperature: float = option(0.0, "of the answer, for retrieve; 0 = greedy", low=0)
    faithful: bool = option(False, "the passes of the authors' package, glued blank lines included")
    template: Any = option(None, "prompt with {context} and {question}, each a paragraph of its own; null = ours")
    tokenizer: Any = option(None, "the model's tokenizer; needed by model.generate, not by retrieve")

    title = "InfiniRetri"
    paper = "arXiv 2502.12962"
    stage = "retrieve"
    query_aware = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template is not None:
            if not isinstance(self.template, str):
                raise ConfigError(f"{self.name}: template={self.template!r} is no text; give one with the two fields.")
            check_template(self.template)

    def hyperparameters(self) -> dict[str, Any]:
        return {k: v for k, v in super().hyperparameters().items() if k != "tokenizer"}

    # ---- the loop ------------------------------------------------------------------------------------------------
    def read(
        self, handle: Handle, tokenizer: Any, blocks: Iterable[str], question: str,
        report: Callable[[Pass], None] | None = None,
    ) -> tuple[Prompt, list[Sentence]]:  # fmt: skip
        """(the prompt around the context, the sentences kept of the text). Nothing runs if an option does not fit."""
        prompt = Prompt(tokenizer, self.template or TEMPLATE, question, self.add_prompt, self.faithful)
        least, most = self._limits(handle, prompt)
        reader = _Passes(self, handle, tokenizer, prompt, most, report)
        waiting: list[Chunk] = []
        total, end = -reader.gap, 0
        for chunk, count in chunks(blocks, tokenizer, self.window_length):
            waiting.append(chunk)
            total, end = total + count + reader.gap, chunk.end
            if total > least:  # from here on nothing waits
                for one in waiting:
                    reader.step(one)
                waiting = []
        if not end:
            raise InputError("the text is empty; give some text.")
        whole = [s for chunk in waiting for s in split([chunk.text], 8, chunk.start)]
        return prompt, whole or reader.kept

    def _limits(self, handle: Handle, prompt: Prompt) -> tuple[int, float]:
        """(tokens up to which a text stays whole, most tokens retained). ConfigError where the window is too small."""
        least = self.window_length if self.min_retrieve_tokens is None else self.min_retrieve_tokens
        window = getattr(handle.plan.config, "max_position_embeddings", None) or math.inf
        room = window - len(prompt) - max(self.window_length, 0 if self.faithful else least)
        if room < 0:
            raise ConfigError(
                f"{self.name}: a chunk of {self.window_length} tokens and {len(prompt)} around it do not fit the "
                f"model's window of {window}; lower window_length (and min_retrieve_tokens), or shorten the question."
            )
        most = window - len(prompt) - self.window_length
        return -1 if self.faithful else least, min(most, self.max_retained_tokens or math.inf)

    # ---- generate ------------------------------------------------------------------------------------------------
    def prepare(self, model: Any, input_ids: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """The prompts made of what each row's text keeps, padded on the left. question: a string, or one per row."""
        import torch

        tokenizer, questions = self.tokenizer, kwargs.pop("question", None)
        if tokenizer is None:
            raise ConfigError(f"{self.name} reads text: pass patch_model(model, {self.name!r}, tokenizer=tokenizer).")
        if not isinstance(questions, (list, tuple)):
            questions = [questions] * input_ids.shape[0]
        if len(questions) != input_ids.shape[0] or not all(q is None or isinstance(q, str) for q in questions):
            raise InputError(f"question={questions!r}: give a string, or one for each of {input_ids.shape[0]} rows.")
        mask, prompts = kwargs.pop("attention_mask", None), []
        for row, (ids, question) in enumerate(zip(input_ids, questions, strict=True)):
            text = user_text(tokenizer, ids if mask is None else ids[mask[row].bool().to(ids.device)])
            text, question = last_paragraph(text) if question is None else (text, question)
            prompt, kept = self.read(model._attnpatch, tokenizer, [text], question)
            prompts.append(prompt.whole("".join(s.text for s in kept)))
        longest = max(map(len, prompts))
        pad = next((x for x in (tokenizer.pad_token_id, tokenizer.eos_token_id) if x is not None), 0)
        rows = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
        real = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        config = kwargs.get("generation_config")
        if kwargs.get("max_new_tokens") is None and (most := kwargs.pop("max_length", None)) is not None:
            if most <= input_ids.shape[1]:
                raise InputError(f"max_length={most} leaves no token after a prompt of {input_ids.shape[1]}; raise it.")
            kwargs["max_new_tokens"] = most - input_ids.shape[1]  # the given prompt counts, not the one written
        if config is None and not {"max_new_tokens", "max_length"} & set(kwargs):
            kwargs["max_new_tokens"] = max(1, self.max_new_tokens)
        return rows.to(input_ids.device), {**kwargs, "attention_mask": real.to(input_ids.device)}


class _Passes:
    """What goes from one pass to the next: the sentences kept, and the rows' weights, which the first pass sets."""

    def __init__(
        self, method: InfiniRetri, handle: Handle, tokenizer: Any, prompt: Prompt, most: float, report: Any
    ) -> None:
        from attnpatch.engine.tap import layer_to_read

        self.method, self.handle, self.tokenizer, self.prompt = method, handle, tokenizer, prompt
        self.most, self.report = most, report
        self.layer = layer_to_read(handle, method.layer)
        self.gap = len(tokenizer("\n", add_special_tokens=False)["input_ids"])
        self.window = getattr(handle.plan.config, "max_position_embeddings", None) or math.inf
        self.kept: list[Sentence] = []
        self.weights: Tensor | None = None  # fp32 [R]
        self.number = 0

    def step(self, chunk: Chunk) -> None:
        """One forward over what is kept and the chunk; what stays of both."""
        sentences, context = self._context(chunk)
        tokens = sum(map(len, context)) + len(self.prompt)
        if tokens > self.window:
            raise InputError(
                f"a pass needs {tokens} tokens and the model's window is {self.window}: a piece of the text without "
                "sentence ends is too long; lower window_length or max_retained_tokens."
            )
        best, hit = self._score(context)
        if not all(map(math.isfinite, best)):
            raise InputError("the attention of the layer read is not finite; load the model in bfloat16 or float32.")
        scored = [replace(s, score=b) for s, b, h in zip(sentences, best, hit, strict=True) if h]
        if self.method.faithful:
            scored = [replace(s, text=self.tokenizer.decode(list(s.ids))) for s in scored]
        self.kept = fit(scored, self.most)
        if not self.kept:
            raise InputError(
                f"the best sentence has more tokens than the {self.most:.0f} that may be kept between passes, so "
                "nothing would stay; raise max_retained_tokens, or lower window_length."
            )
        self.number += 1
        if self.report is not None:
            self.report(Pass(self.number, tokens, chunk.end, tuple(self.kept)))

    def _context(self, chunk: Chunk) -> tuple[list[Sentence], list[tuple[int, ...]]]:
        """The pass's sentences, and the tokens each of them is fed as: the first and last are stripped, then glued."""
        glue = self.prompt.glue
        if self.method.faithful:
            pieces = [replace(s, ids=()) for s in resplit([*self.kept, chunk], glue, 8)]
            sentences = encoded(self.tokenizer, pieces)
            return sentences, [s.ids for s in sentences]
        new = encoded(self.tokenizer, list(split([chunk.text], 8, chunk.start)), chunk.known)
        # a few tokens more than alone: the ends are encoded with other blanks
        room = self.window - len(self.prompt) - sum(len(s.ids) for s in new) - 8
        sentences = [*fit(self.kept, room), *new]
        fed = [s.ids for s in sentences]
        ends: dict[int, str] = {0: sentences[0].text.lstrip()}
        ends[len(fed) - 1] = ends.get(len(fed) - 1, sentences[-1].text).rstrip() + glue
        for at, ids in zip(
            ends, self.tokenizer(list(ends.values()), add_special_tokens=False)["input_ids"], strict=True
        ):
            fed[at] = tuple(ids)
        return sentences, fed

    def _score(self, context: Sequence[Sequence[int]]) -> tuple[list[float], list[bool]]:
        """Each sentence's best token score, and whether it holds one of the best tokens. Waits for the device once."""
        import torch

        from attnpatch.engine.compat import input_device
        from attnpatch.engine.tap import read
        from attnpatch.executors import summed_rows

        before, rows = self.prompt.before, self.prompt.rows
        counts = [len(ids) for ids in context]
        begin, end = len(before), len(before) + sum(counts)
        device = input_device(self.handle.model)
        ids = torch.tensor([[*before, *(x for part in context for x in part), *self.prompt.after]], device=device)
        span = slice(end + rows[0], end + rows[1])
        seen = read(self.handle, ids, self.layer, span)
        mass = summed_rows.run(seen.q, seen.kv, q_pos=seen.q_pos, scaling=seen.scaling, softcap=seen.softcap)[0]
        score = self._token_scores(mass, span, slice(begin, end))
        chosen = top_tokens(score, self.method.topk)
        owner = torch.repeat_interleave(torch.tensor(counts)).to(score.device)  # [C] the sentence of each token
        best = torch.full((len(counts),), -torch.inf, device=score.device).scatter_reduce(0, owner, score, "amax")
        hit = torch.zeros_like(best).index_fill(0, owner[chosen], 1.0)
        values, hits = torch.stack([best, hit]).tolist()
        return values, [h > 0 for h in hits]

    def _token_scores(self, mass: Tensor, rows: slice, context: slice) -> Tensor:
        """fp32 [C] of mass [R, N], after the first pass has set the rows' weights."""
        import torch

        first = self.weights is None
        if self.weights is None:
            self.weights = mass[:, rows].sum(-1)  # how much each row looks at the question and what follows it
            if not self.method.use_question_weight and not self.method.faithful:
                self.weights = torch.ones_like(self.weights)
        score = token_scores(mass[:, context], self.weights, self.method.answer_length)
        if first and not self.method.use_question_weight:  # the package weighs in its first pass all the same
            self.weights = torch.ones_like(self.weights)
        return score


# ---- the maths ---------------------------------------------------------------------------------------------------
def phrase_sums(x: Tensor, width: int) -> Tensor:
    """Sums over x[j - width // 2 .. j + ceil(width / 2) - 1] along the last axis, zeros outside: x [R, C] -> [R, C]."""
    import torch.nn.functional as F

    # a convolution would round to TF32 on CUDA
    return F.pad(x, (width // 2, width - 1 - width // 2)).unfold(-1, width, 1).sum(-1)


def token_scores(mass: Tensor, weights: Tensor, width: int) -> Tensor:
    """fp32 [C]: the phrase sums of mass [R, C], rows weighted by the squares of weights [R]."""
    # both are linear, so the rows are summed first
    return phrase_sums((weights.square()[:, None] * mass).sum(0, keepdim=True), width)[0]


def top_tokens(score: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest of score [C] (all if there are fewer); ties: the earlier token."""
    return score.sort(descending=True, stable=True).indices[:count]
