"""Triton compiles a kernel anew where a whole number turns 1 or divisible by 16, unless it is told not to look.

Lengths do so at every 16th decode step, and a compilation takes as long as many steps.
"""

from __future__ import annotations

import os

import pytest
import torch
from interpreter import mend_interpreter, needs_triton, run_interpreted

import attnpatch
from attnpatch.bench.shapes import random_model
from attnpatch.executors import chunk_scores, gather_decode, likeness, page_bounds, pooled, top_slots, votes, weakest

CASES = {
    "quest": {"budget": 48, "page_size": 8, "dense_layers": 0},
    "recycled": {"budget": 24, "min_budget": 24, "schedule": "qc", "stride": 3, "threshold": 0.9},
    "tokenselect": {"top_k": 16, "n_local": 8, "n_init": 4, "prefill": False, "positions": "true", "threshold": 0.9},
    "hip": {
        "mask_k": 16, "block_size_q": 8, "stride_q": 2, "sliding_window": 8, "sink": 4, "dense_layers": 0,
        "refresh": 4,
    },
    "infinitehip": {
        "k": 12, "chunks": [8, 4, 2], "keeps": [48, 24], "strides_q": [4, 2, 1], "block_size_q": 8, "sliding_window": 8,
        "sink": 4, "wide_layers": 0, "dense_up_to": 0, "refresh": [1, 1, 1],
    },
}  # fmt: skip


def kinds(kernel, values: dict) -> tuple[tuple, tuple]:
    """What Triton compiles a kernel by: all but whole numbers, and their kinds where they are specialized."""
    fixed, numbers = [], []
    left, hints = kernel.kwargs.get("do_not_specialize") or (), kernel.fn.__annotations__
    for name in kernel.arg_names:
        value = values.get(name)
        if "constexpr" in str(hints.get(name, "")):
            fixed.append(value)
        elif isinstance(value, torch.Tensor):
            fixed.append(value.dtype)
        elif isinstance(value, int) and name not in left:
            numbers.append((name, "1" if value == 1 else "16 n" if value % 16 == 0 else "n"))
    return tuple(fixed), tuple(numbers)


def interpreted() -> None:
    """Runs in a process of its own: the interpreter must be asked for before triton is imported."""
    from triton.runtime.interpreter import InterpretedFunction

    from attnpatch.executors import _top_slots_triton

    mend_interpreter()
    seen: dict[tuple, set] = {}
    plain = InterpretedFunction.run

    def run(self, *args, grid, warmup, **options):
        fixed, numbers = kinds(self, dict(zip(self.arg_names, args, strict=False)) | options)
        seen.setdefault((self.fn.__module__, self.fn.__name__, fixed), set()).add(numbers)
        return plain(self, *args, grid=grid, warmup=warmup, **options)

    InterpretedFunction.run = run
    gather_decode._decide = lambda call, forced: ("triton", "watched")
    for executor in (chunk_scores, likeness, page_bounds, pooled, top_slots, votes, weakest):
        executor.choose = lambda *args: ("triton", "watched")
    _top_slots_triton.SHORT = 32
    model = random_model("tiny", dtype=torch.float32, device="cpu")
    for name, options in CASES.items():
        for batch in (1, 2):
            ids = torch.randint(5, 1000, (batch, 118), generator=torch.Generator().manual_seed(0))
            with attnpatch.patched(model, name, **options), torch.inference_mode():
                cache = attnpatch.PatchCache(model, prompt_length=100)
                argument = {attnpatch.engine.compat.cache_name(model.forward): cache}
                model(ids[:, :100], **argument)
                seen.clear()
                for i in range(100, 118):  # 112 divides by 16
                    model(ids[:, i : i + 1], **argument)
            assert seen, name
            for (module, kernel, _), found in seen.items():
                changing = {a for x in found for a in x if any(a not in y for y in found)}
                assert not changing, (name, batch, module, kernel, changing)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="starts an interpreter of its own")
@needs_triton
def test_steps_compile_no_kernel_anew():
    run_interpreted(__file__)


if __name__ == "__main__":
    interpreted()
