"""One case of an evaluation: a context, questions about it, accepted answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from attnpatch.errors import InputError

_UNANSWERED = ("unscored", "loglikelihood")  # metrics that compare with no answer


@dataclass(frozen=True)
class Sample:
    """A context with one or more questions; everything a runner and a metric need.

    Attributes:
        id: stable within a task.
        task: name of the task, e.g. "needle".
        context: the long text.
        questions: one or more; several are turns of a conversation or requests on one context.
        answers: accepted answers of each question (a metric says whether one or all of them are wanted).
        metric: name in ``metrics.METRICS``.
        max_new_tokens: tokens that an answer may take.
        template: raw prompt form, a ``str.format`` text with ``{context}`` before ``{question}``, each once.
        prefix: text that starts the answer.
        choices: the classes or options, where there are some.
        meta: further facts, such as the seed or the length asked for.
    """

    id: str
    task: str
    context: str
    questions: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]
    metric: str
    max_new_tokens: int
    template: str = "{context}\n\n{question}"
    prefix: str = ""
    choices: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name = f"sample {self.id!r}"
        if not self.questions or len(self.questions) != len(self.answers):
            raise InputError(
                f"{name} has {len(self.questions)} questions and {len(self.answers)} lists of answers; "
                "give at least one question and one list of answers for each."
            )
        given = [bool(one) and all(text.strip() for text in one) for one in self.answers]
        if self.metric not in _UNANSWERED and not all(given):
            raise InputError(
                f"{name} has no answer to question {given.index(False) + 1}, or an empty one, so that its score would "
                "not depend on the model; give one, or leave the question out."
            )
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
            raise InputError(f"{name} has max_new_tokens={self.max_new_tokens!r}; give a whole number from 1 on.")
        context, question = self.template.find("{context}"), self.template.find("{question}")
        if not 0 <= context < question:
            raise InputError(f"{name} has the template {self.template!r}; it needs {{context}}, then {{question}}.")
        try:
            self.template.format(context="", question="")
        except (KeyError, IndexError, ValueError) as error:
            raise InputError(
                f"{name} has a template that str.format refuses ({error}); write {{{{ and }}}} for braces."
            ) from error

    def prompt(self, question: int = 0) -> str:
        """The raw prompt of one question (counted from 0), the start of the answer included."""
        if not 0 <= question < len(self.questions):
            raise InputError(
                f"sample {self.id!r} has questions 0..{len(self.questions) - 1}; {question} is none of them."
            )
        return self.template.format(context=self.context, question=self.questions[question]) + self.prefix

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready record that ``formats.load(path, "attnpatch")`` reads back."""
        return asdict(self)
