"""How a small kernel follows the one before it, for all that a decode step launches. Imported at the first call only.

A step is many kernels of a few microseconds each. Chained (`launching.chained`), the next one is on the
multiprocessors, its launch behind it, when the one before ends. Every kernel that is launched so has to follow before
it reads or writes anything, also one with nothing to do: the one after waits for it alone.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def follow(CHAINED: tl.constexpr):
    """Wait until the kernel before has ended and what it wrote is there; let the next one come."""
    if CHAINED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
