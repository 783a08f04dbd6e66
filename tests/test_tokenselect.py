"""TokenSelect's prefill and options, against plain loops from its specification."""

from __future__ import annotations

import pytest
import torch
from attnpatch.patches.tokenselect import TokenSelect
from oracle import CACHE, CONFIGS, tiny
from selections import attend, layer, noise, pairs

import attnpatch
from attnpatch.engine import turns
from attnpatch.errors import ConfigError
from attnpatch.executors import dispatch

BASE = {"top_k": 9, "n_local": 12, "n_init": 4, "chunk": 8, "positions": "true"}


def naive_chunks(q, k, n, patch):
    """bool [n, n]: pairs that one row's queries q [Hq, n, D] attend of k [Hkv, n, D]."""
    heads, kv_heads, seen = q.shape[0], k.shape[0], torch.zeros(n, n, dtype=torch.bool)
    for start in range(0, n, patch.chunk):
        end = min(start + patch.chunk, n)
        near = max(patch.n_local, end - start)
        keys = set(range(end))
        if end > patch.n_init + patch.top_k + near:
            between = range(patch.n_init, end - near)
            votes = torch.zeros(len(between))
            for h in range(heads):
                own = h % kv_heads if patch.strict else h * kv_heads // heads
                votes += torch.softmax(k[own, patch.n_init : end - near] @ q[h, start:end].mean(0), -1)
            best = sorted(range(len(between)), key=lambda i: (float(votes[i]), i))[-patch.top_k :]
            keys = {between[i] for i in best} | set(range(patch.n_init)) | set(range(end - near, end))
        for i in range(start, end):
            seen[i, [j for j in keys if j <= i]] = True
    return seen


@pytest.mark.parametrize("change", [{}, {"chunk": 20}, {"n_init": 0}, {"top_k": 90}, {"strict": True}],
                         ids=["plain", "wide", "no-sink", "all", "strict"])  # fmt: skip
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (8, 1)], ids=["gqa1", "gqa4", "gqa8"])
def test_chunks_equal_the_specification(heads, kv_heads, change):
    patch, lengths = TokenSelect(**{**BASE, **change}), [77, 41, 5]
    q, k, v = noise(77, heads, kv_heads, batch=3, scale=0.3)
    one, kv, ctx = layer(q, k, v, lengths)
    found = pairs(patch, one, kv, ctx)
    for b, n in enumerate(lengths):
        wanted = naive_chunks(q[b], k[b], n, patch)
        assert torch.equal(found[b, :, :n, :n], wanted.expand(heads, -1, -1)), b
    assert torch.isfinite(attend(patch, one, kv, ctx)).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_with_room_for_all_is_dense_and_else_sparse(name):
    model, ids = tiny(name), torch.randint(2, 97, (2, 60), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :23] = 0
    with torch.no_grad():
        wanted = model(ids * mask, attention_mask=mask).logits
        with attnpatch.patched(model, "tokenselect", **{**BASE, "top_k": 100}):
            got = model(ids * mask, attention_mask=mask).logits
        torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], atol=5e-5, rtol=0)
        with attnpatch.patched(model, "tokenselect", **BASE):
            sparse = model(ids, use_cache=False).logits
        assert torch.isfinite(sparse).all()
        assert name == "mistral_sw" or not torch.allclose(sparse, model(ids).logits, atol=1e-3)


def test_a_later_turn_is_sparse_after_steps_with_a_mask_of_ones():
    ids = torch.randint(2, 97, (1, 75), generator=torch.Generator().manual_seed(3))
    with attnpatch.patched(tiny("llama"), "tokenselect", **{**BASE, "chunk": 10}) as model, torch.no_grad():
        caches, outs = [attnpatch.PatchCache(model) for _ in range(2)], []
        for part in ids.split([50, 1, 1, 22, 1], 1):
            outs = []
            for cache, given in zip(caches, (False, True), strict=True):
                mask = {"attention_mask": torch.ones_like(ids[:, : cache.get_seq_length() + part.shape[1]])}
                outs.append(model(part, **(mask if given else {}), **{CACHE: cache}).logits)
            torch.testing.assert_close(*outs, atol=5e-5, rtol=0)
        assert not any(layer.note for layer in caches[1].layers)


@pytest.mark.parametrize("rows", [512, 1], ids=["chunk", "step"])
def test_8_positions_stay_below_what_is_attended(rows):
    """At the default sizes and 100,000 tokens no query or key is rotated to a position beyond 2687."""
    n, seen, patch = 100_000, [], TokenSelect(threshold=1.01)
    q, kv, ctx = layer(*noise(n, 2, 1, 4), prefix=n - rows)
    ctx.turn, ctx.back = (lambda x, by: x), lambda x: x.float()
    ctx.event, ctx.phase = ("step", "decode") if rows == 1 else ("prompt", "prefill")
    chosen = patch.select(q, kv, ctx)
    chosen = list(chosen) if hasattr(chosen, "__next__") else [chosen]
    q, kv.k = q.clone(), kv.k.clone()
    q[..., 0], kv.k[..., 0] = ctx.q_pos[:, None].float(), kv.pos.float()  # each tells where it stands
    ctx.turn = lambda x, by: seen.append(x[..., 0].long() + by[:, None]) or torch.zeros_like(x)
    for term in chosen:
        dispatch.run(q, kv, term, ctx)
    assert len(seen) >= 2 and all(0 <= int(at.min()) and int(at.max()) <= 2687 for at in seen)
    assert max(int(at.max()) for at in seen) == 128 + 2048 + 512 - 1


@pytest.mark.parametrize(("change", "message"), [
    ({"threshold": 1.5}, "threshold=1.5 is too large; it must be at most 1.01"),
    ({"threshold": -2.0}, "threshold=-2.0 is too small; it must be at least -1.01"),
    ({"chunk": 0}, "chunk=0 is too small"),
    ({"n_local": 0}, "n_local=0 is too small"),
    ({"decode": False, "prefill": False}, "both False"),
    ({"positions": "rank"}, "choose one of 'compact', 'true'"),
], ids=["high", "low", "chunk", "local", "neither", "positions"])  # fmt: skip
def test_refusals(change, message):
    with pytest.raises(ConfigError, match=message):
        TokenSelect(**change)


@pytest.mark.parametrize(("threshold", "rate"), [(-1.01, 9 / 10), (1.01, None)], ids=["always", "never"])
def test_status_tells_the_hit_rate(threshold, rate):
    model, ids = tiny("llama"), torch.randint(2, 97, (2, 60), generator=torch.Generator().manual_seed(3))
    with attnpatch.patched(model, "tokenselect", **{**BASE, "threshold": threshold}):
        for _ in range(2):  # a new cache counts anew
            model.generate(ids, max_new_tokens=11, do_sample=False)
            report = attnpatch.status(model).layers[0].report
            if rate is None:
                assert "hit rate" not in report
            else:
                assert report["sparse steps"] == 10 and report["hit rate"] == pytest.approx(rate)


@pytest.mark.parametrize("pad", [0, 4], ids=["alike", "padded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_turn_back_by_pairs_of_channels_is_the_turn_back(name, pad):
    model, seen = tiny(name), []
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :pad] = 0
    select = TokenSelect.select

    def look(self, q, kv, ctx):
        pairs, back = ctx.pairs(), ctx.back(q)
        turned = q[:, :, 0].float() if pairs is None else pairs.turned(q[:, :, 0])
        torch.testing.assert_close(turned, back[:, :, 0], atol=1e-5, rtol=1e-5)
        seen.append(pairs is None)
        return select(self, q, kv, ctx)

    with attnpatch.patched(model, "tokenselect", **{**BASE, "prefill": False}), pytest.MonkeyPatch.context() as change:
        change.setattr(TokenSelect, "select", look)
        change.setattr(turns, "AHEAD", 2)  # steps go beyond what was made at once
        model.generate(torch.randint(2, 97, (2, 9)) * mask, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert seen and not all(seen) or name == "mistral_sw"  # whose layers are left alone


def test_a_short_row_stays_dense_beside_a_long_one():
    """While a row holds no more than is attended, no kept vote may hide what left its window."""
    model, ids = tiny("llama"), torch.randint(2, 97, (2, 60), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :43] = 0
    with attnpatch.patched(model, "tokenselect", **{**BASE, "prefill": False, "threshold": -1.01}):
        both = model.generate(ids * mask, attention_mask=mask, max_new_tokens=14, do_sample=False)
        alone = model.generate(ids[1:, 43:], max_new_tokens=14, do_sample=False)
    assert torch.equal(both[1, 60:], alone[0, 17:])


@pytest.mark.parametrize("positions", ["compact", "true"])
@pytest.mark.parametrize("pad", [0, 23], ids=["alike", "padded"])
@pytest.mark.parametrize("threshold", [-1.01, 1.01], ids=["hits", "votes"])
def test_status_tells_what_was_read(positions, pad, threshold):
    model, ids = tiny("llama"), torch.randint(2, 97, (2, 60), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    hyper = {**BASE, "positions": positions, "threshold": threshold}
    with attnpatch.patched(model, "tokenselect", **hyper):
        model.generate(ids * mask, attention_mask=mask, max_new_tokens=11, do_sample=False)
        layer = attnpatch.status(model).layers[1]
        held = sum(60 - p + i for p in (0, pad) for i in range(1, 11))
        scored = sum(60 + i - 16 for i in range(1, 11 if threshold > 1 else 2)) * 2
        assert (layer.steps, layer.attended, layer.scored) == (10, 25, scored / 20)
        each = 2 * 16 * 4  # bytes of the keys of a token
        assert layer.bytes_read_dense == held * 2 * each
        assert layer.bytes_read == (20 * 25 * 2 + scored) * each
        assert layer.hit_rate == (None if threshold > 1 else pytest.approx(0.9))
        assert "10 steps attended 25 and scored" in str(attnpatch.status(model))
        model.generate(ids, max_new_tokens=1, do_sample=False)
        assert attnpatch.status(model).layers[1].steps == 0  # a new cache counts anew


@pytest.mark.parametrize(("patch", "hyper", "attended", "scored"), [
    ("quest", {"budget": 16, "page_size": 4, "dense_layers": 0}, 16, None),
    ("recycled", {"budget": 20, "min_budget": 1, "schedule": "fixed", "stride": 50}, 21, 0),
    ("tokenselect", {}, 65.5, 0),
], ids=["quest", "recycled", "dense"])  # fmt: skip
def test_status_of_other_methods(patch, hyper, attended, scored):
    model, ids = tiny("qwen3"), torch.randint(2, 97, (1, 60), generator=torch.Generator().manual_seed(3))
    with attnpatch.patched(model, patch, **hyper):
        model.generate(ids, max_new_tokens=11, do_sample=False, num_beams=2)
        layer = attnpatch.status(model).layers[3]
    assert layer.steps == 10 and layer.attended == attended
    assert layer.scored == (2 * sum(-(-(60 + i) // 4) for i in range(1, 11)) / 10 if scored is None else scored)
    assert (layer.bytes_read < layer.bytes_read_dense) == bool(hyper)
