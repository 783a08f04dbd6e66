"""Which backend the executor for page lists takes, and the helpers that make lists."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from test_pages import DTYPES, choice, problem

from attnpatch.errors import ConfigError, InputError, VersionError
from attnpatch.executors import dense, lists, naive, pages, row_lists

# ---- the choice ----


def cuda_call(**change):
    plain = dict.fromkeys(["columns", "near", "holes", "softcap", "window", "mask", "want_lse"], False)
    given = {**plain, "device": "cuda", "capability": 9, "dtype": torch.bfloat16, "dim": 128, "page": 128, "bq": 128}
    given |= change
    fine = row_lists.Call(*(given[n] for n in ("device", "capability", "dtype", "dim")), True, False, given["window"])
    return pages._Call(**given, fine=fine)


@pytest.mark.parametrize(
    ("change", "fa4", "name"),
    [
        ({}, True, "fa4"),
        ({}, False, "flex"),
        ({"want_lse": True}, True, "fa4"),
        ({"bq": 0}, True, "fa4"),
        ({"page": 64, "bq": 64}, True, "fa4"),
        ({"page": 32}, True, "flex"),
        ({"bq": 32}, True, "flex"),
        ({"page": 24}, True, "triton"),
        ({"dim": 256}, True, "flex"),
        ({"dim": 80}, True, "flex"),
        ({"capability": 8}, True, "flex"),
        ({"capability": 10}, True, "flex"),
        ({"capability": 10, "bq": 256}, True, "fa4"),
        ({"dtype": torch.float32}, True, "flex"),
        ({"dtype": torch.float64}, True, "torch"),
        ({"capability": 7, "page": 24}, True, "torch"),
        ({"page": 0}, True, "torch"),
        *[({beside: True}, True, "triton") for beside in ("near", "holes", "softcap")],
        ({"columns": True}, True, "fa4+triton"),
        ({"columns": True, "want_lse": True, "page": 64, "bq": 64}, True, "fa4+triton"),
        ({"columns": True}, False, "triton"),
        *[({"columns": True, beside: True}, True, "triton") for beside in ("near", "holes", "softcap")],
        *[({"columns": True, **other}, True, "triton") for other in ({"page": 32}, {"bq": 32}, {"dim": 256})],
        *[({"columns": True, "capability": n}, True, "triton") for n in (8, 10)],
        ({"columns": True, "dtype": torch.float32}, True, "torch"),
        *[({beside: True}, True, "torch") for beside in ("window", "mask")],
    ],
    ids=lambda x: "+".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else str(x),
)
def test_choice_on_cuda(change, fa4, name, monkeypatch):
    monkeypatch.setattr(pages, "fa4", lambda: object() if fa4 else None)
    monkeypatch.setattr(row_lists, "has_triton", lambda: True)
    monkeypatch.setattr(pages, "_chosen", {})
    assert pages._decide(cuda_call(**change), None)[0] == name


def test_choice_on_cpu_and_its_reason():
    q, kv, ctx = problem(40, 40)
    name, reason = pages.choose(q, kv, choice(q, kv, page=16, bq=16), ctx)
    assert name == "torch" and "not fa4: needs CUDA capability >= 9, this is cpu" in reason
    assert "not flex: compiled for CUDA" in reason
    assert [name for name, _, _ in pages.backends()] == ["fa4", "fa4+triton", "flex", "triton", "torch"]


def test_forced_backend(monkeypatch):
    q, kv, ctx = problem(40, 40)
    selection = choice(q, kv, page=16, bq=16)
    monkeypatch.setenv("ATTNPATCH_BACKEND", "torch")
    assert pages.choose(q, kv, selection, ctx) == ("torch", "forced by ATTNPATCH_BACKEND")
    monkeypatch.setenv("ATTNPATCH_BACKEND", "fa4")
    with pytest.raises(ConfigError, match="needs CUDA capability >= 9, this is cpu"):
        pages.run(q, kv, selection, ctx)
    monkeypatch.setenv("ATTNPATCH_BACKEND", "flex")
    with pytest.raises(ConfigError, match="no log-sum-exp on a CPU"):
        pages.run(q, kv, selection, ctx, want_lse=True)
    monkeypatch.setenv("ATTNPATCH_BACKEND", "nonsense")
    for run in (pages.run, dense.run):
        with pytest.raises(ConfigError, match="allowed: fa4, fa3, cudnn, flash, sdpa, torch, flex"):
            run(q, kv, selection, ctx)
    monkeypatch.setattr(pages, "fa4", lambda: None)
    with pytest.raises(VersionError, match="pip install"):
        pages._decide(cuda_call(), "fa4")


def test_a_name_of_another_executor_leaves_the_choice(monkeypatch):
    q, kv, ctx = problem(40, 40)
    monkeypatch.setenv("ATTNPATCH_BACKEND", "sdpa")
    name, reason = pages.choose(q, kv, choice(q, kv, page=16, bq=16), ctx)
    assert name == "torch" and "sdpa belongs to another executor" in reason
    monkeypatch.setenv("ATTNPATCH_BACKEND", "flex")
    name, reason = dense.choose(q, kv, ctx)
    assert name == "sdpa" and "flex belongs to another executor" in reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bq": 32}, "3 lists for 40 query rows in blocks of 32; give 2"),
        ({"index": torch.zeros(1, 3, 3, 1, dtype=torch.int32)}, "Selection.index of shape"),
        ({"count": torch.zeros(1, 1, 3, dtype=torch.int32)}, "Selection.count of shape"),
        ({"rows": slice(0, 0)}, "Selection.rows"),
        ({"rows": slice(0, 40, 2)}, "Selection.rows"),
    ],
    ids=["bq", "heads", "count", "empty", "step"],
)
def test_lists_that_do_not_fit_are_refused(change, message):
    q, kv, ctx = problem(40, 40)
    with pytest.raises(InputError, match=message):
        pages.run(q, kv, replace(choice(q, kv, page=16, bq=16), **change), ctx)


def test_import_is_light():
    code = "import sys, attnpatch.executors.pages; sys.exit(bool({'flash_attn', 'triton'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- lists ----


@pytest.mark.parametrize("width", [None, 20, 8, 1])
def test_pack_and_unpack(width):
    chosen = torch.rand(2, 3, 5, 20, generator=torch.Generator().manual_seed(0)) < 0.4
    chosen[0, 0, 0] = False
    chosen[0, 0, 1] = True
    index, count = lists.pack(chosen, width)
    expected_index, expected_count = naive.pack(chosen, width or 20)
    assert index.dtype == count.dtype == torch.int32
    assert torch.equal(index, expected_index) and torch.equal(count, expected_count)
    kept = chosen & (chosen.flip(-1).cumsum(-1).flip(-1) <= (width or 20))
    assert torch.equal(lists.unpack(index, count, 20), kept)
    assert lists.unpack(index, count, 7).shape == (2, 3, 5, 7)
    meta, _ = lists.pack(chosen.to("meta"), width)
    assert meta.shape == index.shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_top_k_and_top_mass(dtype):
    scores = torch.randint(0, 6, (2, 3, 4, 17), generator=torch.Generator().manual_seed(0)).to(dtype)  # many ties
    flat = scores.flatten(0, 2)
    for k in (0, 1, 5, 40):
        expected = torch.stack([naive.top(row, k=k) for row in flat]).view_as(scores)
        assert torch.equal(lists.top_k(scores, k), expected)
    for mass in (0.0, 0.3, 0.9, 1.0, 1.1):
        expected = torch.stack([naive.top(row, mass=mass) for row in flat]).view_as(scores)
        assert torch.equal(lists.top_mass(scores, mass * scores.float().sum(-1)), expected)


def test_top_k_and_top_mass_by_head():
    scores = torch.rand(2, 3, 4, 17, generator=torch.Generator().manual_seed(0))
    k, mass = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.rand(2, 3, 4) * 9
    for b, h in ((0, 2), (1, 0)):
        assert torch.equal(lists.top_k(scores, k)[b, h], lists.top_k(scores[b, h], int(k[b, h])))
        assert torch.equal(lists.top_mass(scores, mass)[b, h], lists.top_mass(scores[b, h], mass[b, h]))
    future = scores.masked_fill(torch.arange(17) > 2, float("-inf"))
    assert (lists.top_k(future, 9).sum(-1) == 3).all()
