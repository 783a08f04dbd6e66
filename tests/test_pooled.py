"""pooled against plain lists; the Triton form on CUDA, else in the interpreter's own process."""

from __future__ import annotations

import pytest
import torch
from interpreter import DEVICE, FORMS, INTERPRETED, mend_interpreter, needs_triton, run_interpreted

from attnpatch.errors import ConfigError, InputError
from attnpatch.executors import pooled

if INTERPRETED:
    mend_interpreter()


def expected(row, width, newest, own):
    row = row[: newest + 1] + [float("-inf")] * (len(row) - newest - 1)
    if own and newest >= 0:
        row[newest] = float("-inf")
    half = width // 2
    out = [max(row[max(0, i - half) : i + half + 1]) for i in range(newest + 1)]
    if own and newest >= 0:
        out[newest] = float("inf")
    return out + [float("-inf")] * (len(row) - newest - 1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("own", [False, True], ids=["all", "own"])
@pytest.mark.parametrize("width", [1, 7, 63])
@pytest.mark.parametrize("slots", [1, 40, 2500])
def test_neighbourhoods(form, slots, width, own):
    scores = torch.randn(4, 3, slots, generator=torch.Generator().manual_seed(0)).mul(3).round()
    newest = torch.tensor([[0, slots - 1], [0, slots // 2], [0, -1], [0, 0]])
    wanted = [[expected(row, width, n, own) for row in rows] for rows, n in
              zip(scores.tolist(), newest[:, 1].tolist(), strict=True)]  # fmt: skip
    scores, newest = scores.to(form[1]), newest.to(form[1])[:, 1]
    assert pooled.run(scores, width, newest, own=own, _backend=form[0]).tolist() == wanted
    skip = torch.tensor([False, True, False, True], device=form[1])
    scores[1] = float("nan")
    found = pooled.run(scores, width, newest, own=own, skip=skip, _backend=form[0])
    assert found[0].tolist() == wanted[0] and found[2].tolist() == wanted[2]


def test_choice_and_refusals():
    x, at = torch.zeros(1, 1, 4), torch.zeros(1)
    assert pooled.choose(x) == ("torch", "not triton: needs CUDA capability >= 8")
    with pytest.raises(ConfigError, match="'nonsense' is not a backend of pooled"):
        pooled.run(x, 3, at, _backend="nonsense")
    with pytest.raises(InputError, match="a neighbourhood of 4 scores has no middle; give an odd width"):
        pooled.run(x, 4, at)


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests above run the fused form")
def test_the_fused_form_in_tritons_interpreter():
    run_interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", __file__)
