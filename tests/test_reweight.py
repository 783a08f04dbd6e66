"""`reweight` against the naive reference: the torch form, and the fused one on CUDA or in Triton's interpreter."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from interpreter import FORMS, HALF, INTERPRETED, mend_interpreter, needs_triton, run_interpreted
from selections import layer as as_layer

from attnpatch.decisions import ColumnReweight, Selection
from attnpatch.engine.call import KV
from attnpatch.errors import ConfigError, InputError
from attnpatch.executors import backends, naive, reweight

if INTERPRETED:
    mend_interpreter()
DTYPES = [torch.float32, HALF]


def run(form, out, lse, q, kv, decision, ctx, want_lse=False):
    """The executor in one form on its device, brought back."""
    name, device = form
    moved = [
        type(x)(**{n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in vars(x).items()})
        for x in (kv, decision, ctx)
    ]
    result = reweight.run(*(t.to(device) for t in (out, lse, q)), *moved, want_lse, _backend=name)
    return tuple(None if t is None else t.cpu() for t in result)


def problem(rows, slots, group=2, kind="aligned", dtype=torch.float32, softcap=None, heads=None, seed=0):
    """q, kv, ctx and the columns of 2 batch rows. Empty slots, padding queries and what they gave hold NaN.

    kind: aligned (row 0 is shorter) | evicted (any order, holes by head). heads: of the columns; default KV heads.
    """
    g = torch.Generator().manual_seed(seed)
    kv_heads, dim = 2, 16
    q = torch.randn(2, kv_heads * group, rows, dim, generator=g).to(dtype)
    k, v = (torch.randn(2, kv_heads, slots, dim, generator=g).to(dtype) for _ in range(2))
    pos = torch.arange(slots, dtype=torch.int32).expand(2, 1, -1).clone()
    pos[0, :, slots - rows // 3 :] = -1
    q_pos = pos[:, 0, slots - rows :].long()
    if kind == "evicted":
        pos = pos.repeat(1, kv_heads, 1)
        pos[..., : slots - rows][torch.rand(2, kv_heads, slots - rows, generator=g) < 0.3] = -1
        pos[..., : slots - rows] = pos[..., : slots - rows].flip(-1)
    k, v = (x.masked_fill((pos < 0)[..., None], float("nan")) for x in (k, v))
    q = q.masked_fill((q_pos < 0)[:, None, :, None], float("nan"))
    kv = KV(k, v, pos, holes=True, aligned=kind == "aligned")
    ctx = SimpleNamespace(q_pos=q_pos, scaling=dim**-0.5, softcap=softcap, window=None, mask=None)
    columns = 1 + torch.stack([torch.randperm(slots + 4, generator=g)[:5] for _ in range(2 * (heads or kv_heads))])
    columns = columns.view(2, -1, 5).to(torch.int32)
    columns[..., 0], columns[0, :, 1] = 0, -1
    return q, kv, ctx, columns


def attended(q, kv, ctx):
    """Dense (out, lse) with NaN at padding queries."""
    out, lse = naive.run(q, kv, Selection(), ctx, True)
    pad = ctx.q_pos < 0
    return out.masked_fill(pad[..., None, None], float("nan")), lse.masked_fill(pad[:, None], float("nan"))


def same(got, expected, ctx, atol, scale=1.0):
    """Equal at real queries. scale [B, T, Hq, 1]: what happens to the other keys' weights, and so to rounding."""
    real = (ctx.q_pos >= 0)[..., None, None].expand_as(got)
    error = ((got.float() - expected.float()).abs() / torch.as_tensor(scale).clamp(min=1))[real]
    assert (error <= atol * expected[real].float().abs().clamp(min=1)).all(), error.max()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "half"])
@pytest.mark.parametrize("rule", [*reweight.RULES, reweight.SCALE])
@pytest.mark.parametrize("group", [4] if INTERPRETED else [1, 4, 8])
@pytest.mark.parametrize(("rows", "slots"), [(1, 1), (2, 2), (1, 33), (33, 33), (7, 130)])
@pytest.mark.parametrize("kind", ["aligned", "evicted"])
def test_executor_equals_naive(kind, rows, slots, group, rule, dtype, form):
    for softcap, heads, some in ((None, 2, False), (5.0, 1, True), (None, 2 * group, True)):
        q, kv, ctx, columns = problem(rows, slots, group, kind, dtype, softcap, heads)
        g = torch.Generator().manual_seed(1)
        factor = torch.rand(2, 2 * group, 5, generator=g)
        factor = factor if rule == "give_back" else 0.1 + 7.9 * factor
        chosen = torch.rand(2, q.shape[1], rows, generator=g) < 0.7 if some else None
        decision = ColumnReweight(columns, factor, rule, chosen)
        out, lse = attended(q, kv, ctx)
        got, new_lse = run(form, out, lse, q, kv, decision, ctx, want_lse=True)
        expected, weights = naive.reweight(q, kv, decision, ctx)
        grown = (lse - new_lse).exp().transpose(1, 2)[..., None]
        same(got, expected, ctx, 1e-5 if dtype == torch.float32 else 2e-2, grown)
        assert got.dtype == dtype and torch.isnan(got[ctx.q_pos < 0]).all()
        # every key that was not listed has the weight exp(logit - new lse)
        before = naive._probabilities(naive._logits(q, kv, ctx.scaling, softcap), naive._per_query_head(
            naive.visible(kv, ctx.q_pos), q.shape[1]))[0]  # fmt: skip
        here = naive._spread(kv.pos, 2, q.shape[1])[:, :, None] == naive._spread(columns, 2, q.shape[1])[..., None]
        free = (~here.any(2))[:, :, None] & (ctx.q_pos >= 0)[:, None, :, None]
        by_lse = before * (lse - new_lse).exp()[..., None]
        free = free.expand_as(before)
        torch.testing.assert_close(by_lse[free], weights[free], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_blocks_of_rows_factor_one_and_rows_before_the_column(form, monkeypatch):
    q, kv, ctx, columns = problem(33, 33)
    out, lse = attended(q, kv, ctx)
    real = ctx.q_pos >= 0
    for rule in (*reweight.RULES, reweight.SCALE):
        same_again = run(form, out, lse, q, kv, ColumnReweight(columns, torch.ones(1, 1, 5), rule), ctx)[0]
        assert torch.equal(same_again[real], out[real]), "factor 1 gives the input back, bit for bit"
        late = ColumnReweight(torch.full((1, 1, 1), 9, dtype=torch.int32), torch.full((1, 1, 1), 0.5), rule)
        whole, whole_lse = run(form, out, lse, q, kv, late, ctx, True)
        before = real & (ctx.q_pos < 9)
        assert torch.equal(whole[before], out[before]) and not torch.equal(whole[real], out[real])
        with monkeypatch.context() as m:
            m.setattr("attnpatch.executors.column_sums.MAX_BLOCK", 2 * 4 * 16 * 5)  # five rows at once
            parts, parts_lse = run(form, out, lse, q, kv, late, ctx, True)
        same(parts, whole, ctx, 1e-6)
        same(parts_lse.transpose(1, 2)[..., None], whole_lse.transpose(1, 2)[..., None], ctx, 1e-6)
    with pytest.raises(ConfigError, match="'double' is not allowed"):
        reweight.run(out, lse, q, kv, replace(late, rule="double"), ctx)


@pytest.mark.parametrize("form", FORMS)
def test_windows_masks_and_other_keys_that_hold_nothing(form):
    q, kv, ctx, columns = problem(33, 33)
    ctx.window = 6
    first = ColumnReweight(torch.zeros(1, 1, 1, dtype=torch.int32), torch.full((1, 1, 1), 3.0))
    out, lse = attended(q, kv, ctx)
    got = run(form, out, lse, q, kv, first, ctx)[0]
    same(got, naive.reweight(q, kv, first, ctx)[0], ctx, 1e-5)
    behind = ctx.q_pos >= 6
    assert torch.equal(got[behind], out[behind]), "the first key has left the window"
    ctx.window, ctx.mask = None, torch.rand(2, 1, 33, 33, generator=torch.Generator().manual_seed(2)) < 0.7
    ctx.mask |= torch.eye(33, dtype=torch.bool)
    out, lse = attended(q, kv, ctx)
    mixed = ColumnReweight(columns, torch.full((1, 1, 5), 0.3), "give_back")
    same(reweight.run(out, lse, q, kv, mixed, ctx)[0], naive.reweight(q, kv, mixed, ctx)[0], ctx, 1e-5)
    # all weight on the listed column: nothing can be given back, and nothing is lost
    q, k, v = torch.ones(1, 1, 1, 8), torch.zeros(1, 1, 3, 8), torch.randn(1, 1, 3, 8)
    k[:, :, 1] = 100.0
    q, kv, ctx = as_layer(q, k, v, prefix=0)[0], KV(k, v, torch.arange(3)[None, None].int()), ctx
    ctx.q_pos, ctx.mask = torch.tensor([[2]]), None
    alone = ColumnReweight(torch.ones(1, 1, 1, dtype=torch.int32), torch.full((1, 1, 1), 0.4), "give_back")
    out, lse = attended(q, kv, ctx)
    torch.testing.assert_close(run(form, out, lse, q, kv, alone, ctx)[0], v[:, None, :, 1])
    assert naive.reweight(q, kv, alone, ctx)[1].sum() == 1


def test_worked_examples_and_mass():
    rows = [[1, 0, 0, 0], [0.6, 0.4, 0, 0], [0.5, 0.3, 0.2, 0], [0.4, 0.3, 0.2, 0.1]]
    a = torch.tensor(rows)[None, None]

    def after(columns, factor, rule="renorm", probs=a):
        n = len(columns)
        decision = ColumnReweight(torch.tensor(columns).int()[None, None], torch.full((1, 1, n), factor), rule)
        return naive.reweight(*as_layer(*(torch.zeros(1, 1, 4, 8),) * 3)[:2], decision, CTX, probs)[1][0, 0]

    torch.testing.assert_close(after([0], 2.0)[3], torch.tensor([0.571429, 0.214286, 0.142857, 0.071429]))
    torch.testing.assert_close(after([0], 0.5)[3], torch.tensor([0.25, 0.375, 0.25, 0.125]))
    torch.testing.assert_close(after([0], 3.0), after([0], 2.0, probs=after([0], 1.5)[None, None]))
    torch.testing.assert_close(after([0], 0.25, probs=after([0], 4.0)[None, None]), a[0, 0])
    assert torch.equal(after([0], 8.0)[0], a[0, 0, 0]) and after([0], 1e6)[3, 0] > 0.999
    one = [[1, 0, 0, 0], [0.84, 0.16, 0, 0], [0.628571, 0.12, 0.251429, 0], [0.502857, 0.12, 0.251429, 0.125714]]
    torch.testing.assert_close(after([1], 0.4, "give_back"), torch.tensor(one))
    two = after([1, 2], 0.4, "give_back")
    torch.testing.assert_close(two[2:], torch.tensor([[0.8, 0.12, 0.08, 0], [0.64, 0.12, 0.08, 0.16]]))
    for new in (after([0], 0.3), after([1], 0.0, "give_back"), two):
        torch.testing.assert_close(new.sum(-1), torch.ones(4))
        assert torch.equal(new.triu(1), torch.zeros(4, 4))


CTX = SimpleNamespace(q_pos=torch.arange(4)[None], scaling=1.0, softcap=None, window=None, mask=None)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("n", [1, 2, 33, 1024])
def test_the_four_ways_to_scale_the_first_key_are_one(n, dtype, atol):
    g = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(1, h, n, 16, generator=g).to(dtype) for h in (8, 2, 2))
    gamma = 0.1 + 7.9 * torch.rand(8, generator=g)
    q, kv, ctx = as_layer(q, k, v)
    decision = ColumnReweight(torch.zeros(1, 1, 1, dtype=torch.int32), gamma[None, :, None])
    eager = naive.reweight(q, kv, decision, ctx)[0]
    causal = torch.full((n, n), float("-inf")).triu(1).expand(1, 8, -1, -1).clone()
    causal[..., 0] += gamma.log()[None, :, None]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    masked = sdpa(q, k, v, attn_mask=causal.to(dtype), enable_gqa=True)
    more_q = (gamma.log() / ctx.scaling)[None, :, None, None].expand(1, 8, n, 1).to(dtype)
    more_k = torch.zeros(1, 2, n, 1, dtype=dtype)
    more_k[:, :, 0] = 1
    wide = [torch.cat(pair, -1) for pair in ((q, more_q), (k, more_k), (v, torch.zeros_like(more_k)))]
    augmented = sdpa(*wide, is_causal=True, scale=ctx.scaling, enable_gqa=True)[..., :16]
    out, lse = naive.run(q, kv, Selection(), ctx, True)
    by_lse = reweight.run(out, lse, q, kv, decision, ctx)[0]
    for other in (masked.transpose(1, 2), augmented.transpose(1, 2), by_lse):
        torch.testing.assert_close(other.float(), eager.float(), atol=atol, rtol=atol)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": torch.zeros(1, 1, 2)}, "factors above 0"),
        ({"factor": torch.full((1, 1, 2), 1.5), "rule": "give_back"}, "within 0..1"),
        ({"rule": "add"}, "'add' is not allowed"),
        ({"columns": torch.tensor([[[3, 3]]])}, "twice"),
        ({"columns": torch.zeros(1, 3, 2).int()}, "expected"),
        ({"columns": torch.tensor([[[3]]])}, "give one each"),
        ({"rows": torch.ones(1, 4, 3).bool()}, "rows of shape"),
    ],
)
def test_a_decision_says_what_is_wrong(change, message):
    decision = ColumnReweight(torch.tensor([[[3, -1]]]), torch.ones(1, 1, 2))
    decision.validate(1, 4, 2, 5)
    with pytest.raises(InputError, match=message):
        replace(decision, **change).validate(1, 4, 2, 5)


# ---- the fused form ----


@pytest.mark.parametrize("dim", [24, 64, 128])
@pytest.mark.parametrize("form", FORMS)
def test_head_sizes_and_strides_on_a_clean_aligned_cache(form, dim):
    g = torch.Generator().manual_seed(dim)
    q, k, v = (torch.randn(2, h, 37, dim, generator=g) for h in (6, 2, 2))
    q, kv, ctx = as_layer(q[:, :, 16:], k.transpose(2, 3).contiguous().transpose(2, 3), v, prefix=0)
    ctx.q_pos = torch.arange(16, 37).expand(2, -1)
    kv.aligned = kv.clean = True
    columns = torch.tensor([[[0, 20, -1, 36, 99]]], dtype=torch.int32)  # 99: behind the end
    out, lse = naive.run(q, kv, Selection(), ctx, True)
    for rule, size in (("renorm", 3.0), ("give_back", 0.25)):
        decision = ColumnReweight(columns, torch.full((1, 6, 5), size), rule)
        same(run(form, out, lse, q, kv, decision, ctx)[0], naive.reweight(q, kv, decision, ctx)[0], ctx, 1e-5)


def test_the_choice_and_its_reason(monkeypatch):
    ctx, q = SimpleNamespace(mask=None), torch.zeros(1, 4, 1, 128)
    assert reweight.choose(q, ctx) == ("torch", "not triton: needs CUDA capability >= 8, this is cpu")
    monkeypatch.setattr(reweight, "too_old", lambda device, found, needed: None)
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    assert reweight.choose(q, ctx)[0] == "triton"
    for bad, changed, why in (
        (q.double(), ctx, "float64"),
        (torch.zeros(1, 4, 1, 512), ctx, "above 256"),
        (q, SimpleNamespace(mask=q), "4-D mask"),
        (q.clone().requires_grad_(), ctx, "no backward"),
    ):
        assert why in reweight.choose(bad, changed)[1]
    monkeypatch.setattr(backends, "has_triton", lambda: False)
    assert "not installed" in reweight.choose(q, ctx)[1]


def test_import_is_light():
    code = "import sys, attnpatch.executors.reweight; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@needs_triton
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the fused form runs here itself")
def test_the_fused_form_in_tritons_interpreter():
    run_interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", __file__)
