"""Storage under methods that treat heads differently: steady heads, entries that stand for others, composition."""

from __future__ import annotations

import pytest
import torch
from oracle import CACHE, run_both, tiny
from profiles import head_profile
from test_engine_modes import padded_turns
from test_methods import feed, held, prompt
from test_ragged import poison

import attnpatch
from attnpatch.engine.ragged import Packed

SCORES = [[0.1, 0.9], [0.8, 0.2], [0.3, 0.4], [0.7, 0.6]]
METHODS = {
    "duoattention": {"profile": head_profile("llama", SCORES), "sink": 2, "recent": 7},
    "razorattention": {
        "profile": head_profile("llama", SCORES, "echo-heads"), "induction_ratio": 0.4, "sink": 2, "buffer": 7,
        "ratio": 4.0,
    },
}  # fmt: skip


class Rows:
    """What steady storage must hold, kept as lists of (k, v, position) per pair."""

    def __init__(self, counts, dim=4, seed=0):
        generator = torch.Generator().manual_seed(seed)
        width = max(map(max, counts))
        self.k, self.v = (torch.randn(len(counts), len(counts[0]), width, dim, generator=generator) for _ in range(2))
        self.pos = torch.arange(width).expand(len(counts), len(counts[0]), -1).to(torch.int32)
        self.lists = [
            [[(self.k[b, h, i], self.v[b, h, i], i) for i in range(n)] for h, n in enumerate(row)]
            for b, row in enumerate(counts)
        ]

    def check(self, packed):
        for b, row in enumerate(self.lists):
            for h, entries in enumerate(row):
                start, n = int(packed.start[b, h]), int(packed.count[b, h])
                assert n == len(entries) < int(packed.cap[b, h]) + 1
                got = {int(packed.pos[start + i]): i for i in range(n)}
                assert set(got) == {p for *_, p in entries}
                for k, v, p in entries:
                    assert torch.equal(packed.k[start + got[p]], k) and torch.equal(packed.v[start + got[p]], v)
        ends = (packed.start + packed.cap).flatten().tolist()
        assert ends[-1] == packed.total and packed.start.flatten().tolist() == [0, *ends[:-1]]


@pytest.mark.parametrize("limited", [(0,), (1, 2), (0, 1, 2)], ids=["one", "two", "all"])
@pytest.mark.parametrize("growing", [False, True], ids=["fixed", "growing"])
def test_steady_heads_drop_what_they_get(limited, growing):
    counts = [[6 if h in limited else 9 for h in range(3)], [4 if h in limited else 9 for h in range(3)]]
    rows, limit = Rows(counts), 6
    packed = Packed(rows.k, rows.v, rows.pos, torch.tensor(counts), limited, limit)
    poison(packed)
    generator = torch.Generator().manual_seed(1)
    for step in range(60):
        limit += int(growing and step % 5 == 4)
        k, v = (torch.randn(2, 3, 1, 4, generator=generator) for _ in range(2))
        packed.append(k, v, 9 + step, None)
        slots = torch.full((2, 3, 1), -1)
        for b in range(2):
            for h in range(3):
                entries = rows.lists[b][h]
                entries.append((k[b, h, 0], v[b, h, 0], 9 + step))
                if h in limited and len(entries) > limit:
                    oldest = min(p for *_, p in entries[2:] if p > 1)
                    start, n = int(packed.start[b, h]), int(packed.count[b, h])
                    slots[b, h, 0] = packed.pos[start : start + n].tolist().index(oldest)
                    entries[:] = [e for e in entries if e[2] != oldest]
        packed.drop(slots, limit)
        rows.check(packed)
        if step == 30:
            order = torch.tensor([1, 0])
            packed.rows(lambda x, order=order: x[order])
            rows.lists = [list(map(list, rows.lists[i])) for i in (1, 0)]
            rows.check(packed)
        if not growing:
            assert packed.cap[:, list(limited)].eq(7).all(), "steady heads take no room of those that grow"
        assert packed.widest >= int(packed.count.max())
        poison(packed)
    if len(limited) == 3:
        assert packed.widest <= limit + 1


def test_several_entries_at_once_find_room_in_steady_heads():
    rows = Rows([[6, 9]])
    packed = Packed(rows.k, rows.v, rows.pos, torch.tensor([[6, 9]]), (0,), 6)
    k, v = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    packed.append(k, v, 9, None)
    for h in range(2):
        rows.lists[0][h] += [(k[0, h, i], v[0, h, i], 9 + i) for i in range(5)]
    rows.check(packed)


@pytest.mark.parametrize("patch", METHODS)
def test_a_chunk_without_tokens_of_a_row_leaves_the_row_alone(patch):
    turn = torch.ones(2, 20).long()
    turn[1, :13] = 0
    feeds, mask = [], torch.cat([torch.ones(2, 30).long(), turn], 1)
    for lo, hi in ((0, 30), (30, 35), (35, 40), (40, 45), (45, 50)):
        feeds.append((prompt(2, hi - lo, seed=lo), mask[:, :hi], mask[1, lo:hi].bool()))
    with attnpatch.patched(tiny("llama"), patch, evict_per_chunk=True, **METHODS[patch]) as model, torch.no_grad():
        cache, alone = attnpatch.PatchCache(model), attnpatch.PatchCache(model)
        worst = padded_turns(model, cache, alone, feeds[:1])
        cache.expect(50)
        alone.expect(37)
        assert max(worst, padded_turns(model, cache, alone, feeds[1:])) < 5e-5
        assert held(cache, 1) == held(alone)


@pytest.mark.parametrize("patch", METHODS)
def test_finished_rows_that_take_tokens_back_go_on(patch):
    """Row 1 was fed three pads as if they were real; the next turn's mask says so. What had left by then is gone."""
    mask = torch.ones(2, 60).long()
    mask[1, 42:45] = 0
    with attnpatch.patched(tiny("llama"), patch, **METHODS[patch]) as model, torch.no_grad():
        _, cache = feed(model, prompt(2), *prompt(2, 5, seed=8).split(1, 1))
        for ids in (prompt(2, 9, seed=9), *prompt(2, 6, seed=4).split(1, 1)):
            now = mask[:, : cache.get_seq_length() + ids.shape[1]]
            pos = (now.cumsum(-1) - 1)[:, -ids.shape[1] :]
            out = model(ids, attention_mask=now, position_ids=pos, **{CACHE: cache}).logits
            assert torch.isfinite(out).all()
        for layer in held(cache, 1):
            assert all(max(s) == 56 and s >= {0, 1, *range(50, 57)} for s in layer)
            assert max(map(len, layer)) <= 57


@pytest.mark.parametrize("patch", [*METHODS, "adakv", "cake"])
def test_steps_with_a_mask_of_ones_go_on_after_a_later_turn(patch):
    """A loop by hand that always gives the mask holds the same as one that gives none."""
    hyper = METHODS.get(patch, {"budget": 12, "window_size": 4})
    feeds = [prompt(), prompt(1, 1, seed=3), prompt(1, 9, seed=9), *prompt(1, 4, seed=4).split(1, 1)]
    with attnpatch.patched(tiny("llama"), patch, **hyper) as model, torch.no_grad():
        wanted, plain = feed(model, *feeds)
        cache = attnpatch.PatchCache(model)
        for ids in feeds:
            mask = torch.ones(1, cache.get_seq_length() + ids.shape[1], dtype=torch.long)
            logits = model(ids, attention_mask=mask, **{CACHE: cache}).logits
        assert held(cache) == held(plain) and (logits - wanted).abs().max() < 5e-5


@pytest.mark.parametrize("patch", METHODS)
def test_decisions_are_valid_and_compose(patch, monkeypatch):
    monkeypatch.setenv("ATTNPATCH_DEBUG", "1")
    feeds = [prompt(2), *prompt(2, 9, seed=8).split(1, 1)]
    outs = []
    for name, more in ((patch, METHODS[patch]), (f"{patch}+zerotuning", {patch: METHODS[patch], "gamma": 1.0}),
                       (f"{patch}+zerotuning", {patch: METHODS[patch], "gamma": 3.0})):  # fmt: skip
        with attnpatch.patched(tiny("llama"), name, **more) as model:
            outs.append(feed(model, *feeds)[0])
    assert (outs[0] - outs[1]).abs().max() < 5e-5
    assert (outs[0] - outs[2]).abs().max() > 1e-2


@pytest.mark.parametrize("patch", METHODS)
def test_gradients_pass(patch):
    """Training-free does not mean untrainable: nothing detaches what was held or put together."""
    with attnpatch.patched(tiny("llama"), patch, **METHODS[patch]) as model:
        cache = attnpatch.PatchCache(model)
        with torch.no_grad():
            model(prompt(2), **{CACHE: cache})
        model(prompt(2, 3, seed=5), **{CACHE: cache}).logits.sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("patch", METHODS)
def test_unpatching_is_exact_and_threads_of_a_model_share_nothing(patch):
    model, ids = tiny("llama"), prompt(2)
    with torch.no_grad():
        before = model(ids).logits
        with attnpatch.patched(model, patch, **METHODS[patch]):
            first = attnpatch.PatchCache(model), attnpatch.PatchCache(model)
            together = [feed(model, part, cache=c)[0] for part in (ids, ids[:, :1]) for c in first]
            assert torch.equal(together[0], together[1]) and torch.equal(together[2], together[3])
        assert torch.equal(model(ids).logits, before)


# ---- every method that stores heads at their own lengths -------------------------------------------------------------
ALL = {
    **METHODS,
    "adakv": {"budget": 300, "window_size": 8, "alpha": 0.0},
    "taskkv": {"budget": 0.4, "sink": 4, "recent": 32, "last_full": 1, "supplement": 0},
}
LONG = {"num_hidden_layers": 2, "max_position_embeddings": 4096}


def settings(patch):
    """As METHODS, for the model of LONG."""
    given = dict(ALL.get(patch, {}))
    if "profile" in given:
        given["profile"] = head_profile("llama", SCORES[:2], given["profile"].kind, **LONG)
    return {**given, "recent": 300} if patch == "duoattention" else given


@pytest.mark.parametrize("patch", [*ALL, "tca"])
def test_bytes_are_those_of_the_entries(patch):
    """After a long prompt and through 90 steps, at most 3 per cent more is allocated than the entries need."""
    model, (first, *steps) = tiny("llama", **LONG), prompt(2, 1500 + 90).split([1500, *[1] * 90], 1)
    with attnpatch.patched(model, patch, **settings(patch)), torch.no_grad():
        cache = attnpatch.PatchCache(model)
        model(first, **{CACHE: cache})
        for number, step in enumerate(steps):
            model(step, **{CACHE: cache})
            if number % 30 == 29:
                for layer in cache.layers:
                    entries = int(layer.packed.count.sum())
                    extra = 0 if layer.extra is None else layer.extra.k.numel() // 16
                    size = (entries + extra) * 16 * 2 * 4
                    assert entries >= 1000 and size <= layer.bytes_held() <= 1.03 * size
        for told, layer in zip(attnpatch.status(model).layers, cache.layers, strict=True):
            assert told.bytes_held == layer.bytes_held() < told.bytes_dense


@pytest.mark.parametrize("patch", [p for p in ALL if p != "razorattention"])  # its mean is no entry of the oracle's
def test_three_hundred_steps_equal_masking(patch):
    given = {**settings(patch), "budget": 0.4} if patch in ("adakv", "taskkv") else ALL[patch]
    feeds = prompt(2, 60 + 300).split([60, *[1] * 300], 1)
    worst, cache = run_both("llama", patch, feeds, dtype=torch.float64, **given)
    assert worst < 2e-5 and cache.get_seq_length() == 360
    assert any(layer.packed is not None for layer in cache.patched)
