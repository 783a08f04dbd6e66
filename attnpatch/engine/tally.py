"""What the decode steps of a selecting method read: counters of a cache layer. The host never waits for them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from attnpatch.decisions import Selection
    from attnpatch.engine.call import KV, Ctx


@dataclass
class Tally:
    """Sums over decode steps: ints where all rows are alike, int64 or fp32 tensors [B] where only the device knows.

    attended: tokens, the mean of the heads; where parts of a selection overlap, at most. scored: keys read to choose
    them, as the method tells. held: tokens that a dense step would have attended.
    """

    steps: Any = 0
    attended: Any = 0
    scored: Any = 0
    held: Any = 0
    _now: Any = 0

    def counter(self, batch: int, device: torch.device) -> torch.Tensor:
        """`scored` as int64 [batch] that a method may change in place."""
        if not isinstance(self.scored, torch.Tensor):
            self.scored = torch.full((batch,), self.scored, dtype=torch.int64, device=device)
        elif self.scored.is_inference() and not torch.is_inference_mode_enabled():
            self.scored = self.scored.clone()
        return self.scored

    def pick(self, pick: Any) -> Tally:
        """The counters after a row operation (beams, repeats)."""
        values = (getattr(self, f.name) for f in fields(self))
        return Tally(*(pick(x) if isinstance(x, torch.Tensor) else x for x in values))

    def term(self, term: Selection, kv: KV) -> None:
        """Add the tokens that a term of this step names."""
        if term.dense:
            self._now = self._now + kv.S
            return
        named: Any = term.sink + term.window
        if term.index is not None and term.count is not None:
            named = named + term.count.float().mean((1, 2)) * term.page  # [B|1]
        elif term.index is not None:
            named = named + term.index.shape[-1] * term.page
        if term.columns is not None:
            named = named + term.columns.shape[-1]
        if term.only is not None:
            named = torch.where(term.only, named, kv.S)  # [B]
        self._now = self._now + named

    def close(self, kv: KV, ctx: Ctx, whole: bool = False) -> None:
        """End a step. whole: all that is held was attended."""
        now, self._now = self._now, 0
        held: Any = kv.S
        if ctx.ragged:
            held = ctx.q_pos[:, -1] + 1  # [B]; 0 = no token in this step
            self.steps = self.steps + (held > 0)
        else:
            self.steps = self.steps + 1
        if whole:
            now = held
        elif isinstance(now, torch.Tensor) or isinstance(held, torch.Tensor):
            now, limit = (torch.as_tensor(x, device=kv.k.device) for x in (now, held))
            now = torch.minimum(now, limit.to(now.dtype))
        else:
            now = min(now, held)
        self.attended, self.held = self.attended + now, self.held + held

    def figures(self, batch: int, key: int, value: int) -> dict[str, Any]:
        """For status, may wait: steps, attended and scored per step, bytes read. key, value: bytes of a row's token."""
        steps, attended, scored, held = (
            float(x.double().expand(batch).sum()) if isinstance(x, torch.Tensor) else float(x * batch)
            for x in (self.steps, self.attended, self.scored, self.held)
        )
        read, dense = attended * (key + value) + scored * key, held * (key + value)
        per = max(steps, 1)
        return {"steps": round(steps / batch), "attended": attended / per, "scored": scored / per,
                "bytes_read": round(read), "bytes_read_dense": round(dense)}  # fmt: skip
