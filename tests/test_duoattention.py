"""DuoAttention against its specification: what streaming heads hold, and generation against the masked oracle."""

from __future__ import annotations

import random

import pytest
import torch
from attnpatch.patches import _heads
from oracle import CACHE, CONFIGS, Oracle, positions, run_both, tiny
from profiles import head_profile
from test_methods import feed, held, prompt

import attnpatch
from attnpatch.errors import ConfigError
from attnpatch.profile import Profile

ATOL = 5e-5
NAN = float("nan")
SCORES = {  # two KV heads a layer
    "llama": [[0.1, 0.9], [0.8, 0.2], [0.3, 0.4], [0.7, 0.6]],
    "qwen3": [[0.9, 0.8], [0.1, 0.2], [0.3, 0.7], [0.6, 0.4]],
    "gemma3": [[NAN, NAN]] * 3 + [[0.2, 0.9]],
}
STREAMING = {  # the lower half, by hand
    "llama": [{0}, {1}, {0, 1}, set()],
    "qwen3": [set(), {0, 1}, {0}, {1}],
    "gemma3": [None, None, None, {0}],
}
SMALL = {"sink": 3, "recent": 8}


def duo(name, **more):
    return {"profile": head_profile(name, SCORES[name]), **SMALL, **more}


def spec(n, sink=3, recent=8):
    """What a streaming head holds after n tokens (spec, invariant 6)."""
    return set(range(n)) if n <= sink + recent else set(range(sink)) | set(range(n - recent, n))


def expected(name, n):
    return [
        [spec(n) if h in streaming else set(range(n)) for h in range(2)]
        for streaming in STREAMING[name]
        if streaming is not None
    ]


# ---- which heads -----------------------------------------------------------------------------------------------


def test_exactly_the_share_is_streaming_and_sets_are_nested():
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        scores = (torch.rand(5, 4, generator=generator) * 4).round() / 4  # many ties
        scores[seed % 5] = NAN
        flat = [(scores[i, h].item(), i, h) for i in range(5) for h in range(4) if i != seed % 5]
        before = set()
        for share in (0.0, 0.2, 0.5, 0.77, 1.0):
            chosen = _heads.weakest(scores, share)
            mine = {(i, h) for i, h in chosen.nonzero().tolist()}
            assert mine == {(i, h) for _, i, h in sorted(flat)[: round(share * 16)]}
            assert before <= mine
            before = mine


@pytest.mark.parametrize("name", STREAMING)
def test_streaming_heads_hold_sinks_and_recent(name):
    for n in (10, 11, 12, 40, 43):
        with attnpatch.patched(tiny(name), "duoattention", **duo(name)) as model:
            _, cache = feed(model, prompt(length=n))
            assert held(cache) == expected(name, n)
            for extra in range(1, 14):
                feed(model, prompt(length=1, seed=extra), cache=cache)
                assert held(cache) == expected(name, n + extra)


def test_echo_heads_profile_a_folder_and_a_pattern_choose_alike(tmp_path):
    profile = head_profile("llama", SCORES["llama"], "echo-heads")
    folder = profile.save(tmp_path / "echo")
    lines = "\n".join("\t".join(f"{x:.18e}" for x in row) for row in SCORES["llama"])
    (tmp_path / "full_attention_heads.tsv").write_text(lines + "\n")
    for given in ({"profile": profile}, {"profile": folder}, {"profile": str(folder)}, {"pattern": tmp_path},
                  {"pattern": str(tmp_path / "full_attention_heads.tsv")}):  # fmt: skip
        with attnpatch.patched(tiny("llama"), "duoattention", **given, **SMALL) as model:
            assert held(feed(model, prompt())[1]) == expected("llama", 40)


def test_a_pattern_is_read_as_written_and_clipped(tmp_path):
    generator = torch.Generator().manual_seed(0)
    alpha = torch.rand(4, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    (tmp_path / "p.tsv").write_text("\n".join("\t".join(f"{x:.18e}" for x in row) for row in alpha.tolist()))
    found = _heads.read_pattern("duoattention", tmp_path / "p.tsv", tiny("llama").config)
    assert (found - alpha.clamp(0, 1)).abs().max() < 1e-15
    lines = (tmp_path / "p.tsv").read_text().splitlines()
    (tmp_path / "windows.tsv").write_bytes(("\ufeff" + "\r\n".join([*lines, "", ""])).encode())
    assert torch.equal(_heads.read_pattern("duoattention", tmp_path / "windows.tsv", tiny("llama").config), found)
    gemma = _heads.read_pattern("duoattention", tmp_path / "p.tsv", tiny("gemma3").config)
    assert gemma[:3].isnan().all() and torch.equal(gemma[3], found[3])


def test_all_full_or_a_short_prompt_is_dense():
    stock, model = tiny("llama"), tiny("llama")
    stock.set_attn_implementation("sdpa")
    ids = prompt(2)
    for more in ({"full_heads": 1.0}, {"recent": 60}):
        with attnpatch.patched(model, "duoattention", **duo("llama", **more)) as patched:
            logits, cache = feed(patched, ids)
            assert torch.equal(logits, stock(ids).logits)
            assert all(layer.complete and layer.packed is None for layer in cache.layers)
    with attnpatch.patched(model, "duoattention", **duo("llama", full_heads=0.0)) as patched:
        assert held(feed(patched, ids)[1]) == [[spec(40)] * 2] * 4


# ---- generation against the oracle -----------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("name", SCORES)
def test_decoding_equals_masking(name, group, monkeypatch):
    kind, extra = CONFIGS[name]
    heads = 4 // group
    monkeypatch.setitem(CONFIGS, name, (kind, {**extra, "num_key_value_heads": heads}))
    rows = [[x for x in (row * 2)[:heads]] for row in SCORES[name]]
    hyper = {"profile": head_profile(name, rows), **SMALL}
    feeds = [prompt(2), *prompt(2, 12, seed=8).split(1, 1), prompt(2, 7, seed=9), *prompt(2, 4, seed=5).split(1, 1)]
    worst, cache = run_both(name, "duoattention", feeds, **hyper)
    assert worst < ATOL and cache.get_seq_length() == 63


@pytest.mark.parametrize("name", SCORES)
def test_padded_chunks_turns_and_short_rows(name):
    """Left padding; a row shorter than the window, which fills up while decoding; two turns; chunked prompts."""
    pads = torch.tensor([0, 11, 32])
    masks = (torch.arange(80)[None] >= pads[:, None]).long()
    feeds = [prompt(3), *prompt(3, 14, seed=8).split(1, 1), prompt(3, 9, seed=9), *prompt(3, 5, seed=5).split(1, 1)]
    worst, cache = run_both(name, "duoattention", feeds, masks=masks, **duo(name))
    assert worst < ATOL
    for row, n in enumerate((68 - pads).tolist()):
        assert held(cache, row) == expected(name, n)
    chunks = [prompt(3, 15, seed=1), prompt(3, 25, seed=2), prompt(3, 4, seed=3), *prompt(3, 9, seed=4).split(1, 1)]
    for more in ({}, {"evict_per_chunk": False}):
        worst, cache = run_both(
            name, "duoattention", chunks, masks=masks[:, :53], prompt_ends=[44] * 12, **duo(name, **more)
        )
        assert worst < ATOL
        for row, n in enumerate((53 - pads).tolist()):
            assert held(cache, row) == expected(name, n)


def test_a_second_chunk_sees_sinks_the_window_before_it_and_itself():
    """Step 5: the rule for queries of a later chunk, as a mask written down from the specification."""
    stock, model = tiny("llama"), tiny("llama")
    first, second = prompt(1, 30), prompt(1, 13, seed=9)
    oracle = Oracle(stock)
    mask = torch.ones(1, 43).long()
    oracle.forward(first, mask[:, :30])
    sets = expected("llama", 30)
    width = max(len(s) for row in sets for s in row)
    rows = [torch.tensor([sorted(s) + [-1] * (width - len(s)) for s in layer])[None] for layer in sets]
    wanted = oracle.forward(second, mask, rows)
    with attnpatch.patched(model, "duoattention", **duo("llama")) as patched:
        cache = attnpatch.PatchCache(patched)
        cache.expect(43)
        assert (feed(patched, first, second, cache=cache)[0] - wanted).abs().max() < ATOL


def strict(name, ids, mask, sink, recent):
    """Logits of the stock model whose streaming heads see sinks and window only: a mask for every head."""
    model = tiny(name)
    pos = torch.where(mask.bool(), mask.cumsum(-1) - 1, -1)
    ahead = pos[:, :, None] - pos[:, None]  # query - key
    near = (ahead < recent) | (pos[:, None] < sink)
    hooks = []
    for layer, streaming in zip(model.model.layers, STREAMING[name], strict=True):
        if streaming is None:
            continue
        group = layer.self_attn.num_key_value_groups

        def hook(module, args, kwargs, streaming=streaming, group=group):
            whole = kwargs["attention_mask"].expand(-1, 4, -1, -1).clone()  # [B, Hq, T, T]
            for h in range(4):
                if h // group in streaming:
                    whole[:, h].masked_fill_(~near, torch.finfo(whole.dtype).min)
            kwargs["attention_mask"] = whole
            return args, kwargs

        hooks.append(layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True))
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=pos.clamp(min=0)).logits


@pytest.mark.parametrize("length", [60, 290])
@pytest.mark.parametrize("name", SCORES)
def test_a_streaming_prefill_sees_sinks_and_window(name, length):
    ids = prompt(3, length)
    mask = (torch.arange(length)[None] >= torch.tensor([0, 17, length - 9])[:, None]).long()
    wanted = strict(name, ids, mask, 3, 8)
    with attnpatch.patched(tiny(name), "duoattention", **duo(name, prefill="streaming")) as model, torch.no_grad():
        cache = attnpatch.PatchCache(model)
        pos = (mask.cumsum(-1) - 1).clamp(min=0)
        got = model(ids, attention_mask=mask, position_ids=pos, **{CACHE: cache}).logits
        assert (got - wanted)[mask.bool()].abs().max() < ATOL
        for row, n in enumerate(mask.sum(-1).tolist()):
            assert held(cache, row) == expected(name, n)
        stock = tiny(name)(ids, attention_mask=mask, position_ids=pos).logits
        assert (got - stock)[0].abs().max() > 1e-2
        assert torch.isfinite(feed(model, prompt(3, 1), cache=cache)[0]).all()


def test_a_streaming_prefill_in_chunks_is_strict_in_the_first_only():
    first, second = prompt(1, 40), prompt(1, 13, seed=9)
    with attnpatch.patched(tiny("llama"), "duoattention", **duo("llama", prefill="streaming")) as model:
        cache = attnpatch.PatchCache(model)
        cache.expect(53)
        got, _ = feed(model, first, cache=cache)
        assert (got - strict("llama", first, torch.ones(1, 40).long(), 3, 8)).abs().max() < ATOL
        assert torch.isfinite(feed(model, second, cache=cache)[0]).all()
        assert held(cache) == expected("llama", 53)
        told = attnpatch.status(model).layers
        assert "evicted" in told[0].note and not told[3].note.startswith("dense: earlier")


def test_bf16_is_near_fp32():
    feeds = [prompt(2), *prompt(2, 6, seed=8).split(1, 1)]
    outs = []
    for dtype in (torch.float32, torch.bfloat16):
        with attnpatch.patched(tiny("llama", dtype), "duoattention", **duo("llama")) as model:
            logits, cache = feed(model, *feeds)
            assert held(cache) == expected("llama", 46)
            outs.append(logits.float())
    assert torch.isfinite(outs[1]).all() and (outs[0] - outs[1]).abs().max() < 0.15 * outs[0].abs().max()


@pytest.mark.parametrize("name", SCORES)
def test_beams_equal_their_own_histories(name):
    model, ids = tiny(name), prompt(2)
    with attnpatch.patched(model, "duoattention", **duo(name)) as patched, torch.no_grad():
        cache = attnpatch.PatchCache(patched)
        patched(ids, **{CACHE: cache})
        cache.batch_repeat_interleave(2)
        chooser = random.Random(0)
        history = [ids[i // 2] for i in range(4)]
        for step in range(16):
            new = prompt(4, 1, seed=50 + step)
            logits = patched(new, **{CACHE: cache}).logits
            history = [torch.cat([h, n]) for h, n in zip(history, new, strict=True)]
            order = [2 * (i // 2) + chooser.randrange(2) for i in range(4)]
            cache.reorder_cache(torch.tensor(order))
            history, logits = [history[i] for i in order], logits[order]
        for row, tokens in enumerate(history):
            alone, own = feed(patched, tokens[None, :40], *tokens[None, 40:].split(1, 1))
            assert (alone[0, -1] - logits[row, -1]).abs().max() < ATOL
            assert held(cache, row) == held(own)
        out = patched.generate(ids, num_beams=3, max_new_tokens=20, do_sample=False)
        assert out.shape == (2, 60)


# ---- storage ---------------------------------------------------------------------------------------------------


def test_bytes_in_status_follow_the_formula_and_streaming_heads_do_not_grow():
    with attnpatch.patched(tiny("llama"), "duoattention", **duo("llama")) as model:
        _, cache = feed(model, prompt(2))
        sizes = []
        for step in range(120):
            feed(model, prompt(2, 1, seed=step), cache=cache)
            sizes.append([layer.packed.cap.clone() if layer.packed is not None else None for layer in cache.layers])
        report = attnpatch.status(model)
    slot = 2 * 16 * 4  # K and V of one entry, fp32
    for layer, told, streaming in zip(cache.layers, report.layers, STREAMING["llama"], strict=True):
        entries = 2 * sum(11 if h in streaming else 160 for h in range(2)) * slot
        assert entries <= told.bytes_held <= entries + 2 * 2 * slot * (4 + 1)
        if streaming:
            assert layer.packed.cap[:, sorted(streaming)].eq(12).all()
            assert told.report["streaming heads"] == len(streaming)
    assert sizes[0][2].eq(12).all() and sizes[-1][2].eq(12).all()


def test_a_step_moves_one_entry_and_frees_nothing_else():
    with attnpatch.patched(tiny("llama"), "duoattention", **duo("llama")) as model:
        _, cache = feed(model, prompt())
        before = [None if p is None else p.clone() for p in positions(cache)]
        buffer = cache.layers[2].packed.k.data_ptr()
        feed(model, prompt(1, 1), cache=cache)
        assert cache.layers[2].packed.k.data_ptr() == buffer, "the steady heads are overwritten in place"
        for old, new in zip(before, positions(cache), strict=True):
            moved = [len(set(a.tolist()) ^ set(b.tolist())) for a, b in zip(old[0], new[0], strict=True)]
            assert max(moved) <= 2


# ---- refusals --------------------------------------------------------------------------------------------------

OTHER = head_profile("llama", [[0.5] * 2] * 3, num_hidden_layers=3)
SHORT = Profile("retrieval-heads", {"kv_score": torch.rand(3, 2)}, head_profile("llama", SCORES["llama"]).model, {})
LACKS = Profile("retrieval-heads", {"score": torch.rand(4, 4)}, SHORT.model, {})
SINKS = Profile("sinks", {"first": torch.rand(4, 4)}, SHORT.model, {})


@pytest.mark.parametrize(
    ("hyper", "words"),
    [
        ({}, "duoattention needs to know which heads keep the whole context; give profile=FOLDER"),
        ({"profile": OTHER}, "made for another model \\(layers 3 instead of 4\\)"),
        ({"profile": SHORT}, "incomplete: 'kv_score' holds 3 layers, the model has 4"),
        ({"profile": LACKS}, "incomplete: no 'kv_score', 4 layers x 2 heads are needed"),
        ({"profile": SINKS}, "kind 'sinks'; allowed: retrieval-heads, echo-heads"),
        ({"profile": 7}, "profile=7 is no folder"),
        ({"profile": "/nowhere"}, "no profile at '/nowhere'"),
        ({"profile": OTHER, "pattern": "x"}, "profile and pattern both choose"),
        ({"pattern": "/nowhere/p.tsv"}, "cannot be read"),
        ({"pattern": 3}, "pattern=3 is no path; name a full_attention_heads.tsv"),
        ({"profile": OTHER, "full_heads": 1.5}, "full_heads=1.5 must lie in 0..1"),
        ({"profile": OTHER, "recent": 0}, "recent=0 is too small"),
        ({"profile": OTHER, "budget": 8}, "no hyperparameter 'budget'"),
    ],
    ids=range(13),
)
def test_refusals(hyper, words):
    model = tiny("llama")
    with pytest.raises(ConfigError, match=words):
        attnpatch.patch_model(model, "duoattention", **hyper)
    assert not hasattr(model, "_attnpatch")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0.1\t0.2\n" * 3, "of another model \\(3 layers x 2 KV heads; this one has 4 x 2\\)"),
        ("0.1\t0.2\t1\n" * 4, "4 layers x 3 KV heads"),
        ("0.1\t0.2\n0.1\n" * 2, "4 layers x 1/2 KV heads"),
        ("a\tb\n" * 4, "no table of numbers"),
        ("0.1\tnan\n" * 4, "values that are no numbers"),
        ("", "0 layers x 0 KV heads"),
    ],
    ids=["layers", "heads", "ragged", "words", "nan", "empty"],
)
def test_bad_patterns(tmp_path, text, words):
    (tmp_path / "full_attention_heads.tsv").write_text(text)
    with pytest.raises(ConfigError, match=words):
        attnpatch.patch_model(tiny("llama"), "duoattention", pattern=tmp_path)


def test_a_layer_that_was_not_measured_is_named():
    profile = head_profile("llama", [[0.1, 0.9], [NAN, NAN], [0.3, 0.4], [0.7, 0.6]])
    with attnpatch.patched(tiny("llama"), "duoattention", profile=profile, **SMALL) as model:
        with pytest.raises(ConfigError, match="says nothing of layer 1, .* layers="):
            feed(model, prompt())
    with attnpatch.patched(tiny("llama"), "duoattention", profile=profile, layers=[0, 2, 3], **SMALL) as model:
        feed(model, prompt())
