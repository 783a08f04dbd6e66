"""BAMBOO, LongEval, prebuilt RULER, Lost in the Middle, QMSum and bAbI as samples."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from attnpatch.errors import InputError

from .sample import Sample

_BAMBOO_CHOICE = (
    "You are given an article or a long dialogue, a multiple-choice question with four optional answer(marked by "
    "A, B, C, "
    "D). Please choose the best answer to the question based on the given content by responsing its "
    "corresponding letter "
    "(either A, B, C, or D). Do not provide any explanation.\n\nArticle: "
    "```{context}```\n\n{question}\n\nAnswer(Only give "
    "the corresponding letter (either A, B, C, or D)): "
)
_BAMBOO_YES_NO = (
    "You are given an NLP paper and a hypothesis. Your task is to identify if the hypothesis is right according to the "
    'paper. If the hypothesis is entailed by the paper, response "Yes.". If the hypothesis is contradict to the '
    "paper or "
    'has any hallucination, response "No.".\nPaper: ```{context}```\n{question}\nAnswer ("Yes." or "No."):'
)
_BAMBOO_ORDER = (
    "Given a long text, and {{count}} events which take place in the long text, each indicated by number identifier [] "
    "that represents the shuffled order, (e.g. [0], [2], etc.). Reorder the events according to the original "
    "order of the "
    "events in the long text. The events should be listed in descending order using identifiers, and the first "
    "event in "
    "original order should be list first, and the output format should be [] > [], e.g., [0] > [2]. Only response the "
    "reorder results, do not say any word or explain.\n\nLong text:\n{context}\n{question}\n\nGive the reorder "
    "results, "
    "only give the ordered identifiers of the events [] > [] > [] > [] > []: "
)
_BAMBOO_NUMBER = "\n\nYou should only give an number as the answer, without any explanations and other words.\nAnswer: "


def bamboo(row: dict[str, Any], name: str) -> Sample:
    """A BAMBOO row; its kind (choice, hypothesis, order, number) follows from its keys."""
    context, template = row["content"], "{context}{question}"
    answer, choices = str(row["answer"]), tuple[str, ...]()
    if "options" in row:
        task, metric, length, template = "choice", "bamboo_choice", 8, _BAMBOO_CHOICE
        question = f"Question: {row['question']}\nOptions: " + "\n".join(row["options"])
        choices = tuple(row["options"])
    elif "hypothesis" in row:
        task, metric, length, template = "hypothesis", "bamboo_yes_no", 8, _BAMBOO_YES_NO
        question, answer = f"Hypothesis: ```{row['hypothesis']}```", "Yes." if row["answer"] else "No."
    elif "summaries" in row:
        task, metric, length = "order", "bamboo_order", 32
        template = _BAMBOO_ORDER.replace("{{count}}", str(len(row["summaries"])))
        question = "Events: " + "\n".join(f"[{place}] {text}" for place, text in enumerate(row["summaries"]))
        answer = " > ".join(f"[{place}]" for place in row["answer"])
    else:
        task, metric, length = "number", "bamboo_exact", 16
        context, mark, rest = context.rpartition("\n\nQuestion:")
        if not mark:
            raise InputError(f"{name} has no 'Question:' in its content; BAMBOO's altqa rows end with one.")
        asked, first, document = rest.partition("\n\nDocument:")
        if first:  # half of the rows ask before the document, which then would be no context
            context, rest = context + first + document, asked
        question = mark + rest.rstrip() + _BAMBOO_NUMBER
    return Sample(
        id=name,
        task=f"bamboo-{task}",
        context=context,
        questions=(question,),
        answers=((answer,),),
        metric=metric,
        max_new_tokens=length,
        template=template,
        choices=choices,
    )


def longeval(row: dict[str, Any], name: str) -> Sample:
    """A LongEval row: lines (exact number) or topics (the first topic's name occurs in the answer)."""
    lines = "expected_number" in row
    mark = "\nNow the record is over." if lines else " Now the record ends."
    context, found, rest = row["prompt"].rpartition(mark)
    if not found:
        raise InputError(f"{name} lacks {mark.strip()!r} in its prompt; it is not a prompt of LongEval.")
    answer = str(row["expected_number"]) if lines else row["topics"][0]
    return Sample(
        id=name,
        task="longeval-lines" if lines else "longeval-topics",
        context=context,
        questions=(found + rest,),
        answers=((answer,),),
        metric="last_number" if lines else "string_match_part",
        max_new_tokens=100 if lines else 50,
        template="{context}{question}",
    )


# The last sentence of RULER's templates, where the question starts.
_RULER_MARKS = (
    "\nWhat is the special magic",
    "\nWhat are all the special magic",
    "\nQuestion:",
    " Question:",
    "\n\nAnswer the question based on the given documents.",
)


def ruler(row: dict[str, Any], name: str) -> Sample:
    """A prebuilt RULER row: input and outputs (all wanted), or prompt and answer (question answering)."""
    prompt = row["input"] if "input" in row else row["prompt"]
    answers = tuple(str(one) for one in row["outputs"]) if "outputs" in row else (str(row["answer"]),)
    qa = "given documents" in prompt[:200]
    if qa:
        place = prompt.rfind(_RULER_MARKS[-1])
    else:
        place = max(prompt.rfind(mark) for mark in _RULER_MARKS[:-1])
    if place <= 0:
        raise InputError(f"{name} has no question that RULER's templates know; write it in the package's own format.")
    return Sample(
        id=str(row.get("index", name)),
        task="ruler-qa" if qa else "ruler",
        context=prompt[:place],
        questions=(prompt[place:],),
        answers=(answers,),
        metric="string_match_part" if qa else "string_match_all",
        max_new_tokens=32 if qa else 128,
        template="{context}{question}",
        prefix=row.get("answer_prefix", ""),
    )


_KV = (
    "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{context}\n\n"
    "{question}\nCorresponding value:"
)
_DOCUMENTS = (
    "Write a high-quality answer for the given question using only the provided search results (some of which might be "
    "irrelevant).\n\n{context}\n\nQuestion: {question}\nAnswer:"
)
_SEARCH_RESULTS = 20


def lost_in_the_middle(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Iterator[Sample]:
    """Rows of key-value retrieval, of documents (ctxs), or of NQ-Open gold passages.

    A gold passage is mixed with the passages of the rows behind it, 20 search results in all (fewer in short files),
    none of which holds an accepted answer but the gold one; its place goes through 0, 1 ... from row to row.
    """
    meta: dict[str, Any]
    for number, (row, name) in enumerate(zip(rows, names, strict=True)):
        if "ordered_kv_records" in row:
            pairs = [f'"{key}": "{value}"' for key, value in row["ordered_kv_records"]]
            context, question, template = "{" + ",\n ".join(pairs) + "}", f'Key: "{row["key"]}"', _KV
            answers, task, metric = (row["value"],), "kv-retrieval", "value_match"
            meta = {"keys": len(pairs)}
        else:
            passages, place = _search_results(rows, number)
            context = "\n".join(f"Document [{i}](Title: {title}) {text}" for i, (title, text) in enumerate(passages, 1))
            question, template, task, metric = row["question"], _DOCUMENTS, "nq-open", "substring_match"
            answers, meta = tuple(row["answers"]), {"gold": place, "documents": len(passages)}
        yield Sample(
            id=str(row.get("id", name)),
            task=task,
            context=context,
            questions=(question,),
            answers=(answers,),
            metric=metric,
            max_new_tokens=100,
            template=template,
            meta=meta,
        )


def _search_results(rows: Sequence[dict[str, Any]], number: int) -> tuple[list[tuple[str, str]], int | None]:
    row = rows[number]
    if "ctxs" in row:
        return [(one["title"], one["text"]) for one in row["ctxs"]], None
    answers = [answer.lower() for answer in row["answers"]]
    passages: list[tuple[str, str]] = []
    for step in range(1, len(rows)):
        other = rows[(number + step) % len(rows)]
        text = f"{other['title']} {other['text']}".lower()
        if not any(answer in text for answer in answers):
            passages.append((other["title"], other["text"]))
        if len(passages) == _SEARCH_RESULTS - 1:
            break
    place = number % (len(passages) + 1)
    passages.insert(place, (row["title"], row["text"]))
    return passages, place


def qmsum(row: dict[str, Any], name: str) -> Sample:
    """A QMSum meeting with all its queries, general ones first."""
    queries = [*row["general_query_list"], *row["specific_query_list"]]
    return Sample(
        id=name,
        task="qmsum",
        context="\n".join(f"{turn['speaker']}: {turn['content']}" for turn in row["meeting_transcripts"]),
        questions=tuple(one["query"] for one in queries),
        answers=tuple((one["answer"],) for one in queries),
        metric="rouge_l",
        max_new_tokens=512,
        template=(
            "You are given a meeting transcript and a query containing a question or instruction. Answer the query in "
            "one or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting "
            "transcript in one or more sentences.\n\nQuery: {question}\nAnswer:"
        ),
    )


def babi(text: str, stem: str) -> Iterator[Sample]:
    """bAbI's text: one sample a question, its context is the story so far.

    Raises:
        InputError: a line without a number, or a question without an answer, by its line number.
    """
    story: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        found = re.fullmatch(r"(\d+) (.*)", line.rstrip("\r"))
        if not found:
            raise InputError(
                f"{stem}, line {number} has no number in front: {line[:60]!r}; bAbI lines are '3 Where ...'."
            )
        if found[1] == "1":
            story = []
        question, *rest = re.split(r"\t|\|", found[2])
        if not rest:
            story.append(found[2].strip())
            continue
        if not rest[0].strip() or not story:
            raise InputError(
                f"{stem}, line {number} asks without an answer or a story: {line[:60]!r}; correct the line."
            )
        yield Sample(
            id=f"{stem}-{number}",
            task=stem.partition("_")[0],
            context="\n".join(story),
            questions=(question.strip(),),
            answers=((rest[0].strip(),),),
            metric="first_line_match",
            max_new_tokens=12,
            template="{context}\n\nAnswer with one word or a list with commas.\nQuestion: {question}\nAnswer:",
        )
