"""Methods that keep the cache and read little of it while decoding, against plain loops from their specifications."""

from __future__ import annotations

import pytest
import torch
from attnpatch.patches.hip import HiP
from attnpatch.patches.quest import Quest
from attnpatch.patches.recycled import RefreshKV
from attnpatch.patches.tokenselect import TokenSelect
from interpreter import mend_interpreter, needs_triton, run_interpreted
from oracle import CACHE, CONFIGS, tiny
from test_hip import naive_search

import attnpatch
from attnpatch.decisions import Selection
from attnpatch.engine.call import KV, Ctx
from attnpatch.errors import ConfigError
from attnpatch.executors import (
    dispatch,
    gather_decode,
    likeness,
    naive,
    page_bounds,
    pooled,
    top_slots,
    votes,
    weakest,
)  # fmt: skip

# ---- a layer as the engine hands it to the hooks ----


def turned(x, by):
    """A rotation of pairs of channels, by `by` [B, T] steps; x [B, H, T, D]."""
    half = x.shape[-1] // 2
    angle = by[:, None, :, None] * 0.7 ** torch.arange(half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


class Layer:
    """Rows of a batch of known tokens, decoded step by step; NaN in free slots."""

    def __init__(self, tokens=100, heads=4, kv_heads=2, batch=1, dim=8, seed=0, whole=False, layer=0, n_layers=1):
        g = torch.Generator().manual_seed(seed)
        draw = (lambda *s: torch.randint(-2, 3, s, generator=g).float()) if whole else (
            lambda *s: torch.randn(s, generator=g)
        )  # fmt: skip
        self.q, self.k, self.v = draw(batch, heads, tokens, dim), *(draw(batch, kv_heads, tokens, dim) for _ in "kv")
        self.layer, self.n_layers, self.scaling, self.softcap = layer, n_layers, dim**-0.5, None
        self.state, self.rows, self.plain, self.holes = {}, {}, {}, False

    def call(self, ends, event="step", paused=()):
        """(q, kv, ctx) with ends[b] tokens held. A step brings the newest one, a prompt all."""
        batch, longest = len(ends), max(ends)
        end = torch.tensor(ends)
        pos = torch.arange(longest).expand(batch, -1)
        pos = torch.where(pos < end[:, None], pos, -1)
        free = (pos < 0)[:, None, :, None]
        k, v = (x[:batch, :, :longest].masked_fill(free, float("nan")) for x in (self.k, self.v))
        holes = self.holes = self.holes or len(set(ends)) > 1  # once padded, always
        kv = KV(k, v, pos[:, None].int(), holes, True, self.state, self.rows, self.plain)
        if event == "step":
            at = (end - 1)[:, None, None, None].expand(-1, self.q.shape[1], -1, self.q.shape[3])
            q, q_pos = self.q[:batch].gather(2, at), (end - 1)[:, None].clone()
            q_pos[list(paused)] = -1
        else:
            q, q_pos = self.q[:batch, :, :longest].masked_fill(free, float("nan")), pos
        ctx = Ctx(
            self.layer, self.n_layers, "decode" if event == "step" else "prefill", event, q_pos,
            () if event == "step" else tuple(ends), self.scaling, self.softcap,
        )  # fmt: skip
        ctx.ragged, ctx.turn, ctx.back = holes, turned, lambda x: turned(x.float(), -q_pos)
        return q, kv, ctx

    def attended(self, patch, ends, event="step", paused=()):
        """The set of slots of each row and query head: [[{..}]]. Checks the executor against naive on the way."""
        q, kv, ctx = self.call(ends, event, paused)
        chosen = patch.select(q, kv, ctx) if event == "step" else None
        selection = chosen or Selection()
        seen = naive.visible(kv, ctx.q_pos).expand(-1, q.shape[1], -1, -1)
        seen = seen & naive.selected(selection, kv, ctx.q_pos, q.shape[1])
        if event == "step":
            out = dispatch.run(q, kv, selection, ctx)[0]
            torch.testing.assert_close(out, naive.run(q, kv, selection, ctx)[0], atol=1e-4, rtol=1e-4)
        if "observe" in patch.hooks():
            patch.observe(q, kv, ctx)
        return [[set(row[-1].nonzero()[:, 0].tolist()) for row in heads] for heads in seen]


def best(scores, k):
    """Indices of the k largest, the best first; ties to the later."""
    return sorted(range(len(scores)), key=lambda i: (scores[i], i), reverse=True)[:k]


# ---- quest ----


def naive_quest(q, k, quest):
    """Keys that one query q [D] attends of k [n, D]."""
    n, page = len(k), quest.page_size
    pages, count = -(-n // page), quest.pages(n)
    if count * page >= n:
        return set(range(n))
    bound = []
    for j in range(pages):
        part = k[j * page : (j + 1) * page]
        bound.append(float(torch.maximum(q * part.amin(0), q * part.amax(0)).sum()))
    if quest.keep_last:
        bound[-1] = float("inf")
    return {t for j in best(bound, count) for t in range(j * page, min(n, (j + 1) * page))}


QUEST = {"budget": 16, "page_size": 4, "dense_layers": 0}


@pytest.mark.parametrize("change", [
    {}, {"budget": 0.2}, {"budget": 4}, {"min_pages": 1, "budget": 4}, {"page_size": 1}, {"page_size": 7},
    {"keep_last": False}, {"budget": 64}, {"page_size": 64},
], ids=lambda c: "+".join(f"{k}={v}" for k, v in c.items()) or "plain")  # fmt: skip
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (8, 1)])
def test_quest_equals_the_specification(change, heads, kv_heads):
    quest = Quest(**{**QUEST, **change})
    layer = Layer(heads=heads, kv_heads=kv_heads, batch=3, whole=True)
    for step in range(12):
        ends = [88 + step, 61 + step, 9 + step]
        found = layer.attended(quest, ends)
        for b, n in enumerate(ends):
            for h in range(heads):
                expected = naive_quest(layer.q[b, h, n - 1], layer.k[b, h * kv_heads // heads, :n], quest)
                assert found[b][h] == expected, (b, h, step)


def test_quest_of_groups():
    group, alone = Quest(**QUEST, gqa="group_max"), Quest(**QUEST)
    for heads in (2, 8):
        layer = Layer(heads=heads, whole=True)
        q, kv, ctx = layer.call([100])
        scores = naive.page_bounds(q, kv.k, 4).unflatten(1, (2, -1)).amax(2)
        scores[..., -1] = float("inf")
        index = group.select(q, kv, ctx).index
        assert index.shape == (1, 2, 1, 4)
        for h in range(2):
            assert index[0, h, 0].tolist() == sorted(best(scores[0, h].tolist(), 4))
        assert heads > 2 or torch.equal(index, alone.select(q, kv, ctx).index)


def test_quest_sets_grow_with_the_budget():
    layer, before = Layer(), [set()] * 4
    for budget in range(4, 104, 4):
        now = layer.attended(Quest(**{**QUEST, "budget": budget}), [100])[0]
        assert all(a <= b and len(b) <= max(12, budget) and 99 in b for a, b in zip(before, now, strict=True))
        before = now
    assert before == [set(range(100))] * 4


def test_quest_with_pages_of_one_is_the_exact_top_k():
    layer = Layer()
    found = layer.attended(Quest(budget=10, page_size=1, dense_layers=0, keep_last=False), [100])
    logits = layer.q[:, :, 99:] @ layer.k.repeat_interleave(2, 1).transpose(-1, -2)
    assert found == [[set(row[0].topk(10).indices.tolist()) for row in logits[0]]]


@pytest.mark.parametrize("n_layers", [2, 24, 32, 80])
def test_quest_leaves_the_first_layers(n_layers):
    for index in range(n_layers):
        q, kv, ctx = Layer(layer=index, n_layers=n_layers).call([100])
        assert (Quest(budget=16).select(q, kv, ctx) is None) == (index < 2)


def test_bounds_grow_as_they_would_be_made_anew():
    quest, layer = Quest(**QUEST), Layer(tokens=200, batch=3)
    for step in range(100):
        ends = [90 + step, 70 + step, 3 + step]
        if step == 40:
            layer.rows.clear()  # a crop
        layer.attended(quest, ends)
        anew = page_bounds.summarise(layer.call(ends)[1].k, 4, layer.call(ends)[1].pos >= 0)
        assert torch.equal(layer.rows["page_bounds"], anew)


@pytest.mark.parametrize("padded", [False, True])
def test_bounds_catch_up_with_a_later_turn(padded):
    quest, layer = Quest(**QUEST), Layer(tokens=200, batch=2)
    for ends in ([50, 30], [51, 31], [79, 40], [80, 41], [81, 42], [117, 117]):
        ends = ends if padded else [ends[0]] * 2
        layer.attended(quest, ends)
        kv = layer.call(ends)[1]
        assert torch.equal(layer.rows["page_bounds"], page_bounds.summarise(kv.k, 4, kv.pos >= 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize(("slots", "page"), [(1, 16), (16, 16), (77, 16), (45, 1), (50, 7)])
def test_page_bounds(slots, page, group, dtype):
    layer = Layer(tokens=slots, heads=2 * group, batch=2, dim=32)
    q, kv, _ = layer.call([slots, max(1, slots - 20)])
    q, k, filled = q.to(dtype), kv.k.to(dtype), kv.pos >= 0
    bounds = page_bounds.summarise(k, page, filled)
    assert bounds.dtype == dtype
    scores = page_bounds.scores(q, bounds, page, torch.tensor([slots, max(1, slots - 20)]))
    expected = naive.page_bounds(q, k, page, filled)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
    dots = q.float() @ k.float().repeat_interleave(group, 1).transpose(-1, -2)
    dots = torch.where(filled[:, :, None], dots, float("-inf"))[:, :, 0]
    dots = torch.nn.functional.pad(dots, (0, -slots % page), value=float("-inf")).unflatten(-1, (-1, page)).amax(-1)
    assert (scores >= dots - 1e-4).all() and (page > 1 or torch.allclose(scores, dots, atol=1e-4))
    full = page_bounds.summarise(k[:1], page)
    torch.testing.assert_close(page_bounds.scores(q[:1], full, page), expected[:1], atol=1e-4, rtol=1e-4)


# ---- recycled ----


def naive_scores(q, k, scaling, kernel, force_self):
    """Scores of one KV head: q [G, D] its newest queries, k [n, D]."""
    probs = torch.softmax(q.double() @ k.double().T * scaling, -1).amax(0).tolist()
    if force_self:
        probs[-1] = float("-inf")
    half = kernel // 2
    pooled = [max(probs[max(0, i - half) : i + half + 1]) for i in range(len(probs))]
    if force_self:
        pooled[-1] = float("inf")
    return pooled


class NaiveRefresh:
    """One row, one KV head, with lists: the pseudo-code of the specification."""

    def __init__(self, patch, layer, b, h, capacity):
        self.patch, self.layer, self.size = patch, layer, capacity
        group = layer.q.shape[1] // layer.k.shape[1]
        self.q, self.k = layer.q[b, h * group : (h + 1) * group], layer.k[b, h]
        self.mean = turned(layer.q[b : b + 1], -torch.arange(layer.q.shape[2])[None])[0].mean(0)  # [T, D]

    def refresh(self, n):
        patch = self.patch
        self.last = n - 1
        scores = naive_scores(self.q[:, n - 1], self.k[:n], self.layer.scaling, patch.kernel_size, patch.force_self)
        self.list = best(scores, self.size)[::-1]  # from the weakest

    def full(self, n, step):
        if step % self.patch.stride:
            return False
        if self.patch.schedule == "fixed":
            return True
        return torch.cosine_similarity(self.mean[n - 1], self.mean[self.last], 0) <= self.patch.threshold

    def step(self, n, step):
        if self.full(n, step):
            self.refresh(n)
            return set(range(n))
        self.list.append(n - 1)
        attended = set(self.list)
        assert len(attended) == len(self.list)
        if len(self.list) > self.size:
            self.list.pop(0)
        return attended


RECYCLED = {"budget": 12, "min_budget": 1, "stride": 7, "schedule": "fixed"}


@pytest.mark.parametrize("change", [
    {}, {"kernel_size": 1}, {"kernel_size": 3, "force_self": False}, {"stride": 1}, {"stride": 1000}, {"budget": 0.4},
    {"budget": 45}, {"budget": 1}, {"budget": 0.1, "min_budget": 9}, {"schedule": "qc", "stride": 3, "threshold": 0.1},
    {"schedule": "qc", "stride": 2, "threshold": 0.3, "budget": 0.4},
], ids=lambda c: "+".join(f"{k}={v}" for k, v in c.items()) or "plain")  # fmt: skip
def test_recycled_equals_the_specification(change):
    patch, layer = RefreshKV(**{**RECYCLED, **change}), Layer(batch=3)
    lengths = [60, 41, 5]
    layer.attended(patch, lengths, "prompt")
    sizes = [max(patch.min_budget, patch.budget.tokens(n)) for n in lengths]
    naives = [[NaiveRefresh(patch, layer, b, h, sizes[b]) for h in range(2)] for b in range(3)]
    for b, n in enumerate(lengths):
        for one in naives[b]:
            one.refresh(n)
    for step in range(1, 40):
        ends = [n + step for n in lengths]
        found = layer.attended(patch, ends)
        for b, n in enumerate(ends):
            for h, one in enumerate(naives[b]):
                expected = one.step(n, step)
                assert found[b][2 * h] == found[b][2 * h + 1] == expected, (b, h, step)


@pytest.mark.parametrize("change", [{"stride": 61}, {"stride": 999}, {"schedule": "qc", "stride": 9, "threshold": 0.0}],
                         ids=["fixed", "never", "qc"])  # fmt: skip
def test_recycled_11_equals_lists_over_500_steps(change):
    """The list that is overwritten in place against one from which the oldest falls off."""
    patch, layer = RefreshKV(**{**RECYCLED, **change}), Layer(tokens=560)
    layer.attended(patch, [50], "prompt")
    naives = [NaiveRefresh(patch, layer, 0, h, patch.budget.tokens(50)) for h in range(2)]
    [one.refresh(50) for one in naives]
    for step in range(1, 501):
        found = layer.attended(patch, [50 + step])[0]
        for h, one in enumerate(naives):
            assert found[2 * h] == found[2 * h + 1] == one.step(50 + step, step), (h, step)


def test_recycled_full_steps_follow_the_queries():
    """A threshold that every query meets makes the fixed schedule, one that none meets no full step."""

    def sizes(schedule, threshold=0.85, change=lambda q: q):
        layer = Layer()
        layer.q = change(layer.q)
        patch = RefreshKV(**{**RECYCLED, "schedule": schedule, "stride": 4, "threshold": threshold})
        layer.attended(patch, [50], "prompt")
        return [layer.attended(patch, [50 + i])[0] for i in range(1, 20)]

    def same(q):
        back = torch.arange(q.shape[2])[None]
        return turned(q[:, :, :1].expand_as(q), back)

    assert sizes("qc", 1.01) == sizes("fixed")
    assert all(len(heads[0]) == 13 for heads in sizes("qc", -1.01))
    assert all(len(heads[0]) == 13 for heads in sizes("qc", 0.999, same)), "a constant query before its rotation"
    flipped = sizes("qc", -0.999, lambda q: same(q) * torch.where(torch.arange(100) < 50, 1, -1)[:, None])
    assert [len(heads[0]) for heads in flipped] == [13] * 3 + [54] + [13] * 15


def ring(layer, b, h):
    return {s for s in layer.rows["recycled"][b, h].tolist() if s >= 0}


def test_recycled_list_of_a_prompt_is_what_snapkv_keeps():
    layer = Layer(tokens=60)
    layer.attended(RefreshKV(budget=13, min_budget=1), [60], "prompt")
    kept = attnpatch.probe(
        "snapkv", layer.q, layer.k, layer.v, budget=13, window_size=1, kernel_size=7, gqa="group_max"
    )  # fmt: skip
    for h in range(2):
        assert ring(layer, 0, h) == set(kept.index[0, h].tolist())


def test_recycled_turns_and_crops_renew_the_list():
    patch, layer = RefreshKV(**RECYCLED), Layer()
    layer.attended(patch, [50], "prompt")
    assert len(layer.attended(patch, [51])[0][0]) == 13
    layer.attended(patch, [70], "prompt")  # a turn
    assert layer.plain["recycled_step"] == 0
    assert len(layer.attended(patch, [71])[0][0]) == 13
    layer.rows.clear()  # a crop
    assert len(layer.attended(patch, [61])[0][0]) == 61 and len(layer.attended(patch, [62])[0][0]) == 13
    assert len(layer.attended(patch, [64])[0][0]) == 64, "a step that the method did not see"


def test_recycled_row_that_pauses_keeps_its_list():
    patch, layer, alone = RefreshKV(**{**RECYCLED, "stride": 1000}), Layer(batch=2), Layer(batch=2)
    for one in (layer, alone):
        one.attended(patch, [50, 40], "prompt")
    layer.attended(patch, [51, 41])
    layer.attended(patch, [52, 41], paused=[1])
    layer.attended(patch, [53, 41], paused=[1])
    alone.attended(patch, [51, 41])
    assert layer.attended(patch, [54, 42])[1] == alone.attended(patch, [52, 42])[1]
    # a full step and a turn in which it pauses, too
    patch.stride = 5
    layer.attended(patch, [55, 42], paused=[1])
    q, kv, ctx = layer.call([60, 42], "prompt")
    q, ctx.q_pos = q[:, :, 55:], ctx.q_pos[:, 55:]
    patch.observe(q, kv, ctx)
    assert ring(layer, 1, 0) == ring(alone, 1, 0) and len(ring(layer, 0, 0)) == 12


# ---- hip ----

HIP = {"mask_k": 16, "block_size_q": 8, "sliding_window": 12, "sink": 4, "dense_layers": 0}


def naive_hip(q, k, hip, searched):
    """Keys that the newest of k [n, D] attends, by the search of query q [D] at position `searched`."""
    n, wide = len(k), hip.block_size_k_after_masking or hip.block_size_k
    blocks = naive_search([(searched, q)], k, hip)
    pages = {(hip.sink + b * hip.block_size_k) // wide for b in blocks}
    keys = {t for page in pages for t in range(page * wide, page * wide + wide)}
    return {t for t in keys | set(range(hip.sink)) | set(range(searched - hip.sliding_window + 1, n)) if 0 <= t < n}


@pytest.mark.parametrize("change", [
    {}, {"refresh": 1}, {"refresh": 3}, {"mask_k": 7}, {"block_size_k_after_masking": 4}, {"block_size_k": 1},
], ids=lambda c: "+".join(f"{k}={v}" for k, v in c.items()) or "plain")  # fmt: skip
def test_hip_decode_equals_the_specification(change):
    hip, layer = HiP(**{**HIP, **change}), Layer(tokens=120, batch=3, whole=True)
    for step in range(20):
        ends = [90 + step, 64 + step, 10 + step]
        found, age = layer.attended(hip, ends), step % hip.refresh
        for b, n in enumerate(ends):
            for h in range(4):
                expected = naive_hip(layer.q[b, h, n - 1 - age], layer.k[b, h // 2, :n], hip, n - 1 - age)
                assert found[b][h] == expected, (b, h, step)


def test_hip_searches_again_after_a_turn_and_a_crop():
    hip, layer = HiP(**HIP), Layer(tokens=120)
    for n, age in ((33, 0), (34, 1), (60, 0), (61, 1)):
        layer.attended(hip, [n])
        assert layer.plain["hip_age"] == age
    layer.rows.clear()
    layer.attended(hip, [50])
    assert layer.plain["hip_age"] == 0


@pytest.mark.parametrize("refresh", [1, 3, 8])
def test_hip_row_that_outgrows_the_dense_length_reads_as_beside_a_longer_one(refresh):
    hip, layer, alone = HiP(**{**HIP, "refresh": refresh}), Layer(tokens=120, batch=2), Layer(tokens=120, batch=2)
    alone.q, alone.k, alone.v = (x[1:] for x in (layer.q, layer.k, layer.v))
    for n in range(hip.short - 4, hip.short + 20):
        found = layer.attended(hip, [n + 40, n])[1]
        assert alone.attended(hip, [n])[0] == found, n
    assert len(found[0]) < n


def test_hip_row_that_pauses_keeps_its_list():
    hip, layer = HiP(**{**HIP, "refresh": 2}), Layer(tokens=120, batch=2)
    found = layer.attended(hip, [70, 60])[1]
    assert layer.attended(hip, [71, 60], paused=[1])[1] == [set()] * 4
    layer.attended(hip, [72, 60], paused=[1])  # a search
    assert layer.plain["hip_age"] == 0
    assert layer.attended(hip, [73, 61])[1] == [keys | {60} for keys in found]


# ---- tokenselect ----

TOKENS = {"top_k": 9, "n_local": 12, "n_init": 4, "threshold": 1.01, "positions": "true", "prefill": False}


def naive_votes(q, k, patch):
    """Votes for each of k [Hkv, n, D] by q [Hq, D], -inf where none are taken."""
    n, heads, votes = k.shape[1], len(q), [float("-inf")] * k.shape[1]
    between = range(patch.n_init, n - patch.n_local)
    logits = [[float(q[h] @ k[h * len(k) // heads, t]) for t in between] for h in range(heads)]
    for i, t in enumerate(between):
        if patch.selection == "soft_vote":
            votes[t] = sum(float(torch.softmax(torch.tensor(row), -1)[i]) for row in logits)
        elif patch.selection == "logit_sum":
            votes[t] = sum(row[i] for row in logits)
        else:
            votes[t] = sum(i in best(row, patch.top_k) for row in logits)
    half = patch.pool_kernel // 2
    return [max(votes[max(0, t - half) : t + half + 1]) if t in between else float("-inf") for t in range(n)]


def naive_tokenselect(q, k, patch):
    n = k.shape[1]
    votes = naive_votes(q, k, patch)
    taken = {t for t in best(votes, patch.top_k) if votes[t] > float("-inf")}
    return taken | set(range(min(n, patch.n_init))) | set(range(max(0, n - patch.n_local), n))


@pytest.mark.parametrize("change", [
    {}, {"pool_kernel": 5}, {"selection": "head_vote"}, {"selection": "logit_sum"}, {"n_init": 0}, {"top_k": 30},
    {"n_local": 1}, {"top_k": 90},
], ids=lambda c: "+".join(f"{k}={v}" for k, v in c.items()) or "plain")  # fmt: skip
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (8, 1)])
def test_tokenselect_equals_the_specification(change, heads, kv_heads):
    patch, layer = TokenSelect(**{**TOKENS, **change}), Layer(heads=heads, kv_heads=kv_heads, batch=3)
    for step in range(3):
        ends = [70 + step, 40 + step, 9 + step]
        found = layer.attended(patch, ends)
        for b, n in enumerate(ends):
            assert found[b] == [naive_tokenselect(layer.q[b, :, n - 1], layer.k[b, :, :n], patch)] * heads, (b, step)


def test_tokenselect_votes():
    layer, patch = Layer(), TokenSelect(**TOKENS)
    q, kv, ctx = layer.call([80])
    votes = patch.votes(q, kv, torch.tensor([79]))
    assert (votes > float("-inf")).sum() == 80 - 4 - 12
    torch.testing.assert_close(votes[votes > 0].sum(), torch.tensor(4.0))
    few, more = (layer.attended(TokenSelect(**{**TOKENS, "top_k": k}), [80])[0][0] for k in (5, 9))
    assert len(few) == 21 and few < more


@pytest.mark.parametrize("threshold", [-1.01, 0.3, 1.01])
def test_tokenselect_takes_tokens_again(threshold):
    """A vote is held where the query is unlike that of the last vote, row by row; a turn votes anew."""
    patch, layer = TokenSelect(**{**TOKENS, "threshold": threshold}), Layer(batch=2)
    flat = turned(layer.q, -torch.arange(100)[None]).transpose(1, 2).flatten(2)  # [B, T, Hq * D]
    last, voted, hits, before = [None] * 2, [None] * 2, 0, None
    for ends in [[n, n - 20] for n in (60, *range(61, 75), 80, *range(81, 90))]:
        found = layer.attended(patch, ends)
        for b, n in enumerate(ends):
            like = before is not None and ends[0] - before == 1
            like = like and torch.cosine_similarity(flat[b, n - 1], flat[b, last[b]], 0) >= threshold
            if not like:
                last[b], votes = n - 1, naive_votes(layer.q[b, :, n - 1], layer.k[b, :, :n], patch)
                voted[b] = set(best(votes, patch.top_k))
            hits += bool(like)
            assert found[b][0] == voted[b] | set(range(4)) | set(range(n - 12, n)), (b, n)
        before = ends[0]
    assert {-1.01: hits == 46, 0.3: 0 < hits < 46, 1.01: hits == 0}[threshold]


# ---- what they share ----

SMALL = {
    "quest": {**QUEST, "budget": 24},
    "recycled": {"budget": 20, "min_budget": 1, "stride": 4, "threshold": 0.5},
    "hip": {**HIP, "block_size_q": 16, "refresh": 3},
    "tokenselect": {**TOKENS, "threshold": 0.8},
}
ALL = {"quest": {"budget": 1000}, "recycled": {"budget": 1000}, "hip": {"mask_k": 1000, "dense_layers": 0},
       "tokenselect": {}}  # fmt: skip


def prompt(batch=1, length=60, seed=3):
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def generate(model, ids, new=12, **kwargs):
    out = model.generate(
        ids, max_new_tokens=new, do_sample=False, output_logits=True, return_dict_in_generate=True, **kwargs
    )
    return out.sequences, torch.stack(out.logits)  # logits [new, B, vocab]


def padded(ids, pad):
    """ids with the first `pad` tokens of row 1 as padding, and the mask."""
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    return ids * mask, mask


def close(a, b, atol=5e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def notes(model):
    return [layer.note for layer in attnpatch.status(model).layers if layer.covered]


@pytest.mark.parametrize("patch", SMALL)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_budget_of_everything_is_dense(name, patch):
    model = tiny(name)
    ids, mask = padded(prompt(2), 23)
    wanted, logits = generate(model, ids, attention_mask=mask)
    with attnpatch.patched(model, patch, **ALL[patch]):
        got, mine = generate(model, ids, attention_mask=mask)
        assert torch.equal(got, wanted)
        close(mine, logits)


@pytest.mark.parametrize("patch", SMALL)
@pytest.mark.parametrize("name", CONFIGS)
def test_sparse_in_every_family_and_padded_rows_alone(name, patch):
    model = tiny(name)
    ids, mask = padded(prompt(2), 23)
    wanted, logits = generate(model, ids, attention_mask=mask)
    with attnpatch.patched(model, patch, **SMALL[patch]):
        got, mine = generate(model, ids, attention_mask=mask)
        dense = [bool(note) for note in notes(model)]
        alone, single = generate(model, ids[1:, 23:])
        assert torch.equal(alone[0, 37:], got[1, 60:])
        close(single[:, 0], mine[:, 1])
    if patch != "hip":
        close(mine[0], logits[0])  # the prefill is dense
    if name == "mistral_sw" or (name, patch) == ("gemma2", "hip"):
        assert all(dense)
        close(mine, logits)
    else:
        assert not any(dense) and not torch.allclose(mine[1], logits[1], atol=1e-3), "the patch did nothing"
    assert torch.equal(generate(model, ids, attention_mask=mask)[1], logits)


@pytest.mark.parametrize("patch", ["quest", "recycled", "tokenselect"])
def test_chunked_prefill_changes_nothing(patch):
    model = tiny("llama")
    with attnpatch.patched(model, patch, **SMALL[patch]):
        wanted, logits = generate(model, prompt(2))
        got, mine = generate(model, prompt(2), prefill_chunk_size=16)
        assert torch.equal(got, wanted)
        close(mine, logits)


@pytest.mark.parametrize("patch", SMALL)
@pytest.mark.parametrize("settings", [ALL, SMALL], ids=["all", "sparse"])
def test_three_turns_on_one_cache(patch, settings):
    model, ids = tiny("qwen3"), prompt()
    plain, dense = None, []
    for turn in range(3):
        plain, logits = generate(model, ids if plain is None else torch.cat([plain, prompt(1, 30, turn)], 1))
        dense.append(logits)
    with attnpatch.patched(model, patch, **settings[patch]):
        cache, out = attnpatch.PatchCache(model), None
        for turn in range(3):
            out, logits = generate(
                model, ids if out is None else torch.cat([out, prompt(1, 30, turn)], 1), **{CACHE: cache}
            )
            if settings is ALL:
                close(logits, dense[turn])
        layer = cache.layers[-1]
        assert layer.held == layer.seen == 60 + 3 * 12 + 60 - 1 and layer.complete
        if settings is ALL:
            assert torch.equal(out, plain)
        elif patch == "quest":
            assert torch.equal(layer.rows["page_bounds"], page_bounds.summarise(layer.keys, 4))


@pytest.mark.parametrize("patch", SMALL)
def test_beams(patch):
    model = tiny("llama")
    ids, mask = padded(prompt(2), 9)
    search = {"num_beams": 3, "max_new_tokens": 10, "do_sample": False, "attention_mask": mask}
    wanted = model.generate(ids, **search)
    with attnpatch.patched(model, patch, **ALL[patch]):
        assert torch.equal(model.generate(ids, **search), wanted)
    with attnpatch.patched(model, patch, **SMALL[patch]):
        cache = attnpatch.PatchCache(model)
        assert torch.equal(model.generate(ids, **search, **{CACHE: cache}), model.generate(ids, **search))
        if patch == "quest":
            for layer in cache.layers:
                anew = page_bounds.summarise(layer.keys, 4, layer.pos >= 0)
                assert torch.equal(layer.rows["page_bounds"], anew)


def test_schedules_that_amount_to_others():
    model, ids = tiny("qwen3"), prompt()
    logits = generate(model, ids)[1]
    with attnpatch.patched(model, "recycled", **{**RECYCLED, "stride": 1}):
        close(generate(model, ids)[1], logits)
    with attnpatch.patched(model, "recycled", **{**RECYCLED, "stride": 3}):
        wanted = generate(model, ids)[1]
    with attnpatch.patched(model, "recycled", **{**RECYCLED, "stride": 3, "schedule": "qc", "threshold": 1.01}):
        close(generate(model, ids)[1], wanted)


def test_similarity_is_of_queries_before_their_rotation(monkeypatch):
    """One token over and over, as the first layer's queries: alike before the rotation, whatever their positions."""
    model, found = tiny("llama"), []
    like = RefreshKV._like
    monkeypatch.setattr(RefreshKV, "_like", lambda *args, **kw: found.append(like(*args, **kw)) or found[-1])
    hyper = {"budget": 20, "min_budget": 1, "stride": 2, "threshold": 0.99999}
    with attnpatch.patched(model, "recycled", layers=[0], **hyper), torch.no_grad():
        cache, ids = attnpatch.PatchCache(model), torch.full((1, 50), 7)
        for part in (ids, *[ids[:, :1]] * 6, *[ids[:, :1] + 1] * 2):
            model(part, **{CACHE: cache})
    assert torch.cat(found).tolist() == [True] * 3 + [False]


@pytest.mark.parametrize("patch", SMALL)
def test_bfloat16_is_finite(patch):
    model = tiny("llama", torch.bfloat16)
    ids, mask = padded(prompt(2), 23)
    with attnpatch.patched(model, patch, **SMALL[patch]):
        assert torch.isfinite(generate(model, ids, attention_mask=mask)[1]).all()


@pytest.mark.parametrize("patch", SMALL)
def test_crop_then_continue(patch):
    """Rolled back and fed again, a cache without schedule answers as before."""
    model, more = tiny("llama"), prompt(1, 8, seed=8)
    with attnpatch.patched(model, patch, **SMALL[patch]), torch.no_grad():
        cache = attnpatch.PatchCache(model)
        model(prompt(), **{CACHE: cache})
        before = [model(more[:, i : i + 1], **{CACHE: cache}).logits for i in range(8)]
        cache.crop(-5)
        assert not cache.layers[0].rows
        after = [model(more[:, i : i + 1], **{CACHE: cache}).logits for i in range(3, 8)]
        assert cache.get_seq_length() == 68 and torch.isfinite(torch.cat(after)).all()
        if patch == "quest":
            close(torch.cat(after), torch.cat(before[3:]))


@pytest.mark.parametrize("change", [{}, {"threshold": -1.01}], ids=["votes", "holds"])
@pytest.mark.parametrize("patch", ["quest", "tokenselect"])
def test_a_row_may_pause_while_others_go_on(patch, change):
    model, ids, more = tiny("llama"), prompt(2), prompt(2, 6, seed=8)
    hyper = {**SMALL[patch], **(change if patch == "tokenselect" else {})}
    with attnpatch.patched(model, patch, **hyper), torch.no_grad():
        cache, alone = attnpatch.PatchCache(model), attnpatch.PatchCache(model)
        mask = torch.ones_like(ids)
        model(ids, attention_mask=mask, **{CACHE: cache})
        model(ids[1:], **{CACHE: alone})
        for step, real in enumerate((0, 1, 0, 0, 1, 1)):
            mask = torch.cat([mask, torch.tensor([[1], [real]])], 1)
            pos, token = (mask.cumsum(-1) - 1)[:, -1:], more[:, step : step + 1]
            got = model(token, attention_mask=mask, position_ids=pos, **{CACHE: cache}).logits
            if real:
                close(got[1:], model(token[1:], **{CACHE: alone}).logits)


def test_composition():
    model, ids = tiny("llama"), prompt(1, 300)
    flex = {"gamma": 0.6, "min_budget": 32, "block_size": 16}
    with attnpatch.patched(model, "flexprefill", **flex):
        wanted = generate(model, ids)[1]
    for patch in ("quest", "recycled", "tokenselect"):
        with attnpatch.patched(model, f"flexprefill+{patch}", flexprefill=flex, **{patch: SMALL[patch]}):
            got = generate(model, ids)[1]
        close(got[0], wanted[0])
        assert not torch.allclose(got[1], wanted[1], atol=1e-3)
        with pytest.raises(ConfigError, match=f"'{patch}' needs the full cache in decode, which 'snapkv' evicts"):
            attnpatch.patch_model(model, f"snapkv+{patch}")
        with pytest.raises(ConfigError, match="both choose what (prefill|decode) attends"):
            attnpatch.patch_model(model, f"hip+{patch}")
    with pytest.raises(ConfigError, match="which 'snapkv' evicts; set decode=False on 'hip'"):
        attnpatch.patch_model(model, "hip+snapkv")
    assert not hasattr(model, "_attnpatch")


@pytest.mark.parametrize(("patch", "change", "message"), [
    ("quest", {"budget": 0}, "budget 0 is out of range"),
    ("quest", {"budget": "1MiB"}, "budget 1MiB is in bytes, but nothing is evicted; give tokens or a ratio"),
    ("quest", {"page_size": 0}, "page_size=0 is too small; it must be at least 1"),
    ("quest", {"min_pages": 0}, "min_pages=0 is too small"),
    ("quest", {"gqa": "mean"}, "choose one of 'per_query_head', 'group_max'"),
    ("recycled", {"budget": -1}, "budget -1 is out of range"),
    ("recycled", {"threshold": 1.02}, "threshold=1.02 is too large; it must be at most 1.01"),
    ("recycled", {"threshold": -1.02}, "threshold=-1.02 is too small; it must be at least -1.01"),
    ("recycled", {"schedule": "never"}, "choose one of 'qc', 'fixed'"),
    ("recycled", {"stride": 0}, "stride=0 is too small; it must be at least 1"),
    ("recycled", {"threshold": 1.02}, "threshold=1.02 is too large; it must be at most 1.01"),
    ("recycled", {"min_budget": 0}, "min_budget=0 is too small"),
    ("recycled", {"kernel_size": 4}, "kernel_size=4 is even"),
    ("recycled", {"kernel_size": 0}, "kernel_size=0 is too small"),
    ("tokenselect", {"top_k": 0}, "top_k=0 is too small; it must be at least 1"),
    ("tokenselect", {"pool_kernel": 2}, "pool_kernel=2 is even"),
    ("tokenselect", {"selection": "max"}, "choose one of 'soft_vote', 'head_vote', 'logit_sum'"),
    ("hip", {"refresh": 0}, "refresh=0 is too small; it must be at least 1"),
    ("hip", {"decode": 1}, "decode=1 has the wrong type; expected bool"),
], ids=lambda x: "+".join(x) if isinstance(x, dict) else "")  # fmt: skip
def test_refusals(patch, change, message):
    with pytest.raises(ConfigError, match=message):
        attnpatch.patch_model(tiny("llama"), patch, **change)


@pytest.mark.parametrize("patch", [
    Quest(**QUEST), RefreshKV(**RECYCLED), RefreshKV(**{**RECYCLED, "schedule": "qc"}), HiP(**HIP),
    TokenSelect(**{**TOKENS, "threshold": 0.9}),
], ids=lambda p: p.name)  # fmt: skip
def test_no_host_wait(patch, monkeypatch):
    layer = Layer(batch=2)
    if patch.name == "recycled":
        layer.attended(patch, [60, 45], "prompt")
    calls = [layer.call([61 + i, 46 + i]) for i in range(16)]

    def refuse(*args, **kwargs):
        raise AssertionError("the host reads a tensor")

    for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    for q, kv, ctx in calls:
        selection = patch.select(q, kv, ctx)
        if "observe" in patch.hooks():
            patch.observe(q, kv, ctx)
        dispatch.run(q, kv, selection or Selection(window=5), ctx)


@pytest.mark.parametrize("end", [20, 35])
@pytest.mark.parametrize("schedule", ["fixed", "qc"])
def test_recycled_rows_whose_prompt_ends_in_an_earlier_chunk(schedule, end):
    model = tiny("llama")
    ids = torch.randint(2, 97, (2, 66), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, 66, dtype=torch.long)
    mask[0, end:60] = 0
    found = []
    with attnpatch.patched(model, "recycled", budget=12, min_budget=12, stride=50, schedule=schedule), torch.no_grad():
        for chunks in ([60], [20, 20, 20]):
            cache, at, logits = attnpatch.PatchCache(model, prompt_length=60), 0, []
            for n in [*chunks, *[1] * 6]:
                out = model(ids[:, at : at + n], attention_mask=mask[:, : at + n], **{CACHE: cache}).logits
                at += n
                logits.append(out[:, -1])
            found.append((torch.stack(logits[-6:]), cache.layers[0].rows["recycled"].sort(-1).values))
    torch.testing.assert_close(found[1][0], found[0][0], atol=5e-5, rtol=0)
    assert torch.equal(found[1][1], found[0][1])


# ---- the Triton kernels of these steps, interpreted ----


def interpreted():
    """Runs in a process of its own: the interpreter must be asked for before triton is imported."""
    from attnpatch.executors import _top_slots_triton

    mend_interpreter()
    qc, found = {"schedule": "qc", "stride": 3, "threshold": 0.1}, []
    patches = [Quest(**QUEST), RefreshKV(**RECYCLED), RefreshKV(**{**RECYCLED, **qc}), HiP(**{**HIP, "refresh": 3}),
               TokenSelect(**TOKENS), TokenSelect(**{**TOKENS, "threshold": 0.1})]  # fmt: skip
    for form in ("torch", "triton"):
        if form == "triton":
            gather_decode._decide = lambda call, forced: ("triton", "compared")
            for executor in (likeness, pooled, top_slots, votes, weakest):
                executor.choose = lambda *args: ("triton", "compared")
            _top_slots_triton.SHORT = 32
        for patch in patches:
            for short in (0, 17):
                layer = Layer(batch=3, dim=16)
                layer.attended(patch, [60, 60 - short, 60], "prompt")
                for i in range(1, 8):
                    paused = [2] if short and i == 3 else []
                    found.append((layer.attended(patch, [60 + i, 60 + i - short, 60 + i], paused=paused), patch, i))
    half = len(found) // 2
    for wanted, got in zip(found[:half], found[half:], strict=True):
        assert wanted == got, wanted[1:]


@needs_triton
def test_triton_kernel_under_the_interpreter():
    run_interpreted(__file__)


if __name__ == "__main__":
    interpreted()
