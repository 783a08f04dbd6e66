"""Short sets (GSM8K, MMLU, SuperGLUE, SST-2, MT-Bench) and the package's own format as samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attnpatch.errors import InputError

from .metrics import METRICS
from .sample import Sample

_OWN = tuple(Sample.__dataclass_fields__)


def own(row: dict[str, Any], name: str) -> Sample:
    """A record of the package's own format: the fields of ``Sample``, of which id and task may be left out.

    Raises:
        InputError: an unknown or missing field, or one of the wrong type.
    """
    unknown = [key for key in row if key not in _OWN]
    if unknown:
        raise InputError(f"{name} has the unknown field {unknown[0]!r}; known: {', '.join(_OWN)}.")
    given = {"id": name, "task": "own", "max_new_tokens": 64, **row}
    given["id"], given["task"] = str(given["id"]), str(given["task"])  # numbers, often
    if not isinstance(given["context"], str) or not isinstance(given["metric"], str):
        raise InputError(f"{name}: context and metric are to be texts; correct the line.")
    if given["metric"] not in METRICS:
        raise InputError(f"{name} names the metric {given['metric']!r}; known: {', '.join(METRICS)}.")
    for key, kind in (("template", str), ("prefix", str), ("meta", Mapping)):
        if key in given and not isinstance(given[key], kind):
            what = "a text" if kind is str else "an object"
            raise InputError(f"{name}: {key} is {type(given[key]).__name__}; write {what} there or leave it out.")
    for key in ("questions", "answers", "choices"):
        if not isinstance(given.get(key, []), list):
            raise InputError(f"{name}: {key} is {type(given[key]).__name__}, not a list; write [...] there.")
    if any(isinstance(one, str) for one in given["answers"]):
        raise InputError(f"{name}: answers holds one list for each question; write [[...], ...] there.")
    given["questions"] = tuple(str(one) for one in given["questions"])
    given["answers"] = tuple(tuple(str(a) for a in one) for one in given["answers"])
    given["choices"] = tuple(given.get("choices", ()))
    return Sample(**given)


def short(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Iterator[Sample]:
    """Rows of one of the short sets; which one follows from their keys."""
    two_way = any(row.get("label") == "not_entailment" for row in rows)  # RTE; CB also knows "neutral"
    for row, name in zip(rows, names, strict=True):
        yield _mt_bench(row, name) if "turns" in row else _short(row, name, two_way)


def _mt_bench(row: dict[str, Any], name: str) -> Sample:
    references = row.get("reference") or [None] * len(row["turns"])
    return Sample(
        id=str(row.get("question_id", name)),
        task="mt-bench",
        context="",
        questions=tuple(row["turns"]),
        answers=tuple((one,) if one else () for one in references),
        metric="unscored",
        max_new_tokens=512,
        template="{context}{question}",
        meta={"category": row.get("category", "")},
    )


def _short(row: dict[str, Any], name: str, two_way: bool) -> Sample:
    choices: tuple[str, ...] = ()
    if "subject" in row:
        task, metric, length, choices = "mmlu", "choice", 8, ("A", "B", "C", "D")[: len(row["choices"])]
        listed = "\n".join(f"{letter}. {text}" for letter, text in zip(choices, row["choices"], strict=True))
        context, question, answer = row["question"], f"{listed}\nAnswer:", choices[row["answer"]]
    elif "sentence" in row:
        task, metric, length, choices = "sst2", "label", 4, ("negative", "positive")
        context, question, answer = (
            f"Review: {row['sentence']}",
            "Sentiment (negative or positive):",
            choices[row["label"]],
        )
    elif "passage" in row:
        task, metric, length, choices = "boolq", "label", 4, ("no", "yes")
        context, question = row["passage"], f"Question: {row['question']}?\nAnswer (yes or no):"
        answer = choices[bool(row["label"])]
    elif "choice1" in row:
        task, metric, length, choices = "copa", "choice", 4, ("A", "B")
        asked = "What was the cause?" if row["question"] == "cause" else "What happened as a result?"
        context, answer = row["premise"], choices[row["label"]]
        question = f"{asked}\nA. {row['choice1']}\nB. {row['choice2']}\nAnswer:"
    elif "hypothesis" in row:
        task, metric, length = "entailment", "label", 4
        answer = {"entailment": "yes", "not_entailment": "no", "contradiction": "no", "neutral": "maybe"}[row["label"]]
        choices = ("yes", "no") if two_way else ("yes", "no", "maybe")
        context = row["premise"]
        asked = "yes or no" if two_way else "yes, no or maybe"
        question = f"Question: Does it follow that {row['hypothesis']}\nAnswer ({asked}):"
    else:
        task, metric, length = "gsm8k", "final_number", 320
        context, question, answer = f"Question: {row['question']}", "Let's think step by step.\nAnswer:", row["answer"]
    return Sample(
        id=str(row.get("idx", name)),
        task=task,
        context=context,
        questions=(question,),
        answers=((answer,),),
        metric=metric,
        max_new_tokens=length,
        template="{context}\n{question}",
        choices=choices,
    )
