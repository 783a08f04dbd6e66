"""LongBench (native rows and finished prompts) and LongBench v2 as samples."""

from __future__ import annotations

from typing import Any

from attnpatch.errors import InputError

from .sample import Sample

_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words."
)
_BRIEF = (
    "answer the question based on the story as concisely as you can, using a single phrase if possible. "
    "Do not provide any explanation."
)
_QASPER = (
    "nswer the question {source} as concisely as you can, using a single phrase or sentence if possible. If the "
    "question "
    'cannot be answered based on the information in the article, write "unanswerable". If the question is a yes/no '
    'question, answer "yes", "no", or "unanswerable". Do not provide any explanation.\n\n'
)
_HOPS = f"{_PASSAGES}\n\nThe following are given passages.\n{{context}}"
_HOPS_ASK = f"\n\n{_PASSAGES}\n\nQuestion: {{question}}\nAnswer:"

# task: (text up to the context, text from the context's end on, metric, tokens of an answer).  The official prompts.
_TASKS: dict[str, tuple[str, str, str, int]] = {
    "narrativeqa": (
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question as "
        "concisely as you can, using a single phrase if possible. Do not provide any explanation.\n\nStory: {context}",
        f"\n\nNow, {_BRIEF}\n\nQuestion: {{question}}\n\nAnswer:",
        "qa_f1",
        128,
    ),
    "qasper": (
        "You are given a scientific article and a question. A"
        + _QASPER.replace("{source} ", "")
        + "Article: {context}",
        "\n\n A" + _QASPER.replace("{source}", "based on the above article") + "Question: {question}\n\nAnswer:",
        "qa_f1",
        128,
    ),
    "multifieldqa_en": (
        "Read the following text and answer briefly.\n\n{context}",
        "\n\nNow, answer the following question based on the above text, only give me the answer and do not output any "
        "other words.\n\nQuestion: {question}\nAnswer:",
        "qa_f1",
        64,
    ),
    "multifieldqa_zh": (
        "阅读以下文字并用中文简短回答：\n\n{context}",
        "\n\n现在请基于上面的文章回答下面的问题，只告诉我答案，不要输出任何其他字词。\n\n问题：{question}\n回答：",
        "qa_f1_zh",
        64,
    ),
    "hotpotqa": (_HOPS, _HOPS_ASK, "qa_f1", 32),
    "2wikimqa": (_HOPS, _HOPS_ASK, "qa_f1", 32),
    "musique": (_HOPS, _HOPS_ASK, "qa_f1", 32),
    "dureader": (
        "请基于给定的文章回答下述问题。\n\n文章：{context}",
        "\n\n请基于上述文章回答下面的问题。\n\n问题：{question}\n回答：",
        "rouge_zh",
        128,
    ),
    "gov_report": (
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n{context}",
        "\n\nNow, write a one-page summary of the report.\n\nSummary:{question}",
        "rouge_l",
        512,
    ),
    "qmsum": (
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one "
        "or more sentences.\n\nTranscript:\n{context}",
        "\n\nNow, answer the query based on the above meeting transcript in one or more sentences.\n\nQuery: "
        "{question}\nAnswer:",
        "rouge_l",
        512,
    ),
    "multi_news": (
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}",
        "\n\nNow, write a one-page summary of all the news.\n\nSummary:{question}",
        "rouge_l",
        512,
    ),
    "vcsum": (
        "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}",
        "\n\n会议总结：{question}",
        "rouge_zh",
        512,
    ),
    "trec": (
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}",
        "\n{question}",
        "classification",
        64,
    ),
    "triviaqa": (
        "Answer the question based on the given passage. Only give me the answer and do not output any other "
        "words. The "
        "following are some examples.\n\n{context}",
        "\n\n{question}",
        "qa_f1",
        32,
    ),
    "samsum": (
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}",
        "\n\n{question}",
        "rouge_l",
        128,
    ),
    "lsht": ("请判断给定新闻的类别，下面是一些例子。\n\n{context}", "\n{question}", "classification", 64),
    "passage_count": (
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read "
        "these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other "
        "words, "
        "how many non-repeating paragraphs are there in total?\n\n{context}",
        "\n\nPlease enter the final count of unique paragraphs after removing duplicates. The output format "
        "should only "
        "contain the number, such as 1, 2, 3, and so on.\n\nThe final answer is: {question}",
        "count",
        32,
    ),
    "passage_retrieval_en": (
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the "
        "abstract is "
        "from.\n\n{context}",
        "\n\nThe following is an abstract.\n\n{question}\n\nPlease enter the number of the paragraph that the abstract "
        'is from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: ',
        "retrieval",
        32,
    ),
    "passage_retrieval_zh": (
        "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}",
        "\n\n下面是一个摘要\n\n{question}\n\n请输入摘要所属段落的编号。答案格式必须是"
        '"段落1"，"段落2"等格式\n\n答案是：',
        "retrieval_zh",
        32,
    ),
    "lcc": ("Please complete the code given below. \n{context}", "Next line of code:\n{question}", "code_sim", 64),
    "repobench-p": (
        "Please complete the code given below. \n{context}",
        "{question}Next line of code:\n",
        "code_sim",
        64,
    ),
}
_FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")
# Where the last question of a few-shot prompt starts.
_LAST_SHOT = {"trec": "\nQuestion:", "triviaqa": "\n\nPassage:", "samsum": "\n\nDialogue:", "lsht": "\n新闻内容："}


def longbench(row: dict[str, Any], name: str) -> Sample:
    """A native row (context, input, answers, dataset) or a finished prompt (prompt, answers, task).

    Raises:
        InputError: the row's task is not one of LongBench's 21.
    """
    task = str(row.get("dataset", row.get("task"))).removesuffix("_e")
    if task not in _TASKS:
        raise InputError(f"{name} is of the LongBench task {task!r}; known: {', '.join(_TASKS)}.")
    head, tail, metric, length = _TASKS[task]
    if "prompt" in row:
        context, question, template = *_split(row["prompt"], task, tail), "{context}{question}"
    else:
        context, question, template = row["context"], row["input"], head + tail
    return Sample(
        id=str(row.get("_id", row.get("id", name))),
        task=task,
        context=context,
        questions=(question,),
        answers=(tuple(row["answers"]),),
        metric=metric,
        max_new_tokens=length,
        template=template,
        choices=tuple(row.get("all_classes") or ()),
        meta={"benchmark": "longbench", "first_line": task in _FIRST_LINE},
    )


def _split(prompt: str, task: str, tail: str) -> tuple[str, str]:
    """(context, question) of a finished prompt; joined they are the prompt. A prompt of another form is all context."""
    marks = (_LAST_SHOT.get(task), tail.partition("{question}")[0], _HOPS_ASK.partition("{question}")[0], "\nQuestion:")
    for mark in filter(None, marks):
        place = prompt.rfind(mark)
        if place > 0:
            return prompt[:place], prompt[place:]
    place = prompt.rfind("Next line of code:\n") if task == "repobench-p" else -1
    return (prompt[:place], prompt[place:]) if place > 0 else (prompt, "")


_V2_HEAD = "Please read the following text and answer the question below.\n\n<text>\n{context}\n</text>\n\n"
_V2_TAIL = 'Format your response as follows: "The correct answer is (insert answer here)".'


def longbench_v2(row: dict[str, Any], name: str) -> Sample:
    """A row of LongBench v2: choices as an object of letters or as choice_A ... choice_D."""
    choices = row.get("choices") or {letter: row[f"choice_{letter}"] for letter in "ABCD"}
    listed = "\n".join(f"({letter}) {text}" for letter, text in sorted(choices.items()))
    return Sample(
        id=str(row.get("id", row.get("_id", name))),
        task="longbench-v2",
        context=row["context"],
        questions=(f"What is the correct answer to this question: {row['question']}\nChoices:\n{listed}",),
        answers=((row["answer"],),),
        metric="choice",
        max_new_tokens=128,
        template=f"{_V2_HEAD}{{question}}\n\n{_V2_TAIL}",
        choices=tuple(sorted(choices)),
        meta={key: row[key] for key in ("domain", "sub_domain", "difficulty", "length") if key in row},
    )
