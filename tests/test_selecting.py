"""The scoring and choosing operations beneath the methods that select, against naive forms and plain loops."""

from __future__ import annotations

import pytest
import torch
from attnpatch.patches.flexprefill import FlexPrefill
from attnpatch.patches.minference import MInference
from attnpatch.patches.xattention import XAttention
from selections import largest, layer, noise
from torch.utils._python_dispatch import TorchDispatchMode

from attnpatch.engine.call import KV, Ctx
from attnpatch.executors import column_sums, line_sums, lists, naive, selecting

# ---- line sums -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("block", [64 * 2**20, 2 * 8 * 9 * 10, 1])
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("ragged", [False, True])
def test_line_sums_match_naive(ragged, group, block, dtype, monkeypatch):
    monkeypatch.setattr(column_sums, "MAX_BLOCK", block)
    q, k, v = (x.to(dtype) for x in noise(41, group, 1, 16, batch=3))
    q, kv, ctx = layer(q, k, v, [41, 27, 4] if ragged else None)
    rows, q_pos = selecting.probe_rows(q, ctx, 9, 0)
    assert q_pos[0].tolist() == list(range(32, 41)) and (q_pos[2, :5] == -1).all() == ragged
    expected = naive.line_sums(rows, kv, q_pos=q_pos, scaling=0.3)
    got = line_sums.run(rows, kv, q_pos=q_pos, scaling=0.3, newest=not ragged)
    for a, e in zip(got, expected, strict=True):
        assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a.sum(-1), (q_pos >= 0).sum(-1)[:, None].expand(-1, group).to(a), atol=1e-5, rtol=0)


def test_line_sums_hold_a_bounded_block(monkeypatch):
    seen, matmul = [], line_sums.matmul
    monkeypatch.setattr(line_sums, "matmul", lambda a, b: seen.append(matmul(a, b)) or seen[-1])
    monkeypatch.setattr(column_sums, "MAX_BLOCK", 20_000)
    q, kv, ctx = layer(*noise(1000, 4, 2))
    line_sums.run(q[:, :, -32:], kv, q_pos=ctx.q_pos[:, -32:], scaling=1.0, newest=True)
    assert max(x.numel() for x in seen) <= 20_000 < 4 * 32 * 1000


# ---- selecting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 5, 8, 13])
@pytest.mark.parametrize("tokens", [1, 3, 8, 29])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_12_block_means_are_over_real_tokens(start, tokens, dtype):
    x = torch.randn(3, 2, tokens, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.testing.assert_close(selecting.pooled(x, 8, start=start), naive.pooled(x, 8, start=start))
    end = torch.tensor([start + tokens, start + tokens // 2, 0])
    x[torch.arange(tokens).expand(3, 2, -1) + start >= end[:, None, None]] = float("nan")
    got = selecting.pooled(x, 8, start=start, end=end)
    torch.testing.assert_close(got, naive.pooled(x, 8, start=start, end=end))


def test_top_k_top_mass_and_counts_equal_loops():
    g = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 5, (3, 4, 17), generator=g).double()  # many ties
    k = torch.randint(0, 19, (3, 4), generator=g)
    mass = scores.sum(-1) * torch.rand(3, 4, generator=g, dtype=torch.float64)
    for b in range(3):
        for h in range(4):
            own, limit = scores[b, h].tolist(), mass[b, h].item()
            for later in (True, False):
                got = lists.top_k(scores, k, later)[b, h].nonzero().flatten().tolist()
                assert got == sorted(largest(own, int(k[b, h]), later))
            order = largest(own, 17)
            for lag in (0, 1, 2):
                taken, total = [], [0.0]
                for r, i in enumerate(order):
                    total.append(total[-1] + own[i])
                    fits = total[-1] <= limit if lag == 0 else r < lag - 1 or total[r + 1 - lag] < limit
                    taken += [i] if fits else []
                got = lists.top_mass(scores, mass, lag=lag)[b, h].nonzero().flatten().tolist()
                assert got == sorted(taken)
    n = torch.full((3, 1), 17)
    assert lists.mass_count(torch.ones(3, 4, 17), 5.5, n).eq(6).all()
    assert lists.mass_count(torch.ones(3, 4, 17), 17.5, n).eq(18).all()


class Largest(TorchDispatchMode):
    """Remembers the largest tensor (elements) that an operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not any(r.alias_info for r in func._schema.returns):  # else a view
            made = out if isinstance(out, (tuple, list)) else [out]
            self.elements = max([self.elements, *(x.numel() for x in made if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize(
    "patch",
    [
        FlexPrefill(),
        FlexPrefill(strict=True),
        XAttention(),
        XAttention(first_chunk_quirk=True, threshold=[[0.9] * 32]),
        MInference(),
        MInference(heads=[[[1000, 6096], [3500, 100]] * 16]),
        MInference("tri_shape"),
        MInference("block_sparse"),
    ],
    ids=lambda patch: f"{patch.name}-{getattr(patch, 'pattern', '')}",
)
@pytest.mark.parametrize("ragged", [False, True])
def test_long_prompts_in_bounded_memory_without_waiting(patch, ragged):
    # a meta tensor has no values: reading one on the host raises, and so does a shape that depends on one
    n, device = 131072, torch.device("meta")
    q = torch.empty(1, 32, n, 128, dtype=torch.bfloat16, device=device)
    k = torch.empty(1, 8, n, 128, dtype=torch.bfloat16, device=device)
    pos = torch.empty(1, n, dtype=torch.long, device=device)
    ctx = Ctx(0, 1, "prefill", "prompt", pos, (n - 100,), 0.1)
    ctx.ragged = ragged
    with Largest() as seen:
        found = list(patch.select(q, KV(k, k, pos[:, None].int(), holes=ragged), ctx))
    assert all(s.index is None or s.index.device == device for s in found)
    assert seen.elements <= (q.numel() if ragged else k.numel())  # a copy with pads cleared; elsewhere k in fp32
