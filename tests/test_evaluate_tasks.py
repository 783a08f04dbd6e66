"""Generated tasks and readers of files: lengths, determinism, answers in the text, real sets, refusals."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from attnpatch import testbed
from attnpatch.errors import ConfigError, InputError
from attnpatch.evaluate import formats, formats_longbench, metrics, tasks, tasks_length
from attnpatch.evaluate.sample import Sample

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the benchmark files are not in {DATA}")
FILES = sorted(str(file.relative_to(DATA)) for file in DATA.glob("*/*.gz") if file.parent.name != "text_ppl")
FILES += sorted(str(file.relative_to(DATA)) for file in DATA.glob("short_tasks/*.jsonl"))
GENERATED = [name for name in tasks.TASKS if not name.startswith("testbed:")]


class Letters:
    """A tokenizer of one token a byte and one in front: the longest prompts there are."""

    def encode(self, text):
        return [0, *text.encode()]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(testbed.path() / "tokenizer.json"))


def gold(sample, question=0):
    answers = sample.answers[question]
    return ", ".join(answers) if sample.metric == "string_match_all" else answers[0]


@pytest.mark.parametrize("name", GENERATED)
@pytest.mark.parametrize("tokens", [1021, 4099, 9000])
def test_prompts_have_the_length_asked_for_and_hold_their_answers(name, tokens, tokenizer):
    for sample in tasks.get(name).samples(tokenizer, tokens, 3, seed=5):
        length = tasks_length.count_tokens(tokenizer, sample.prompt())
        assert 0.99 * tokens <= length <= tokens
        for question, answers in enumerate(sample.answers):
            assert answers and all(answer in sample.context for answer in answers)
            assert metrics.score(gold(sample, question), sample, question) == 100.0
            assert metrics.score("", sample, question) == 0.0


@pytest.mark.parametrize("name", GENERATED)
def test_length_under_a_tokenizer_of_bytes(name):
    (sample,) = tasks.get(name).samples(Letters(), 6001, 1)
    assert 0.99 * 6001 <= len(Letters().encode(sample.prompt())) <= 6001


@pytest.mark.parametrize("name", [name for name in tasks.TASKS if tasks.TASKS[name].uses_text])
def test_a_given_text_is_the_haystack(name, tokenizer):
    text = "Zebras paint quietly. " * 3 + "Yaks never answer letters on Sundays."
    (sample,) = tasks.get(name).samples(tokenizer, 1200, 1, text=text)
    assert sample.context.count("Yaks never answer letters on") > 3 and "grass is green" not in sample.context


@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_equal_arguments_give_equal_samples_and_seeds_differ(name, tokenizer):
    task = tasks.get(name)
    first = task.samples(tokenizer, 1500, 3, seed=1)
    assert first == task.samples(tokenizer, 1500, 3, seed=1)
    assert first[:2] == task.samples(tokenizer, 1500, 2, seed=1)
    other = task.samples(tokenizer, 1500, 3, seed=2)
    contexts = {sample.context for sample in first + other}
    assert len(contexts) == 6 and len({sample.id for sample in first + other}) == 6


@pytest.mark.parametrize("name", [name for name in tasks.TASKS if name.startswith("testbed:")])
def test_the_embedded_models_tasks_keep_its_wording_and_exact_length(name, tokenizer):
    (sample,) = tasks.get(name).samples(tokenizer, 1024, 1, seed=3)
    marked = f"<|begin|><|user|>{sample.prompt()}<|end|><|assistant|>"
    assert len(tokenizer.encode(marked, add_special_tokens=False).ids) == 1024
    for question, answers in enumerate(sample.answers):
        longest = len(tokenizer.encode(answers[0], add_special_tokens=False).ids)
        assert longest < sample.max_new_tokens and metrics.score(answers[0], sample, question) == 100.0
    if name == "testbed:needle":
        case = made_directly(sample)
        assert (case.context, case.question, case.answer_text) == (
            sample.context,
            sample.questions[0],
            sample.answers[0][0],
        )


def made_directly(sample):
    from attnpatch.testbed import tasks as own

    return own.make("needle", sample.meta["tokens"], seed=1_000_003 * sample.meta["seed"] + sample.meta["number"])


def test_needle_families_follow_their_definitions(tokenizer):
    def one(name):
        (sample,) = tasks.get(name).samples(tokenizer, 2048, 1)
        return sample, sample.context.count("special magic")

    assert one("needle")[1] == 1 and one("multikey")[1] == one("multivalue")[1] == one("multiquery")[1] == 4
    assert one("multikey-dense")[1] > 20 and len(one("multikey-uuid")[0].answers[0][0]) == 36
    assert [len(a) for a in one("multivalue")[0].answers] == [4] == [len(a) for a in one("multiquery")[0].answers]
    turns = one("needle-turns")[0]
    assert len(set(turns.questions)) == 4 and len(set(turns.answers)) == 4 and not turns.prefix
    assert one("needle")[0].prompt().endswith("mentioned in the provided text is")


def test_variables_frequencies_and_common_words_are_true(tokenizer):
    (sample,) = tasks.get("vt").samples(tokenizer, 1500, 1)
    value = sample.questions[0].split("value ")[1].split(" ")[0]
    known = {value}
    for left, right in (
        part.split(".")[0].split(" = ") for part in sample.context.replace("= VAR", "=").split("VAR ")[1:]
    ):
        assert right in known
        known.add(left)
    assert known - {value} == set(sample.answers[0]) and len(known) == 6
    for name, strip in (("fwe", 3), ("cwe", 10)):
        (sample,) = tasks.get(name).samples(tokenizer, 2048, 1)
        words = [word for word in sample.context.split() if word[0].isalpha()]
        counts = sorted({word: words.count(word) for word in words}.items(), key=lambda pair: -pair[1])
        assert {word for word, _ in counts[:strip]} == set(sample.answers[0])
        assert counts[strip - 1][1] > counts[strip][1]


def test_facts_spread_over_a_text_without_sentences_or_spaces():
    words = tasks_length.Haystack("字" * 5000 + " 字", random.Random(0)).words(400)
    text = tasks_length.insert(words, ["ONE", "TWO"], [0.25, 0.75])
    assert 0.2 < text.index("ONE") / len(text) < 0.3 and 0.7 < text.index("TWO") / len(text) < 0.8


REFUSED = {
    "task": (lambda t: tasks.get("neddle"), ConfigError, "unknown task 'neddle'; choose one of needle, multikey"),
    "short": (lambda t: tasks.get("needle").samples(t, 40, 1), ConfigError, "tokens=40 is too short .* give at least"),
    "tokens": (lambda t: tasks.get("needle").samples(t, 0, 1), ConfigError, "tokens=0 for the task 'needle': give a"),
    "bool": (lambda t: tasks.get("kv").samples(t, 500, True), ConfigError, "count=True for the task 'kv'"),
    "seed": (lambda t: tasks.get("kv").samples(t, 500, 1, seed=-1), ConfigError, "seed=-1 .* from 0 on"),
    "text": (
        lambda t: tasks.get("kv").samples(t, 500, 1, text="a b"),
        ConfigError,
        "makes its own text; leave text out",
    ),
    "words": (lambda t: tasks.get("needle").samples(t, 500, 1, text=" x "), InputError, "fewer than two words"),
    "tokenizer": (lambda t: tasks.get("kv").samples(None, 500, 1), ConfigError, "a tokenizer is needed .* NoneType"),
    "embedded": (
        lambda t: tasks.get("testbed:vt").samples(Letters(), 500, 1),
        ConfigError,
        "testbed:vt with tokens=500: .*",
    ),
    "tiny": (lambda t: tasks.get("testbed:vt").samples(t, 12, 1), ConfigError, "testbed:vt with tokens=12: "),
}


@pytest.mark.parametrize("which", list(REFUSED))
def test_what_cannot_be_made_is_refused(which, tokenizer):
    make, error, message = REFUSED[which]
    with pytest.raises(error, match=message):
        make(tokenizer)


@needs_data
@pytest.mark.parametrize("file", FILES)
def test_real_sets_load_and_their_gold_answers_score_100(file):
    samples = formats.load(DATA / file)
    assert len({sample.id for sample in samples}) == len(samples) and str(DATA) not in samples[0].id
    for sample in samples[:: 1 + len(samples) // 200]:
        assert sample.metric in metrics.METRICS and (sample.context or sample.task == "mt-bench")
        assert sample.prompt()
        for question in range(len(sample.questions) if sample.metric != "unscored" else 0):
            assert metrics.score(gold(sample, question), sample, question) == pytest.approx(100.0)
            assert metrics.score("", sample, question) == 0.0


@needs_data
def test_finished_longbench_prompts_are_kept_and_agree_with_the_templates():
    for file in (file for file in FILES if file.startswith("longbench_mini")):
        rows = [json.loads(line) for line in formats.read_text(DATA / file).split("\n") if line]
        for row, sample in zip(rows, formats.load(DATA / file), strict=True):
            assert sample.prompt() == row["prompt"] and sample.questions[0]
            if sample.task == "qasper":  # this set gives it the passages' prompt
                continue
            head, tail, *_ = formats_longbench._TASKS[sample.task]
            assert row["prompt"].startswith(head.removesuffix("{context}"))
            before, after = tail.split("{question}")
            assert before in row["prompt"] and row["prompt"].rstrip().endswith(after.rstrip())


@needs_data
def test_gold_passages_are_mixed_with_others_at_going_places():
    samples = formats.load(DATA / "lost_in_the_middle" / "nq_open_oracle.jsonl.gz")[:40]
    assert [sample.meta["gold"] for sample in samples] == [*range(20), *range(20)]
    sample = samples[3]
    holding = [part for part in sample.context.split("\n") if any(a.lower() in part.lower() for a in sample.answers[0])]
    assert len(holding) == 1 and holding[0].startswith("Document [4](Title: ")


def test_bamboos_numbers_ask_behind_the_document(tmp_path):
    head, asked, document = (
        "Answer the question.",
        "\n\nQuestion:\nwhen was it\n",
        "\n\nDocument:\nIn 1964. Question: none.",
    )
    rows = [{"content": head + document + asked, "answer": "1964"},
            {"content": head + asked.rstrip() + document, "answer": "1964"}]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    one, other = formats.load(tmp_path / "a.jsonl")
    assert one.context == other.context == head + document
    assert one.questions == other.questions and one.questions[0].startswith("\n\nQuestion:\nwhen was it")


@needs_data
def test_bamboos_documents_are_context():
    for sample in formats.load(DATA / "bamboo" / "altqa_4k.jsonl.gz"):
        assert len(sample.questions[0]) < 400 < len(sample.context)


@needs_data
def test_haystacks_load():
    assert len(formats.load_text(DATA / "text_ppl" / "wikitext2_valid.txt.gz")) > 10**6


def test_the_own_format_goes_round(tmp_path):
    sample = Sample(
        "a-1", "mine", "Text {x}.", ("Q?", "R?"), (("a", "b"), ("c",)), "exact_match", 5, prefix="A:", meta={"k": 1}
    )
    file = tmp_path / "own.jsonl.gz"
    with gzip.open(file, "wt", encoding="utf-8") as out:
        out.write(json.dumps(sample.to_dict()) + "\n\n" + json.dumps(replace(sample, id="a-2").to_dict()))
    assert formats.load(file) == [sample, replace(sample, id="a-2")]
    assert sample.prompt(1) == "Text {x}.\n\nR?A:"
    file = tmp_path / "short.jsonl"
    file.write_text('{"context": "c", "questions": ["q"], "answers": [["a"]], "metric": "label", "choices": ["a"]}')
    assert formats.load(file)[0].id == "short-0" and formats.load(file, "attnpatch")[0].max_new_tokens == 64
    file.write_text(GOOD + ', "id": 7, "task": 3}')
    assert (formats.load(file)[0].id, formats.load(file)[0].task) == ("short-7", "3")


GOOD = '{"context": "c", "questions": ["q"], "answers": [["a"]], "metric": "exact_match"'
MALFORMED = {
    "json": (GOOD + "}\n\n{oops", "line 3 is not JSON .* write one object a line"),
    "object": (GOOD + "}\n[1]", "line 2 is not a JSON object"),
    "missing": (GOOD + '}\n{"context": "c"}', "line 2 lacks answers, metric, questions of the format 'attnpatch'"),
    "metric": (
        GOOD + "}\n" + GOOD.replace("exact_match", "bleu") + "}",
        "line 2 names the metric 'bleu'; known: qa_f1",
    ),
    "field": (GOOD + ', "anwsers": []}', "line 1 has the unknown field 'anwsers'"),
    "flat": (GOOD.replace('[["a"]]', '["a"]') + "}", "line 1: answers holds one list for each question"),
    "list": (GOOD.replace('["q"]', '"q"') + "}", "line 1: questions is str, not a list"),
    "counts": (GOOD.replace('["q"]', '["q", "r"]') + "}", "2 questions and 1 lists of answers"),
    "answerless": (GOOD.replace('[["a"]]', "[[]]") + "}", "line 1' has no answer to question 1, or an empty one"),
    "blank": (GOOD.replace('"q"', '"q", "r"').replace('["a"]', '["a"], [" "]') + "}", "no answer to question 2"),
    "new": (GOOD + ', "max_new_tokens": 0}', "max_new_tokens=0; give a whole number from 1 on"),
    "template": (GOOD + ', "template": "{question}"}', "it needs {context}, then {question}"),
    "braces": (GOOD + ', "template": "{a} {context} {question}"}', "str.format refuses"),
    "prefix": (GOOD + ', "prefix": 3}', "line 1: prefix is int; write a text"),
    "unknown": ('{"foo": 1}', "no known format: its first row has the keys foo; name one of attnpatch, longbench"),
    "type": ('{"content": 3, "answer": "4"}', "line 1 does not fit the format 'bamboo' .AttributeError"),
    "longbench": ('{"prompt": "p", "answers": ["a"], "task": "new"}', "LongBench task 'new'; known: narrativeqa"),
    "empty": (" \n", "holds no line"),
    "babi": ("1 Mary went home.\nWhere is she?\thome", "line 2 has no number in front"),
    "babi-answer": ("1 Mary went home.\n2 Where is she?\t\t1", "line 2 asks without an answer"),
}


@pytest.mark.parametrize("which", list(MALFORMED))
def test_malformed_lines_are_refused_by_their_number(which, tmp_path):
    text, message = MALFORMED[which]
    file = tmp_path / "data.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        formats.load(file)


def test_unreadable_files_and_unknown_formats_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist; give a file of samples"):
        formats.load(tmp_path / "none.jsonl")
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(gzip.compress(b"x" * 9999)[:30])
    with pytest.raises(InputError, match="cannot be read .* UTF-8"):
        formats.load(broken)
    (tmp_path / "latin.jsonl").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(InputError, match="cannot be read .* UTF-8"):
        formats.load(tmp_path / "latin.jsonl")
    with pytest.raises(ConfigError, match="unknown format 'longbnch'; choose one of attnpatch, longbench"):
        formats.load(broken, "longbnch")


def test_importing_needs_neither_torch_nor_transformers():
    code = (
        "import sys; from attnpatch.evaluate import tasks, formats; print({'torch', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
