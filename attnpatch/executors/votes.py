"""How much attention one query per row gives each key, the heads reduced: what decoding methods choose keys by."""

from __future__ import annotations

import torch

from attnpatch.errors import ConfigError, InputError
from attnpatch.executors import top_slots
from attnpatch.executors.backends import HALF, capability, no_triton, too_old
from attnpatch.executors.column_sums import matmul, operand
from attnpatch.executors.launching import on, without_grad

REDUCE = ("sum", "max", "mean")


def choose(q: torch.Tensor, k: torch.Tensor) -> tuple[str, str]:
    """(backend, reason) for this call. Never waits for the device."""
    why = too_old(q.device.type, capability(q.device), 8)
    if why is None and (q.dtype != k.dtype or q.dtype not in (*HALF, torch.float32) or q.shape[3] > 256):
        why = "needs float16, bfloat16 or float32, one for queries and keys, and a head dimension up to 256"
    why = why or no_triton()
    return ("triton", "the fastest that fits") if why is None else ("torch", f"not triton: {why}")


def _run_torch(
    q: torch.Tensor, k: torch.Tensor, first: int, end: torch.Tensor, late: int, scaling: float,
    softcap: float | None, reduce: str, outs: int,
) -> torch.Tensor:  # fmt: skip
    slot = torch.arange(k.shape[2], device=q.device)
    inside = ((slot >= first) & (slot < end[:, None] - late))[:, None]  # [B, 1, S]
    packed = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])  # [B, Hkv, G, D]
    logits = matmul(operand(packed), operand(k).transpose(-1, -2)).float().flatten(1, 2) * scaling  # [B, Hq, S]
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = torch.where(inside, logits, float("-inf"))  # also replaces NaN of free slots
    probs = torch.softmax(logits, dim=-1).unflatten(1, (outs, -1))
    found = probs.sum(2) if reduce == "sum" else probs.mean(2) if reduce == "mean" else probs.amax(2)
    return torch.where(inside, found, float("-inf"))  # also replaces NaN of rows with none


@without_grad
def run(
    q: torch.Tensor, k: torch.Tensor, *, end: torch.Tensor, first: int = 0, late: int = 0, scaling: float = 1.0,
    softcap: float | None = None, reduce: str = "sum", heads: int = 1, skip: torch.Tensor | None = None,
    known: dict[str, torch.Tensor] | None = None, zero: torch.Tensor | None = None, count: bool = False,
    _backend: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """Softmax of scaling * q . k over slots first .. end[b] - late - 1 of a row, reduced over heads; -inf elsewhere.

    q: [B, Hq, 1, D]; k: [B, Hkv, S, D], slots are positions and those named are filled; end: int [B].
    Returns fp32 [B, heads, S], of which each is the sum, max or mean over Hq / heads neighbouring query heads.
    skip: bool [B], rows whose keys need not be read: what is returned of them is undefined. known: what attention over
    the same slots by the same queries left of the other rows (`Selection.leave`), which saves reading keys.
    zero: int32 [B, heads, ...], set to 0 besides, but for rows that skip (`top_slots.bins`). count: and what is
    returned is counted in them (`top_slots.count_first`).
    """
    if q.shape[2] != 1 or q.shape[1] % heads or reduce not in REDUCE:
        raise InputError(
            f"votes of {q.shape[2]} queries of {q.shape[1]} heads, reduced to {heads} by {reduce!r}; give one query, "
            f"a divisor of the heads, and one of {', '.join(REDUCE)}."
        )
    if count and zero is None:
        raise InputError("votes counts its scores in `zero`; give it.")
    name = _backend or choose(q, k)[0]
    if name == "torch":
        found = _run_torch(q, k, first, end, late, scaling, softcap, reduce, heads)
        if zero is not None:
            zero.zero_()
            if count:
                top_slots.count_first(found, zero.view(*found.shape[:2], *zero.shape[-2:]))
        return found
    if name != "triton":
        raise ConfigError(f"{name!r} is not a backend of votes; allowed: triton, torch.")
    from attnpatch.executors._votes_triton import launch

    with on(q.device):
        return launch(q, k, first, end, late, scaling, softcap, reduce, heads, skip, known, zero, count)
