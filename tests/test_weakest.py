"""weakest against a plain list; the Triton form on CUDA, else in the interpreter's own process."""

from __future__ import annotations

import pytest
import torch
from interpreter import DEVICE, FORMS, INTERPRETED, mend_interpreter, needs_triton, run_interpreted

from attnpatch.errors import ConfigError
from attnpatch.executors import weakest

if INTERPRETED:
    mend_interpreter()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("blocks", [False, True], ids=["list", "blocks"])
@pytest.mark.parametrize("width", [1, 7, 256, 5000])
def test_each_new_slot_takes_the_place_of_the_weakest(form, width, blocks):
    g = torch.Generator().manual_seed(0)
    slots = torch.stack([torch.randperm(9000, generator=g)[:width] for _ in range(6)]).int().view(2, 3, width)
    score = torch.randn(2, 3, width, generator=g).mul(3).round()  # with ties
    if width > 5:
        slots[0, :, 2], score[0, :, 2] = -1, float("-inf")  # room
        slots[0, :, 4], score[0, :, 4] = -1, float("inf")  # never used
    pairs = zip(score.view(6, -1).tolist(), slots.view(6, -1).tolist(), strict=True)
    lists = [sorted(p for p in zip(s, t, strict=True) if p != (float("inf"), -1)) for s, t in pairs]
    slots, score = slots.to(form[1]), score.to(form[1])
    least = weakest.lowest(slots, score) if blocks else None
    for new in range(9000, 9000 + 2 * min(width, 7) + 1):
        given = torch.tensor([[0, new], [0, -1 if new % 3 == 0 else new]], device=form[1])[:, 1]
        weakest.replace(slots, score, given, least, _backend=form[0])
        assert not blocks or torch.equal(least, weakest.lowest(slots, score))
        for i, one in enumerate(lists):
            if i < 3 or new % 3:
                lists[i] = [*one[1:], (float("inf"), new)]
            found = slots[i // 3, i % 3]
            assert set(found[found >= 0].tolist()) == {t for _, t in lists[i] if t >= 0}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "more", [(), ("size",), ("skip",), ("size", "skip", "least")], ids=lambda m: "+".join(m) or "-"
)
def test_lists_made_anew(form, more):
    """Slots behind the scores are none; rows that skip keep theirs, of which nothing is read."""
    g, n, width = torch.Generator().manual_seed(1), 700, 600
    scores = torch.randn(3, 2, n, generator=g)
    slots = torch.stack([torch.randperm(n + 200, generator=g)[:width] for _ in range(6)]).int().view(3, 2, width)
    score = torch.randn(3, 2, width, generator=g)
    size, skip = torch.tensor([10, 700, 400]), torch.tensor([False, True, False])
    wanted, wanted_score = slots.clone(), score.clone()
    for b in range(3):
        for h in range(2):
            if "skip" in more and skip[b]:
                continue
            for i, slot in enumerate(slots[b, h].tolist()):
                wanted[b, h, i] = slot if slot < n else -1
                wanted_score[b, h, i] = scores[b, h, slot] if slot < n else float("-inf")
                if "size" in more and i > size[b]:
                    wanted_score[b, h, i] = float("inf")
    if "skip" in more:
        scores[1] = float("nan")
    slots, score, scores, size, skip = (x.to(form[1]) for x in (slots, score, scores, size, skip))
    given = {"size": size, "skip": skip, "least": weakest.lowest(slots, score)}
    weakest.renew(slots, score, scores, **{name: given[name] for name in more}, _backend=form[0])
    assert torch.equal(slots.cpu(), wanted) and torch.equal(score.cpu(), wanted_score)
    assert "least" not in more or torch.equal(given["least"], weakest.lowest(slots, score))


def test_choice():
    assert weakest.choose(torch.zeros(1, 1, 4)) == ("torch", "not triton: needs CUDA capability >= 8")
    with pytest.raises(ConfigError, match="'nonsense' is not a backend of weakest"):
        weakest.replace(torch.zeros(1, 1, 4).int(), torch.zeros(1, 1, 4), torch.zeros(1), _backend="nonsense")


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests above run the fused form")
def test_the_fused_form_in_tritons_interpreter():
    run_interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", __file__)
