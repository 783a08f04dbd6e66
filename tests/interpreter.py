"""Triton kernels in tests: on CUDA itself, or in Triton's interpreter, which has a process of its own.

The interpreter must be asked for before triton is imported, and it multiplies the bits of bf16 as integers: give it
fp32 or fp16.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
HALF = torch.float16 if INTERPRETED else torch.bfloat16
FORMS = [  # (backend, device)
    pytest.param(("torch", "cpu"), id="torch"),
    pytest.param(
        ("triton", DEVICE),
        id="triton",
        marks=pytest.mark.skipif(
            not find_spec("triton") or (DEVICE == "cpu" and not INTERPRETED),
            reason="needs triton and a CUDA device; without one test_the_fused_form_in_tritons_interpreter runs it",
        ),
    ),
]
needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")


def mend_interpreter() -> None:
    """Loop bounds are arrays of one element to Triton 3.6's interpreter; numpy 2.4 no longer converts them to int."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def run_interpreted(*command: str) -> None:
    """Run `python *command` in the interpreter's own process; fails with the end of what it said."""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
