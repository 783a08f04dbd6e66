"""Eviction traces: what a layer kept, how the last tokens saw the needle, the text of tokens, and the command."""

from __future__ import annotations

import json

import pytest
import torch
from evaluation import text as words
from evaluation import tokenizer
from test_cli import needs_weights, one_error, outcome

from attnpatch.api import patched, resolve
from attnpatch.errors import ConfigError, InputError
from attnpatch.report import status
from attnpatch.reporting import page, reading, tracing
from attnpatch.reporting.trace import Layer, Trace

NEEDLE = [20, 21, 22, 40]
LENGTH = 97


def build(kv_heads=2, dtype=torch.float32, kind="llama"):
    """A random model of two layers with 8 query heads."""
    from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

    torch.manual_seed(0)
    common = dict(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8, head_dim=8,
        num_key_value_heads=kv_heads, max_position_embeddings=512, eos_token_id=1, bos_token_id=None, pad_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    config = (
        LlamaConfig(**common)
        if kind == "llama"
        else Gemma2Config(**common, sliding_window=16, attn_logit_softcapping=4.0, query_pre_attn_scalar=8)
    )
    config._attn_implementation = "eager"
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.tensor([tokenizer()(words(LENGTH), add_special_tokens=False)["input_ids"]])


def looked(model, ids, window):
    """(look, best, worst) of each layer from the stock model's own attention weights."""
    with torch.no_grad():
        layers = model(ids, output_attentions=True).attentions
    made = []
    for weight in layers:
        mean = weight[0, :, -window:].float().mean(1)  # [Hq, S]
        look = max(sum(row[i].item() for i in NEEDLE) for row in mean)
        groups = mean.shape[0] // model.config.num_key_value_heads
        ranks = []
        for head in mean.split(groups):
            votes = head.mean(0)[:-window].tolist()
            ranks.append([1 + sum(v > votes[i] for v in votes) for i in NEEDLE])
        chosen = min(ranks, key=max)
        made.append((look, min(chosen), max(chosen)))
    return made


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("kv_heads", [8, 2, 1], ids=["gqa1", "gqa4", "gqa8"])
def test_the_eye_sees_what_the_models_own_weights_say(kv_heads, kind, ids):
    model = build(kv_heads, kind=kind)
    want = looked(model, ids, 16)
    eye = tracing.Eye(needle=NEEDLE, window=16)
    tracing.answer(model, tokenizer(), ids, [eye], 2)
    assert set(eye.seen) == ({0, 1} if kind == "llama" else {1})  # gemma2's first layer slides
    for at, (look, best, worst) in eye.seen.items():
        assert look.item() == pytest.approx(want[at][0], rel=1e-4)
        assert (best.item(), worst.item()) == want[at][1:]


def test_a_needle_within_the_window_has_no_rank(ids):
    eye = tracing.Eye(needle=[LENGTH - 2])
    tracing.answer(build(), tokenizer(), ids, [eye], 1)
    assert all(best is None and worst is None and 0 < look < 1 for look, best, worst in eye.seen.values())


def needle_of(ids):
    row = tokenizer().convert_ids_to_tokens(ids[0].tolist())
    at = 30
    return " ".join(row[at : at + 3]), at


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kv_heads", [8, 2, 1], ids=["gqa1", "gqa4", "gqa8"])
def test_kept_tokens_are_those_of_the_cache(kv_heads, dtype, ids):
    model, (needle, at) = build(kv_heads, dtype), needle_of(ids)
    before = model(ids).logits
    patches = resolve("snapkv", budget=30, window_size=8)
    made = tracing.trace(model, tokenizer(), ids, patches, name="tiny", needle=needle, max_new_tokens=3)
    assert torch.equal(model(ids).logits, before)  # un-patched again
    with patched(model, patches), torch.no_grad():
        model.generate(ids, max_new_tokens=1, do_sample=False, attention_mask=torch.ones_like(ids))
        held = status(model).layers
    assert (at, at + 3) in made.needle
    for layer, row in zip(made.layers, held, strict=True):
        heads = [set(p.tolist()) for p in row.positions[0]]
        assert layer.heads == [len(h) for h in heads] == [30] * kv_heads
        assert layer.needle == [sum(i in h for a, b in made.needle for i in range(a, b)) for h in heads]
        for i, digit in enumerate(layer.kept):
            holding = sum(i in h for h in heads)
            assert (digit == "0") == (holding == 0) and (digit == "9") == (holding == kv_heads), (i, digit)
        assert layer.look is not None and 1 <= layer.best <= layer.worst <= LENGTH


def test_by_position_and_by_step(ids):
    """What is told is the state as the prompt ended, not after steps that evict more."""
    made = tracing.trace(
        build(), tokenizer(), ids, resolve("streamingllm", budget=20, sink=4), name="t", max_new_tokens=9
    )
    kept = {layer.kept for layer in made.layers}
    assert kept == {"9" * 4 + "0" * (LENGTH - 20 + 1) + "9" * 15}  # the coming token has its room
    assert not made.needle and all(layer.look is None for layer in made.layers)


def test_layers_that_slide_are_left_alone(ids):
    made = tracing.trace(
        build(kind="gemma2"), tokenizer(), ids, resolve("snapkv", budget=30, window_size=8), name="t", max_new_tokens=2
    )
    assert made.layers[0].reason and not made.layers[0].kept and made.layers[1].heads == [30, 30]
    assert "sliding" in page.build(reading.Records(traces=[made]))


def test_a_trace_survives_its_file(ids, tmp_path):
    made = tracing.trace(
        build(), tokenizer(), ids, resolve("snapkv", budget=30, window_size=8), name="t", needle="w42", max_new_tokens=2
    )
    (tmp_path / "t.json").write_text(json.dumps(made.as_dict()))
    assert reading.read([tmp_path / "t.json"]).traces == [made]


def test_several_occurrences_and_none(ids):
    with pytest.raises(InputError, match="'w99' does not occur in the prompt"):
        tracing.trace(build(), tokenizer(), ids, resolve("snapkv"), name="t", needle="w99")
    assert tracing.find(["a", "b ", "c", "", "ab", " c"], "b c") == [(1, 3), (4, 6)]
    assert tracing.find(["abc", "def"], "cd") == [(0, 2)] and tracing.find(["abc", "def"], "b") == [(0, 1)]


def test_what_cannot_be_traced(ids):
    with pytest.raises(InputError, match="are not one prompt"):
        tracing.trace(build(), tokenizer(), ids.repeat(2, 1), resolve("snapkv"), name="t")
    with pytest.raises(ConfigError, match="infiniretri puts a prompt of its own"):
        tracing.trace(build(), tokenizer(), ids, resolve("infiniretri"), name="t")


def test_pieces_join_to_the_text_with_characters_of_several_tokens():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    taken = PreTrainedTokenizerFast(tokenizer_object=inner)
    text = "né 語\n😀 <b>"
    tokens = tracing.pieces(taken, taken(text)["input_ids"])
    assert "".join(tokens) == text and len(tokens) == len(text.encode())
    assert tokens[:4] == ["n", "é", "", " "]


# ---- the command ---------------------------------------------------------------------------------------------------
@needs_weights
def test_the_command_traces_a_needle_of_the_testbed(tmp_path, capsys):
    code, said, _ = outcome(
        capsys, "report", "--trace", "--patch", "snapkv", "--set", "budget=48", "--length", "512", "--depth", "0.2",
        "--out", tmp_path / "r.html", "--save-trace", tmp_path / "t.json", "--device-map", "cpu",
    )  # fmt: skip
    assert code == 0 and "and a trace" in said
    made = Trace.from_dict(json.loads((tmp_path / "t.json").read_text()))
    (span,) = made.needle
    assert made.expected.strip() in "".join(made.tokens[slice(*span)]) and made.dense == made.expected.strip()
    assert len(made.tokens) == 512 and {n for layer in made.layers for n in layer.heads} == {48}
    text = (tmp_path / "r.html").read_text()
    assert "The needle, token by token" in text and "Where each layer kept tokens" in text


@needs_weights
def test_the_command_traces_a_prompt(tmp_path, capsys):
    (tmp_path / "p.txt").write_text(
        "The code of <b>amber fox</b> is 48213. " + "It rained. " * 60 + "What is the code?"
    )
    code, _, _ = outcome(
        capsys, "report", "--trace", "--model", "testbed", "--patch", "streamingllm", "--set", "budget=64",
        "--prompt-file", tmp_path / "p.txt", "--needle", "<b>amber fox</b> is 48213", "--expected", "48213",
        "--max-new-tokens", "8", "--out", tmp_path / "r.html", "--device-map", "cpu",
    )  # fmt: skip
    text = (tmp_path / "r.html").read_text()
    assert code == 0 and "whatever they say" in text and "<b>" not in text and "&lt;b&gt;amber" in text


@needs_weights
def test_a_needle_too_long_for_its_prompt(tmp_path, capsys):
    error = one_error(capsys, "report", "--trace", "--patch", "snapkv", "--length", "8", "--out", tmp_path / "r.html")
    assert "--length 8" in error


def test_layers_know_what_fits():
    with pytest.raises(ValueError, match="layer 3 holds figures that are no numbers"):
        Layer(3, kept="9", heads=["1"]).check(1, False)
