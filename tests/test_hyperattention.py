"""HyperAttention against its specification's recursion in plain loops, and the specification's invariants."""

from __future__ import annotations

import math

import pytest
import torch
from attnpatch.patches.hyperattention import HyperAttention, buckets, halves, nodes
from selections import layer, noise, structured

import attnpatch
from attnpatch.decisions import Selection
from attnpatch.engine.terms import summed
from attnpatch.errors import ConfigError
from attnpatch.executors import naive

INF = float("inf")


def options(**more):
    return HyperAttention(**{"block_size": 16, "sample_size": 24, "min_seq_len": 64, **more})


def hyper(q, k, v, patch, ctx, start=0):
    """Spec: CAUSAL and NONCAUSAL of one unpadded row in float64: q [Hq, T, D], k, v [Hkv, N, D] -> out, lse."""
    heads, rows, n, dim = q.shape[0], q.shape[1], k.shape[1], k.shape[2]
    made = torch.Generator().manual_seed(patch.seed * 1_000_003 + ctx.index * 8191 + ctx.layer)
    lines = torch.randn(dim, patch.lsh_num_projs, generator=made)
    place = buckets(patch.lsh_num_projs, patch.strict)
    size, m = patch.block_size, patch.sample_size
    weight = torch.zeros(heads, rows, n, dtype=torch.float64)  # how often a pair counts

    def bucket(x):
        return place[sum(2**i for i, bit in enumerate((x @ lines > 0).tolist()) if bit)]

    def cross(h, number, low, middle, high):
        keys = sorted(range(low, middle), key=lambda j: (bucket(k[h // (heads // k.shape[0]), j]), j))
        asked = sorted(range(max(middle, start), high), key=lambda i: (bucket(q[h, i - start]), i))
        if not asked:
            return
        blocks = math.ceil(len(keys) / size)
        own = math.ceil(math.ceil(len(asked) / size) * size / blocks)
        at = torch.tensor([number * m + i for i in range(m)]).expand(1, heads, -1)
        drawn = [int(u * len(keys)) for u in ctx.noise(at, patch.seed)[0, h].double().tolist()] if m else []
        for rank, i in enumerate(asked):
            block = rank // own
            for j in keys[block * size : (block + 1) * size]:
                weight[h, i - start, j] = 1.0
            for r in drawn:
                if r // size != block:
                    weight[h, i - start, keys[r]] += len(keys) / m

    def causal(h, number, low, high, length):
        half = math.ceil(length / 2)
        if half < patch.min_seq_len:
            for i in range(max(low, start), high):
                weight[h, i - start, low : i + 1] = 1.0
            return
        half = math.ceil(half / patch.unit) * patch.unit
        middle = min(low + half, high)
        causal(h, 2 * number, low, middle, half)
        causal(h, 2 * number + 1, middle, high, half)
        cross(h, number, low, middle, high)

    for h in range(heads):
        causal(h, 1, 0, n, n)
    group = heads // k.shape[0]
    k, v = (x.double().repeat_interleave(group, 0) for x in (k, v))
    logits = q.double() @ k.transpose(-1, -2) * ctx.scaling + weight.log()
    return (logits.softmax(-1) @ v).transpose(0, 1), logits.logsumexp(-1)


CASES = [
    (300, noise, {}),
    (301, structured, {"strict": True}),
    (257, structured, {"sample_size": 0, "strict": True}),
    (517, noise, {"sample_size": 40, "block_size": 32}),
    (517, structured, {"min_seq_len": 100, "seed": 5}),
    (400, noise, {"lsh_num_projs": 3, "strict": True, "min_seq_len": 90, "block_size": 64}),
]


@pytest.mark.parametrize(("n", "kind", "given"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_output_equals_the_specification(n, kind, given):
    q, k, v = kind(n, seed=n)
    patch, (_, kv, ctx) = options(**given), layer(q, k, v)
    out, lse = summed(patch.select(q, kv, ctx), q, kv, ctx)
    expected, expected_lse = hyper(q[0], k[0], v[0], patch, ctx)
    torch.testing.assert_close(out[0].double(), expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse[0].double(), expected_lse, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_1_exact_up_to_twice_the_shortest_half(strict):
    patch = HyperAttention(strict=strict)
    q, kv, ctx = layer(*noise(40, 2, 1))
    for n, dense in ((4096, True), (8190, True), (8191, False)):
        ctx.prompt_len = (n,)
        assert (patch.select(q, kv, ctx) is None) == dense
    assert options().select(*layer(*noise(126, 2, 1))) is None
    assert options().select(*layer(*noise(127, 2, 1))) is not None


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("m", [0, 500])
def test_2_and_8_one_block_is_exact(m, strict):
    q, kv, ctx = layer(*structured(301))
    patch = options(block_size=512, min_seq_len=128, sample_size=m, strict=strict)
    out, lse = summed(patch.select(q, kv, ctx), q, kv, ctx)
    dense, dense_lse = naive.run(q, kv, Selection(), ctx, want_lse=True)
    torch.testing.assert_close(out, dense, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, dense_lse, atol=1e-5, rtol=1e-5)


def test_4_sums_are_unbiased_and_their_variance_falls_with_the_samples():
    q, k, v = noise(256, 1, 1, 16, scale=0.7)
    q, k, v = (x.expand(-1, 250, -1, -1) for x in (q, k, v))  # draws differ by head
    spread = []
    for m in (16, 64):
        sums = []
        for number in range(2):
            _, kv, ctx = layer(q, k, v, layer=number, n_layers=2)
            patch, first = options(sample_size=m, min_seq_len=128), layer(q, k, v)[2]
            patch.order = lambda x, _, first=first: HyperAttention.order(options(), x, first)  # one set of projections
            sums.append(summed(patch.select(q, kv, ctx), q, kv, ctx)[1][0, :, 128:].double().exp())
        sums = torch.cat(sums)  # [500, 128]
        true = naive.run(q[:, :1], layer(q, k[:, :1], v[:, :1])[1], Selection(), ctx, want_lse=True)[1][0, 0, 128:]
        off = (sums.mean(0) - true.double().exp()) / (sums.std(0) / 500**0.5)
        assert off.abs().max() < 4.5 and (off.abs() < 3).float().mean() > 0.97
        spread.append(sums.var(0).mean())
    assert 3 < spread[0] / spread[1] < 5.3


def test_5_the_first_half_does_not_see_the_second():
    q, k, v = structured(300)
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, :, 299] = 3.0
    one, other = (summed(options().select(*layer(*x)), *layer(*x))[0] for x in ((q, k, v), changed))
    assert torch.equal(one[:, :160], other[:, :160]) and not torch.equal(one[:, 160:], other[:, 160:])


def test_6_neighbouring_buckets_differ_in_one_bit():
    def wrong(place):
        order = sorted(range(128), key=lambda i: place[i])
        return sum((a ^ b).bit_count() > 1 for a, b in zip(order, order[1:], strict=False))

    assert sorted(buckets(7)) == sorted(buckets(7, True)) == list(range(128))
    assert wrong(buckets(7)) == 0 and wrong(buckets(7, True)) == 31
    patch, (q, _, ctx) = options(), layer(*noise(50, 4, 2))
    assert torch.equal(patch.order(q, ctx), patch.order(q * 3.0, ctx))
    assert torch.equal(patch.order(q[:, ::2], ctx), patch.order(q, ctx)[:, ::2]), "one hash for all heads"


def test_7_and_9_every_key_of_a_half_counts_once():
    for n in (257, 301):
        q, kv, ctx = layer(*noise(n, 2, 1))
        patch = options(sample_size=0, strict=True, min_seq_len=100)
        (exact, cross) = list(patch.select(q, kv, ctx))
        index, groups = cross.index[0, 0], cross.groups[0, 0]
        half = -(-n // 2)
        assert sorted(index[index >= 0].tolist()) == list(range(half))
        assert sorted(groups[groups >= 0].tolist()) == list(range(half, n))
        assert exact.groups is not None and (exact.index < n).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1), (8, 1)], ids=["mha", "group4", "group8"])
def test_10_grouped_heads_equal_repeated_heads_and_runs_repeat(heads, kv_heads, dtype):
    q, k, v = structured(301, heads, kv_heads, dtype=dtype)
    given = layer(q, k, v)
    out, _ = summed(options().select(*given), *given)
    repeated = layer(q, *(x.repeat_interleave(heads // kv_heads, 1) for x in (k, v)))
    again, _ = summed(options().select(*repeated), *repeated)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(again, out, atol=tolerance, rtol=tolerance)
    assert torch.equal(summed(options().select(*given), *given)[0], out)
    assert not torch.equal(summed(options(seed=1).select(*given), *given)[0], out)
    expected, _ = hyper(q[0].float(), k[0].float(), v[0].float(), options(), given[2])
    assert (out[0] - expected).abs().mean() < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("strict", [False, True])
def test_rows_of_a_padded_batch_equal_single_rows(strict):
    lengths = [500, 413, 270, 60]
    q, k, v = structured(500, 2, 1, batch=4)
    patch, batch = options(strict=strict), layer(q, k, v, lengths)
    out, _ = summed(patch.select(*batch), *batch)
    for row, n in enumerate(lengths):
        one = layer(*(x[row : row + 1, :, :n] for x in (q, k, v)))
        if patch.select(*one) is None:
            expected = naive.run(*one[:2], Selection(), one[2])[0]
        else:
            expected, _ = summed(patch.select(*one), *one)
        torch.testing.assert_close(out[row, :n], expected[0], atol=1e-5, rtol=1e-5)
        assert (out[row, n:] == 0).all()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("prefix", [64, 100, 250, 300])
def test_a_chunk_after_a_cached_prefix(prefix, strict):
    q, k, v = structured(301)
    patch, given = options(strict=strict), layer(q, k, v, prefix=prefix)
    given[1].complete = True
    out, _ = summed(patch.select(*given), *given)
    expected, _ = hyper(q[0, :, prefix:], k[0], v[0], patch, given[2], start=prefix)
    torch.testing.assert_close(out[0].double(), expected, atol=2e-5, rtol=2e-5)


def test_a_chunk_of_an_unfinished_prompt_halves_as_the_whole_does():
    q, k, v = structured(400)
    whole = layer(q, k, v)
    part = layer(*(x[:, :, :250] for x in (q, k, v)))
    part[2].prompt_len = (400,)
    patch = options(block_size=512, min_seq_len=128)  # one block a half: exact in both
    first, _ = summed(patch.select(*part), *part)
    torch.testing.assert_close(first, summed(patch.select(*whole), *whole)[0][:, :250], atol=1e-5, rtol=1e-5)
    part[2].prompt_len = (250,)
    assert patch.select(*part) is None


def test_halves_and_nodes():
    assert halves(400, 64, 16) == [400, 208, 112] and halves(126, 64, 16) == [126]
    assert nodes([400, 208, 112], 400, 2) == [(0, 112), (112, 208), (208, 320), (320, 400)]
    assert halves(301, 64, 1) == [301, 151, 76] and nodes([301, 151, 76], 301, 2)[-1] == (227, 301)


def test_which_layers():
    ctx = layer(*noise(10, 1, 1), n_layers=6)[2]

    def taken(**given):
        found = []
        for ctx.layer in range(6):
            if options(**given).takes(ctx):
                found.append(ctx.layer)
        return found

    assert taken() == list(range(6)) and taken(which_layers="last", layer_count=2) == [4, 5]
    assert taken(which_layers="first", layer_count=2) == [0, 1] and taken(layer_count=0) == []
    assert taken(which_layers="odd") == [1, 3, 5] and taken(which_layers="even", layer_count=2) == [0, 2]
    q, kv, ctx = layer(*noise(300, 2, 1), n_layers=2)
    assert options(which_layers="last", layer_count=1).select(q, kv, ctx) is None
    ctx.softcap = 30.0
    assert options().select(q, kv, ctx) is None


def test_probe():
    found = attnpatch.probe("hyperattention", *structured(301), block_size=16, sample_size=8, min_seq_len=64)
    assert [s.groups is None for s in found] == [True, False, False] and found[1].weight.shape == found[1].index.shape
    padding = torch.arange(301) >= torch.tensor([[0], [100]])
    q, k, v = structured(301, batch=2)
    assert len(attnpatch.probe("hyperattention", q, k, v, padding=padding, block_size=16, min_seq_len=64)) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"block_size": 100}, "block_size=100 is not allowed; choose one of 16, 32"),
        ({"lsh_num_projs": 17}, "lsh_num_projs=17 is too large; give at most 16"),
        ({"lsh_num_projs": 0}, "lsh_num_projs=0 is too small"),
        ({"min_seq_len": 8}, "min_seq_len=8 is too small"),
        ({"min_seq_len": 64, "block_size": 256}, "min_seq_len=64 is below 128, the grid of block_size=256"),
        ({"which_layers": "some"}, "which_layers='some' is not allowed"),
        ({"sample_size": -1}, "sample_size=-1 is too small"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_bad_values_name_what_is_allowed(given, message):
    with pytest.raises(ConfigError, match=message):
        HyperAttention(**given)
