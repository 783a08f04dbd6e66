"""Tensor parallelism: two processes, each with half of the heads, decide as one does; else a method refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import parallel_cases
import pytest
import torch
from oracle import tiny
from selections import layer, noise

import attnpatch
from attnpatch.engine.shards import WHOLE, Shard
from attnpatch.errors import ConfigError, UnsupportedModeError, UnsupportedModelError

HERE = Path(__file__).parent


def halved(model, rank=0):
    """As transformers marks a model that it divided between two processes."""
    mesh = SimpleNamespace(
        ndim=1, size=lambda: 2, get_local_rank=lambda: rank, get_group=lambda: None
    )  # fmt: skip
    model._tp_size, model._device_mesh = 2, mesh
    return model


def test_two_processes_decide_as_one(tmp_path):
    tiny("llama", **parallel_cases.MODEL).save_pretrained(tmp_path / "model")
    script, path = str(HERE / "parallel_cases.py"), str(tmp_path / "model")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, path]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    found = re.findall(r"(\S+) rank=(\d) same=(\w+) off=(\S+) acts=(True|False)", done.stdout)
    told = done.stdout + done.stderr[-3000:]
    assert sorted(f[:2] for f in found) == sorted((c, r) for c in parallel_cases.CASES for r in "01"), told
    for case, rank, same, off, acts in found:
        # act hands on what is freed, up to 1e3 times the rounding where the other keys hold next to nothing
        most = 2e-3 if case.startswith("act") else 1e-4
        assert same == "True" and float(off) < most and acts == "True", (case, rank, same, off, acts)
    assert done.stdout.count("'infiniretri' needs all heads") == 2, told


def test_every_method_that_says_it_can_is_run():
    able = {name for name, cls in attnpatch.list_patches().items() if cls.tensor_parallel}
    assert {patch for patch, _ in parallel_cases.CASES.values()} == able
    assert able.isdisjoint({"infiniretri"})


def test_a_method_that_needs_all_heads_is_refused():
    model = halved(tiny("llama"))
    with pytest.raises(
        UnsupportedModeError, match=r"'infiniretri' needs all heads .* without tp_plan, or use one of act"
    ):
        attnpatch.patch_model(model, "infiniretri")
    attnpatch.patch_model(model, "snapkv")
    assert (model._attnpatch.plan.shard.size, model._attnpatch.plan.shard.heads) == (2, 4)


def test_the_part_of_a_process():
    part = Shard(rank=1, size=2, heads=8)
    assert part.here([7, 1, 4], 4) == [3, 0] and part.count(4) == 8 and part.first(4) == 4
    assert part.part(list(range(8)), 4) == [4, 5, 6, 7]
    assert part.own(torch.arange(8)[None], 4).tolist() == [[4, 5, 6, 7]]
    assert part.fitting(4) is part and part.fitting(8) is WHOLE
    with pytest.raises(UnsupportedModelError, match="3 of 8 query heads, with 2 processes; only an even"):
        part.fitting(3)


def test_without_processes_nothing_is_asked():
    x = torch.rand(2, 3, 4)
    assert WHOLE.all(x) is x and WHOLE.sum(x) is x and WHOLE.own(x, 3) is x and WHOLE.most(5) == 5
    assert WHOLE.here([2, 0], 3) == [2, 0] and Shard.of(tiny("llama"), 4) is WHOLE


def test_strict_tokenselect_is_refused():
    q, kv, ctx = layer(*noise(64))
    ctx.shard = Shard(0, 2, heads=8)
    with pytest.raises(ConfigError, match="strict=True pairs query heads with KV heads of other processes"):
        attnpatch.list_patches()["tokenselect"](strict=True, positions="true").select(q, kv, ctx)
