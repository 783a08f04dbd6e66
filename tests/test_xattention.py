"""XAttention against a choice written from its specification in plain loops, and the specification's invariants."""

from __future__ import annotations

import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from attnpatch.patches.xattention import XAttention, reference_chunk
from interpreter import FORMS, HALF, INTERPRETED, mend_interpreter, needs_triton, run_interpreted
from selections import attend, block_sets, largest, layer, noise, pairs, structured

from attnpatch.decisions import Selection
from attnpatch.errors import ConfigError
from attnpatch.executors import antidiagonal, backends, column_sums, naive, pages, selecting

if INTERPRETED:
    mend_interpreter()
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(HALF, id="half")]


def block_mass(q, k, b, stride, scaling):
    """Steps 2-4 for one head of an unpadded row, float64: q, k [N, D] -> W [nb, nb]."""
    n = k.shape[0]
    nb, t, groups = math.ceil(n / b), b // stride, math.ceil(n / stride)
    q, k = (torch.cat([x.double(), x.new_zeros(groups * stride - n, x.shape[1]).double()]) for x in (q, k))
    x = torch.zeros(groups, groups, dtype=torch.float64)
    for s in range(stride):
        x += q[stride - 1 - s :: stride] @ k[s::stride].T
    x = (x * scaling / stride).masked_fill(torch.ones(groups, groups).triu(1).bool(), -math.inf).softmax(-1)
    w = torch.zeros(nb, nb, dtype=torch.float64)
    for i in range(nb):
        for j in range(nb):
            w[i, j] = x[i * t : (i + 1) * t, j * t : (j + 1) * t].sum()
    return w


def from_the_spec(q, k, tau=0.9, stride=16, b=64, quirk=False, scaling=None):
    """Step 5 for one unpadded row: q [Hq, N, D], k [Hkv, N, D]. {block: set} per head. tau: number, or one per head."""
    heads, sets = q.shape[0], []
    for h in range(heads):
        level = tau[h] if isinstance(tau, list) else tau
        w = block_mass(q[h], k[h // (heads // k.shape[0])], b, stride, scaling or k.shape[-1] ** -0.5)
        own = {}
        for i in range(w.shape[0]):
            row, early = w[i].tolist(), quirk and i * b < reference_chunk(k.shape[1])
            required, chosen = level * sum(row), {i} if early else {0, i}
            total = sum(row[j] for j in chosen)
            held = [total]  # mass before the 1st, 2nd ... other
            for j in largest([row[j] if j not in chosen else -1.0 for j in range(len(row))], len(row) - len(chosen)):
                if early and len(held) > 1 and held[-2] >= required or not early and held[-1] >= required:
                    break
                chosen = chosen | {j}
                held.append(held[-1] + row[j])
            own[i] = {j for j in chosen | {0} if j <= i}
        sets.append(own)
    return sets


def options(tau=0.9, stride=16, b=64, quirk=False):
    return XAttention(threshold=tau, stride=stride, block_size=b, first_chunk_quirk=quirk)


@pytest.mark.parametrize(
    ("n", "kind", "given"),
    [
        (1280, structured, {}),
        (1300, structured, {"tau": 0.8, "stride": 8, "b": 128}),
        (2500, structured, {"tau": 0.6, "b": 128}),
        (2048, noise, {"tau": 0.9}),
        (1301, noise, {"tau": 0.5, "stride": 4}),
        (1303, structured, {"tau": 0.7, "quirk": True}),
        (1300, structured, {"tau": 0.3, "quirk": True, "stride": 8}),
        (2500, structured, {"tau": 0.9, "quirk": True, "b": 128}),
        (1300, structured, {"tau": 0.9, "b": 32, "scaling": 0.5}),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_block_sets_equal_the_specification(n, kind, given):
    q, k, v = kind(n, seed=n)
    patch = options(**{key: x for key, x in given.items() if key != "scaling"})
    got = block_sets(patch, *layer(q, k, v, scaling=given.get("scaling")))
    assert got == from_the_spec(q[0], k[0], **given)


@pytest.mark.parametrize("quirk", [False, True])
@pytest.mark.parametrize("stride", [8, 16])
def test_rows_of_a_padded_batch_equal_single_rows(stride, quirk):
    lengths = [500, 413, 270, 100]
    q, k, v = structured(500, 2, 1, batch=4)
    patch, batch = options(0.7, stride, quirk=quirk), layer(q, k, v, lengths)
    for row, n in enumerate(lengths):
        got = block_sets(patch, *batch, row=row)
        assert got == from_the_spec(q[row, :, :n], k[row, :, :n], 0.7, stride, quirk=quirk), f"row {row}"
    if quirk:
        return
    out = attend(patch, *batch)
    for row, n in enumerate(lengths):
        one = attend(patch, *layer(*(x[row : row + 1, :, :n] for x in (q, k, v))))
        torch.testing.assert_close(out[row, :n], one[0], atol=1e-5, rtol=1e-5)
        assert (out[row, n:] == 0).all()


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1), (8, 1)])
def test_6_grouped_heads_equal_repeated_heads(heads, kv_heads):
    q, k, v = structured(700, heads, kv_heads)
    got = block_sets(options(0.7), *layer(q, k, v))
    assert got == from_the_spec(q[0], k[0], 0.7)
    assert block_sets(options(0.7), *layer(q, *(x.repeat_interleave(heads // kv_heads, 1) for x in (k, v)))) == got


def rank_correlation(x, y):
    """Spearman's, of values without ties."""
    x, y = (v.argsort().argsort().double() for v in (x, y))
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


def test_6_the_estimate_ranks_blocks_as_their_true_mass():
    """Rank correlation of estimated and true block mass, mean over heads and rows; smaller tiles are finer."""
    q, k, _ = structured(1024)
    mean = {}
    for stride in (4, 8, 16):
        found = []
        for h in range(4):
            keys, tril = k[0, h // 2].double(), torch.ones(1024, 1024).tril().bool()
            probs = (q[0, h].double() @ keys.T * 32**-0.5).masked_fill(~tril, -math.inf).softmax(-1)
            true = probs.unflatten(1, (16, 64)).unflatten(0, (16, 64)).sum((1, 3))
            w = block_mass(q[0, h], k[0, h // 2], 64, stride, 32**-0.5)
            found += [rank_correlation(w[i, : i + 1], true[i, : i + 1]) for i in range(5, 16)]
        mean[stride] = sum(found) / len(found)
    assert mean[4] > mean[8] > mean[16] > 0.7


def test_6_attention_over_the_chosen_blocks_is_masked_dense_attention():
    q, kv, ctx = layer(*structured(700, 8, 2))
    got = torch.zeros(1, 700, 8, 32)
    for term in options(0.6).select(q, kv, ctx):
        got[:, term.rows] = pages.run(q, kv, term, ctx)[0]
    seen = torch.zeros(8, 704, 704, dtype=torch.bool)
    for h, own in enumerate(from_the_spec(q[0], kv.k[0], 0.6)):
        for i, found in own.items():
            for j in found:
                seen[h, i * 64 : i * 64 + 64, j * 64 : j * 64 + 64] = True
    k, v = (x.repeat_interleave(4, 1) for x in (kv.k, kv.v))
    logits = (q @ k.transpose(-1, -2) * 32**-0.5).masked_fill(~seen[:, :700, :700].tril(), -math.inf)
    torch.testing.assert_close(got, (logits.softmax(-1) @ v).transpose(1, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix", [64, 80, 640, 699])
def test_5_a_chunk_chooses_as_the_whole_prompt_does(prefix):
    q, k, v = structured(700)
    whole = block_sets(options(0.7), *layer(q, k, v))
    chunk = block_sets(options(0.7), *layer(q, k, v, prefix=prefix))
    for all_rows, own in zip(whole, chunk, strict=True):  # a partial first block lacks the cached queries
        assert set(own) == {i for i in all_rows if i >= prefix // 64}
        assert all(own[i] == all_rows[i] for i in own if i * 64 >= prefix)
        assert {0, prefix // 64} <= own[prefix // 64]


def test_5_stripes_and_key_blocks_do_not_change_the_choice(monkeypatch):
    q, k, v = structured(500, 2, 1)
    whole = pairs(options(0.7), *layer(q, k, v, prefix=70))
    for rows in (128, 1):
        monkeypatch.setattr(selecting, "MAX_ROWS", rows)
        assert torch.equal(pairs(options(0.7), *layer(q, k, v, prefix=70)), whole)
    for most in (2 * 4 * 8 * 3, 1):
        monkeypatch.setattr(column_sums, "MAX_BLOCK", most)
        assert torch.equal(pairs(options(0.7), *layer(q, k, v, prefix=70)), whole)


def test_1_the_ends_of_the_threshold():
    q, kv, ctx = layer(*structured(700))
    assert block_sets(options(1.01), q, kv, ctx) == [{i: set(range(i + 1)) for i in range(11)}] * 4
    torch.testing.assert_close(attend(options(1.01), q, kv, ctx), naive.run(q, kv, Selection(), ctx)[0])
    assert block_sets(options(0.0), q, kv, ctx) == [{i: {0, i} for i in range(11)}] * 4
    assert options().select(*layer(*noise(128, 2, 1))) is None and options().select(*layer(*noise(129, 2, 1)))
    ctx.softcap = 30.0
    assert options().select(q, kv, ctx) is None


def test_2_nested_in_the_threshold():
    given = layer(*structured(700))
    maps = [pairs(options(tau), *given) for tau in (0.0, 0.3, 0.6, 0.9, 1.01)]
    for small, large in zip(maps, maps[1:], strict=False):
        assert not (small & ~large).any() and small.sum() < large.sum()


def test_4_the_retained_mass_reaches_the_threshold():
    q, k, v = structured(1300)
    for h, own in enumerate(block_sets(options(0.8), *layer(q, k, v))):
        w = block_mass(q[0, h], k[0, h // 2], 64, 16, 32**-0.5)
        for i, blocks in own.items():
            assert {0, i} <= blocks and max(blocks) == i
            assert w[i, sorted(blocks)].sum() >= 0.8 * w[i].sum() * (1 - 1e-5)


def test_a_table_of_thresholds():
    q, k, v = structured(700)
    table = [[0.9] * 4, [0.2, 0.5, 0.8, 1.0]]
    got = block_sets(XAttention(threshold=table, block_size=64), *layer(q, k, v, layer=1, n_layers=2))
    assert got == from_the_spec(q[0], k[0], table[1])
    with pytest.raises(ConfigError, match="2 layers x 4 heads, the model has 3 patched layers x 4 query heads"):
        XAttention(threshold=table, block_size=64).select(*layer(q, k, v, n_layers=3))


@pytest.mark.parametrize(("n", "chunk"), [(2000, 2048), (8000, 8192), (16384, 16384), (32768, 8192), (65536, 4096),
                                          (131072, 2048), (500000, 2048)])  # fmt: skip
def test_reference_chunk(n, chunk):
    assert reference_chunk(n) == chunk


@pytest.mark.parametrize("stride", [4, 8, 16])
def test_3_one_dot_product_is_an_antidiagonal(stride):
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randint(-5, 6, (1, 1, 64, 8), generator=g).double() for _ in range(2))
    logits = (q @ k.transpose(-1, -2))[0, 0]
    got = antidiagonal.reduced(q, 32, stride, reverse=True) @ antidiagonal.reduced(k, 32, stride).transpose(-1, -2)
    for i in range(64 // stride):
        for j in range(64 // stride):
            tile = logits[i * stride : (i + 1) * stride, j * stride : (j + 1) * stride]
            assert got[0, 0, i, j] == tile.flip(0).diagonal().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("most", [2**26, 3000, 1])
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("start", [0, 32, 37, 90])
def test_antidiagonal_mass_matches_naive(start, group, most, dtype, monkeypatch):
    monkeypatch.setattr(column_sums, "MAX_BLOCK", most)
    q, k, _ = (x.to(dtype) for x in noise(150, group, 1, 16, batch=3))
    end = torch.tensor([150, 101, 0])
    q, given = q[:, :, start:], {"start": start, "end": end, "block": 32, "stride": 4, "scaling": 0.3}
    expected = naive.antidiagonal(q, k, **given)
    keys = antidiagonal.reduced(selecting.without_pads(k, end), 32, 4)
    got = antidiagonal.run(selecting.without_pads(q, end, start), keys, **given)
    assert got.shape == (3, group, -(-150 // 32) - start // 32, 5)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_the_estimate_holds_a_bounded_block(monkeypatch):
    seen, matmul = [], antidiagonal.matmul
    monkeypatch.setattr(antidiagonal, "matmul", lambda a, b: seen.append(matmul(a, b)) or seen[-1])
    monkeypatch.setattr(column_sums, "MAX_BLOCK", 4000)
    q, k, _ = noise(1000, 4, 2)
    keys = antidiagonal.reduced(k, 64, 4)
    antidiagonal.run(q, keys, start=0, end=torch.tensor([1000]), block=64, stride=4, scaling=1.0)
    assert max(x.numel() for x in seen) <= 4000 < 4 * 250 * 250


def estimate(form, q, k, **given):
    """Block mass by `form` on its device, brought back; q, k with anything behind `end`, q from `start` on."""
    q, k = selecting.without_pads(q, given["end"], given["start"]), selecting.without_pads(k, given["end"])
    keys = antidiagonal.reduced(k, given["block"], given["stride"]).to(form[1])
    given["end"] = given["end"].to(form[1])
    return antidiagonal.run(q.to(form[1]), keys, **given, _backend=form[0]).cpu()


def check(form, q, k, *, start=0, end=None, block=32, stride=8, tol=2e-5):
    end = torch.full((q.shape[0],), k.shape[2]) if end is None else torch.tensor(end)
    given = {"start": start, "end": end, "block": block, "stride": stride, "scaling": q.shape[3] ** -0.5}
    got = estimate(form, q[:, :, start:], k, **given)
    assert got.dtype == torch.float32
    # the product of halves is exact in fp32; only the order of sums differs
    torch.testing.assert_close(got, naive.antidiagonal(q[:, :, start:], k, **given), atol=tol, rtol=tol)
    return got


def problem(n, heads=2, kv_heads=1, dim=32, dtype=torch.float32, batch=2, lengths=None):
    """q, k with NaN behind each row's length."""
    q, k, _ = noise(n, heads, kv_heads, dim, batch)
    behind = torch.arange(n) >= torch.tensor(lengths or [n] * batch)[:, None]
    return (x.masked_fill(behind[:, None, :, None], float("nan")).to(dtype) for x in (q, k))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [4, 8, 16])
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("form", FORMS)
def test_all_blocks_and_strides(form, block, stride, dtype):
    q, k = problem(291, dtype=dtype, lengths=[291, 150])
    got = check(form, q, k, start=37, end=[291, 150], block=block, stride=stride)
    assert (got.triu(1 + 37 // block) == 0).all() and (got[1, :, 150 // block + 1 - 37 // block :] == 0).all()


@pytest.mark.parametrize("start", [0, 1, 8, 64, 129, 290])
@pytest.mark.parametrize("form", FORMS)
def test_any_start(form, start):
    check(form, *problem(291, dtype=HALF, lengths=[291, 137]), start=start, end=[291, 137])


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 1), (16, 2)])
@pytest.mark.parametrize("form", FORMS)
def test_grouped_heads(form, heads, kv_heads):
    check(form, *problem(97, heads, kv_heads, dtype=HALF, lengths=[97, 0]), end=[97, 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 64, 72, 96, 256])
@pytest.mark.parametrize("form", FORMS)
def test_head_sizes(form, dim, dtype):
    check(form, *problem(70, dim=dim, dtype=dtype, batch=1))


@pytest.mark.parametrize("form", FORMS)
def test_several_tiles_of_rows_and_keys(form, monkeypatch):
    q, k = problem(1333, dtype=HALF, batch=1)
    whole = check(form, q, k, block=64, stride=4)
    monkeypatch.setattr(column_sums, "MAX_BLOCK", 2 * 16 * 21 * 5)  # five query blocks at a time
    torch.testing.assert_close(check(form, q, k, block=64, stride=4), whole)


@pytest.mark.parametrize("form", FORMS)
def test_strided_and_unaligned_inputs(form):
    q, k = problem(101, 4, 2, dtype=HALF)
    expected = check(form, q, k)
    for x in (q.transpose(1, 2).contiguous().transpose(1, 2), torch.cat([q, q], dim=3)[..., :32]):
        assert torch.equal(check(form, x, k), expected)
    shifted = torch.cat([q.new_zeros(1), q.flatten()])[1:].view_as(q)  # 2 bytes off
    assert torch.equal(check(form, shifted, k), expected)


@pytest.mark.parametrize("form", FORMS)
def test_logits_far_apart(form):
    q, k = problem(200, dtype=HALF, batch=1)
    check(form, q * 30, k, tol=3e-4)  # most tiles hold nothing beside the best; large logits round more coarsely


@pytest.mark.parametrize("form", FORMS)
def test_block_sets_by_either_form_equal_the_specification(form, monkeypatch):
    q, k, v = structured(700)
    given = layer(*(x.to(form[1]) for x in (q, k, v)), prefix=70)
    given[2].q_pos, given[1].pos = given[2].q_pos.to(form[1]), given[1].pos.to(form[1])
    monkeypatch.setattr(antidiagonal, "choose", lambda q, keys: (form[0], ""))
    got, expected = block_sets(options(0.7), *given), from_the_spec(q[0], k[0], 0.7)
    assert all(own[i] == whole[i] for own, whole in zip(got, expected, strict=True) for i in range(2, 11))


@needs_triton
@pytest.mark.skipif(not INTERPRETED, reason="for the interpreter")
def test_triton_with_the_tile_of_large_devices():
    from attnpatch.executors import _antidiagonal_triton as fused

    q, k = problem(1100, dtype=HALF, batch=1)
    given = {"start": 0, "end": torch.tensor([1100]), "block": 64, "stride": 4, "scaling": 0.2}
    keys = antidiagonal.reduced(k, 64, 4)
    config = fused._config(32, 2, 228 * 1024)
    got = fused.launch(q, keys, **given, most=2**26, **config)
    assert config["BLOCK_N"] == 256
    torch.testing.assert_close(got, antidiagonal.run(q, keys, **given), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("major", "dim", "dtype", "why"),
    [
        (9, 128, torch.bfloat16, None),
        (10, 96, torch.float16, None),
        (8, 128, torch.bfloat16, "needs CUDA capability >= 9, this is capability 8"),
        (9, 100, torch.bfloat16, "multiple of 8, this is 100"),
        (9, 128, torch.float32, "needs float16 or bfloat16, this is float32"),
    ],
)
def test_the_choice_on_cuda(major, dim, dtype, why, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    monkeypatch.setattr(backends, "_found", {})
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    q = SimpleNamespace(shape=(1, 4, 64, dim), dtype=dtype, device=torch.device("cuda", 0))
    name, reason = antidiagonal.choose(q, q)
    assert (name == "triton" and why is None) or (name == "torch" and why in reason)
    assert antidiagonal.choose(q, SimpleNamespace(dtype=torch.float64))[0] == "torch"
    monkeypatch.setattr(backends, "has_triton", lambda: False)
    assert "not triton" in antidiagonal.choose(q, q)[1]


def test_the_choice_and_its_errors():
    q, k = problem(64)
    assert antidiagonal.choose(q, k) == ("torch", "not triton: needs CUDA capability >= 9, this is cpu")
    given = {"start": 0, "end": torch.tensor([64, 64]), "block": 32, "stride": 4, "scaling": 1.0}
    for dtype, name in ((torch.float64, "triton"), (torch.float32, "cuda")):
        with pytest.raises(ConfigError, match=f"'{name}'.*allowed are 'torch', and 'triton' but for float64"):
            antidiagonal.run(q.to(dtype), antidiagonal.reduced(k.to(dtype), 32, 4), **given, _backend=name)


def test_import_is_light():
    code = "import sys, attnpatch.executors.antidiagonal; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@needs_triton
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the fused form runs here itself")
def test_the_fused_form_in_tritons_interpreter():
    run_interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", __file__)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"threshold": 1.02}, "threshold=1.02 is out of range; give 0 <= threshold <= 1.01"),
        ({"threshold": -0.1}, "0 <= threshold"),
        ({"threshold": float("nan")}, "0 <= threshold"),
        ({"threshold": "0.9"}, "threshold='0.9' is out of range"),
        ({"threshold": [[0.9, 2.0]]}, "threshold=2.0 is out of range"),
        ({"threshold": [[0.9, 0.8], [0.9]]}, "one list per layer"),
        ({"threshold": [0.9, 0.8]}, "one list per layer"),
        ({"threshold": []}, "one list per layer"),
        ({"stride": 5}, "stride=5 is not allowed; choose one of 4, 8, 16"),
        ({"block_size": 16}, "block_size=16 is not allowed; choose one of 32, 64, 128"),
    ],
)
def test_bad_values_name_what_is_allowed(given, message):
    with pytest.raises(ConfigError, match=message):
        XAttention(**given)
