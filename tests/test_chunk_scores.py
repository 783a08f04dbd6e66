"""Scores of chunks: the Triton form, the torch form and plain Python loops from InfiniteHiP's specification."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from interpreter import DEVICE, FORMS, HALF, INTERPRETED, mend_interpreter, needs_triton, run_interpreted
from test_decode_select import turned

from attnpatch.errors import ConfigError
from attnpatch.executors import backends, chunk_scores, column_sums

if INTERPRETED:
    mend_interpreter()
LOWEST = torch.finfo(torch.float32).min


# ---- from the specification: plain loops ----


def naive_product(queries, limits, key, slot):
    """The key's highest product with a query that may score it."""
    return max([LOWEST, *(float(x @ key) for x, limit in zip(queries, limits, strict=True) if slot <= limit)])


def naive_chunk(queries, limits, k, start, chunk, end, middle, further):
    """C2 for one query head: queries [n, D], k [S, D]."""
    at, size, visited = start, chunk, []
    if chunk == 1:
        return naive_product(queries, limits, k[at], at)
    while size > 1:
        size //= 2
        probe = size // 2 if middle else 0
        one, two = min(at + probe, end - 1), min(at + size + probe, end - 1)
        left = rival = naive_product(queries, limits, k[one], one)
        if further is not None:
            rival = naive_product(further, limits, k[one], one)
        right = naive_product(queries, limits, k[two], two) if at + size < end else float("-inf")
        visited.append(max(left, right) if middle else left if rival > right else right)
        at += 0 if rival > right else size
    return max(visited) if middle else visited[-1]


def naive(q, limit, k, start, end, *, chunk, middle=True, further=None):
    out, (batch, heads, lists), kv_heads = torch.full(start.shape, float("-inf")), q.shape[:3], k.shape[1]
    q, k, limit, start, end = q.double(), k.double(), limit.tolist(), start.tolist(), end.tolist()
    for b in range(batch):
        for r in range(lists):
            for m, first in enumerate(start[b][r]):
                if first < end[b][r]:
                    out[b, r, m] = max(
                        naive_chunk(
                            q[b, h, r], limit[b][r], k[b, h * kv_heads // heads], first, chunk, end[b][r], middle,
                            None if further is None else further[b, h, r].double(),
                        )
                        for h in range(heads)
                    )  # fmt: skip
    return out


# ---- problems ----


def problem(
    *, chunk=8, samples=4, lists=3, chunks=11, heads=4, kv_heads=2, dim=16, lengths=(90, 61), dtype=torch.float32,
    q_dtype=None, device="cpu", seed=0, far=False, wholly=True,
):  # fmt: skip
    """Arguments of `run`. wholly: few whole numbers (means: quarters), so that sums are exact and ties frequent.

    Keys from a row's length on are NaN, and so are queries that score nothing.
    """
    g, batch, slots = torch.Generator().manual_seed(seed), len(lengths), max(lengths)

    def draw(*shape):
        return torch.randint(-3, 4, shape, generator=g).float() if wholly else torch.randn(*shape, generator=g)

    k = draw(batch, kv_heads, slots, dim)
    q = draw(batch, heads, lists, samples, dim)
    q_dtype = q_dtype or dtype
    if q_dtype != dtype:  # means
        q = q + draw(*q.shape) / 4
    length = torch.tensor(lengths)[:, None]
    end = (length - torch.arange(lists).flip(0) * 7).clamp(min=-3)  # [B, R]
    limit = end[..., None] - 1 - torch.arange(samples).flip(0)
    if samples > 2:
        limit[:, :, 1] = -5
    first = torch.randperm(max(chunks, -(-slots // chunk)), generator=g)[:chunks].sort().values * chunk
    start = first.to(torch.int32).expand(batch, lists, -1).contiguous()
    start[-1, 0, -2:] = 2**30  # behind everything
    q = q.masked_fill((limit < 0)[:, None, ..., None], float("nan"))
    k = k.masked_fill((torch.arange(slots) >= length)[:, None, :, None], float("nan"))
    args = [x.to(device) for x in (q.to(q_dtype), limit, k.to(dtype), start, end.to(torch.int32))]
    more = {"further": draw(*q.shape).to(q_dtype).to(device)} if far else {}
    return args, {"chunk": chunk, **more}


def compare(form, middle=True, **shape):
    name, device = form
    args, more = problem(device=device, **shape)
    found = chunk_scores.run(*args, middle=middle, **more, _backend=name).cpu()
    cpu = [x.cpu() for x in args], {n: x.cpu() if isinstance(x, torch.Tensor) else x for n, x in more.items()}
    expected = naive(*cpu[0], middle=middle, **cpu[1])
    assert torch.equal(found.isinf(), expected.isinf()) and not found.isnan().any()
    assert torch.equal(found.float(), expected.float())
    return expected


# ---- against the specification ----


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("middle", [True, False], ids=["middle", "first"])
@pytest.mark.parametrize("chunk", [1, 2, 8, 32, 256])
def test_equals_the_specification(form, middle, chunk):
    lengths = (90, 61) if chunk < 256 else (600, 300)
    scores = compare(form, middle, chunk=chunk, lengths=lengths, chunks=min(11, -(-max(lengths) // chunk)))
    assert scores.isinf().any() and not scores.isinf().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("middle", [True, False], ids=["middle", "first"])
def test_left_halves_compared_by_other_queries(form, middle):
    compare(form, middle, far=True)
    compare(form, middle, far=True, q_dtype=torch.float32, dtype=torch.float16)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 2), (4, 1), (8, 1), (6, 2)])
def test_heads(form, heads, kv_heads):
    compare(form, heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("samples", [1, 3, 16, 64, 100])
def test_queries_of_a_block(form, samples):
    compare(form, samples=samples, lists=1 if samples == 1 else 2, lengths=(190,), heads=2, kv_heads=1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dim", [8, 64, 80, 128, 256])
def test_head_dimensions(form, dim):
    compare(form, dim=dim, heads=2, kv_heads=1, chunks=5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("q_dtype", [HALF, torch.float32], ids=["as-keys", "means"])
@pytest.mark.parametrize("middle", [True, False], ids=["middle", "first"])
def test_half_precision(form, q_dtype, middle):
    compare(form, middle, dtype=HALF, q_dtype=q_dtype)
    compare(form, middle, dtype=HALF, q_dtype=q_dtype, dim=64, samples=20, chunk=32, chunks=3)


@pytest.mark.parametrize("form", FORMS)
def test_many_tiles_and_heads_together(form):
    """More programs than the device holds at once: one takes all query heads of a KV head, in larger tiles."""
    compare(form, lists=9, chunks=140, chunk=2, lengths=(290,), samples=2, heads=4, kv_heads=2)
    compare(form, False, lists=9, chunks=9, heads=6, kv_heads=2, far=True, dtype=HALF)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_to_score(form):
    scores = compare(form, lengths=(3, 0))
    assert scores.isinf()[1].all()
    args, more = problem(device=form[1])
    args[3] = args[3][:, :, :0]
    assert chunk_scores.run(*args, **more, _backend=form[0]).shape == (2, 3, 0)


@pytest.mark.parametrize("form", FORMS)
def test_means_keep_more_than_half_precision(form):
    """Of few halves: as near to fp32 products as two parts of the mean hold."""
    name, device = form
    args, more = problem(device=device, dtype=HALF, q_dtype=torch.float32, chunk=1, dim=64, wholly=False)
    found = chunk_scores.run(*args, **more, _backend=name)
    exact = chunk_scores.run(*[x.double() if x.is_floating_point() else x for x in args], **more)
    real = exact > float("-inf")
    torch.testing.assert_close(found[real], exact[real].float(), atol=2e-4, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_any_strides(form):
    name, device = form
    args, more = problem(device=device, wholly=True)
    expected = chunk_scores.run(*args, **more, _backend=name)
    q, limit, k, start, end = args
    wide = torch.full((*k.shape[:2], 200, 2 * k.shape[3]), float("nan"), device=device)
    wide[:, :, : k.shape[2], : k.shape[3]] = k
    k = wide[:, :, : k.shape[2], : k.shape[3]]
    q = q.permute(3, 2, 1, 0, 4).contiguous().permute(3, 2, 1, 0, 4)
    start = start.transpose(1, 2).contiguous().transpose(1, 2)
    limit = limit.to(torch.int32).transpose(1, 2).contiguous().transpose(1, 2)
    end = end.t().contiguous().t()
    assert torch.equal(chunk_scores.run(q, limit, k, start, end, **more, _backend=name), expected)
    one = start[:1, :1].expand_as(start)  # as the first stage gives them
    assert torch.equal(
        chunk_scores.run(q, limit, k, one, end, **more, _backend=name),
        chunk_scores.run(q, limit, k, one.contiguous(), end, **more, _backend=name),
    )


def test_cut_by_memory(monkeypatch):
    args, more = problem()
    expected = chunk_scores.run(*args, **more)
    monkeypatch.setattr(column_sums, "MAX_BLOCK", 1)
    assert torch.equal(chunk_scores.run(*args, **more), expected)


def test_keys_turned_to_places():
    """Equals keys that were turned before, where all blocks turn them alike."""
    args, more = problem(lengths=(88,), chunks=11, wholly=False)
    place = torch.arange(11).expand(1, 3, -1) - 10
    q, limit, k, start, end = args
    start = (torch.arange(11, dtype=torch.int32) * 8).expand(1, 3, -1)
    found = chunk_scores.run(q, limit, k, start, end, **more, turn=turned, place=place)
    before = turned(k, (torch.arange(88) // 8 - 10)[None])
    expected = chunk_scores.run(q, limit, before, start, end, **more)
    real = expected > float("-inf")
    assert torch.equal(real, found > float("-inf"))
    torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=0)


# ---- the choice ----


@pytest.mark.parametrize(
    ("dtype", "dim", "samples", "more", "why"),
    [
        (torch.bfloat16, 128, 64, {}, None),
        (torch.bfloat16, 128, 64, {"further": True}, None),
        (torch.float16, 80, 1, {}, None),
        (torch.float32, 64, 16, {}, None),
        (torch.bfloat16, 128, 64, {"placed": True}, "turns no keys"),
        (torch.float64, 128, 64, {}, "needs keys of float16, bfloat16 or float32"),
        (torch.bfloat16, 320, 64, {}, "head dimension up to 256"),
        (torch.bfloat16, 256, 128, {"further": True}, "at most 128 KB of a block's queries at once here, not 256"),
    ],
)
def test_the_choice_on_cuda(dtype, dim, samples, more, why, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    monkeypatch.setattr(backends, "_found", {})
    k = SimpleNamespace(
        shape=(1, 2, 64, dim), dtype=dtype, device=torch.device("cuda", 0), element_size=lambda: dtype.itemsize
    )
    q = SimpleNamespace(shape=(1, 4, 3, samples, dim), dtype=torch.float32 if dtype != torch.float64 else dtype)
    name, reason = chunk_scores.choose(q, k, **more)
    assert (name == "triton" and why is None) or (name == "torch" and why in reason)
    monkeypatch.setattr(backends, "has_triton", lambda: False)
    assert chunk_scores.choose(q, k, **more)[0] == "torch"


def test_refusals():
    args, more = problem()
    assert chunk_scores.choose(args[0], args[2]) == ("torch", "not triton: needs CUDA capability >= 8, this is cpu")
    with pytest.raises(ConfigError, match="'cuda' is not a backend of chunk_scores; allowed: triton, torch"):
        chunk_scores.run(*args, **more, _backend="cuda")
    with pytest.raises(ConfigError, match="chunk=12 does not halve down to one key; give a power of two"):
        chunk_scores.run(*args, chunk=12)
    place = torch.zeros(2, 3, 11)
    with pytest.raises(ConfigError, match="give both turn and place, or none"):
        chunk_scores.run(*args, **more, place=place)
    with pytest.raises(ConfigError, match="'triton' turns no keys to other positions; use 'torch'"):
        chunk_scores.run(*args, **more, place=place, turn=turned, _backend="triton")


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("middle", [True, False], ids=["middle", "first"])
@pytest.mark.parametrize(
    ("chunk", "samples", "means"), [(256, 16, True), (32, 16, True), (8, 64, False), (8, 1, False)]
)
def test_triton_equals_torch_on_a_gpu(chunk, samples, means, middle):
    args, more = problem(
        chunk=chunk, samples=samples, lists=40, chunks=min(500, 16000 // chunk), heads=8, kv_heads=2, dim=128,
        lengths=(16000, 9111), dtype=HALF, q_dtype=torch.float32 if means else HALF, device="cuda",
    )  # fmt: skip
    assert chunk_scores.choose(args[0], args[2])[0] == "triton"
    fast, slow = (chunk_scores.run(*args, middle=middle, **more, _backend=name) for name in ("triton", "torch"))
    assert torch.equal(fast, slow) and (fast > LOWEST).any()


@needs_triton
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernel runs here itself")
def test_the_fused_form_in_tritons_interpreter():
    run_interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", __file__)
