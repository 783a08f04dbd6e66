"""Scores of answers, 0 to 100: the definitions of the benchmarks' own scripts.

``METRICS[name](prediction, answers, sample)`` scores one answer against the accepted ones of its question. Where a
benchmark's score is not per answer or needs a package, the nearest per-answer form stands here and its docstring says
what differs.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

from attnpatch.errors import InputError

from .rouge import rouge_l_f
from .sample import Sample

Metric = Callable[[str, Sequence[str], Sample], float]

_CHINESE_MARKS = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠"
    "［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_MARKS = frozenset(string.punctuation)
_ALL_MARKS = frozenset(string.punctuation + _CHINESE_MARKS)


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and extra white space (SQuAD's rule)."""
    kept = "".join(c for c in text.lower() if c not in _MARKS)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def _characters(text: str) -> list[str]:
    return [c for c in text.lower() if c not in _ALL_MARKS and not c.isspace()]


def _f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    same = sum((Counter(prediction) & Counter(answer)).values())
    return 2.0 * same / (len(prediction) + len(answer)) if same else 0.0


def _share_of_numbers(prediction: str, wanted: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def _first_line(prediction: str) -> str:
    return prediction.lstrip("\n").split("\n")[0]


def _best(one: Callable[[str, str, Sample], float]) -> Metric:
    """The metric that takes the accepted answer with the highest score; ``one`` gives 0 to 1."""

    def score(prediction: str, answers: Sequence[str], sample: Sample) -> float:
        if sample.meta.get("first_line"):  # LongBench's rule for its few-shot tasks
            prediction = _first_line(prediction)
        return 100.0 * max((one(prediction, answer, sample) for answer in answers), default=0.0)

    score.__doc__ = one.__doc__
    return score


def _qa_f1(prediction: str, answer: str, sample: Sample) -> float:
    """LongBench: F1 of normalised words."""
    return _f1(normalise(prediction).split(), normalise(answer).split())


def _qa_f1_zh(prediction: str, answer: str, sample: Sample) -> float:
    """LongBench's F1 for Chinese over characters (its script cuts words with jieba, a package we do not need)."""
    return _f1(_characters(prediction), _characters(answer))


def _rouge_l(prediction: str, answer: str, sample: Sample) -> float:
    """LongBench: ROUGE-L F of the ``rouge`` package (summary level, distinct words)."""
    return rouge_l_f(prediction, answer)


def _rouge_zh(prediction: str, answer: str, sample: Sample) -> float:
    """LongBench's ROUGE-L for Chinese over characters (its script cuts words with jieba)."""
    return rouge_l_f(*(" ".join(c for c in text if not c.isspace()) for text in (prediction, answer)))


def _classification(prediction: str, answer: str, sample: Sample) -> float:
    """LongBench: 1 / number of classes named, if the right one is among them."""
    named = [name for name in sample.choices if name in prediction]
    for name in named:  # removing while iterating skips a name now and then: so does the original
        if name in answer and name != answer:
            named.remove(name)
    return 1.0 / len(named) if answer in named else 0.0


def _number_of(pattern: str) -> Callable[[str, str, Sample], float]:
    def score(prediction: str, answer: str, sample: Sample) -> float:
        """LongBench: share of the numbers in the prediction that are the paragraph's."""
        found = re.findall(pattern, answer)
        if not found:
            raise InputError(f"sample {sample.id!r}: answer {answer!r} does not match {pattern!r}; correct the answer.")
        return _share_of_numbers(prediction, found[0])

    return score


def _count(prediction: str, answer: str, sample: Sample) -> float:
    """LongBench: share of the numbers in the prediction that are the right one."""
    return _share_of_numbers(prediction, answer)


def _code_sim(prediction: str, answer: str, sample: Sample) -> float:
    """LongBench: edit similarity of the first line that holds no mark of a comment or a fence.

    As ``fuzzywuzzy.fuzz.ratio`` without its optional C package: ``difflib``, rounded to whole percent.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((one for one in lines if not any(mark in one for mark in ("`", "#", "//"))), "")
    if not line or not answer:
        return 0.0
    return round(100 * SequenceMatcher(None, line, answer).ratio()) / 100


def _printable(prediction: str) -> str:
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip().lower()


def string_match_all(prediction: str, answers: Sequence[str], sample: Sample) -> float:
    """RULER: share of the answers that occur in the prediction."""
    text = _printable(prediction)
    return 100.0 * sum(answer.lower() in text for answer in answers) / max(1, len(answers))


def string_match_part(prediction: str, answers: Sequence[str], sample: Sample) -> float:
    """RULER (question answering): one of the answers occurs in the prediction."""
    text = _printable(prediction)
    return 100.0 * any(answer.lower() in text for answer in answers)


def _exact_match(prediction: str, answer: str, sample: Sample) -> float:
    """The whole answer, but for case and white space at line and word ends."""
    return float(" ".join(prediction.lower().split()) == " ".join(answer.lower().split()))


def _first_line_match(prediction: str, answer: str, sample: Sample) -> float:
    """The prediction's first line equals the answer after SQuAD's normalisation (bAbI)."""
    wanted = normalise(answer)
    return float(bool(wanted) and normalise(prediction.strip().split("\n")[0]) == wanted)


def _substring_match(prediction: str, answer: str, sample: Sample) -> float:
    """Lost in the Middle, NQ-Open: the normalised answer occurs in the prediction's normalised first line.

    First line only: an answer that copies the context would hold the gold answer, too.
    """
    wanted = normalise(answer)
    return float(bool(wanted) and wanted in normalise(prediction.split("\n")[0]))


def _value_match(prediction: str, answer: str, sample: Sample) -> float:
    """Lost in the Middle, key-value retrieval: the value occurs in the prediction, whatever its case."""
    return float(bool(answer) and answer.lower() in prediction.lower())


def _last_number(prediction: str, answer: str, sample: Sample) -> float:
    """LongEval lines: the last number in the prediction."""
    numbers = re.findall(r"\d+", prediction)
    return float(bool(numbers) and int(numbers[-1]) == int(answer))


def _final_number(prediction: str, answer: str, sample: Sample) -> float:
    """GSM8K: the last number, behind "####" if that stands there; thousands' commas are removed."""

    def last(text: str) -> float | None:
        found = re.findall(r"(?:(?<![\w)])-)?\d[\d,]*(?:\.\d+)?", text.rsplit("####", 1)[-1])
        return float(found[-1].replace(",", "")) if found else None

    return float(last(prediction) is not None and last(prediction) == last(answer))


def _choice(prediction: str, answer: str, sample: Sample) -> float:
    """LongBench v2's letter: "The correct answer is (B)", else "The correct answer is B".

    Where the sentence is missing, a letter that stands first counts, such as "B" or "(B).".
    """
    text = prediction.replace("*", "")
    for pattern in (r"The correct answer is \(([A-Z])\)", r"The correct answer is ([A-Z])"):
        if found := re.search(pattern, text):
            return float(found[1] == answer)
    found = re.match(r"\s*\(?([A-Z])(?![A-Za-z'])", text)
    return float(found is not None and found[1] == answer)


def _label(prediction: str, answer: str, sample: Sample) -> float:
    """The first of the sample's choices that stands in the prediction as a whole word."""
    text = prediction.lower()
    found = []
    for choice in sample.choices:
        place = re.search(rf"(?<!\w){re.escape(choice.lower())}(?!\w)", text)
        if place:
            found.append((place.start(), -len(choice), choice))
    return float(bool(found) and min(found)[2] == answer)


def _bamboo_choice(prediction: str, answer: str, sample: Sample) -> float:
    """BAMBOO's letter: the first character of the answer, whatever its case."""
    return float(prediction.strip()[:1].upper() == answer)


def _bamboo_exact(prediction: str, answer: str, sample: Sample) -> float:
    """BAMBOO altqa: equal but for case, white space and full stops at the ends."""
    return float(prediction.strip().strip(".").lower() == answer.strip().strip(".").lower())


def _bamboo_yes_no(prediction: str, answer: str, sample: Sample) -> float:
    """BAMBOO's hallucination tasks: "yes" among the first three characters, else no.

    Per answer this is accuracy; a result file also has BAMBOO's precision, recall and F1 of the whole set
    (`yes_no_f1`). An empty answer is wrong here.
    """
    text = prediction.strip().lower()
    return float(bool(text) and ("yes" in text[:3]) == (answer.strip().lower().startswith("yes")))


def _bamboo_order(prediction: str, answer: str, sample: Sample) -> float:
    """BAMBOO's sorting tasks: share of the pairs in the right order (0 if the number of items is wrong)."""
    order, right = ([int(one) for one in re.findall(r"\d+", text)] for text in (prediction, answer))
    if len(order) != len(right) or len(right) < 2:
        return 0.0
    base = 1 if min(order) == 1 else 0

    def pairs(items: list[int], base: int = 0) -> set[tuple[int, int]]:
        return {(a - base, b - base) for place, a in enumerate(items) for b in items[place + 1 :]}

    return len(pairs(order, base) & pairs(right)) / len(pairs(right))


def unscored(prediction: str, answers: Sequence[str], sample: Sample) -> float:
    """Sets without gold answers (MT-Bench): asking for a score is an error."""
    raise InputError(
        f"sample {sample.id!r} of {sample.task!r} has no accepted answers, so it cannot be scored; "
        "generate with it and let people or a judge compare, or choose another set."
    )


def yes_no_f1(predictions: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """BAMBOO's figures of a hallucination set, 0 to 100: precision, recall and F1 of "yes" (0 where undefined).

    predictions, answers: one of each a question, as `bamboo_yes_no` reads them; an empty prediction is a "no".
    """
    said = ["yes" in one.strip().lower()[:3] for one in predictions]
    right = [one.strip().lower().startswith("yes") for one in answers]
    hits = sum(a and b for a, b in zip(said, right, strict=True))

    def share(of: int) -> float:
        return 100.0 * hits / of if of else 0.0

    precision, recall = share(sum(said)), share(sum(right))
    both = precision + recall
    return {"precision": precision, "recall": recall, "f1": 2.0 * precision * recall / both if both else 0.0}


METRICS: dict[str, Metric] = {
    "qa_f1": _best(_qa_f1),
    "qa_f1_zh": _best(_qa_f1_zh),
    "rouge_l": _best(_rouge_l),
    "rouge_zh": _best(_rouge_zh),
    "classification": _best(_classification),
    "retrieval": _best(_number_of(r"Paragraph (\d+)")),
    "retrieval_zh": _best(_number_of(r"段落(\d+)")),
    "count": _best(_count),
    "code_sim": _best(_code_sim),
    "string_match_all": string_match_all,
    "string_match_part": string_match_part,
    "exact_match": _best(_exact_match),
    "first_line_match": _best(_first_line_match),
    "substring_match": _best(_substring_match),
    "value_match": _best(_value_match),
    "last_number": _best(_last_number),
    "final_number": _best(_final_number),
    "choice": _best(_choice),
    "label": _best(_label),
    "bamboo_choice": _best(_bamboo_choice),
    "bamboo_exact": _best(_bamboo_exact),
    "bamboo_yes_no": _best(_bamboo_yes_no),
    "bamboo_order": _best(_bamboo_order),
    "unscored": unscored,
}


def score(prediction: str, sample: Sample, question: int = 0) -> float:
    """The score, 0 to 100, of an answer to one question of ``sample``.

    Raises:
        InputError: the sample names a metric that does not exist, or has no accepted answers.
    """
    metric = METRICS.get(sample.metric)
    if metric is None:
        raise InputError(f"sample {sample.id!r} names the metric {sample.metric!r}; known: {', '.join(METRICS)}.")
    return metric(prediction, sample.answers[question], sample)
