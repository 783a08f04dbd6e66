"""top_slots against a plain sort; the Triton form on CUDA, else in the interpreter's own process."""

from __future__ import annotations

import pytest
import torch
from interpreter import DEVICE, FORMS, INTERPRETED, mend_interpreter, needs_triton, run_interpreted

from attnpatch.errors import ConfigError, InputError
from attnpatch.executors import launching, pooled, top_slots, votes

if INTERPRETED:
    mend_interpreter()


def expected(row, k):
    """Slots of the k best, ascending; ties to the later, -inf never."""
    order = sorted((i for i in range(len(row)) if row[i] > float("-inf")), key=lambda i: (row[i], i), reverse=True)
    return sorted(order[:k])


def check(backend, scores, k, most=None):
    index, count = top_slots.run(scores, k, most, _backend=backend)
    assert index.shape == (*scores.shape[:-1], k) and index.dtype == count.dtype == torch.int32
    n = scores.shape[-1]
    most = torch.full(count.shape, k) if most is None else most.expand(count.shape)
    given = scores.reshape(-1, n), index.reshape(-1, k), count.flatten(), most.flatten()
    for row, found, width, limit in zip(*(x.tolist() for x in given), strict=True):
        wanted = expected(row, max(0, min(k, limit)))
        assert found == wanted + [n] * (k - len(wanted)) and width == len(wanted)


def drawn(kind, *shape, device="cpu"):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=g)
    if kind == "ties":
        x = (x * 2).round()
    elif kind == "peaked":  # as an unscaled softmax: most are zero
        x = torch.softmax(x * 60, -1)
    elif kind == "holes":
        x = torch.where(torch.rand(shape, generator=g) < 0.7, float("-inf"), x)
    elif kind == "extremes":
        x = torch.where(x > 1, float("inf"), torch.where(x < -1, -3.0e38, torch.where(x > 0.5, -0.0, x * 1e-40)))
    return x.to(device)


KINDS = ["noise", "ties", "peaked", "holes", "extremes"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 7, 60, 77, 90])
def test_short_rows(form, kind, k):
    check(form[0], drawn(kind, 2, 3, 77, device=form[1]), k)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(2048, 128), (1100, 3), (5001, 100), (8192, 256), (4097, 300)])
def test_few_of_many(form, kind, n, k):
    """Where what may be chosen is brought together first, if it is little enough and no ties are told apart."""
    scores = drawn(kind, 2, n, device=form[1])
    check(form[0], scores, k)
    scores = scores.sort(-1).values  # all of the best in a row
    check(form[0], scores, k, torch.tensor([k // 2, 0], device=form[1]))
    scores[0, k // 2 :] = float("-inf")
    check(form[0], scores, k)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(9001, 500), (8193, 8193), (12000, 3)])
def test_long_rows(form, kind, n, k):
    check(form[0], drawn(kind, 2, n, device=form[1]), k)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [50, 9000])
def test_rows_with_few_or_no_scores_and_limits(form, n):
    scores = drawn("holes", 2, 3, n, device=form[1])
    scores[0, 0], scores[0, 1, 5:] = float("-inf"), float("-inf")
    scores[0, 1, :5] = 1.0
    check(form[0], scores, 20)
    check(form[0], scores, 20, torch.tensor([[3], [0]], device=form[1]))
    limits = torch.tensor([[-1, 4, 30], [8, 9, 10]], device=form[1])
    check(form[0], scores, 20, limits)
    check(form[0], scores[1:], 20, limits[1:])
    check(form[0], scores, 20, limits[0])
    check(form[0], scores, 20, limits[0, 1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [50, 9000])
def test_rows_that_skip_keep_what_they_had(form, n):
    first, second = (drawn(kind, 2, 3, n, device=form[1]) for kind in ("noise", "ties"))
    skip = torch.tensor([[True], [False]], device=form[1])
    old = top_slots.run(first, 9, _backend=form[0])
    before, new = tuple(x.clone() for x in old), top_slots.run(second, 9, _backend=form[0])
    second[0] = float("nan")  # not read
    found = top_slots.run(second, 9, old=old, skip=skip, _backend=form[0])
    for a, b, c, d in zip(found, old, before, new, strict=True):
        assert a is b and torch.equal(a[0], c[0]) and torch.equal(a[1], d[1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("alike", ["rows", "heads", "all", "none"])
def test_whom_a_mark_is_for(form, alike):
    first, second = (drawn(kind, 2, 3, 8500, device=form[1]) for kind in ("noise", "ties"))
    skip = {"rows": [[True], [False]], "heads": [[True, False, True]], "all": True,
            "none": [[False, True, True], [True, True, False]]}[alike]  # fmt: skip
    skip = torch.tensor(skip, device=form[1])
    old = top_slots.run(first, 9, _backend=form[0])
    before, new = old[0].clone(), top_slots.run(second, 9, _backend=form[0])[0]
    found = top_slots.run(second, 9, old=old, skip=skip, _backend=form[0])[0]
    assert torch.equal(found, torch.where(skip.expand(2, 3)[..., None], before, new))


@pytest.mark.parametrize("form", FORMS)
def test_what_counts_may_be_zeroed_by_what_made_the_scores(form, monkeypatch):
    """By the kernels of votes, and counted by that of pooled, for rows that do not skip."""
    monkeypatch.setattr(top_slots, "choose", lambda scores: (form[0], ""))
    g, n = torch.Generator().manual_seed(0), 8300
    q, k = torch.randn(2, 4, 1, 16, generator=g).to(form[1]), torch.randn(2, 2, n, 16, generator=g).to(form[1])
    bins = top_slots.bins((2, 2), n, q.device)
    assert (bins is None) == (form[0] == "torch") and top_slots.bins((2, 2), 8000, q.device) is None
    zero = torch.empty(2, 2, 4, 256, dtype=torch.int32, device=form[1]) if bins is None else bins
    end, skip = torch.tensor([n, 5000], device=form[1]), torch.tensor([False, True], device=form[1])
    zero.fill_(1)
    scores = votes.run(q, k, end=end, reduce="max", heads=2, zero=zero, _backend=form[0])
    assert (zero == 0).all()
    wanted = top_slots.run(scores, 100, _backend=form[0])
    found = top_slots.run(scores, 100, bins=bins, _backend=form[0])
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    votes.run(q, k, end=end, reduce="max", heads=2, zero=zero, count=True, _backend=form[0])
    counts = torch.zeros_like(zero)
    top_slots.count_first(scores, counts)
    assert torch.equal(zero, counts)
    found = top_slots.run(scores, 100, bins=bins, counted=bins is not None, _backend=form[0])
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    if bins is None:
        bins = torch.zeros(2, 2, 4, 256, dtype=torch.int32)
    bins.zero_()
    scores = pooled.run(scores, 7, end - 1, skip=skip, bins=bins, _backend=form[0])
    by_hand = torch.zeros_like(bins[:1])
    top_slots.count_first(scores[:1], by_hand)
    assert torch.equal(bins[:1], by_hand) and (by_hand.sum((-1, -2)) == n).all() and (bins[:, :, 1:] == 0).all()
    wanted = top_slots.run(scores[:1], 100, _backend=form[0])[0]
    old = tuple(x.clone() for x in found)
    again = top_slots.run(scores, 100, old=old, skip=skip[:, None], bins=bins, counted=True, _backend=form[0])[0]
    assert torch.equal(again[:1], wanted) and torch.equal(again[1], found[0][1])


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_are_not_contiguous(form):
    check(form[0], drawn("ties", 60, 4, device=form[1]).T, 11)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [5, 8200])
def test_far_more_wanted_than_there_are(form, n):
    index, count = top_slots.run(torch.randn(1, n).to(form[1]), 2 * n + 3000, _backend=form[0])
    wanted = torch.arange(2 * n + 3000).clamp(max=n)
    assert count.tolist() == [n] and torch.equal(index[0].cpu().long(), wanted)


def test_choice_and_refusals():
    scores = drawn("noise", 40)
    assert top_slots.choose(scores) == ("torch", "not triton: needs CUDA capability >= 8, this is cpu")
    with pytest.raises(ConfigError, match="'nonsense' is not a backend of top_slots; allowed: triton, torch"):
        top_slots.run(scores, 3, _backend="nonsense")
    with pytest.raises(InputError, match="`old` and `skip` together"):
        top_slots.run(scores, 3, skip=torch.ones((), dtype=torch.bool))
    with pytest.raises(InputError, match="without the bins it counted in; give `bins`"):
        top_slots.run(scores, 3, counted=True)


def test_where_kernels_are_chained(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(launching, "capability", lambda device: 9 if device.type == "cuda" else 0)
    for on in (False, True):
        monkeypatch.setattr(launching, "CHAINED", on)
        assert launching.chained(gpu) == ({"CHAINED": True, "launch_pdl": True} if on else {"CHAINED": False})
        assert launching.chained(torch.device("cpu")) == {"CHAINED": False}


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
def test_chained_kernels_choose_the_same(monkeypatch):
    """One after another without a pause, eagerly and as a graph, in memory that is used again and again."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(5, 2, 8, 1, 128, generator=g).to("cuda", torch.bfloat16)
    k = torch.randn(2, 2, 9000, 128, generator=g).to("cuda", torch.bfloat16)
    end = torch.tensor([9000, 7000], device="cuda")

    def chosen():
        found = []
        for one in q:
            bins = top_slots.bins((2, 1), 9000, one.device)
            scores = votes.run(one, k, end=end, zero=bins, count=True)
            found.append(top_slots.run(scores, 500, bins=bins, counted=True)[0])
            found.append(top_slots.run(scores[..., :8192].contiguous(), 100)[0])
        return torch.cat([x.flatten() for x in found])

    wanted = chosen()
    monkeypatch.setattr(launching, "CHAINED", True)
    assert torch.equal(chosen(), wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chosen()
    for _ in range(20):
        graph.replay()
        assert torch.equal(found, wanted)


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests above run the fused form")
def test_the_fused_form_in_tritons_interpreter():
    run_interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", __file__)
