"""Every evicting patch on every tiny config against the oracle (full KV, eager, evicted entries masked)."""

from __future__ import annotations

import pytest
import torch
from oracle import CONFIGS, run_both
from varlen import FakeVarlen

import attnpatch
from attnpatch.executors import dense

# stock eager and stock SDPA differ by up to 3e-5 on these logits (magnitude 10 to 40): fp32 rounding, not a wrong mask
ATOL = 5e-5
PATCHES = {
    "snapkv": {"budget": 12, "window_size": 4, "kernel_size": 3},
    "pyramidkv": {"budget": 14, "window_size": 4, "kernel_size": 3},
    "streamingllm": {"budget": 12, "positions": "original"},
    "h2o": {"budget": 12},
    "random": {"budget": 12, "window_size": 3},
    "adakv": {"budget": 12, "window_size": 4, "kernel_size": 3, "alpha": 0.0},
    "cake": {"budget": 12, "window_size": 4},
    "taskkv": {"budget": 0.6, "window_size": 4, "kernel_size": 3, "sink": 2, "recent": 5, "last_full": 1},
    "compresskv": {"budget": 12, "window_size": 4, "kernel_size": 3, "heads": "all"},
    "tca": {"block_size": 4, "dense_below": 0, "mu": 1.0, "prefill": False},  # sparse prompts in its own file
}
BY_PROFILE = {"duoattention", "razorattention"}  # need a profile of each model: against the oracle in their own files


def ids(batch: int, *lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(1, 97, (batch, n), generator=generator) for n in lengths]


def left_mask(total: int, *pads: int) -> torch.Tensor:
    return (torch.arange(total)[None] >= torch.tensor(pads)[:, None]).long()


@pytest.fixture(params=CONFIGS)
def config(request):
    return request.param


def test_every_evicting_patch_is_covered():
    shipped = {n: cls for n, cls in attnpatch.list_patches().items() if cls.__module__.startswith("attnpatch.patches.")}
    assert {n for n, cls in shipped.items() if "keep" in cls.hooks()} == set(PATCHES) | BY_PROFILE


@pytest.mark.parametrize("patch", PATCHES)
def test_one_prompt_then_decode(config, patch):
    worst, cache = run_both(config, patch, ids(1, 40, 1, 1, 1), **PATCHES[patch])
    assert worst < ATOL and cache.get_seq_length() == 43


@pytest.mark.parametrize("patch", PATCHES)
def test_left_padded_batch_with_turns(config, patch):
    worst, _ = run_both(config, patch, ids(3, 40, 1, 1, 7, 1), masks=left_mask(50, 0, 11, 30), **PATCHES[patch])
    assert worst < ATOL


@pytest.mark.parametrize("patch", PATCHES)
def test_chunked_padded_prefill(config, patch):
    feeds = ids(2, 15, 15, 10, 1, 1)
    worst, _ = run_both(config, patch, feeds, masks=left_mask(42, 3, 17), prompt_ends=[40] * 5, **PATCHES[patch])
    assert worst < ATOL


@pytest.mark.parametrize("patch", PATCHES)
def test_padded_rows_by_their_lengths(patch, monkeypatch):
    """What CUDA does with flash-attn-4: each row of a padded batch by its own number of queries and keys."""
    fake = FakeVarlen()
    monkeypatch.setattr(dense, "_fa4", lambda varlen=False: fake if varlen else None)
    monkeypatch.setitem(dense._WHY_NOT, "fa4", lambda c: None if c.packed and not c.part else "not asked for here")
    monkeypatch.setattr(dense, "_chosen", {})
    test_left_padded_batch_with_turns("llama", patch)
    test_chunked_padded_prefill("llama", patch)
    assert fake.calls > 3


@pytest.mark.parametrize("patch", PATCHES)
def test_three_turns(config, patch):
    worst, _ = run_both(config, patch, ids(2, 40, 1, 1, 9, 1, 1, 12, 1), **PATCHES[patch])
    assert worst < ATOL


@pytest.mark.parametrize("patch", PATCHES)
def test_budget_across_chunks_and_turns(config, patch):
    feeds, ends = ids(2, 15, 15, 10, 1, 9, 1), [40, 40, 40, 40, 50, 50]
    per_chunk = {} if patch in ("cake", "tca") else {"evict_per_chunk": True}  # cake refuses it, tca has none
    hyper = {**PATCHES[patch], **per_chunk, "recompress": True}
    worst, _ = run_both(config, patch, feeds, prompt_ends=ends, **hyper)
    assert worst < ATOL
