"""InfiniRetri on twenty documents, ordinary and odd: every pass against a second run written from the specification.

It shares nothing with `test_infiniretri.naive_run`: sentences by a character scan, chunks recounted, plain loops.
"""

from __future__ import annotations

import random
import re

import pytest
import torch

import attnpatch
from attnpatch import retrieval, testbed
from attnpatch.testbed.tasks import make

TEMPLATE = "Read carefully.\n\n{context}\n\nAsked:\n\n{question}\n\nSay:"
M, K, WIDTH = 160, 12, 8
MARKS = "。！？.?!"
WORDS = "alpha beta gamma delta river stone window lamp table garden".split()


def sentences(text, guard):
    """Spec A: pieces by delimiters and blank lines, then grown into sentences."""
    pieces, at, cur = [], 0, ""
    while at < len(text):
        step = 2 if text[at : at + 2] == "\n\n" else 1
        cut = step == 2 or text[at] in MARKS
        if cut and cur:
            pieces.append(cur)
        if cut:
            pieces.append(text[at : at + step])
        cur = "" if cut else cur + text[at]
        at += step
    found, pieces, cur = [], [*pieces, cur], ""
    for p in filter(None, pieces):
        bare = p.strip()
        if not cur.strip() or not bare or bare in MARKS or (cur.endswith(".") and len(bare) <= guard):
            cur += p
        else:
            found.append(cur)
            cur = p
    return [*found, cur] if cur.strip() else found


def check_chunks(text, chunks, count):
    """Spec B: the text's own pieces, in order, of at most M tokens; greedy where no sentence is cut."""
    joined = "".join(chunks)
    assert text.startswith(joined) and not text[len(joined) :].strip()
    parts = sentences(text, 10)
    if any(count(s) > M for s in parts):
        assert all(count(c) <= M + 4 for c in chunks)
        return
    want, chunk, total = [], "", 0
    for s in parts:
        if chunk and total + count(s) + count("\n") > M:
            want.append(chunk)
            chunk, total = "", 0
        total += count(s) + (count("\n") if chunk else 0)
        chunk += s
    assert [c for c in [*want, chunk] if c.strip()] == chunks


def by_hand(model, tok, text, question):
    """Spec C and D with the text's own slices kept: [(kept sentences, prompt tokens)] of every pass."""

    def ids(s):
        return tok(s, add_special_tokens=False)["input_ids"]

    chunks = [c.text for c, _ in retrieval.chunks([text], tok, M)]
    check_chunks(text, chunks, lambda s: len(ids(s)))
    before, between, end = re.split(r"\{context\}|\{question\}", TEMPLATE)
    chat = [{"role": "user", "content": "@@@"}]  # the embedded model's template has no system role
    opening, closing = tok.apply_chat_template(chat, tokenize=False, add_generation_prompt=True).split("@@@")
    question = question.strip()
    after = between + question + end + closing
    glue = re.match(r"(\n\n)*", after).group()  # a blank line belongs to the sentence before it
    head = [ids(s) for s in sentences(opening + before, 8)]
    tail = [(s, ids(s)) for s in sentences(after[len(glue) :], 8)]
    kept, weights, passes = [], None, []
    for chunk in chunks:
        parts = kept + sentences(chunk, 8)
        fed = [parts[0].lstrip(), *parts[1:]]
        fed[-1] = fed[-1].rstrip() + glue
        body = [ids(s) for s in fed]
        c0 = sum(map(len, head))
        c1 = r0 = c0 + sum(map(len, body))
        seen = len(glue)
        for s, x in tail if question else ():
            if seen + len(s) > len(between):
                break
            seen, r0 = seen + len(s), r0 + len(x)
        flat = [x for part in [*head, *body, *(x for _, x in tail)] for x in part]
        with torch.no_grad():
            mass = model(torch.tensor([flat]), output_attentions=True).attentions[-1][0].float().sum(0)[r0:]
        weights = mass[:, r0:].sum(1) if weights is None else weights
        x = mass[:, c0:c1]
        low, high = -(WIDTH // 2), (WIDTH + 1) // 2
        score = torch.stack([x[:, max(0, j + low) : j + high].sum(1) @ weights**2 for j in range(c1 - c0)]).tolist()
        best = sorted(range(c1 - c0), key=lambda j: (-score[j], j))[:K]
        owner = [i for i, part in enumerate(body) for _ in part]
        kept = [parts[i] for i in sorted({owner[j] for j in best})]
        passes.append((kept, len(flat)))
    return passes


def needle(seed, cut=None, keys=2):
    case = make("needle", 700, keys=keys, seed=seed)
    return case.context[:cut], case.question


def some(words, seed=0, between=" "):
    rng = random.Random(seed)
    return between.join(rng.choice(WORDS) for _ in range(words))


def chinese(length, marks=True):
    rng = random.Random(3)
    return "".join(rng.choice("他她我们来了走山水天地人大小中国") + rng.choice("。！？，、" if marks else "，、")
                   for _ in range(length))  # fmt: skip


DOCUMENTS = {
    **{f"needle-{seed}": needle(seed) for seed in range(60, 70)},
    "huge-sentence": (f"{needle(70, 900)[0]} {some(350)}. {needle(71, 900)[0]}", "What is the code?"),
    "no-punctuation": (some(500, 1), "where is the lamp"),
    "no-spaces": (some(90, 2, "") * 3, "what?"),
    "chinese": (chinese(220), "他在哪里？"),
    "chinese-without-marks": (chinese(200, False), "他在哪里"),
    "empty-question": (needle(72)[0], ""),
    "blank-question": (needle(73)[0], " \n "),
    "many-questions": (needle(74, keys=4)[0], "First? Second one. What is the code of amber fox?"),
    "windows-line-ends": ("\r\n".join(["He went home."] * 3 + ["She said: no!", ""] * 60), "Who?"),
    "repeated-sentences": ("It was late. She slept.\n\n" * 70, "Who slept?"),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_pass_keeps_what_the_specification_keeps(name):
    text, question = DOCUMENTS[name]
    model, tok = testbed.load(dtype=torch.float32)
    model.set_attn_implementation("eager")
    want = by_hand(model, tok, text, question)
    model.set_attn_implementation("sdpa")
    got = []
    result = attnpatch.retrieve(
        model, tok, text, question, callback=got.append, window_length=M, topk=K, answer_length=WIDTH,
        template=TEMPLATE, max_new_tokens=0, min_retrieve_tokens=0,
    )  # fmt: skip
    assert [([s.text for s in p.kept], p.tokens) for p in got] == want and len(want) > 2
    assert all(text[s.start : s.end] == s.text for s in result.sentences)
    assert [s.start for s in result.sentences] == sorted({s.start for s in result.sentences})
