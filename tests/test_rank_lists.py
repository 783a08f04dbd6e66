"""Lists by rank against their reference, and TokenSelect's compact positions against plain loops."""

from __future__ import annotations

import pytest
import torch
from attnpatch.patches.tokenselect import RAW, TokenSelect
from oracle import CACHE, CONFIGS, FULL, tiny
from selections import layer, noise, pairs
from test_decode_select import Layer, close, generate, padded, prompt, turned

import attnpatch
from attnpatch.decisions import Selection
from attnpatch.errors import ConfigError, InputError
from attnpatch.executors import dispatch, naive, rank_lists

SMALL = {"top_k": 9, "n_local": 12, "n_init": 4, "chunk": 8, "threshold": 1.01}


def listed(n, batch, rows, width, seed=0):
    """A list int32 [batch, 1, 1, W] of `width` random keys and the last `rows`, ascending."""
    g = torch.Generator().manual_seed(seed)
    early = [torch.randperm(n - rows, generator=g)[:width].sort().values for _ in range(batch)]
    return torch.stack([torch.cat([x, torch.arange(n - rows, n)]) for x in early])[:, None, None].int()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_equals_the_reference(group, ragged, rows, dtype):
    q, k, v = (x.to(dtype) for x in noise(45, 2 * group, 2, batch=3))
    q, kv, ctx = layer(q, k, v, [45, 41, 20] if ragged else None, prefix=45 - rows)
    ctx.turn, index, count = turned_as, listed(45, 3, rows, 15), None
    if ragged:  # each row its own list, the rest of it unused
        ends = (ctx.q_pos.amax(-1) + 1).tolist()
        own = [listed(max(e, 20), 1, 1, 5 + b, b)[0, 0, 0] for b, e in enumerate(ends)]
        own[1] = torch.cat([own[1][:-1], torch.arange(38, 41)]).unique().int()
        count = torch.tensor([len(x) if e else 0 for x, e in zip(own, ends, strict=True)])[:, None, None].int()
        index = torch.stack([torch.nn.functional.pad(x, (0, 20 - len(x)), value=99) for x in own])[:, None, None]
    term = Selection(index, count, positions="rank")
    for softcap in (None, 5.0):
        ctx.softcap = softcap
        out, lse = dispatch.run(q, kv, term, ctx, want_lse=True)
        expected, logsum = naive.run(q, kv, term, ctx, want_lse=True)
        atol = 1e-5 if dtype == torch.float32 else 3e-2
        close(out, expected, atol)
        close(lse, logsum, atol)
        close(dispatch.run(q, kv, term, ctx)[0], expected, atol)


def turned_as(x, by):
    """The rotation of `turned`, in x's dtype."""
    return turned(x.float(), by).to(x.dtype)


def test_rows_of_a_term():
    q, kv, ctx = layer(*noise(40))
    ctx.turn = turned_as
    term = Selection(listed(30, 1, 10, 8), positions="rank", rows=slice(20, 30))
    out = dispatch.run(q, kv, term, ctx)[0]
    close(out, naive.run(q, kv, term, ctx)[0][:, 20:30], 1e-5)
    assert "rank_lists" in dispatch.explain(q, kv, term, ctx)


@pytest.mark.parametrize("change", [
    {"page": 2}, {"sink": 3}, {"window": 3}, {"columns": torch.zeros(1, 1, 2, dtype=torch.int32)},
    {"index": torch.zeros(1, 2, 1, 3, dtype=torch.int32)}, {"index": torch.zeros(1, 1, 2, 3, dtype=torch.int32)},
], ids=["page", "sink", "window", "columns", "heads", "lists"])  # fmt: skip
def test_other_forms_are_refused(change):
    q, kv, ctx = layer(*noise(40))
    ctx.turn = turned_as
    with pytest.raises(InputError, match="takes one list of keys for all heads"):
        rank_lists.run(q, kv, Selection(**{"index": listed(40, 1, 1, 3), "positions": "rank", **change}), ctx)


def test_without_a_rotation_it_is_refused():
    q, kv, ctx = layer(*noise(40))
    term = Selection(listed(40, 1, 1, 3), positions="rank")
    with pytest.raises(ConfigError, match=r"give turn\(x, by\)"):
        rank_lists.run(q, kv, term, ctx)
    with pytest.raises(ConfigError, match="or set positions='true'"):
        TokenSelect(**SMALL).select(q, kv, ctx)


# ---- the method ----


def naive_list(q, k, start, end, patch):
    """Keys of the chunk start .. end - 1 of one row; q [Hq, n, D], k [Hkv, n, D] before their rotation."""
    near, heads, dim = max(patch.n_local, end - start), len(q), q.shape[-1]
    if end <= patch.n_init + patch.top_k + near:
        return set(range(end))
    between, votes = list(range(patch.n_init, end - near)), 0
    at = patch.n_local + torch.arange(end - start)[None]
    mean = turned(q[None, :, start:end], at)[0].mean(1)
    for h in range(heads):
        own = h % len(k) if patch.strict else h * len(k) // heads
        votes = votes + torch.softmax(k[own, patch.n_init : end - near].view(-1, dim) @ mean[h], -1)
    best = sorted(range(len(between)), key=lambda i: (float(votes[i]), i))[-patch.top_k :]
    return {between[i] for i in best} | set(range(patch.n_init)) | set(range(end - near, end))


@pytest.mark.parametrize("change", [{}, {"chunk": 20}, {"n_init": 0}, {"strict": True}],
                         ids=["plain", "wide", "no-sink", "strict"])  # fmt: skip
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (8, 1)], ids=["gqa1", "gqa4", "gqa8"])
def test_chunks_equal_the_specification(heads, kv_heads, change):
    patch, lengths = TokenSelect(**{**SMALL, **change}), [77, 41, 5]
    q, k, v = noise(77, heads, kv_heads, dim=8, batch=3, scale=0.5)
    at = torch.arange(77).expand(3, -1)
    one, kv, ctx = layer(turned(q, at), turned(k, at), v, lengths)
    ctx.turn = turned
    found = pairs(patch, one, kv, ctx)
    for b, n in enumerate(lengths):
        wanted = torch.zeros(n, n, dtype=torch.bool)
        for start in range(0, n, patch.chunk):
            end = min(start + patch.chunk, n)
            keys = naive_list(q[b], k[b], start, end, patch)
            for i in range(start, end):
                wanted[i, [j for j in keys if j <= i]] = True
        assert torch.equal(found[b, :, :n, :n], wanted.expand(heads, -1, -1)), b


def test_steps_equal_the_specification():
    patch, layer_ = TokenSelect(**SMALL), Layer(batch=3)
    at = torch.arange(100).expand(3, -1)
    raw_q, raw_k = turned(layer_.q, -at), turned(layer_.k, -at)
    for step in range(6):
        ends = [70 + step, 40 + step, 9 + step]
        found = layer_.attended(patch, ends)  # compares the executor too
        for b, n in enumerate(ends):
            assert found[b] == [naive_list(raw_q[b], raw_k[b], n - 1, n, patch)] * 4, (b, step)
            close(layer_.rows[RAW][b, :, :n], raw_k[b, :, :n], 1e-4)


# ---- in models ----


@pytest.mark.parametrize("positions", ["compact", "true"])
@pytest.mark.parametrize("name", CONFIGS)
def test_room_for_all_is_dense_in_every_mode(name, positions):
    model, hyper = tiny(name), {**SMALL, "top_k": 200, "positions": positions, "threshold": 0.5}
    ids, mask = padded(prompt(2), 23)
    for kwargs in ({"attention_mask": mask}, {"prefill_chunk_size": 17}, {"num_beams": 2}):
        wanted, logits = generate(model, ids, new=6, **kwargs)
        with attnpatch.patched(model, "tokenselect", **hyper):
            got, mine = generate(model, ids, new=6, **kwargs)
        assert torch.equal(got, wanted)
        close(mine, logits, 2e-5 if name in FULL else 5e-5)  # mistral_sw: no layer can be patched, only rounding


@pytest.mark.parametrize("name", FULL)
def test_compact_padded_rows_are_as_alone(name):
    model = tiny(name, torch.float64)  # in fp32 rounding tips votes that are all but equal
    ids, mask = padded(prompt(2), 23)
    with attnpatch.patched(model, "tokenselect", **{**SMALL, "threshold": 0.6}):
        got, mine = generate(model, ids, attention_mask=mask)
        alone, single = generate(model, ids[1:, 23:])
        assert torch.equal(alone[0, 37:], got[1, 60:])
        close(single[:, 0], mine[:, 1], 1e-4)
    assert not torch.allclose(mine[0], generate(model, ids, attention_mask=mask)[1][0], atol=1e-3)


def test_compact_chunks_turns_beams_and_crops():
    model, ids = tiny("llama", torch.float64), prompt(2)  # as above
    hyper = {**SMALL, "threshold": 0.6}
    with attnpatch.patched(model, "tokenselect", **hyper), torch.no_grad():
        whole = generate(model, ids)[1]
        close(generate(model, ids, prefill_chunk_size=16)[1], whole)
        beams = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False}
        both = model.generate(ids, **beams)
        for b in range(2):
            assert torch.equal(model.generate(ids[b : b + 1], **beams)[0], both[b])
        cache, found = attnpatch.PatchCache(model, prompt_length=60), []
        model(ids, **{CACHE: cache})
        for _ in range(2):  # a crop, and the same steps again
            found.append([model(ids[:, i : i + 1], **{CACHE: cache}).logits for i in range(4)])
            cache.crop(-4)
        close(torch.cat(found[0]), torch.cat(found[1]))
        model(ids[:, :24], **{CACHE: cache})  # a turn
        model(ids[:, :1], **{CACHE: cache})
        held = cache.layers[1]
        at = -torch.arange(held.held).expand(2, -1)
        close(held.rows[RAW][:, :, : held.held], model._attnpatch.plan.rope.turn(held.keys, 1, at), 1e-5)


def test_compact_in_bf16_is_finite():
    model = tiny("qwen3", torch.bfloat16)
    with attnpatch.patched(model, "tokenselect", **SMALL):
        assert torch.isfinite(generate(model, prompt(2))[1]).all()


def test_no_distance_exceeds_what_is_attended(monkeypatch):
    """The largest position given to the rotary table is bound by the list, however long the text."""
    model = tiny("llama")
    with attnpatch.patched(model, "tokenselect", **SMALL):
        seen, run = [], dispatch.dense.run

        def look(q, kv, selection, ctx, *args, **kwargs):
            seen.append(kv.k.shape[2] if selection.rows is None else 0)
            return run(q, kv, selection, ctx, *args, **kwargs)

        monkeypatch.setattr(dispatch.dense, "run", look)
        generate(model, prompt(1, 200), new=3)
    assert max(seen) == 4 + 9 + 12


@pytest.mark.parametrize(("names", "hyper", "message"), [
    ("snapkv+tokenselect", {}, "needs the full cache in decode, which 'snapkv' evicts; set decode=False"),
    ("snapkv+quest", {}, "'quest' needs the full cache in decode, which 'snapkv' evicts; name one"),
    ("flexprefill+tokenselect", {}, "name one, or set prefill=False on 'tokenselect'"),
], ids=["evicting", "quest", "prefill"])  # fmt: skip
def test_company_that_is_refused(names, hyper, message):
    with pytest.raises(ConfigError, match=message):
        attnpatch.patch_model(tiny("llama"), names, **hyper)


def test_prefill_beside_an_evicting_method():
    model = tiny("llama")
    with attnpatch.patched(model, "snapkv+tokenselect", tokenselect={**SMALL, "decode": False}, snapkv={"budget": 40}):
        assert torch.isfinite(generate(model, prompt(1, 80))[1]).all()
        assert attnpatch.status(model).layers[0].held < 80
