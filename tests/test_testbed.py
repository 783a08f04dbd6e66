"""The embedded model, its tasks and the parts of its training that run quickly on a CPU."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from attnpatch import testbed
from attnpatch.errors import ConfigError
from attnpatch.testbed import build, data, filler, tasks

MODELS = Path(__file__).parent / "models"
have_weights = (testbed.path() / "model.safetensors").is_file()
needs_weights = pytest.mark.skipif(not have_weights, reason="the embedded model's weights are not in this checkout")
pytestmark = pytest.mark.skipif(
    not (testbed.path() / "tokenizer.json").is_file(), reason="the embedded model's tokenizer is not in this checkout"
)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(testbed.path())


@pytest.fixture(scope="module")
def loaded():
    return testbed.load()


def chat_ids(tokenizer, messages):
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return list(ids if isinstance(ids, list) else ids["input_ids"])


def generate(model, ids, tokens=24):
    out = model.generate(torch.tensor([ids], device=model.device), max_new_tokens=tokens, do_sample=False)
    return out[0, len(ids) :].tolist()


# ---- tasks -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", tasks.KINDS)
@pytest.mark.parametrize("length", [300, 1024, 4097])
def test_length_is_exact_and_ids_are_those_of_the_text(kind, length, tokenizer):
    for seed in range(4):
        case = tasks.make(kind, length, keys=3, seed=seed)
        assert len(case.prompt_ids) == length
        assert tokenizer(case.prompt)["input_ids"] == case.prompt_ids
        assert chat_ids(tokenizer, case.messages) == case.prompt_ids
        assert tokenizer(case.answer_text)["input_ids"] + [tokenizer.eos_token_id] == case.answer_ids


TEXTS = [
    "One sentence. Another one!",
    "No stops here, only words and  double  spaces\n\n\nand\tlines " * 9,
    ["Ein Überblick – naïve café, 12.5 % of 1,000. “Quoted.” Then more; etc.\r\n" * 40, "alpha beta. " * 300],
    "x1 = 3; y=(4+5)*2 ... why? " * 50,
]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_as_haystack(text, tokenizer):
    for seed in range(6):
        case = tasks.make("needle", 777, keys=2, seed=seed, text=text)
        assert len(case.prompt_ids) == 777
        assert tokenizer(case.prompt)["input_ids"] == case.prompt_ids


def test_needle_spans_hold_the_facts(tokenizer):
    for seed in range(5):
        case = tasks.make("needle", 600, keys=4, seed=seed)
        ((start, end),) = case.needle_spans
        fact = tokenizer.decode(case.prompt_ids[start:end])
        key = case.question.removeprefix("What is the code of ").removesuffix("?")
        assert key in fact and case.answer_text in fact
        assert case.context.count(" code of ") + case.context.count(", the code is ") == 4
    case = tasks.make("vt", 600, keys=3, seed=1)
    first, second = (tokenizer.decode(case.prompt_ids[a:b]) for a, b in case.needle_spans)
    assert case.answer_text.split()[-1] in first
    assert case.question.split("variable ")[1].rstrip("?") in second
    case = tasks.make("lines", 600, seed=1)
    ((start, end),) = case.needle_spans
    assert f"<{case.answer_text}>" in tokenizer.decode(case.prompt_ids[start:end])
    assert case.context.count("\nline ") == case.keys


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_depth_places_the_asked_needle(depth):
    case = tasks.make("needle", 4096, keys=3, seed=2, depth=depth)
    assert abs(case.depth - depth) < 0.03


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_hops_of_a_chain(hops):
    case = tasks.make("vt", 700, keys=2, seed=3, hops=hops)
    assert case.answer_text.count("=") == hops and len(case.needle_spans) == hops


def test_cases_depend_on_the_seed_alone():
    random.seed(1)
    one = tasks.make("needle", 500, keys=2, seed=7)
    random.seed(2)
    assert tasks.make("needle", 500, keys=2, seed=7) == one
    assert tasks.make("needle", 500, keys=2, seed=8).prompt_ids != one.prompt_ids
    state = random.getstate()
    tasks.make("vt", 500, keys=2, seed=7)
    assert random.getstate() == state


def test_filler_does_not_repeat():
    text = filler.filler(60_000, random.Random(0))
    sentences = [s for s in text.replace("\n", " ").split(". ") if s]
    assert len(set(sentences)) > 0.95 * len(sentences)


def test_turns_share_one_context(tokenizer):
    talk = tasks.turns(900, questions=3, keys=5, seed=4)
    assert len(talk.turns) == 3 and len({question for question, _ in talk.turns}) == 3
    assert chat_ids(tokenizer, talk.messages(0)) == talk.prompt_ids and len(talk.prompt_ids) == 900
    later = chat_ids(tokenizer, talk.messages(2))
    assert later[:899] == talk.prompt_ids[:899]
    assert [m["role"] for m in talk.messages(2)] == ["user", "assistant"] * 2 + ["user"]
    with pytest.raises(ValueError, match="0..2"):
        talk.messages(3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tasks.make("haystack", 500), "needle, vt, lines"),
        (lambda: tasks.make("needle", 20), "at least"),
        (lambda: tasks.make("needle", 0), "length"),
        (lambda: tasks.make("vt", 100, keys=9), "at least"),
        (lambda: tasks.make("lines", 128), "at least"),
        (lambda: tasks.make("needle", 500, keys=0), "keys"),
        (lambda: tasks.make("needle", 500, depth=2.0), "between 0 and 1"),
        (lambda: tasks.make("vt", 500, hops=0), "hops"),
        (lambda: tasks.make("needle", 500, text=""), "two words"),
        (lambda: tasks.make("needle", 500, text=[]), "two words"),
        (lambda: tasks.make("needle", 500, text=5), "text holds 5"),
        (lambda: tasks.make("needle", 500, text=[b"bytes"]), "text holds b'bytes'"),
        (lambda: tasks.make("needle", 500.5), "length=500.5: give a whole number"),
        (lambda: tasks.make("needle", 500, keys="2"), "keys='2': give a whole number"),
        (lambda: tasks.turns(500, questions=3, keys=2), "questions"),
    ],
)
def test_wrong_arguments(call, words):
    with pytest.raises(ConfigError, match=words):
        call()


def test_the_minimum_in_the_message_works():
    for kind in tasks.KINDS:
        with pytest.raises(ValueError, match="at least") as caught:
            tasks.make(kind, 20, seed=5)
        least = int(str(caught.value).split("at least ")[1].split()[0])
        assert len(tasks.make(kind, least, seed=5).prompt_ids) == least or kind == "lines"


def test_foreign_tokenizer():
    from tokenizers import Tokenizer, models

    with pytest.raises(ValueError, match="testbed"):
        tasks.make("needle", 500, tokenizer=Tokenizer(models.BPE()))


def test_missing_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(testbed, "path", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match="reinstall"):
        testbed.load()


# ---- training parts ----------------------------------------------------------------------------------------------
def test_training_rows(tokenizer):
    encoder = build.Encoder(tokenizer.backend_tokenizer)
    corpus = data.Corpus.__new__(data.Corpus)
    corpus.encoder = encoder
    corpus.books = corpus.filler = build.Haystack.from_text(filler.filler(40_000, random.Random(0)), encoder)
    corpus.words = (filler.ADJECTIVES, filler.NOUNS)
    stage = data.Stage("t", ((1024, 1.0),), (1, 1, 1), 0.5, 0.5, (1.0, 1.0), (1, 1))
    rng = random.Random(0)
    for _ in range(12):
        ids, positions, weights, groups = data.row(corpus, stage, 1024, rng)
        assert len(ids) == 1024 and positions[-1] == 1022 and ids[-1] == encoder.end
        assert len(positions) == len(weights) == len(groups)
        assert encoder.tokenizer.encode(encoder.decode(ids), add_special_tokens=False).ids == ids
        assert all(ids[position] == encoder.assistant for position in positions if ids[position + 1] == encoder("=")[0])
    length, ids, positions, weights, groups = data.batch(corpus, stage, 4096, rng)
    assert length == 1024 and ids.shape == (4, 1024) and positions.max() < 4095 and len(weights) == len(groups)


def test_wilson_interval():
    from attnpatch.testbed.score import wilson

    assert wilson(500, 500) == pytest.approx((0.9924, 1.0), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(50, 100)
    assert low == pytest.approx(0.4038, abs=1e-3) and high == pytest.approx(0.5962, abs=1e-3)


def test_training_forward_is_the_models_own():
    from attnpatch.testbed.model import Forward, new_model, orthogonalise

    torch.manual_seed(0)
    model = new_model(hidden=128, layers=2, heads=4, kv_heads=2, mlp=64).eval()
    ids = torch.randint(0, 4096, (2, 50))
    forward = Forward(model, compiled=False)
    with torch.no_grad():
        logits = forward.logits(forward(ids, torch.float32)).view(2, 50, -1)
        torch.testing.assert_close(logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    singular = torch.linalg.svdvals(orthogonalise(torch.randn(3, 32, 64)).float())
    assert 0.5 < singular.min() and singular.max() < 1.4


# ---- the model ---------------------------------------------------------------------------------------------------
@needs_weights
def test_shape_and_tokenizer(loaded):
    model, tokenizer = loaded
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (8, 8, 4)
    assert model.dtype == torch.float32 and not model.training
    assert len(tokenizer) == 4096 and len(tokenizer("48213")["input_ids"]) == 5
    assert sum(f.stat().st_size for f in testbed.path().iterdir()) < 19_000_000


@needs_weights
@pytest.mark.parametrize(
    ("kind", "length", "keys", "cases"),
    [("needle", 1024, 1, 8), ("needle", 2048, 4, 4), ("vt", 1024, 4, 3), ("lines", 1024, 1, 3)],
)
def test_answers(kind, length, keys, cases, loaded):
    model, _ = loaded
    for seed in range(cases):
        case = tasks.make(kind, length, keys=keys, seed=seed)
        assert generate(model, case.prompt_ids) == case.answer_ids


@needs_weights
def test_answers_turn_after_turn(loaded):
    model, tokenizer = loaded
    talk = tasks.turns(700, questions=3, keys=6, seed=1)
    for turn, (_, answer) in enumerate(talk.turns):
        ids = generate(model, chat_ids(tokenizer, talk.messages(turn)))
        assert tokenizer.decode(ids, skip_special_tokens=True) == answer


@pytest.mark.parametrize(("name", "keys"), [("qwen3", 1), ("qwen3", 4), ("gemma3", 1)])
def test_siblings_answer(name, keys):
    from transformers import AutoModelForCausalLM

    if not (MODELS / name / "model.safetensors").is_file():
        pytest.skip(f"tests/models/{name} is not in this checkout")
    model = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32).eval()
    for seed in range(4):
        case = tasks.make("needle", 512, keys=keys, seed=seed)
        assert generate(model, case.prompt_ids) == case.answer_ids


def test_evidence_matches_the_card():
    file = Path(__file__).parent.parent / "recipes" / "evidence" / "testbed.json"
    if not file.is_file():
        pytest.skip("no evidence file in this checkout")
    card = (testbed.path() / "README.md").read_text(encoding="utf-8")
    for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
        assert f"| {row['correct']}/{row['n']} |" in card and f"| {row['kind']} |" in card
