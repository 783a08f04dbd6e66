"""CompressKV against a computation from its specification, and the specification's invariants."""

from __future__ import annotations

import math

import pytest
import torch
from attnpatch.patches.compresskv import CompressKV, allocated
from oracle import CACHE, CONFIGS, run_both, tiny
from test_methods import best, feed, held, kept, left_padded, naive_attention, prompt, qkv

import attnpatch
from attnpatch.errors import ConfigError
from attnpatch.profile import Profile, structure
from attnpatch.profiling import layer_errors
from attnpatch.recipe import load_recipe

ATOL = 5e-5
NAN = math.nan
SMALL = {"window_size": 4, "kernel_size": 3, "first_k": 2}
LAYERS = {"llama": range(4), "qwen3": range(4), "gemma3": [3]}
ORDER = {
    name: [[(i + 2) % 4, i % 4, (i + 3) % 4, (i + 1) % 4] if i in layers else [-1] * 4 for i in range(4)]
    for name, layers in LAYERS.items()
}
LLAMA = [
    164, 168, 292, 234, 233, 296, 219, 252, 350, 338, 346, 315, 162, 340, 300, 302, 249, 286, 280, 292, 333, 213, 280,
    301, 276, 239, 235, 261, 191, 163, 199, 83,
]  # fmt: skip
LLAMA_128 = [
    89, 90, 143, 118, 118, 145, 112, 126, 169, 163, 168, 153, 88, 165, 147, 148, 125, 141, 138, 143, 161, 109, 138, 147,
    136, 121, 119, 130, 100, 88, 104, 54,
]  # fmt: skip
MISTRAL = [
    255, 126, 305, 151, 248, 242, 241, 332, 192, 354, 205, 293, 358, 189, 309, 354, 286, 209, 320, 266, 273, 254, 266,
    221, 251, 253, 262, 170, 258, 189, 235, 325,
]  # fmt: skip


def profile(name, order=None, **overrides):
    order = torch.tensor(ORDER[name] if order is None else order)
    return Profile("semantic-heads", {"order": order}, structure(tiny(name, **overrides).config), {})


def naive(q, k, budget, heads, window=4, kernel=3):
    """Steps 10-15 on one unpadded row: the positions every KV head keeps."""
    n = k.shape[1]
    if n <= budget:
        return set(range(n))
    votes = naive_attention(q, k)[heads, n - window :, : n - window].sum(1)  # [first_k, N - W]
    half, prefix = kernel // 2, n - window
    pooled = torch.stack([votes[:, max(0, i - half) : i + half + 1].sum(-1) / kernel for i in range(prefix)], -1)
    return best(pooled.mean(0).float().tolist(), budget - window) | set(range(prefix, n))


# ---- budgets ---------------------------------------------------------------------------------------------------


def test_3_4_published_budgets():
    llama, mistral = (
        load_recipe(name).hyperparameters["layer_scores"]
        for name in ("compresskv-llama-3.1-8b", "compresskv-mistral-7b-v0.3")
    )
    # six digits are published; with all six layer 1 comes to 136.5002 entries, and the vectors to less than 136.5
    llama, mistral = (*llama[:1], 0.0190429, *llama[2:]), tuple(mistral)
    assert list(allocated(llama, 256 * 32, 32, 768)) == LLAMA
    assert list(allocated(llama, 128 * 32, 32, 384)) == LLAMA_128
    assert list(allocated(mistral, 256 * 32, 32, 768)) == MISTRAL and sum(MISTRAL) == 8192


def test_5_hand_cases_and_exact_sums():
    assert allocated((0.1, 0.2, 0.3, 0.4), 400, 32, 300) == (59, 86, 114, 141)
    assert allocated((0.0, 0.0, 0.0, 1.0), 400, 32, 300) == (34, 33, 33, 300)
    assert allocated((0.25,) * 4, 402, 32, 300) == (101, 101, 100, 100)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        layers = int(torch.randint(1, 40, (1,), generator=generator))
        scores = tuple((torch.rand(layers, generator=generator) ** 4 + 1e-9).tolist())
        total = int(torch.randint(32 * layers, 300 * layers + 1, (1,), generator=generator))
        budgets = allocated(scores, total, 32, 300)
        assert sum(budgets) == total and min(budgets) >= 32 and max(budgets) <= 300
    assert allocated((1.0, 2.0), 1000, 32, 300) == (300, 300), "where nothing can move the total is missed"


def test_layers_hold_their_shares_without_the_sliding_ones():
    scores = [5.0, 1.0, 2.0, 0.0]
    more = {"budget": 16, "layer_scores": scores, "min_budget": 6, "max_factor": 2.0, **SMALL}
    with attnpatch.patched(tiny("llama"), "compresskv", profile=profile("llama"), **more) as model:
        _, cache = feed(model, prompt())
        layers = held(cache)
        report = attnpatch.status(model)
    wanted = allocated(tuple(scores), 64, 6, 32)
    assert [len(heads[0]) for heads in layers] == list(wanted) and sum(wanted) == 64 and len(set(wanted)) == 4
    assert [x.report["entries of the layer"] for x in report.layers] == list(wanted)
    assert [x.bytes_held for x in report.layers] == [n * 2 * 2 * 16 * 4 for n in wanted]
    more["layer_scores"] = [9, 9, 9, 1]
    with attnpatch.patched(tiny("gemma3"), "compresskv", profile=profile("gemma3"), **more) as model:
        assert [len(s) for s in held(feed(model, prompt())[1])[0]] == [16, 16]


def test_1_layers_below_the_prompt_are_compressed_though_the_mean_is_not():
    more = {"budget": 50, "layer_scores": [1.0, 0.0, 1.0, 1.0], "min_budget": 20, **SMALL}
    with attnpatch.patched(tiny("llama"), "compresskv", heads="all", **more) as model:
        assert [len(x[0]) for x in held(feed(model, prompt())[1])] == [40, 20, 40, 40]


# ---- selection -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [17, 40, 61])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (8, 1)])
def test_7_9_kept_entries(n, heads, kv_heads):
    q, k = qkv(n, heads, kv_heads, seed=n)
    order = [heads - 1, 1, 0]
    keep = attnpatch.probe("compresskv", q, k, budget=16, heads=[order], **SMALL)
    wanted = naive(q[0], k[0], 16, order[:2])
    assert kept(keep, 0, kv_heads) == [wanted] * kv_heads and len(wanted) == 16


def test_6_a_needle_of_the_voters_stays_and_other_heads_do_not_matter():
    q, k = qkv(200, 8, 2)
    for h in (2, 5):
        q[:, h] = k[:, h // 4, 100:105].sum(1)[:, None] * 9
    keep = attnpatch.probe("compresskv", q, k, budget=20, heads=[[2, 5]], **SMALL)
    assert set(range(100, 105)) <= kept(keep, 0, 2)[0]
    other = q.clone()
    other[:, [0, 1, 3, 4, 6, 7]] = other[:, [7, 6, 0, 1, 4, 3]] * 3
    again = attnpatch.probe("compresskv", other, k, budget=20, heads=[[2, 5]], **SMALL)
    assert kept(again, 0, 2) == kept(keep, 0, 2)


def test_8_all_heads_are_snapkv_votes_averaged():
    q, k = qkv(50, 4, 4)
    keep = attnpatch.probe("compresskv", q, k, budget=20, heads="all")
    wanted = naive(q[0], k[0], 20, [0, 1, 2, 3], 8, 5)
    assert kept(keep, 0, 4) == [wanted] * 4
    listed = attnpatch.probe("compresskv", q, k, budget=20, heads=[[3, 1, 0, 2]])
    assert kept(listed, 0, 4) == [wanted] * 4


def test_11_padded_rows_choose_as_alone():
    q, k = qkv(50, 8, 2, batch=3, seed=4)
    lengths = [50, 31, 12]
    padded_q, padded_k, real = left_padded(q, k, lengths)
    keep = attnpatch.probe("compresskv", padded_q, padded_k, padding=real, budget=16, heads=[[6, 1]], **SMALL)
    for row, n in enumerate(lengths):
        assert kept(keep, row, 2) == [naive(q[row, :, 50 - n :], k[row, :, 50 - n :], 16, [6, 1])] * 2


# ---- generation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("name", ORDER)
def test_decoding_equals_masking(name, group, monkeypatch):
    kind, extra = CONFIGS[name]
    monkeypatch.setitem(CONFIGS, name, (kind, {**extra, "num_key_value_heads": 4 // group}))
    hyper = {"profile": profile(name), "budget": 14, "layer_scores": [3, 1, 2, 4], "min_budget": 6, **SMALL}
    feeds = [prompt(2), *prompt(2, 5, seed=8).split(1, 1), prompt(2, 6, seed=9), *prompt(2, 2, seed=5).split(1, 1)]
    worst, cache = run_both(name, "compresskv", feeds, **hyper)
    assert worst < ATOL and cache.get_seq_length() == 53
    sets = held(cache)
    assert all(heads == heads[:1] * len(heads) for heads in sets), "one set for all heads of a layer"
    if name != "gemma3":
        assert len({len(heads[0]) for heads in sets}) == 4
        assert all(heads[0] >= set(range(36, 53)) for heads in sets)


@pytest.mark.parametrize("name", ORDER)
def test_padding_chunks_and_recompression(name):
    masks = (torch.arange(60)[None] >= torch.tensor([0, 13, 30])[:, None]).long()
    hyper = {"profile": profile(name), "budget": 12, **SMALL}
    feeds = [prompt(3), *prompt(3, 3, seed=8).split(1, 1), prompt(3, 9, seed=9), *prompt(3, 2, seed=5).split(1, 1)]
    for more in ({}, {"recompress": True}):
        assert run_both(name, "compresskv", feeds, masks=masks[:, :54], **hyper, **more)[0] < ATOL
    chunks = [prompt(3, 15, seed=1), prompt(3, 20, seed=2), prompt(3, 5, seed=3), *prompt(3, 2, seed=4).split(1, 1)]
    for more in ({}, {"evict_per_chunk": True}):
        ends = {"masks": masks[:, :42], "prompt_ends": [40] * 5}
        assert run_both(name, "compresskv", chunks, **ends, **hyper, **more)[0] < ATOL
    with attnpatch.patched(tiny(name), "compresskv", **hyper) as model:
        whole = held(feed(model, torch.cat(chunks[:3], 1))[1])
        assert held(feed(model, *chunks[:3], expect=40)[1]) == whole


def test_10_positions_beams_and_bf16():
    hyper = {"profile": profile("llama"), "budget": 12, **SMALL}
    for dtype in (torch.float32, torch.bfloat16):
        with attnpatch.patched(tiny("llama", dtype), "compresskv", **hyper) as model:
            _, cache = feed(model, prompt(2), prompt(2, 1, seed=9))
            assert cache.get_seq_length() == 41 and all(x.held == 13 for x in cache.layers)
            assert all(x.pos.amax(-1).eq(40).all() for x in cache.layers)
            assert model.generate(prompt(2), num_beams=3, max_new_tokens=6, do_sample=False).shape == (2, 46)


def test_a_ratio_below_the_least_is_divided_evenly():
    more = {"budget": "0.25", "layer_scores": [4, 1, 2, 3], **SMALL}
    with attnpatch.patched(tiny("llama"), "compresskv", heads="all", **more) as model:
        assert [len(x[0]) for x in held(feed(model, prompt())[1])] == [10] * 4


def test_real_recipes_fit_their_models():
    for name, scores in (("compresskv-llama-3.1-8b", LLAMA), ("compresskv-mistral-7b-v0.3", MISTRAL)):
        (patch,) = load_recipe(name).build()
        shape = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
        patch.fits(tiny("llama", **shape).config)
        assert isinstance(patch, CompressKV) and len(scores) == 32
        assert patch.voters(0) == [[11, 25, 23, 27], [26, 28, 17, 16]][name.startswith("compresskv-mistral")]
        with pytest.raises(ConfigError, match="they belong to another model"):
            patch.fits(tiny("llama").config)


# ---- refusals --------------------------------------------------------------------------------------------------
GAP = [[0, 1, 2, 3], [-1] * 4, [0, 1, 2, 3], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("hyper", "words"),
    [
        ({}, "needs to know which heads vote; give profile=FOLDER, .*semantic-heads, or heads: give {layer"),
        ({"heads": "some"}, "heads='some' does not fit"),
        ({"heads": [[0, 0, 1, 2]]}, "does not fit; give {layer"),
        ({"heads": [[0, 1]]}, "heads has 2 heads in a layer, first_k=4 vote"),
        ({"heads": [[0, 1, 2, 3]] * 3}, "heads lists 3 layers, the model has 4"),
        ({"heads": [[0, 1, 2, 9]] * 4}, "heads names layer 0, head 9; the model has 4 layers of 4 query heads"),
        ({"heads": {7: [0, 1, 2, 3]}}, "heads names layer 7, head 0"),
        ({"heads": {"0": [0, 1, 2, 3]}}, "does not fit: layers are whole numbers; give {layer"),
        ({"heads": {-1: [0, 1, 2, 3]}}, "does not fit: layers are whole numbers"),
        ({"heads": "all", "max_factor": math.inf}, "max_factor=inf is no number"),
        ({"heads": "all", "max_factor": math.nan}, "max_factor=nan is too small"),
        ({"heads": "all", "first_k": 5}, "first_k=5, but a layer has 4 query heads"),
        ({"heads": "all", "budget": 8}, "budget 8 cannot be met: every layer keeps 9 entries"),
        ({"heads": "all", "budget": 20, "layer_scores": [1] * 4}, "budget 20 cannot be met: every layer keeps 32"),
        ({"heads": "all", "layer_scores": [1] * 4, "min_budget": 8}, "min_budget=8 must exceed window_size 8"),
        ({"heads": "all", "layer_scores": [1] * 3}, "layer_scores has 3 numbers, the model 4 layers"),
        ({"heads": "all", "layer_scores": [1, -1, 1, 1]}, "give a number of 0 or more a layer"),
        ({"heads": "all", "layer_scores": [0] * 4}, "give a number of 0 or more a layer"),
        ({"heads": "all", "layer_scores": [1, math.nan, 1, 1]}, "give a number of 0 or more a layer"),
        ({"heads": "all", "profile": "x"}, "profile and heads both name"),
        ({"heads": "all", "kernel_size": 4}, "kernel_size=4 is even"),
        ({"profile": profile("llama", ORDER["llama"][:3])}, "incomplete: 'order' holds 3 layers, the model has 4"),
        ({"profile": profile("qwen3")}, "made for another model \\(model_type 'qwen3' instead of 'llama'\\)"),
        ({"profile": Profile("sinks", {}, {}, {})}, "kind 'sinks'; allowed: semantic-heads"),
        (
            {"profile": profile("llama", [[0, 1, 2, 3], [0, 1, 2, 9], *ORDER["llama"][2:]])},
            "layer 1 is none of heads 0..3",
        ),
        ({"profile": profile("llama", [[0, 1, 2, 2], *ORDER["llama"][1:]])}, "damaged: its order of layer 0 is none"),
    ],
    ids=range(26),
)
def test_refusals(hyper, words):
    with pytest.raises(ConfigError, match=words):
        attnpatch.patch_model(tiny("llama"), "compresskv", **hyper)


def test_refusals_while_running():
    with attnpatch.patched(tiny("llama"), "compresskv", profile=profile("llama", GAP), budget=12) as model:
        with pytest.raises(ConfigError, match="no heads are known of layer 1, .* layers="):
            model(prompt(), **{CACHE: attnpatch.PatchCache(model)})
    more = {"heads": "all", "budget": 32, "layer_scores": [1] * 4, "layers": [0, 1]}
    with attnpatch.patched(tiny("llama"), "compresskv", **more) as model:
        with pytest.raises(ConfigError, match="divides the budget over 4 layers, but 2 are patched"):
            model(prompt(), **{CACHE: attnpatch.PatchCache(model)})


# ---- layer errors (part B) -------------------------------------------------------------------------------------


def naive_errors(name, ids, order, budget, steps):
    """Steps 6 and 7 for rows of ids on the stock eager model, written from the specification; fp64 sums."""
    from transformers import DynamicCache

    model, totals = tiny(name), {}
    for row in ids:
        cache, found = DynamicCache(config=model.config), {}
        hooks, seen = [], {}  # seen: layer -> its projected output
        for i in LAYERS[name]:
            module = model.model.layers[i].self_attn
            hooks.append(module.o_proj.register_forward_hook(lambda m, a, out, i=i, s=seen: s.update({i: out})))
        with torch.no_grad():
            out = model(row[None, :-1], output_attentions=True, **{CACHE: cache})
            for i in LAYERS[name]:
                group = 4 // cache.layers[i].keys.shape[1]
                found[i] = kept_by_rows(out.attentions[i][0].double(), order[i][:4], budget), group
            token = row[None, -1:]
            for _ in range(steps):
                out = model(token, output_attentions=True, **{CACHE: cache})
                for i, (stay, group) in found.items():
                    a, v = out.attentions[i][0, :, 0].double(), cache.layers[i].values[0].double()
                    a = a.clone()
                    a[:, [j for j in range(len(row) - 1) if j not in stay]] = 0
                    a = a / a.sum(-1, keepdim=True)
                    compressed = torch.cat([a[h] @ v[h // group] for h in range(4)])
                    weight = model.model.layers[i].self_attn.o_proj.weight.double()
                    o_c, o_f = weight @ compressed, seen[i][0, -1].double()
                    totals[i] = totals.get(i, 0) + float((o_c - o_f).norm() / (o_f.norm() + 1e-6))
                token = out.logits[:, -1].argmax(-1, keepdim=True)
        for h in hooks:
            h.remove()
    return [totals[i] / sum(totals.values()) if i in totals else math.nan for i in range(4)]


def kept_by_rows(a, heads, budget, window=8, kernel=5):
    """Positions kept, from a prompt's attention [Hq, N, N]."""
    n, half = a.shape[-1], kernel // 2
    votes = a[heads, n - window :, : n - window].sum(1)
    pooled = torch.stack([votes[:, max(0, i - half) : i + half + 1].sum(-1) / kernel for i in range(n - window)], -1)
    return best(pooled.mean(0).float().tolist(), budget - window) | set(range(n - window, n))


@pytest.mark.parametrize("name", ORDER)
def test_layer_errors_follow_the_specification(name, tmp_path):
    ids = prompt(2, 60)
    found = layer_errors(tiny(name), profile(name), ids=ids, steps=5, budget=16)
    error = found.tensors["error"]
    wanted = torch.tensor(naive_errors(name, ids, ORDER[name], 16, 5))
    torch.testing.assert_close(error, wanted, atol=1e-4, rtol=0, equal_nan=True)
    assert abs(float(error.nansum()) - 1) < 1e-5 and found.kind == "layer-errors"
    folder = found.save(tmp_path / "errors")
    more = {"budget": 16, "min_budget": 6, **SMALL}
    with attnpatch.patched(tiny(name), "compresskv", profile=profile(name), layer_scores=folder, **more) as model:
        sizes = [len(x[0]) for x in held(feed(model, prompt())[1])]
    shares = tuple(float(error[i]) for i in LAYERS[name])
    assert sizes == [min(40, n) for n in allocated(shares, 16 * len(shares), 6, 48)]


def test_layer_errors_refusals(tmp_path):
    with pytest.raises(ConfigError, match="passages of 17 tokens fit the budget of 16"):
        layer_errors(tiny("llama"), profile("llama"), ids=prompt(1, 17), budget=16)
    with pytest.raises(ConfigError, match="needs a tokenizer, or ids"):
        layer_errors(tiny("llama"), profile("llama"))
    with pytest.raises(ConfigError, match="steps=0 is out of range"):
        layer_errors(tiny("llama"), profile("llama"), ids=prompt(), steps=0)
    lacking = Profile("layer-errors", {"error": torch.tensor([0.5, NAN, 0.2, 0.3])}, profile("llama").model, {})
    for given, words in ((lacking, "lacks figures of some layers"), (profile("llama"), "kind 'semantic-heads'"),
                         ("/nowhere", "no profile at")):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            attnpatch.patch_model(tiny("llama"), "compresskv", heads="all", layer_scores=given)
