"""Prompts: chat or raw, the cut between context and question, turns, truncation."""

from __future__ import annotations

from dataclasses import replace

import evaluation
import pytest
from test_readme import weights_missing

from attnpatch.errors import ConfigError, InputError
from attnpatch.evaluate.encoding import Encoder, literals


def test_chat_prompt_is_the_templates_own():
    tokenizer, sample = evaluation.tokenizer(), evaluation.sample(prefix="w7")
    chat = [{"role": "user", "content": f"{sample.context}\n\n{sample.questions[0]}"}]
    wanted = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    encoded = Encoder(tokenizer).encode(sample, 4)
    assert encoded.whole() == [*wanted, tokenizer.convert_tokens_to_ids("w7")] and encoded.cut == 0
    assert tokenizer.decode(encoded.head) == f"<user> {sample.context}"


def test_raw_prompt_is_the_text():
    tokenizer, sample = evaluation.tokenizer(), evaluation.sample()
    encoded = Encoder(tokenizer, chat=False).encode(sample, 4)
    assert encoded.whole() == tokenizer(f"{sample.context} {sample.questions[0]}")["input_ids"]
    assert encoded.head == tokenizer(sample.context)["input_ids"]
    assert not Encoder(evaluation.tokenizer(None)).chat


def test_braces_in_texts_stay():
    texts = {"context": "{x} {", "questions": ("{question} w1",), "template": "w5 {context}{{w7}} {question}"}
    sample = replace(evaluation.sample(), **texts)
    assert Encoder(Letters(), chat=False).encode(sample, 4).whole() == list(sample.prompt().encode())
    assert literals("{context}\n{{}} {question} w2") == ("", "\n{} ", " w2")


class Letters:
    """A tokenizer of bytes."""

    chat_template = None

    def __call__(self, text, **values):
        return {"input_ids": list(text.encode())}


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "raw"])
def test_both_protocols_feed_the_same_ids(chat):
    sample = evaluation.sample(questions=3)
    aware, agnostic = (
        Encoder(evaluation.tokenizer(), chat, p, questions="requests").encode(sample, 4)
        for p in ("query-aware", "query-agnostic")
    )
    assert aware == agnostic and len({tuple(a) for a in aware.asks}) == 3


@pytest.mark.skipif(weights_missing(), reason="the embedded model's weights are not in this checkout")
@pytest.mark.parametrize("template", ["{context}{question}", "{context}\n\n{question}", "{context} {question}"])
def test_a_byte_level_tokenizer_is_cut_where_no_token_spans(template):
    from transformers import AutoTokenizer

    from attnpatch import testbed

    tokenizer = AutoTokenizer.from_pretrained(testbed.path())
    texts = {"context": "The crow sat on the wal", "questions": ("l, and then?", "ls were low?")}
    sample = replace(evaluation.sample(), **texts, template=template, answers=(("a",), ("b",)))
    encoded = Encoder(tokenizer, False, "query-agnostic", questions="requests").encode(sample, 4)
    for number, question in enumerate(sample.questions):
        assert tokenizer.decode(encoded.whole(number)) == template.format(context=sample.context, question=question)


def test_turns_follow_the_template():
    tokenizer, sample = evaluation.tokenizer(), evaluation.sample(questions=2)
    chat = [
        {"role": "user", "content": f"{sample.context}\n\n{sample.questions[0]}"},
        {"role": "assistant", "content": "w9"},
        {"role": "user", "content": sample.questions[1]},
    ]
    wanted = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    encoded = Encoder(tokenizer).encode(sample, 4)
    assert encoded.whole() + [tokenizer.convert_tokens_to_ids("w9")] + encoded.later[1] == wanted
    raw = Encoder(tokenizer, False).encode(sample, 4)
    assert raw.later[1] == tokenizer(sample.questions[1])["input_ids"]


def test_truncation_from_the_middle_keeps_both_ends():
    sample = evaluation.sample(length=100)
    encoded = Encoder(evaluation.tokenizer(), truncate="middle", limit=60).encode(sample, 4)
    whole = Encoder(evaluation.tokenizer()).encode(sample, 4)
    assert encoded.longest + 4 == 60 and encoded.cut == whole.longest - encoded.longest > 0
    assert encoded.asks == whole.asks
    front = (len(encoded.head) - 1) // 2
    assert encoded.head[: front + 1] == whole.head[: front + 1]
    assert encoded.head[front + 1 :] == whole.head[-(len(encoded.head) - front - 1) :]


def test_truncation_counts_all_turns():
    sample = evaluation.sample(length=100, questions=3)
    encoded = Encoder(evaluation.tokenizer(), truncate="middle", limit=90).encode(sample, 12)
    turns = len(encoded.head) + len(encoded.asks[0]) + sum(map(len, encoded.later[1:])) + 12
    assert turns == 90


@pytest.mark.parametrize("protocol", ["query-aware", "query-agnostic"])
@pytest.mark.parametrize("questions", [1, 3])
def test_questions_that_do_not_fit_lose_their_middle_too(protocol, questions):
    long = " ".join(f"w{i % 50}" for i in range(120))
    sample = replace(evaluation.sample(length=100, questions=questions), questions=(long,) * questions)
    encoded = Encoder(evaluation.tokenizer(), None, protocol, "middle", 100).encode(sample, 12)
    assert 100 - 12 - 8 <= encoded.longest <= 100 - 12 and encoded.sample is sample
    whole = Encoder(evaluation.tokenizer(), None, protocol).encode(sample, 12)
    assert encoded.cut == whole.longest - encoded.longest
    ask, full = encoded.asks[0], whole.asks[0]
    assert len(encoded.head) > 15 and ask[:3] == full[:3] and ask[-3:] == full[-3:]
    with pytest.raises(InputError, match="leaves no room for its context"):  # a text to be scored stays whole
        Encoder(evaluation.tokenizer(), truncate="middle", limit=100).encode(replace(sample, metric="loglikelihood"), 0)


def encoder(**values):
    return lambda: Encoder(evaluation.tokenizer(values.pop("template", evaluation.CHAT)), **values)


REFUSALS = [
    (encoder(protocol="blind"), None, ConfigError, "protocol='blind' is not allowed; choose one of query-aware"),
    (encoder(truncate="left"), None, ConfigError, "truncate='left' is not allowed; choose one of refuse, middle"),
    (encoder(questions="all"), None, ConfigError, "questions='all' is not allowed; choose one of turns, requests"),
    (encoder(template=None, chat=True), None, ConfigError, "has no chat template; leave --chat out, or give --raw"),
    (encoder(template="<user>"), None, ConfigError, "does not show the user's message once and unchanged"),
    (encoder(limit=30), {}, InputError, "sample 's0' of task 'words' has .* more than the 30 the model has"),
    (encoder(limit=6, truncate="middle"), {}, InputError, "leaves no room for its context"),
    (encoder(protocol="query-agnostic"), {"context": " "}, InputError, "no context to compress .* query-aware"),
    (encoder(protocol="query-agnostic", chat=False), {"context": ""}, InputError, "no context to compress"),
    (encoder(chat=False), {"context": "", "questions": ("",)}, InputError, "has no tokens; give some text"),
    (
        encoder(template="<user> {{ messages[0]['content'] }} <bot>"),
        {"questions": ("w1", "w2"), "answers": (("a",), ("b",))}, ConfigError,
        "does not show a second turn.* give --questions requests",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("make", "values", "kind", "message"), REFUSALS, ids=[str(i) for i in range(len(REFUSALS))])
def test_refusals(make, values, kind, message):
    with pytest.raises(kind, match=message):
        made = make()
        made.encode(replace(evaluation.sample(), **(values or {})), 4)
