"""Metrics against values worked out by hand from their definitions."""

from __future__ import annotations

import pytest

from attnpatch.errors import InputError
from attnpatch.evaluate.metrics import METRICS, normalise, score, yes_no_f1
from attnpatch.evaluate.rouge import rouge_l_f
from attnpatch.evaluate.sample import Sample


def sample(metric, answers, choices=(), **meta):
    return Sample("s", "t", "c", ("q",), (tuple(answers),), metric, 8, choices=tuple(choices), meta=meta)


CLASSES = ("City", "Other location", "location", "Reason")
# metric, prediction, answers, score, classes, meta
CASES = [
    ("qa_f1", "The cat, a dog!", ["cat dog"], 100, (), {}),
    ("qa_f1", "red blue green", ["blue green black white"], 100 * 4 / 7, (), {}),
    ("qa_f1", "nothing", ["else", "nothing else"], 100 * 2 / 3, (), {}),
    ("qa_f1", "\n55\nand more words", ["55"], 100, (), {"first_line": True}),
    ("qa_f1_zh", "增长 25%。", ["增长了25"], 100 * 8 / 9, (), {}),
    ("rouge_l", "a b c", ["a x c y"], 100 * 4 / 7, (), {}),
    ("rouge_zh", "我爱你", ["我爱他们"], 100 * 4 / 7, (), {}),
    ("classification", "It is a Reason", ["Reason"], 100, CLASSES, {}),
    ("classification", "City or Reason", ["Reason"], 50, CLASSES, {}),
    ("classification", "Other location", ["Other location"], 100, CLASSES, {}),
    ("classification", "City", ["Reason"], 0, CLASSES, {}),
    ("retrieval", "Paragraph 19, not 3", ["Paragraph 19"], 50, (), {}),
    ("retrieval", "none", ["Paragraph 19"], 0, (), {}),
    ("retrieval_zh", "段落5", ["段落5"], 100, (), {}),
    ("count", "46 or 46 or 4", ["46"], 100 * 2 / 3, (), {}),
    ("code_sim", "```python\n# note\nabcd\nzzz", ["abce"], 75, (), {}),
    ("code_sim", "```", ["abce"], 0, (), {}),
    ("string_match_all", "Found ABC and def\x07", ["abc", "def", "ghi"], 100 * 2 / 3, (), {}),
    ("string_match_part", "Found ABC", ["abc", "xyz"], 100, (), {}),
    ("exact_match", " 48213.\n", ["48213."], 100, (), {}),
    ("exact_match", "48213", ["48213."], 0, (), {}),
    ("first_line_match", "The garden.\nQuestion: more", ["garden"], 100, (), {}),
    ("first_line_match", "milk", ["milk,football"], 0, (), {}),
    ("substring_match", "It was the Röntgen, W.", ["nobody", "Röntgen"], 100, (), {}),
    ("substring_match", "Nobody knows.\nRöntgen", ["Röntgen"], 0, (), {}),
    ("value_match", "It is 0D7B-e034.", ["0d7b-e034"], 100, (), {}),
    ("value_match", "0d7be034", ["0d7b-e034"], 0, (), {}),
    ("last_number", "line 7 has 2416.", ["2416"], 100, (), {}),
    ("last_number", "2416 on line 7", ["2416"], 0, (), {}),
    ("final_number", "so 9*2=18 #### 1,018", ["x #### 1018"], 100, (), {}),
    ("final_number", "The answer is $18.00.", ["#### 18"], 100, (), {}),
    ("final_number", "20-18", ["18"], 100, (), {}),
    ("final_number", "it is -18", ["18"], 0, (), {}),
    ("choice", "The correct answer is (B).", ["B"], 100, (), {}),
    ("choice", "**The correct answer is B**", ["B"], 100, (), {}),
    ("choice", "The correct answer is B. No: The correct answer is (C)", ["C"], 100, (), {}),
    ("choice", "A. Or: The correct answer is (B)", ["B"], 100, (), {}),
    ("choice", "(C) because A", ["C"], 100, (), {}),
    ("choice", "A dog", ["A"], 100, (), {}),
    ("choice", "Because of D", ["D"], 0, (), {}),
    ("label", "Not sure: no, yes", ["no"], 100, ("yes", "no"), {}),
    ("label", "nobody", ["no"], 0, ("yes", "no"), {}),
    ("bamboo_choice", " b. It is", ["B"], 100, (), {}),
    ("bamboo_choice", "The answer is B", ["B"], 0, (), {}),
    ("bamboo_exact", " 1964. ", ["1964"], 100, (), {}),
    ("bamboo_exact", "in 1964", ["1964"], 0, (), {}),
    ("bamboo_yes_no", "Yes, it is", ["Yes."], 100, (), {}),
    ("bamboo_yes_no", "It is", ["No."], 100, (), {}),
    ("bamboo_order", "[1] > [0] > [2]", ["[0] > [1] > [2]"], 100 * 2 / 3, (), {}),
    ("bamboo_order", "[1] > [2] > [3]", ["[0] > [1] > [2]"], 100, (), {}),
    ("bamboo_order", "[0] > [1]", ["[0] > [1] > [2]"], 0, (), {}),
]


@pytest.mark.parametrize("case", CASES, ids=[f"{case[0]}-{number}" for number, case in enumerate(CASES)])
def test_scores_by_hand(case):
    metric, prediction, answers, expected, choices, meta = case
    assert score(prediction, sample(metric, answers, choices, **meta)) == pytest.approx(expected)


@pytest.mark.parametrize("metric", [name for name in METRICS if name != "unscored"])
def test_an_empty_answer_scores_nothing_and_the_range_holds(metric):
    answer = {"retrieval": "Paragraph 1", "retrieval_zh": "段落1", "bamboo_order": "[1] > [0]"}.get(metric, "1")
    one = sample(metric, [answer], ("1", "2"))
    for empty in ("", " ", "\n\n"):
        assert score(empty, one) == 0.0
    for text in ("1", "1 1 1", "Yes " * 9, "\x00", "😀", "." * 40, "[" * 30, "A" * 3000):
        assert 0.0 <= score(text, one) <= 100.0
    assert METRICS[metric].__doc__


def test_bamboos_figures_of_a_whole_set():
    answers = ["Yes.", "Yes.", "Yes.", "No.", "No."]
    found = yes_no_f1(["Yes.", "yes, it is", "No.", "Yes", ""], answers)
    assert found == pytest.approx({"precision": 200 / 3, "recall": 200 / 3, "f1": 200 / 3})
    assert yes_no_f1(answers, answers) == {"precision": 100.0, "recall": 100.0, "f1": 100.0}
    assert yes_no_f1([""] * 5, answers) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_normalisation_is_squads():
    assert normalise("The  Quick-brown, an A fox's") == "quickbrown foxs"


def test_rouge_counts_distinct_words_over_sentences():
    # the reference's two sentences take {a, b} and {d}; 4 distinct words there, 3 in the prediction
    assert rouge_l_f("a b. d", "a b c. d") == pytest.approx(2 * (3 / 4) / (3 / 4 + 1))
    assert rouge_l_f("a a a a", "a") == 1.0
    assert rouge_l_f("...", "a") == rouge_l_f("a", " ") == 0.0


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(InputError, match="'s' of 't' has no accepted answers, so it cannot be scored"):
        score("text", sample("unscored", []))
    with pytest.raises(InputError, match="names the metric 'blue'; known: qa_f1"):
        score("text", sample("blue", ["a"]))
    with pytest.raises(InputError, match="answer '3' does not match"):
        score("text", sample("retrieval", ["3"]))
    with pytest.raises(InputError, match=r"has questions 0..0; 1 is none of them"):
        sample("count", ["1"]).prompt(1)
