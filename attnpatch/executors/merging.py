"""Attention over two disjoint sets of keys as one, from what each gives alone. `choose` says by what."""

from __future__ import annotations

import torch

from attnpatch.errors import ConfigError
from attnpatch.executors.backends import HALF, capability, differentiated, no_triton, too_old

Result = tuple[torch.Tensor, torch.Tensor]


def _not_triton(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, lse_other: torch.Tensor) -> str | None:
    """What stands in the way of the fused form, or None."""
    given = (out, lse, other, lse_other)
    if why := too_old(out.device.type, capability(out.device), 8):
        return why
    if any(x.dtype not in (*HALF, torch.float32) for x in given):
        return "adds in float32"
    if differentiated(*given):
        return "has no backward pass"
    return no_triton()


def choose(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, lse_other: torch.Tensor) -> tuple[str, str]:
    """(backend, reason) for this call: "triton" (each number is read once) or "torch". Never waits for the device."""
    why = _not_triton(out, lse, other, lse_other)
    return ("triton", "the fastest that fits") if why is None else ("torch", f"not triton: {why}")


def run(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, lse_other: torch.Tensor, _backend: str | None = None
) -> Result:
    """(out [B, r, Hq, D] in the dtype of the first, lse [B, Hq, r] fp32, or fp64) of both sets of keys together.

    out, other: [B, r, Hq, D]; lse, lse_other: natural log-sum-exp [B, Hq, r] of the logits of each set. A row that sees
    nothing in either (lse -inf in both) stays zero if it is. Raises ConfigError for a backend that is none.
    """
    name = _backend or choose(out, lse, other, lse_other)[0]
    if name == "triton":
        from attnpatch.executors._merging_triton import launch

        return launch(out, lse, other, lse_other)
    if name != "torch":
        raise ConfigError(f"merging by {name!r}: allowed are 'torch' and 'triton'.")
    both = torch.logaddexp(lse, lse_other)
    safe = both.masked_fill(both == float("-inf"), 0.0)
    mine, theirs = ((x - safe).exp().transpose(1, 2)[..., None] for x in (lse, lse_other))  # [B, r, Hq, 1]
    return (out.to(mine.dtype) * mine + other.to(mine.dtype) * theirs).to(out.dtype), both
