"""Executors against the naive reference: every CPU backend of `dense`, and `column_sums`."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from varlen import FakeVarlen

from attnpatch.decisions import Selection
from attnpatch.errors import ConfigError, VersionError
from attnpatch.executors import column_sums, dense, naive
from attnpatch.executors.backends import first_fit

DENSE = Selection()

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]
BACKENDS = ["sdpa", "torch"]
SHAPES = [(1, 1), (1, 777), (7, 7), (7, 40), (33, 33), (33, 777)]
SHAPE_IDS = [f"T{t}-S{s}" for t, s in SHAPES]


def problem(rows, slots, *, group=4, kv_heads=2, batch=2, dim=16, dtype=torch.float32, holes="none", gaps=False):
    """q, kv, ctx of a layer. holes: none | row (padding, same for all heads) | head (per head)."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(batch, kv_heads * group, rows, dim, generator=g).to(dtype)
    k, v = (torch.randn(batch, kv_heads, slots, dim, generator=g).to(dtype) for _ in range(2))
    pos = torch.arange(slots, dtype=torch.int32).expand(batch, 1, slots).clone()
    if gaps:  # what an eviction leaves: the first slots are far in the past
        pos[..., slots - rows :] += 5 * slots
        pos[..., : slots - rows] *= 5
    q_pos = pos[:, 0, slots - rows :].clone()
    if holes != "none":
        q_pos[0, : rows // 3] = -1  # padding queries of row 0
        pos[0, :, : slots - rows] -= 1
        pos[0, :, slots - rows : slots - rows + rows // 3] = -1
        if holes == "head":
            pos = pos.repeat(1, kv_heads, 1)
            pos[:, :, : slots - rows] = torch.where(
                torch.rand(batch, kv_heads, slots - rows, generator=g) < 0.3, -1, pos[:, :, : slots - rows]
            )
            if slots > rows:  # slots of the past in any order, as after overwriting in place
                pos[:, :, : slots - rows] = pos[:, :, : slots - rows].flip(-1)
        empty = (pos < 0)[..., None].expand(batch, kv_heads, slots, dim)
        k, v = k.masked_fill(empty, float("nan")), v.masked_fill(empty, float("nan"))
    kv = SimpleNamespace(k=k, v=v, pos=pos, holes=holes != "none")
    return q, kv, SimpleNamespace(scaling=dim**-0.5, softcap=None, window=None, q_pos=q_pos, mask=None)


def check(q, kv, ctx, backend, want_lse=False):
    out, lse = dense.run(q, kv, DENSE, ctx, want_lse=want_lse, _backend=backend)
    expected, expected_lse = naive.run(q, kv, DENSE, ctx, want_lse=True)
    assert out.shape == (q.shape[0], q.shape[2], q.shape[1], q.shape[3]) and out.dtype == q.dtype
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out, expected, atol=TOLERANCE[q.dtype], rtol=TOLERANCE[q.dtype])
    assert (lse is not None) == want_lse
    if want_lse:
        torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)
    return out, lse


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(dense, "SDPA_ROWS", 20)
    monkeypatch.setattr(dense, "TORCH_ROWS", 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("holes", ["none", "row", "head"])
@pytest.mark.parametrize(("rows", "slots"), SHAPES, ids=SHAPE_IDS)
def test_dense_matches_naive(rows, slots, holes, backend, dtype):
    check(*problem(rows, slots, holes=holes, dtype=dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("holes", ["none", "head"])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_grouped_heads_in_many_blocks(group, holes, backend, small_blocks):
    check(*problem(33, 61, group=group, holes=holes), backend)
    check(*problem(1, 61, group=group, holes=holes), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ordered", [False, True], ids=["unordered", "ordered"])
@pytest.mark.parametrize("gaps", [False, True], ids=["plain", "evicted"])
@pytest.mark.parametrize("holes", ["none", "row", "head"])
@pytest.mark.parametrize(("rows", "slots"), [(1, 40), (33, 33), (33, 101)], ids=["T1-S40", "T33-S33", "T33-S101"])
@pytest.mark.parametrize("window", [1, 9])
def test_window_counts_positions(window, rows, slots, holes, gaps, ordered, backend, small_blocks):
    q, kv, ctx = problem(rows, slots, holes=holes, gaps=gaps)
    kv.ordered = ordered
    ctx.window = window
    check(q, kv, ctx, backend)


def test_window_with_unordered_past_slots():
    q, kv, ctx = problem(1, 40)
    kv.pos[:, :, :39] = kv.pos[:, :, :39].flip(-1)
    ctx.window = 5
    for backend in BACKENDS:
        check(q, kv, ctx, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("holes", ["none", "row", "head"])
@pytest.mark.parametrize(("rows", "slots"), SHAPES, ids=SHAPE_IDS)
def test_softcap_and_lse(rows, slots, holes, dtype, small_blocks):
    q, kv, ctx = problem(rows, slots, holes=holes, dtype=dtype)
    check(q, kv, ctx, None, want_lse=True)
    ctx.softcap = 1.5
    check(q, kv, ctx, None)
    ctx.window = 6
    check(q, kv, ctx, None, want_lse=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("holes", ["none", "head"])
@pytest.mark.parametrize(("rows", "slots"), [(1, 40), (33, 33), (33, 101)], ids=["T1-S40", "T33-S33", "T33-S101"])
def test_user_mask_replaces_causality(rows, slots, holes, window, backend, small_blocks):
    q, kv, ctx = problem(rows, slots, holes=holes)
    ctx.mask = torch.rand(2, 1, rows, slots, generator=torch.Generator().manual_seed(1)) < 0.5
    ctx.mask[:, :, rows // 2] = False  # a row without keys
    ctx.window = window
    out, lse = check(q, kv, ctx, backend, want_lse=backend == "torch")
    assert (out[:, rows // 2] == 0).all()
    assert lse is None or (lse[:, :, rows // 2] == float("-inf")).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 9])
def test_rows_without_keys_give_zeros(rows, backend):
    q, kv, ctx = problem(rows, 12, holes="row")
    ctx.q_pos[0] = -1
    q[0] = float("nan")  # whatever a padding query holds stays with it
    out, lse = check(q, kv, ctx, backend, want_lse=backend == "torch")
    assert (out[0] == 0).all() and (out[1] != 0).any()
    assert lse is None or ((lse[0] == float("-inf")).all() and torch.isfinite(lse[1]).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_real_nan_is_not_hidden(backend):
    q, kv, ctx = problem(7, 12, holes="row")
    q[1, 0, 3] = float("nan")
    assert dense.run(q, kv, DENSE, ctx, _backend=backend)[0][1, 3, 0].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp64_and_gradients(backend, small_blocks):
    q, kv, ctx = problem(9, 15, dtype=torch.float64)
    check(q, kv, ctx, backend)
    grads = []
    for run in (lambda *a: dense.run(*a, _backend=backend), naive.run):
        leaf = q.clone().requires_grad_()
        run(leaf, kv, DENSE, ctx)[0].square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "slots"), SHAPES, ids=SHAPE_IDS)
def test_positions_need_not_exist_where_slots_say_it_all(rows, slots, backend):
    q, kv, ctx = problem(rows, slots)
    expected = naive.run(q, kv, DENSE, ctx)[0]
    kv.pos = ctx.q_pos = None
    torch.testing.assert_close(dense.run(q, kv, DENSE, ctx, _backend=backend)[0], expected, atol=1e-5, rtol=1e-5)


def test_strided_inputs():
    q, kv, ctx = problem(33, 64)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    kv.k = torch.cat([kv.k, kv.k], dim=2)[:, :, :64]
    for backend in BACKENDS:
        check(q, kv, ctx, backend)


# ---- the choice ----


@pytest.mark.parametrize(
    ("change", "want_lse", "name"),
    [({}, False, "sdpa"), ({"softcap": 30.0}, False, "torch"), ({"window": 4}, False, "sdpa"), ({}, True, "torch")],
    ids=["plain", "softcap", "window", "lse"],
)
def test_choice_on_cpu_and_its_reason(change, want_lse, name):
    q, kv, ctx = problem(7, 12)
    vars(ctx).update(change)
    chosen, reason = dense.choose(q, kv, ctx, want_lse)
    assert chosen == name
    assert "not fa4: needs CUDA capability >= 9, this is cpu" in reason and "not flash" in reason
    assert ("not sdpa" in reason) == (name == "torch")


def cuda_call(**change):
    plain = dict.fromkeys(["single", "square", "holes", "softcap", "window", "part", "mask", "want_lse"], False)
    return dense._Call(**{**plain, "device": "cuda", "capability": 9, "dtype": torch.bfloat16, "dim": 128, **change})


@pytest.mark.parametrize(
    ("change", "fa4", "name"),
    [
        ({"square": True}, True, "fa4"),
        ({"square": True}, False, "cudnn"),
        ({"square": True, "long": False}, False, "flash"),
        ({"square": True, "want_lse": True}, False, "flash"),
        ({"square": True, "window": True}, True, "fa4"),
        ({"square": True, "window": True}, False, "sdpa"),
        ({"window": True}, True, "sdpa"),
        ({"softcap": True}, True, "fa4"),
        ({"softcap": True}, False, "torch"),
        ({"single": True}, True, "flash"),
        ({"single": True, "square": True}, True, "flash"),
        ({"dim": 256, "square": True}, True, "flash"),
        ({"capability": 8, "square": True}, True, "flash"),
        ({"capability": 7}, True, "sdpa"),
        ({"holes": True}, True, "sdpa"),
        ({"holes": True, "packed": True}, True, "fa4"),
        ({"holes": True, "packed": True}, False, "sdpa"),
        ({"mask": True, "want_lse": True}, True, "torch"),
        ({"dtype": torch.float32}, True, "sdpa"),
    ],
    ids=lambda x: "+".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else str(x),
)
def test_choice_on_cuda(change, fa4, name, monkeypatch):
    monkeypatch.setattr(dense, "_fa4", lambda varlen=False: object() if fa4 else None)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    assert first_fit(dense._WHY_NOT, cuda_call(**change), None)[0] == name


def test_forced_backend(monkeypatch):
    q, kv, ctx = problem(7, 12)
    monkeypatch.setenv("ATTNPATCH_BACKEND", "torch")
    assert dense.choose(q, kv, ctx) == ("torch", "forced by ATTNPATCH_BACKEND")
    check(q, kv, ctx, None)
    monkeypatch.setenv("ATTNPATCH_BACKEND", "flash")
    with pytest.raises(ConfigError, match="needs CUDA capability >= 8, this is cpu"):
        dense.run(q, kv, DENSE, ctx)
    monkeypatch.setenv("ATTNPATCH_BACKEND", "nonsense")
    with pytest.raises(ConfigError, match="allowed: fa4, fa3, cudnn, flash, sdpa, torch"):
        dense.run(q, kv, DENSE, ctx)


def test_forcing_a_missing_package_is_a_version_error(monkeypatch):
    monkeypatch.setattr(dense, "_fa4", lambda varlen=False: None)
    with pytest.raises(VersionError, match="pip install"):
        first_fit(dense._WHY_NOT, cuda_call(), "fa4")


def test_backends_lists_all_with_reasons():
    listed = dense.backends()
    assert [name for name, _, _ in listed] == ["fa4", "fa3", "cudnn", "flash", "fa2", "sdpa", "torch"]
    assert all(reason for _, _, reason in listed) and listed[-1][1]


def test_import_is_light():
    code = "import sys, attnpatch.executors.dense; sys.exit(bool({'flash_attn', 'triton'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("change", "versions", "name"),
    [
        ({"square": True}, (2, 3), "fa3"),
        ({"square": True, "capability": 10}, (2, 3), "cudnn"),
        ({"square": True, "capability": 8}, (2, 3), "flash"),
        ({"softcap": True}, (2, 3), "fa3"),
        ({"softcap": True, "capability": 8}, (2,), "fa2"),
        ({"square": True, "window": True, "dim": 256}, (2,), "fa2"),
        ({"window": True}, (2, 3), "sdpa"),
        ({"single": True}, (2, 3), "flash"),
        ({"holes": True}, (2, 3), "sdpa"),
    ],
    ids=lambda x: "+".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else str(x),
)
def test_choice_with_an_older_flash_attention(change, versions, name, monkeypatch):
    monkeypatch.setattr(dense, "_fa4", lambda varlen=False: None)
    monkeypatch.setattr(dense, "_older_flash", lambda version: object() if version in versions else None)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    assert first_fit(dense._WHY_NOT, cuda_call(**change), None)[0] == name


@pytest.mark.parametrize("version", [2, 3])
def test_the_call_of_an_older_flash_attention(version, monkeypatch):
    q, kv, ctx = problem(9, 15)
    ctx.window, ctx.softcap = 4, 2.0
    given = {}

    def published(
        q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, return_attn_probs=False
    ):
        given.update(scale=softmax_scale, causal=causal, window=window_size, softcap=softcap)
        held = SimpleNamespace(k=k.transpose(1, 2), v=v.transpose(1, 2), pos=kv.pos, holes=False)
        out, lse = naive.run(q.transpose(1, 2), held, DENSE, ctx, want_lse=True)
        return (out, lse, None) if return_attn_probs else out

    monkeypatch.setattr(dense, "_older_flash", lambda asked: published if asked == version else None)
    expected = naive.run(q, kv, DENSE, ctx, want_lse=True)
    torch.testing.assert_close(dense._RUN[f"fa{version}"](q, kv, ctx, True), expected)
    assert dense._RUN[f"fa{version}"](q, kv, ctx, False)[1] is None
    assert given == {"scale": ctx.scaling, "causal": True, "window": (3, 0), "softcap": 2.0}
    with pytest.raises(VersionError, match=f"FlashAttention {5 - version} is not installed"):
        dense._RUN[f"fa{5 - version}"](q, kv, ctx, False)


class FakeFA4:
    """Stands in for flash_attn_func: checks the layout and answers with the reference."""

    def __init__(self, ctx, kv):
        self.ctx, self.kv, self.kwargs = ctx, kv, None

    def __call__(self, q, k, v, **kwargs):
        self.kwargs = kwargs
        kv = SimpleNamespace(k=k.transpose(1, 2), v=v.transpose(1, 2), pos=self.kv.pos, holes=False)
        return naive.run(q.transpose(1, 2), kv, DENSE, self.ctx, want_lse=kwargs.get("return_lse", False))


def test_fa4_call(monkeypatch):
    q, kv, ctx = problem(9, 15)
    ctx.window, ctx.softcap = 4, 2.0
    fake = FakeFA4(ctx, kv)
    monkeypatch.setattr(dense, "_fa4", lambda varlen=False: fake)
    out, lse = dense._run_fa4(q, kv, ctx, True)
    expected = naive.run(q, kv, DENSE, ctx, want_lse=True)
    torch.testing.assert_close((out, lse), expected)
    assert fake.kwargs["window_size"] == (3, 0) and fake.kwargs["softcap"] == 2.0 and fake.kwargs["causal"]
    assert dense._run_fa4(q, kv, ctx, False)[1] is None and "return_lse" not in fake.kwargs


def test_fa4_call_of_packed_rows(monkeypatch):
    q, kv, ctx = problem(9, 15, batch=3)
    fresh, count = torch.tensor([9, 4, 0], dtype=torch.int32), torch.tensor([15, 7, 5], dtype=torch.int32)
    slot, row = torch.arange(15), torch.arange(9)
    kv.pos = torch.where(slot < count[:, None], slot, -1)[:, None]
    ctx.q_pos = torch.where(row < fresh[:, None], (count - fresh)[:, None] + row, -1)
    kv.real, kv.holes = (fresh, count), True
    monkeypatch.setattr(dense, "_fa4", lambda varlen=False: FakeVarlen() if varlen else None)
    torch.testing.assert_close(dense._run_fa4(q, kv, ctx, True), naive.run(q, kv, DENSE, ctx, want_lse=True))
    kv = dense._rows(q, kv, slice(2, 5), ctx)[1]
    assert kv.real is None  # its lengths speak of all rows


# ---- column sums ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 1.5], ids=["plain", "softcap"])
@pytest.mark.parametrize("holes", ["none", "row", "head"])
@pytest.mark.parametrize(("rows", "slots"), SHAPES, ids=SHAPE_IDS)
def test_column_sums_match_naive(rows, slots, holes, softcap, dtype, monkeypatch):
    q, kv, ctx = problem(rows, slots, holes=holes, dtype=dtype)
    given = {"q_pos": ctx.q_pos, "scaling": ctx.scaling, "softcap": softcap}
    expected = naive.column_sums(q, kv, **given)
    ctx.softcap = softcap
    lse = naive.run(q, kv, DENSE, ctx, want_lse=True)[1]
    lse = lse.masked_fill((ctx.q_pos < 0)[:, None], float("nan"))  # whatever it says of padding rows
    for _ in range(2):
        for known in (None, lse):
            sums = column_sums.run(q, kv, **given, lse=known)
            assert sums.shape == (2, 8, slots) and sums.dtype == torch.float32
            torch.testing.assert_close(sums, expected, atol=1e-5, rtol=1e-5)
        assert (sums.unflatten(1, (2, 4)).masked_select((kv.pos < 0)[:, :, None].expand(2, 2, 4, slots)) == 0).all()
        monkeypatch.setattr(column_sums, "MAX_BLOCK", 2 * 8 * slots * 5)  # 5 rows at a time


@pytest.mark.parametrize("group", [1, 4, 8])
def test_column_sums_add_up_to_the_rows(group):
    q, kv, ctx = problem(33, 33, group=group)
    sums = column_sums.run(q, kv, q_pos=ctx.q_pos, scaling=ctx.scaling)
    torch.testing.assert_close(sums.sum(-1), torch.full((2, 2 * group), 33.0))


def test_column_sums_of_rows_that_are_not_the_last():
    q, kv, ctx = problem(9, 40)
    q_pos = ctx.q_pos - 20
    sums = column_sums.run(q, kv, q_pos=q_pos, scaling=ctx.scaling)
    torch.testing.assert_close(sums, naive.column_sums(q, kv, q_pos=q_pos, scaling=ctx.scaling))
    assert (sums[..., 20:] == 0).all()


def test_column_sums_never_hold_all_pairs(monkeypatch):
    biggest, matmul = [], column_sums.matmul

    def watched(a, b):
        out = matmul(a, b)
        biggest.append(out.numel())
        return out

    monkeypatch.setattr(column_sums, "matmul", watched)
    monkeypatch.setattr(column_sums, "MAX_BLOCK", 100_000)
    q, kv, ctx = problem(500, 500, kv_heads=1, group=2, batch=1)
    column_sums.run(q, kv, q_pos=ctx.q_pos, scaling=ctx.scaling)
    assert max(biggest) <= 100_000 < 500 * 500 * 2 and len(biggest) == 5


def test_group_reductions():
    x = torch.arange(24.0).view(1, 4, 6)
    assert torch.equal(column_sums.group_mean(x, 2)[0, 1], (x[0, 2] + x[0, 3]) / 2)
    assert torch.equal(column_sums.group_max(x, 2)[0, 0], x[0, 1])
