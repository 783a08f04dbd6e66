"""InfiniRetri against an independent run from its specification, and its invariants."""

from __future__ import annotations

import io
import json
import re
import tracemalloc
from types import SimpleNamespace

import pytest
import torch
from attnpatch.patches.infiniretri import InfiniRetri, phrase_sums, token_scores, top_tokens
from transformers import GenerationConfig

import attnpatch
from attnpatch import retrieval, testbed
from attnpatch.bench.shapes import random_model
from attnpatch.engine import tap
from attnpatch.errors import ConfigError, InputError, UnsupportedModeError
from attnpatch.executors import naive, summed_rows
from attnpatch.testbed.tasks import make

SHORT = "{context}\n\n{question}"
SMALL = {"window_length": 200, "topk": 20, "max_new_tokens": 0}


@pytest.fixture(scope="module")
def trained():
    return testbed.load(dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(trained):
    return trained[1]


@pytest.fixture(scope="module")
def tiny():
    return random_model("tiny", dtype=torch.float32, device="cpu")


def book(words=900, seed=0):
    """Sentences of different lengths and paragraphs, with a delimiter of every kind."""
    import random

    from attnpatch.testbed.filler import filler

    return filler(6 * words, random.Random(seed)).strip()


# ---- the specification, run naively -------------------------------------------------------------------------------
def naive_split(text, g):
    cur, found = "", []
    for piece in [p for p in re.split(r"(\n\n)|([。！？.?!])", text) if p]:
        s = piece.strip()
        if not cur.strip() or not s or s in list("。！？.?!") or (cur.endswith(".") and len(s) <= g):
            cur += piece
        else:
            found.append(cur)
            cur = piece
    return found + [cur] * bool(cur.strip())


def naive_chunks(text, tok, m):
    found, chunk, total, sep = [], "", 0, len(tok.encode("\n", add_special_tokens=False))
    for s in naive_split(text, 10):
        n = len(tok.encode(s, add_special_tokens=False))
        if chunk and total + n + sep > m:
            found.append(chunk)
            chunk, total = "", 0
        total += n + (sep if chunk else 0)
        chunk += s
    return [*found, chunk]


def naive_run(model, tok, context, question, template, m, k_top, k, weights=True, faithful=True):
    """(kept sentences of every pass, rows' weights): the full map of the last layer by eager attention."""

    def enc(s):
        return tok.encode(s, add_special_tokens=False)

    kept, w, passes = [], None, []
    for chunk in naive_chunks(context, tok, m):
        if faithful:
            parts = naive_split("".join(kept + [chunk]).strip() + "\n\n", 8)
        else:
            parts = kept + naive_split(chunk, 8)
        fed = list(parts)
        if not faithful:
            fed[0] = fed[0].lstrip()
            fed[-1] = fed[-1].rstrip() + "\n\n"
        user = template.replace("{context}", "".join(fed).strip()).replace("{question}", question.strip())
        messages = [{"role": "system", "content": ""}, {"role": "user", "content": user}][not faithful :]
        whole = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        at = whole.index("".join(fed).strip())
        tail = whole[at + len("".join(fed)) :]
        head, after = naive_split(whole[:at], 8), naive_split(tail, 8)
        asked = next(i for i, s in enumerate(after) if s.strip().startswith(naive_split(question, 8)[0].strip()))
        ids = [enc(s) for s in head + fed + after]
        flat = [x for s in ids for x in s]
        c0 = sum(map(len, ids[: len(head)]))
        counts = [len(enc(s)) for s in fed]
        c1 = c0 + sum(counts)
        r0 = c1 + sum(len(enc(s)) for s in after[:asked])
        with torch.no_grad():
            full = model(torch.tensor([flat]), output_attentions=True).attentions[-1][0].float().sum(0)  # [N, N]
        a = full[r0:]
        if w is None:
            w = a[:, r0:].sum(1)
            w = w if weights else torch.ones_like(w)
        x = torch.zeros_like(a[:, c0:c1])
        for j in range(c1 - c0):
            x[:, j] = a[:, c0:c1][:, max(0, j - k // 2) : j + (k + 1) // 2].sum(1)
        score = (w[:, None] ** 2 * x).sum(0)
        ranked = sorted(range(c1 - c0), key=lambda j: (-score[j].item(), j))[:k_top]
        owner = [i for i, n in enumerate(counts) for _ in range(n)]
        chosen = sorted({owner[j] for j in ranked})
        kept = [tok.decode(enc(parts[i])) if faithful else parts[i] for i in chosen]
        passes.append((list(kept), len(flat)))
    return passes, w


@pytest.mark.parametrize(
    ("seed", "options"),
    [
        (0, {"faithful": True}),
        (1, {}),
        (2, {"use_question_weight": False}),
        (3, {"faithful": True, "answer_length": 5}),
    ],
)
def test_every_pass_equals_the_specification(trained, seed, options):
    model, tok = trained
    case = make("needle", 1500, keys=2, seed=seed)
    template = SHORT if seed % 2 else retrieval.TEMPLATE
    model.set_attn_implementation("eager")
    want, _ = naive_run(
        model, tok, case.context, case.question, template, 300, 20, options.get("answer_length", 8),
        options.get("use_question_weight", True), options.get("faithful", False),
    )  # fmt: skip
    model.set_attn_implementation("sdpa")
    got = []
    attnpatch.retrieve(model, tok, case.context, case.question, callback=got.append, window_length=300, topk=20,
                       template=template, max_new_tokens=0, **options)  # fmt: skip
    assert [[s.text for s in p.kept] for p in got] == [kept for kept, _ in want]
    assert [p.tokens for p in got] == [n for _, n in want] and len(got) > 3
    assert got[-1].read == len(case.context)


# ---- the maths ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_summed_rows_equal_naive(dtype, group, softcap, monkeypatch):
    from attnpatch.executors import column_sums

    torch.manual_seed(0)
    q, k = torch.randn(2, 2 * group, 13, 16).to(dtype), torch.randn(2, 2, 37, 16).to(dtype)
    pos = torch.arange(37, dtype=torch.int32).expand(2, 1, -1).clone()
    pos[1, :, 30:] = -1
    k[1, :, 30:] = float("nan")
    q_pos = torch.stack([torch.arange(24, 37), torch.cat([torch.arange(18, 30), torch.tensor([-1])])])
    kv = SimpleNamespace(k=k, pos=pos)
    monkeypatch.setattr(column_sums, "MAX_BLOCK", 2 * 2 * group * 37 * 4)  # four rows at once
    got = summed_rows.run(q, kv, q_pos=q_pos, scaling=0.3, softcap=softcap)
    want = naive.summed_rows(q, kv, q_pos=q_pos, scaling=0.3, softcap=softcap)
    assert got.shape == (2, 13, 37) and torch.allclose(got, want, atol=1e-5)
    assert torch.allclose(got[0].sum(-1), torch.full((13,), 2.0 * group)) and not got[1, -1].any()


def test_tap_reads_what_eager_attends_with(trained):
    model, tok = trained
    ids = torch.tensor([tok("The code of amber fox is 48213. " * 8)["input_ids"]])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        want = model(ids, output_attentions=True).attentions[5][0].sum(0)[20:33]
    model.set_attn_implementation("sdpa")
    with attnpatch.patched(model, InfiniRetri()):
        seen = tap.read(model._attnpatch, ids, 5, slice(20, 33))
    got = summed_rows.run(seen.q, seen.kv, q_pos=seen.q_pos, scaling=seen.scaling, softcap=seen.softcap)[0]
    assert torch.allclose(got, want, atol=1e-5)


def test_the_last_layer_with_full_attention_is_read():
    """Gemma2: soft-capped logits, its own scale, every second layer with a window."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=8, query_pre_attn_scalar=4, attn_logit_softcapping=2.0,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], attn_implementation="eager",
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    ids = torch.randint(3, 64, (1, 40))
    with torch.no_grad():
        want = model(ids, output_attentions=True).attentions[1][0].sum(0)[30:]
    with attnpatch.patched(model, "infiniretri"):
        handle = model._attnpatch
        assert tap.layer_to_read(handle, None) == tap.layer_to_read(handle, -2) == 1
        seen = tap.read(handle, ids, 1, slice(30, 40))
        with pytest.raises(ConfigError, match=r"full attention: \[1\]"):
            tap.layer_to_read(handle, -1)
    got = summed_rows.run(seen.q, seen.kv, q_pos=seen.q_pos, scaling=seen.scaling, softcap=seen.softcap)[0]
    assert torch.allclose(got, want, atol=1e-5)


def test_vectors():
    x = torch.tensor([[0, 1, 0, 0, 2, 0, 0, 0, 0, 3.0]])
    assert phrase_sums(x, 3).tolist() == [[1, 1, 1, 2, 2, 2, 0, 0, 3, 3]]
    assert phrase_sums(x, 4).tolist() == [[1, 1, 1, 3, 2, 2, 2, 0, 3, 3]]
    assert torch.equal(phrase_sums(x, 1), x) and (phrase_sums(x, 8) >= x).all()
    mass = torch.tensor([[0.1, 0.2, 0, 0.3], [0, 0.1, 0.4, 0.1]])
    got = token_scores(mass, torch.tensor([0.5, 0.25]), 2)
    assert torch.allclose(got, torch.tensor([0.025, 0.08125, 0.08125, 0.10625]))
    assert top_tokens(torch.tensor([1.0, 2, 2, 0, 2]), 2).tolist() == [1, 2]


# ---- sentences and chunks ----------------------------------------------------------------------------------------
TEXTS = {
    "Mr. J. Smith went home. He ate 3.14 pies! Really?\n\nThe end is near without punct\n\nNext": [
        "Mr. J.", " Smith went home. He ate 3.14 pies!", " Really?\n\n", "The end is near without punct\n\n", "Next",
    ],
    "他来了。她走了！真的？是的": ["他来了。", "她走了！", "真的？", "是的"],
    "no marks at all": ["no marks at all"],
    "\n\n...What?! Yes.\n\n\n\nEnd.": ["\n\n...What?!", " Yes.\n\n\n\n", "End."],
    " \n\n ": [],
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_split(text):
    for step in (1, 2, 3, 1000):  # the blocks must not matter
        found = list(retrieval.split([text[i : i + step] for i in range(0, len(text), step)], 8))
        assert [s.text for s in found] == TEXTS[text] == naive_split(text, 8)
        assert all(text[s.start : s.end] == s.text for s in found)


@pytest.mark.parametrize("size", [7, 40, 300])
def test_chunks_restore_the_text(tokenizer, size):
    text = book(500) + "\n\n" + "words without any mark " * 60 + "x" * 400 + "\n\n"
    found = list(retrieval.chunks([text], tokenizer, size))
    assert "".join(c.text for c, _ in found) == text
    assert all(n <= size and text[c.start : c.end] == c.text for c, n in found)
    if size == 300:
        plain = book(500)
        assert [c.text for c, _ in retrieval.chunks([plain], tokenizer, 300)] == naive_chunks(plain, tokenizer, 300)


# ---- what is kept ------------------------------------------------------------------------------------------------
def test_kept_sentences_are_slices_in_order(tiny, tokenizer):
    text, before, got = book(), [], []
    result = attnpatch.retrieve(tiny, tokenizer, text, "Who was it?", callback=got.append, **SMALL)
    assert result.passes == len(got) > 4 and result.characters == len(text) and result.answer == ""
    for done in got:
        assert all(text[s.start : s.end] == s.text for s in done.kept) and 0 < len(done.kept) <= 20
        starts = [s.start for s in done.kept]
        assert starts == sorted(set(starts)) and done.kept[-1].end <= done.read
        last = before[-1].kept if before else ()
        known = {s.start for s in last}
        assert all(s.start in known for s in done.kept if s.start < (before[-1].read if before else 0))
        before.append(done)
    assert result.sentences == got[-1].kept and all(s.score > 0 for s in result.sentences)


def test_duplicate_sentences_keep_their_own_places(tiny, tokenizer):
    text = "The same thing again. " * 200
    result = attnpatch.retrieve(tiny, tokenizer, text, "What?", **SMALL)
    assert len({s.start for s in result.sentences}) == len(result.sentences) > 0
    assert all(text[s.start : s.end] == s.text for s in result.sentences)


def test_all_tokens_keep_the_whole_text(tiny, tokenizer):
    text = book(400)
    result = attnpatch.retrieve(tiny, tokenizer, text, "Who?", window_length=150, topk=10**6, max_new_tokens=0)
    assert result.context == text and result.passes > 2


def test_short_texts_are_kept_whole_unless_faithful(tiny, tokenizer):
    text = "One thing. Another thing. A third thing that is longer than the others."
    result = attnpatch.retrieve(tiny, tokenizer, text, "Which?", max_new_tokens=0)
    assert result.context == text and result.passes == 0 and {s.score for s in result.sentences} == {None}
    faithful = attnpatch.retrieve(tiny, tokenizer, text, "Which?", max_new_tokens=0, faithful=True, topk=1)
    assert faithful.passes == 1 and len(faithful.sentences) == 1
    longer = attnpatch.retrieve(tiny, tokenizer, book(), "Which?", min_retrieve_tokens=10**4, **SMALL)
    assert longer.context == book() and longer.passes == 0


def test_rows_and_weights_are_set_by_the_first_pass(tiny, tokenizer, monkeypatch):
    seen = []
    original = summed_rows.run

    def spy(q, *args, **kwargs):
        seen.append(q.shape[2])
        return original(q, *args, **kwargs)

    monkeypatch.setattr(summed_rows, "run", spy)
    from attnpatch.patches import infiniretri

    weights, scores = [], infiniretri.token_scores
    monkeypatch.setattr(infiniretri, "token_scores", lambda m, w, k: (weights.append(w), scores(m, w, k))[1])
    attnpatch.retrieve(tiny, tokenizer, book(), "Who was it, and when?", **SMALL)
    assert len(set(seen)) == 1 and len(seen) > 3 and all(w is weights[0] for w in weights)
    wide = seen[0]
    attnpatch.retrieve(tiny, tokenizer, book(400), "Who was it, and when?", add_prompt=False, **SMALL)
    assert seen[-1] < wide
    asked = len(tokenizer("Who was it, and when?\n\n", add_special_tokens=False)["input_ids"])
    assert seen[-1] == asked


def test_retained_tokens_are_bounded(tiny, tokenizer):
    got = []
    attnpatch.retrieve(tiny, tokenizer, book(), "Who?", callback=got.append, max_retained_tokens=90, **SMALL)
    assert all(sum(len(s.ids) for s in p.kept) <= 90 for p in got) and max(p.tokens for p in got) < 90 + 200 + 80


def peaks_at(word, tokenizer, monkeypatch):
    """Stub of the model: every row looks at the tokens of `word`, and a little at the end."""
    wanted = set(tokenizer(word, add_special_tokens=False)["input_ids"])

    def read(handle, ids, layer, rows):
        return SimpleNamespace(q=ids, kv=rows, q_pos=None, scaling=1.0, softcap=None)

    def run(ids, rows, **kwargs):
        hit = torch.tensor([[float(x in wanted) for x in row] for row in ids.tolist()])
        hit[:, rows] = 0.01
        return hit[:, None].expand(-1, rows.stop - rows.start, -1).clone()

    monkeypatch.setattr(tap, "read", read)
    monkeypatch.setattr(summed_rows, "run", run)


def test_a_needle_survives_fifty_passes(tiny, tokenizer, monkeypatch):
    peaks_at("Zyx", tokenizer, monkeypatch)
    text = "Now Zyx Zyx is here. " + "Nothing of note was said by any one on that day. " * 700
    result = attnpatch.retrieve(tiny, tokenizer, text, "Where?", window_length=150, topk=3, max_new_tokens=0)
    assert result.passes >= 50 and "Now Zyx Zyx is here." in result.context and len(result.sentences) <= 3


def test_memory_does_not_grow_with_the_text(tiny, tokenizer, monkeypatch):
    peaks_at("thing", tokenizer, monkeypatch)

    def peak(sentences):
        text = (f"Sentence {i % 1000} says a thing about some matter or another. " for i in range(sentences))
        tracemalloc.start()
        attnpatch.retrieve(tiny, tokenizer, text, "What?", window_length=1024, topk=30, max_new_tokens=0)
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return held

    peak(500)
    assert peak(8000) <= 1.05 * peak(1000)


# ---- inputs ------------------------------------------------------------------------------------------------------
def test_a_path_a_stream_and_a_string_are_the_same(tiny, tokenizer, tmp_path):
    text = book(500)
    (tmp_path / "book.txt").write_text(text, encoding="utf-8-sig")  # the mark that some editors begin a file with
    pieces = (text[i : i + 7] for i in range(0, len(text), 7))
    got = [attnpatch.retrieve(tiny, tokenizer, x, "Who?", **SMALL) for x in (text, tmp_path / "book.txt", pieces)]
    assert got[0] == got[1] == got[2]
    shown = json.loads(json.dumps(got[0].as_dict()))
    assert set(shown["sentences"][0]) == {"text", "start", "end", "score"}


@pytest.mark.parametrize(
    "text", ["word " * 900, "x" * 3000, "他来了。她走了！真的？" * 80, "「no end", "one, two;\n" * 200]
)
@pytest.mark.parametrize("faithful", [False, True])
def test_odd_texts(tiny, tokenizer, text, faithful):
    result = attnpatch.retrieve(tiny, tokenizer, text, "Which one?", faithful=faithful, **SMALL)
    assert result.sentences and result.context.strip()
    if not faithful:
        assert all(text[s.start : s.end] == s.text for s in result.sentences)


@pytest.mark.parametrize("faithful", [False, True])
def test_blank_chunks_are_dropped(tiny, tokenizer, faithful):
    text = "\n" * 20000 + "The code is 12345. Hello there."
    options = {"window_length": 64, "topk": 8, "min_retrieve_tokens": 0, "max_new_tokens": 1, "faithful": faithful}
    assert attnpatch.retrieve(tiny, tokenizer, text, "What is the code?", **options).sentences


def test_a_limit_below_every_sentence_is_an_error(tiny, tokenizer):
    options = {"window_length": 64, "topk": 8, "max_retained_tokens": 1, "max_new_tokens": 1}
    with pytest.raises(InputError, match="nothing would stay; raise max_retained_tokens"):
        attnpatch.retrieve(tiny, tokenizer, book(), "What is the code?", **options)


def test_faithful_places_cover_their_text(tiny, tokenizer):
    text = book()
    result = attnpatch.retrieve(tiny, tokenizer, text, "Who?", faithful=True, **SMALL)
    for s in result.sentences:
        assert text[s.start : s.end].strip().startswith(s.text.strip()[:12])


def test_progress_is_drawn_on_stderr(tiny, tokenizer, capsys):
    attnpatch.retrieve(tiny, tokenizer, book(400), "Who?", progress=True, **SMALL)
    out, err = capsys.readouterr()
    assert not out and "sentences kept" in err


def test_questions(tiny, tokenizer):
    text = book(500)
    assert attnpatch.retrieve(tiny, tokenizer, text, "", **SMALL).sentences
    assert attnpatch.retrieve(tiny, tokenizer, text, **SMALL).question == text[-512:]
    with pytest.raises(InputError, match="needs a question"):
        attnpatch.retrieve(tiny, tokenizer, iter([text]))


def test_errors_come_before_any_forward(tiny, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tap, "read", lambda *a: pytest.fail("a forward ran"))
    (tmp_path / "a.bin").write_bytes(b"\xff\xfe\x00\x81")
    (tmp_path / "b.bin").write_bytes(b"abc\0def")
    for bad, message in (
        (tmp_path / "a.bin", "is not UTF-8 text"), (tmp_path / "b.bin", "NUL bytes"), (tmp_path, "is no file"),
        (tmp_path / "none", "is no file"), (b"bytes", "give a string"), (5, "give a string"),
        ([1], "must give strings"),
        ("", "text is empty"), (" \n\n ", "text is empty"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            attnpatch.retrieve(tiny, tokenizer, bad, "What?")
    for options, message in (
        ({"window_length": 140000}, "do not fit the model's window of 131072"), ({"topk": 0}, "at least 1"),
        ({"template": "{context} {question}"}, "blank line"), ({"template": "{context}"}, "once, it holds it 0"),
        ({"template": "{question}\n\n{context}"}, "before"), ({"template": 5}, "no text"),
        ({"layer": 7}, "allowed are the layers"), ({"windw": 1}, "no hyperparameter 'windw'"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            attnpatch.retrieve(tiny, tokenizer, book(), "What?", **options)
    assert not hasattr(tiny, "_attnpatch")


# ---- generate ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("inner", [None, "snapkv", "flexprefill", "zerotuning"])
def test_generate_reads_the_prompt(trained, inner):
    model, tok = trained
    case = make("needle", 1200, keys=1, seed=2)
    ids, plain = torch.tensor([case.prompt_ids]), torch.tensor([tok("A few words.")["input_ids"]])
    before = model(plain).logits
    mine = {"tokenizer": tok, "template": SHORT, "window_length": 300, "topk": 60}
    more = {"snapkv": {"budget": 400}, "zerotuning": {"gamma": 1.0}}.get(inner, {})
    names = {"infiniretri": mine, **({inner: more} if inner else {})}
    attnpatch.patch_model(model, "+".join(names), **names)
    asked = model.generate(ids, question=case.question, max_new_tokens=8)
    alone = model.generate(input_ids=ids, max_new_tokens=8, return_dict_in_generate=True)
    found = attnpatch.retrieve(model, tok, case.context, case.question, max_new_tokens=8)
    held = attnpatch.status(model).layers[0].seen
    attnpatch.unpatch_model(model)
    for out in (asked, alone.sequences):
        assert torch.equal(out[:, : ids.shape[1]], ids)
        assert case.answer_text in tok.decode(out[0, ids.shape[1] :])
    assert case.answer_text in found.answer and held < 400
    assert torch.equal(model(plain).logits, before) and "generate" not in vars(model)


def test_length_limits_count_the_given_prompt(tiny, tokenizer):
    ids = torch.tensor([tokenizer(book(300), add_special_tokens=False)["input_ids"]])
    with attnpatch.patched(tiny, "infiniretri", tokenizer=tokenizer, window_length=64, topk=8, layer=0) as model:
        length = ids.shape[1]
        assert model.generate(ids, question="Who?", max_length=length + 3, do_sample=False).shape[1] <= length + 3
        config = GenerationConfig(max_new_tokens=2, do_sample=False)
        assert model.generate(ids, config, question="Who?").shape[1] <= length + 2
        with pytest.raises(InputError, match="leaves no token"):
            model.generate(ids, question="Who?", max_length=length)


def test_reweighting_acts_in_the_passes(trained):
    """Also without a cache, which a pass does without."""
    model, tok = trained
    ids = torch.tensor([tok("The code of amber fox is 48213. " * 8)["input_ids"]])
    with attnpatch.patched(model, "zerotuning", gamma=3.0), torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids, use_cache=False).logits)
    with attnpatch.patched(model, "infiniretri"):
        plain = tap.read(model._attnpatch, ids, 5, slice(20, 33))
    with attnpatch.patched(model, "infiniretri+zerotuning", zerotuning={"gamma": 3.0}):
        turned = tap.read(model._attnpatch, ids, 5, slice(20, 33))
    assert not torch.allclose(plain.q, turned.q, atol=1e-2)


def test_batches_are_read_row_by_row(trained):
    model, tok = trained
    cases = [make("needle", n, keys=1, seed=2) for n in (900, 700)]
    rows = [[0] * (900 - len(c.prompt_ids)) + c.prompt_ids for c in cases]
    ids = torch.tensor(rows)
    mask = (ids != 0).long()
    options = {"tokenizer": tok, "template": SHORT, "window_length": 300, "topk": 60}
    with attnpatch.patched(model, "infiniretri", **options):
        both = model.generate(ids, attention_mask=mask, question=[c.question for c in cases], max_new_tokens=6)
        for row, case in enumerate(cases):
            one = model.generate(torch.tensor([case.prompt_ids]), question=case.question, max_new_tokens=6)
            assert torch.equal(both[row, 900 : 900 + 5], one[0, len(case.prompt_ids) :][:5])


def test_generate_refuses(tiny, tokenizer):
    ids = torch.tensor([tokenizer("One paragraph only.")["input_ids"]])
    with attnpatch.patched(tiny, "infiniretri"), pytest.raises(ConfigError, match="tokenizer=tokenizer"):
        tiny.generate(ids, question="What?")
    with attnpatch.patched(tiny, "infiniretri", tokenizer=tokenizer):
        with pytest.raises(InputError, match="pass question="):
            tiny.generate(ids)
        with pytest.raises(UnsupportedModeError, match="assisted decoding"):
            tiny.generate(ids, question="What?", prompt_lookup_num_tokens=3)
        with pytest.raises(InputError, match="one for each of 1 rows"):
            tiny.generate(ids, question=["a", "b"])
        with pytest.raises(UnsupportedModeError, match="neither inputs_embeds"):
            tiny.generate(inputs_embeds=torch.zeros(1, 4, 64), question="What?")
        with pytest.raises(UnsupportedModeError, match="the cache of an earlier turn"):
            tiny.generate(ids, question="What?", past_key_values=attnpatch.PatchCache(tiny))


def test_a_tokenizer_without_a_chat_template(tiny, tokenizer):
    from copy import deepcopy

    plain = deepcopy(tokenizer)
    plain.chat_template = None
    prompt = retrieval.Prompt(plain, SHORT, "What?")
    assert prompt.head == "" and prompt.tail == "\n\nWhat?"
    assert attnpatch.retrieve(tiny, plain, book(500), "What?", **SMALL).sentences
    ids = torch.tensor([plain("Some words here.\n\nWhat is said?")["input_ids"]])
    with attnpatch.patched(tiny, "infiniretri", tokenizer=plain, template=SHORT):
        assert tiny.generate(ids, max_new_tokens=2).shape == (1, ids.shape[1] + 2)


def test_a_chat_template_that_refuses_a_system_message(tiny, tokenizer):
    from copy import deepcopy

    strict = deepcopy(tokenizer)
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<|user|>{{ messages[0]['content'] | trim }}<|end|>{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    prompt = retrieval.Prompt(strict, SHORT, "What?")
    assert prompt.head == "<|user|>" and prompt.tail == "\n\nWhat?<|end|><|assistant|>"


def test_an_empty_system_message_only_where_the_template_has_that_role(tiny, tokenizer):
    from copy import deepcopy

    assert retrieval.Prompt(tokenizer, SHORT, "What?").head == "<|begin|><|user|>"
    assert retrieval.Prompt(tokenizer, SHORT, "What?", faithful=True).head == "<|begin|><|user|><|end|><|user|>"
    named = deepcopy(tokenizer)
    named.chat_template = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"
    assert retrieval.Prompt(named, SHORT, "What?").head == "<|system|><|end|><|user|>"
    silent = deepcopy(tokenizer)
    silent.chat_template = "{% for m in messages if m['role'] == 'user' %}[{{ m['content'] }}]{% endfor %}"
    assert retrieval.Prompt(silent, SHORT, "What?").head == "["
    refusing = deepcopy(tokenizer)
    refusing.chat_template = "{{ raise_exception('nothing') }}"
    with pytest.raises(ConfigError, match="refuses a user's message"):
        retrieval.Prompt(refusing, SHORT, "What?")


# ---- the command -------------------------------------------------------------------------------------------------
def test_ask(tmp_path, capsys, monkeypatch, trained):
    from attnpatch.cli import _common, main

    monkeypatch.setattr(_common, "load_model", lambda *a: trained)
    case = make("needle", 1200, keys=1, seed=2)
    (tmp_path / "book.txt").write_text(case.context, encoding="utf-8")
    given = ["ask", "--model", "testbed", "--file", str(tmp_path / "book.txt"), case.question, "--max-new-tokens", "8",
             "--set", "window_length=300", "--set", "topk=60", "--template", r"{context}\n\n{question}"]  # fmt: skip
    assert main.run(given) == 0
    out, err = capsys.readouterr()
    assert case.answer_text in out and "sentences kept" in err
    assert main.run([*given, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert case.answer_text in data["answer"] and data["sentences"][0]["start"] >= 0
    for wrong, message in (
        (["--file", str(tmp_path / "none.txt")], "is no file"), (["--set", "topk=0"], "at least 1"),
        (["--set", "tokenizer=x"], "tokenizer"),
    ):  # fmt: skip
        assert main.run([*given, *wrong]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    monkeypatch.setattr("sys.stdin", io.StringIO(case.context))
    asked = [*given[:3], "--file", "-", *given[5:], "--patch", "snapkv", "--set", "snapkv.budget=300"]
    assert main.run(asked) == 0 and case.answer_text in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\x00"), encoding="utf-8"))
    assert main.run(asked) == 2 and "stdin is not UTF-8" in capsys.readouterr().err


def test_bench_quick_run(tmp_path, monkeypatch):
    from attnpatch.bench import retrieval as bench

    class Package:  # stands for the authors' class, which the tests do not install
        def __init__(self, **options):
            assert options["model"].config._attn_implementation == "eager" and options["window_length"] == 300

        def generate(self, context, question, prompt, max_new_tokens):
            return bench.ANSWER if bench.FACT in context and "{context}" in prompt else ""

    monkeypatch.setattr(bench, "package", lambda: (Package, ""))
    out = tmp_path / "retrieval.json"
    bench.main(["--quick", "--device", "cpu", "--out", str(out)])
    data = json.loads(out.read_text(encoding="utf-8"))
    assert [row["tokens"] for row in data["rows"]] == list(bench.QUICK) and data["package"] == "infini_retri"
    assert all(row["ours"]["passes"] > 3 and row["package"]["right"] for row in data["rows"])
    assert {"time_per_token_over_first", "package_time_over_ours", "seconds_per_1k_tokens"} <= set(data["rows"][1])
    monkeypatch.undo()
    cls, why = bench.package()
    assert (cls is None) == bool(why)
