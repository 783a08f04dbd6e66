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
@pytest.mark.parametrize("width", [1, 7, 5000])
def test_each_new_slot_takes_the_place_of_the_weakest(form, width):
    g = torch.Generator().manual_seed(0)
    slots = torch.stack([torch.randperm(9000, generator=g)[:width] for _ in range(6)]).int().view(2, 3, width)
    score = torch.randn(2, 3, width, generator=g).mul(3).round()  # with ties
    if width > 5:
        slots[0, :, 2], score[0, :, 2] = -1, float("-inf")  # room
        slots[0, :, 4], score[0, :, 4] = -1, float("inf")  # never used
    pairs = zip(score.view(6, -1).tolist(), slots.view(6, -1).tolist(), strict=True)
    lists = [sorted(p for p in zip(s, t, strict=True) if p != (float("inf"), -1)) for s, t in pairs]
    slots, score = slots.to(form[1]), score.to(form[1])
    for new in range(9000, 9000 + 2 * min(width, 7) + 1):
        given = torch.tensor([[0, new], [0, -1 if new % 3 == 0 else new]], device=form[1])[:, 1]
        weakest.replace(slots, score, given, _backend=form[0])
        for i, one in enumerate(lists):
            if i < 3 or new % 3:
                lists[i] = [*one[1:], (float("inf"), new)]
            found = slots[i // 3, i % 3]
            assert set(found[found >= 0].tolist()) == {t for _, t in lists[i] if t >= 0}


def test_choice():
    assert weakest.choose(torch.zeros(1, 1, 4)) == ("torch", "not triton: needs CUDA capability >= 8")
    with pytest.raises(ConfigError, match="'nonsense' is not a backend of weakest"):
        weakest.replace(torch.zeros(1, 1, 4).int(), torch.zeros(1, 1, 4), torch.zeros(1), _backend="nonsense")


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests above run the fused form")
def test_the_fused_form_in_tritons_interpreter():
    run_interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", __file__)
