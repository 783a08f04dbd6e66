"""Storage and attention of heads that hold different numbers of entries, against naive forms and the oracle."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from interpreter import DEVICE, FORMS, INTERPRETED, mend_interpreter, needs_triton, run_interpreted
from oracle import CACHE, CONFIGS, run_both, tiny

import attnpatch
from attnpatch.decisions import KeepSet
from attnpatch.engine.cache import PatchCache
from attnpatch.engine.ragged import Packed, PackedKV
from attnpatch.errors import ConfigError, InputError, UnsupportedModeError
from attnpatch.executors import column_sums, naive, ragged
from attnpatch.executors.backends import ListCall
from attnpatch.patch import _REGISTRY, EvictPatch, option, register

if INTERPRETED:
    mend_interpreter()

ATOL = 2e-5  # the oracle in fp64, so that only our rounding counts

# ---- storage -------------------------------------------------------------------------------------------------------


def filled(counts, dim=8, dtype=torch.float32, seed=0, device="cpu", width=None):
    """Packed storage with `counts` [B][Hkv] entries, and its rectangle (k, v, pos) with NaN in free slots."""
    count = torch.tensor(counts, device=device)
    slots = width or int(count.max()) + 3
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(*count.shape, slots, dim, generator=generator).to(dtype).to(device) for _ in range(2))
    pos = torch.rand(*count.shape, slots, generator=generator).argsort(-1).sort(-1).values.to(torch.int32).to(device)
    free = torch.arange(slots, device=device) >= count[..., None]
    k, v = (x.masked_fill(free[..., None], float("nan")) for x in (k, v))
    pos = pos.masked_fill(free, -1)
    return Packed(k, v, pos, count), (k, v, pos)


def poison(packed):
    """NaN wherever there is no entry."""
    place = torch.zeros(packed.total, dtype=torch.bool, device=packed.k.device)
    slots, entry = packed.slots()
    place[slots[entry]] = True
    packed.k[~place], packed.v[~place] = float("nan"), float("nan")
    packed.pos[~place] = 0


def same(packed, k, v, pos, counts):
    """Whether the storage holds these entries of a rectangle, head by head."""
    for b, row in enumerate(counts):
        for h, n in enumerate(row):
            part = slice(int(packed.start[b, h]), int(packed.start[b, h]) + n)
            assert int(packed.count[b, h]) == n <= int(packed.cap[b, h])
            assert torch.equal(packed.k[part], k[b, h, :n]) and torch.equal(packed.v[part], v[b, h, :n])
            assert torch.equal(packed.pos[part], pos[b, h, :n])


@pytest.mark.parametrize("counts", [[[5, 1, 9, 3]], [[7, 7], [2, 13], [1, 1]], [[4]]], ids=["one", "batch", "single"])
def test_storage_holds_what_it_was_given(counts):
    packed, (k, v, pos) = filled(counts)
    same(packed, k, v, pos, counts)
    assert not torch.isnan(packed.k).any() and not torch.isnan(packed.padded("v")).any()
    assert packed.padded("pos").shape[-1] == packed.widest == max(map(max, counts))


def test_rows_are_picked_repeated_and_reordered():
    counts = [[7, 7], [2, 13], [1, 1]]
    for pick in ([2, 0], [1, 1, 1, 0, 2], [0]):
        packed, (k, v, pos) = filled(counts)
        packed.rows(lambda x, i=pick: x[i])
        same(packed, k[pick], v[pick], pos[pick], [counts[i] for i in pick])


@pytest.mark.parametrize("fresh", [None, [3, 0, 2]], ids=["all", "some"])
def test_appends_go_behind_each_head_across_repacks(fresh):
    counts = [[40, 7], [2, 113], [1, 1]]
    packed, (k, v, pos) = filled(counts, width=300)
    for step in range(12):
        new_k, new_v = (torch.randn(3, 2, 3, 8, generator=torch.Generator().manual_seed(i + step)) for i in (1, 100))
        poison(packed)
        meant = torch.tensor(fresh or [3, 3, 3])[:, None].int()
        packed.append(new_k, new_v, 500 + 3 * step, None if fresh is None else meant)
        for b in range(3):
            for h in range(2):
                n, m = counts[b][h], int(meant[b])
                k[b, h, n : n + m], v[b, h, n : n + m] = new_k[b, h, :m], new_v[b, h, :m]
                pos[b, h, n : n + m] = torch.arange(500 + 3 * step, 500 + 3 * step + m)
                counts[b][h] += m
        same(packed, k, v, pos, counts)
        assert packed.widest >= max(map(max, counts)) and packed.room >= 0


@pytest.mark.parametrize("counts", [[[2048] * 4], [[3900, 80, 2100, 1700], [40, 41, 42, 6000]], [[300, 100]]])
def test_allocated_bytes_stay_within_three_per_cent(counts):
    packed, _ = filled(counts, dim=4)
    entries = sum(map(sum, counts))
    for step in range(300):
        held = entries + step * packed.count.numel()
        assert packed.total == packed.k.shape[0] == packed.v.shape[0] == packed.pos.shape[0]
        if held >= 2000:
            assert held <= packed.total <= 1.03 * held
        new = torch.zeros(*packed.count.shape, 1, 4)
        packed.append(new, new, 9000 + step, None)
    assert packed.bytes() == 2 * packed.total * 4 * 4


def test_appends_in_place_until_the_room_is_used_up():
    packed, _ = filled([[2000, 100]])
    new, moves, at = torch.zeros(1, 2, 1, 8), 0, packed.k.data_ptr()
    for step in range(100):
        packed.append(new, new, step, None)
        moves, at = moves + (packed.k.data_ptr() != at), packed.k.data_ptr()
    assert 1 <= moves <= 5  # 2 per cent of 1050 entries are 21 steps


# ---- attention -----------------------------------------------------------------------------------------------------


def asked(packed, heads, rows, softcap=None, seed=1, dim=8):
    """Queries behind all entries, one padding row among them where there are several rows."""
    batch = packed.count.shape[0]
    q = torch.randn(batch, heads, rows, dim, generator=torch.Generator().manual_seed(seed)).to(packed.k)
    q_pos = torch.arange(rows, device=q.device).flip(0).neg() + int(packed.pos.max())
    q_pos = q_pos.expand(batch, -1).clone()
    if rows > 1:
        q_pos[-1, -1] = -1
    return q, SimpleNamespace(scaling=0.3, softcap=softcap, q_pos=q_pos, mask=None, window=None)


def close(got, expected, dtype):
    close_to = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.float(), b.float(), **close_to)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("rows", [1, 5], ids=["decode", "short"])
@pytest.mark.parametrize("group", [1, 4, 8], ids=["mha", "gqa4", "gqa8"])
@pytest.mark.parametrize("counts", [[[5, 1, 190, 64]], [[65, 7], [2, 130], [1, 129]]], ids=["one", "batch"])
def test_executor_equals_naive(counts, group, rows, softcap, form, monkeypatch):
    backend, device = form
    monkeypatch.setitem(ragged._WHY_NOT, "triton", lambda call: None)
    packed, _ = filled(counts, device=device)
    q, ctx = asked(packed, group * len(counts[0]), rows, softcap=softcap)
    poison(packed)
    got = ragged.run(q, packed, ctx, True, _backend=backend)
    close(got, naive.ragged(q, packed, ctx, True), torch.float32)
    out, lse = ragged.run(q, packed, ctx, _backend=backend)
    assert lse is None and torch.equal(out, got[0])
    if rows == 1:  # one query sees all entries
        ctx.q_pos = None
        close(ragged.run(q, packed, ctx, True, _backend=backend), got, torch.float32)


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests above run the fused form")
def test_the_fused_form_in_tritons_interpreter():
    run_interpreted(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "triton and (batch-gqa4 or one-mha-decode)"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def test_other_dtypes(dtype):
    packed, _ = filled([[65, 7], [2, 130]], dtype=dtype, dim=16)
    q, ctx = asked(packed, 4, 3, dim=16)
    got = ragged.run(q, packed, ctx, True)
    close(got, naive.ragged(q, packed, ctx, True), dtype)
    assert got[0].dtype == dtype and got[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_many_queries_in_bounded_memory(monkeypatch):
    packed, _ = filled([[65, 7], [2, 130]])
    q, ctx = asked(packed, 4, 9)
    expected = ragged.run(q, packed, ctx, True)
    monkeypatch.setattr(column_sums, "MAX_BLOCK", 4000)
    close(ragged.run(q, packed, ctx, True), expected, torch.float32)


def test_refusals():
    packed, _ = filled([[65, 7]])
    q, ctx = asked(packed, 4, 3)
    with pytest.raises(InputError, match="does not fit packed storage of 1 rows, 2 KV heads"):
        ragged.run(q[:, :3], packed, ctx)
    with pytest.raises(InputError, match="give ctx.q_pos"):
        ragged.run(q, packed, SimpleNamespace(**{**vars(ctx), "q_pos": None}))
    with pytest.raises(ConfigError, match="no 4-D mask and no sliding window"):
        ragged.run(q, packed, SimpleNamespace(**{**vars(ctx), "window": 4}))
    with pytest.raises(ConfigError, match="needs CUDA capability"):
        ragged.run(q, packed, ctx, _backend="flash")
    assert ragged.choose(q, packed, ctx)[0] == "torch"


# ---- the whole model -----------------------------------------------------------------------------------------------


@pytest.fixture
def skewed():
    """A method that keeps very different numbers in every head, and says so again at each prompt."""

    @register("skewed")
    @dataclass
    class Skewed(EvictPatch):
        """Keeps the last tokens, more in later heads and layers."""

        padded: bool = option(False, "store one rectangle")

        def keep(self, q, kv, ctx):
            heads = kv.k.shape[1]
            share = torch.arange(1, heads + 1) * (ctx.layer + 2)
            held = (kv.pos >= 0).sum(-1).amin(-1)
            capacity = torch.minimum(3 + share[None] * 4, held[:, None])
            keep = KeepSet.top(ctx.noise(kv.pos.expand(-1, heads, -1), 3), capacity, kv.pos, tail=2)
            return replace(keep, packed=not self.padded)

    yield "skewed"
    _REGISTRY.pop("skewed")


def ids(batch, *lengths):
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(1, 97, (batch, n), generator=generator) for n in lengths]


def left_mask(total, *pads):
    return (torch.arange(total)[None] >= torch.tensor(pads)[:, None]).long()


FEEDS = {
    "one prompt": dict(feeds=ids(1, 40, 1, 1, 1)),
    "padded batch": dict(feeds=ids(3, 40, 1, 1, 7, 1), masks=left_mask(50, 0, 11, 30)),
    "chunked": dict(feeds=ids(2, 15, 15, 10, 1, 1), masks=left_mask(42, 3, 17), prompt_ends=[40] * 5),
    "three turns": dict(feeds=ids(2, 40, 1, 1, 9, 1, 1, 12, 1)),
    "per chunk": dict(
        feeds=ids(2, 15, 15, 10, 1, 9, 1), prompt_ends=[40] * 4 + [50] * 2, evict_per_chunk=True, recompress=True
    ),
}


@pytest.mark.parametrize("name", FEEDS)
@pytest.mark.parametrize("config", CONFIGS)
def test_against_the_oracle(config, name, skewed):
    worst, cache = run_both(config, skewed, dtype=torch.float64, **FEEDS[name])
    assert worst < ATOL
    packed = [layer.packed for layer in cache.patched]
    assert all(p is not None for p in packed)
    for p in packed:
        assert p.count.shape[1] == 1 or (p.count[:, 0] != p.count[:, 1]).any()


@pytest.mark.parametrize("kv_heads", [1, 4], ids=["mqa", "mha"])
def test_other_groupings(kv_heads, skewed, monkeypatch):
    monkeypatch.setitem(CONFIGS, "llama", ("llama", {"num_key_value_heads": kv_heads}))
    worst, _ = run_both("llama", skewed, dtype=torch.float64, **FEEDS["padded batch"])
    assert worst < ATOL


def test_bf16(skewed):
    feeds = FEEDS["padded batch"]
    exact = run_both("llama", "random", dtype=torch.bfloat16, budget=12, window_size=3, **feeds)[0]
    assert run_both("llama", skewed, dtype=torch.bfloat16, **feeds)[0] < 2 * exact


def test_three_hundred_steps(skewed):
    worst, cache = run_both("llama", skewed, ids(1, 40, *[1] * 300), dtype=torch.float64)
    assert worst < ATOL and cache.get_seq_length() == 340


@pytest.fixture
def model():
    return tiny("llama")


def feed(model, *chunks, cache=None):
    cache = PatchCache(model) if cache is None else cache
    with torch.no_grad():
        for chunk in chunks:
            logits = model(chunk, **{CACHE: cache}).logits
    return logits, cache


def test_status_tells_bytes_allocated(model, skewed):
    with attnpatch.patched(model, skewed):
        _, cache = feed(model, *ids(1, 40, 1))
        for layer, told in zip(cache.layers, attnpatch.status(model).layers, strict=True):
            packed = layer.packed
            assert told.bytes_held == packed.k.numel() * 4 + packed.v.numel() * 4 < told.bytes_dense
            assert told.positions.shape == (1, 2, packed.widest) and layer.keys.numel() == layer.values.numel() == 0


def test_beams_select_repeat_and_reset(model, skewed):
    first, *steps = ids(2, 33, 1, 1, 1)
    with attnpatch.patched(model, skewed):
        out = model.generate(
            first, max_new_tokens=5, num_beams=3, do_sample=False, return_dict_in_generate=True, output_scores=True
        )
        for row in range(2):
            one, total, cache = out.sequences[row : row + 1], 0.0, None
            logits, cache = feed(model, one[:, :33])
            for step in range(5):
                total += logits[:, -1].log_softmax(-1)[0, one[0, 33 + step]].item()
                logits, cache = feed(model, one[:, 33 + step : 34 + step], cache=cache)
            assert total / 5 == pytest.approx(out.sequences_scores[row].item(), abs=1e-3)
        _, cache = feed(model, first)
        cache.batch_select_indices(torch.tensor([1]))
        cache.batch_repeat_interleave(2)
        got = feed(model, steps[0], cache=cache)[0]
        _, alone = feed(model, first[1:].expand(2, -1))
        torch.testing.assert_close(got, feed(model, steps[0], cache=alone)[0], atol=5e-5, rtol=0)
        cache.reset()
        assert all(layer.packed is None and layer.held == 0 for layer in cache.layers)
        torch.testing.assert_close(feed(model, first, cache=cache)[0], feed(model, first)[0])


def test_crop_as_far_as_the_last_eviction(model, skewed):
    prompt, a, b = ids(2, 40, 3, 2)
    with attnpatch.patched(model, skewed):
        _, cache = feed(model, prompt, *a.split(1, 1))
        cache.crop(-2)
        _, other = feed(model, prompt, a[:, :1])
        for x, y in zip(cache.layers, other.layers, strict=True):
            assert x.packed is not None and torch.equal(x.packed.count, y.packed.count)
            assert torch.equal(x.pos, y.pos[..., : x.held])
        got, expected = (feed(model, *b.split(1, 1), cache=c)[0] for c in (cache, other))
        torch.testing.assert_close(got, expected, atol=5e-5, rtol=0)
        with pytest.raises(UnsupportedModeError, match="behind the last eviction"):
            cache.crop(-9)


def test_head_room_may_hold_anything(model, skewed):
    prompt, a = ids(2, 40, 4)
    with attnpatch.patched(model, skewed):
        _, cache = feed(model, prompt)
        _, other = feed(model, prompt)
        for token in a.split(1, 1):
            for layer in other.layers:
                poison(layer.packed)
            got, expected = (feed(model, token, cache=c)[0] for c in (other, cache))
            assert torch.equal(got, expected)


def test_a_cache_leaves_inference_mode(model, skewed):
    prompt, a, b = ids(1, 40, 1, 1)
    with attnpatch.patched(model, skewed):
        cache = PatchCache(model)
        with torch.inference_mode():
            model(prompt, **{CACHE: cache})
            for layer in cache.layers:  # so that the next append is in place
                layer.packed.append(
                    layer.packed.k.new_zeros(1, 2, 0, 16), layer.packed.v.new_zeros(1, 2, 0, 16), 0, None
                )
        got = feed(model, a, b, cache=cache)[0]
        torch.testing.assert_close(got, feed(model, prompt, a, b)[0])


@pytest.mark.parametrize("patch", ["zerotuning", "act"])
def test_beside_a_method_that_changes_weights(patch, skewed):
    """Such a method reads the keys of every head: of a padded copy, made for it."""
    values = {"zerotuning": {"gamma": 2.0}, "act": {"heads": "all"}}[patch]
    logits = []
    for padded in (False, True):
        with attnpatch.patched(
            tiny("llama"), f"{skewed}+{patch}", skewed={"padded": padded}, **{patch: values}
        ) as model:
            got, cache = feed(model, *ids(2, 40, 1, 1))
            assert all((layer.packed is None) is padded for layer in cache.layers)
            logits.append(got)
    torch.testing.assert_close(*logits, atol=5e-5, rtol=0)


def test_hooks_see_a_padded_copy():
    packed, (k, _, _) = filled([[5, 9]])
    view = PackedKV(packed, False, {}, {}, {})
    assert view.S == 9 and view.k.shape == (1, 2, 9, 8) and torch.equal(view.k[0, 1], k[0, 1, :9])
    assert view.k is view.k and (view.v[0, 0, 5:] == 0).all()


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["flash", "triton"])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_kernels_in_bf16(group, backend):
    packed, _ = filled([[4000, 7, 300], [2, 130, 1]], dtype=torch.bfloat16, dim=64, device="cuda")
    q, ctx = asked(packed, 3 * group, 1, dim=64)
    poison(packed)
    close(ragged.run(q, packed, ctx, _backend=backend)[:1], naive.ragged(q, packed, ctx)[:1], torch.bfloat16)
    assert ragged.choose(q, packed, ctx)[0] == "triton"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, None), ({"capability": 7}, "this is capability 7"), ({"dtype": torch.float32}, "float16 or bfloat16"),
        ({"dim": 60}, "multiple of 8"), ({"single": False}, "only for one query"), ({"softcap": True}, "soft-capping"),
        ({"want_lse": True}, "log-sum-exp"), ({"grad": True}, "gradients"), ({"device": "cpu"}, "this is cpu"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)  # fmt: skip
def test_choice_on_cuda(change, why):
    plain = {"device": "cuda", "capability": 9, "dtype": torch.bfloat16, "dim": 128, "alike": True, "grad": False}
    keys = ListCall(**{name: change.get(name, value) for name, value in plain.items()})
    asked = {"single": True, "softcap": False, "want_lse": False, **{n: x for n, x in change.items() if n not in plain}}
    found = ragged._not_flash(ragged._Call(keys, **asked))
    assert found is None if why is None else why in found
