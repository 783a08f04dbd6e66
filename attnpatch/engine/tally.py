"""What the decode steps of a selecting method read: counters of a cache layer. The host never waits for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from attnpatch.decisions import Selection
    from attnpatch.engine.call import KV, Ctx


@dataclass
class Tally:
    """Sums over decode steps: ints of what all rows have alike, int64 or fp32 tensors [B] of what the device knows.

    attended: tokens, the mean of the heads; where parts of a selection overlap, at most; what the host knows of them is
    in `alike`. scored: keys read to choose them, as the method tells. held: tokens that a dense step would have
    attended. A count that serves several steps is looked at once: `_counted` holds (it, its page, tokens fp32 [B|1]),
    `_times` the steps in which these tokens were attended since the last sum.
    """

    steps: Any = 0
    attended: Any = 0
    alike: int = 0
    scored: Any = 0
    held: Any = 0
    _now: int = 0  # of this step: what the host knows,
    _most: int = 0  # what it can be at most,
    _part: Any = None  # and what the device knows besides, [B|1]
    _counted: Any = None
    _times: int = 0

    def counter(self, batch: int, device: torch.device) -> torch.Tensor:
        """`scored` as int64 [batch] that a method may change in place."""
        if not isinstance(self.scored, torch.Tensor):
            self.scored = torch.full((batch,), self.scored, dtype=torch.int64, device=device)
        elif self.scored.is_inference() and not torch.is_inference_mode_enabled():
            self.scored = self.scored.clone()
        return self.scored

    def pick(self, pick: Any) -> Tally:
        """The counters after a row operation (beams, repeats)."""
        steps, scored, held = (
            pick(x) if isinstance(x, torch.Tensor) else x for x in (self.steps, self.scored, self.held)
        )
        attended = self._summed()
        if isinstance(attended, torch.Tensor) and attended.shape[0] > 1:  # [1] is of every row
            attended = pick(attended)
        return Tally(steps, attended, self.alike, scored, held)

    def term(self, term: Selection, kv: KV) -> None:
        """Add the tokens that a term of this step names."""
        if term.dense:
            return self._add(kv.S, kv.S)
        named, listed, part = term.sink + term.window, 0, None
        if term.columns is not None:
            named += term.columns.shape[-1]
        if term.index is not None:
            listed = term.index.shape[-1] * term.page
            if term.count is not None:
                part = self._tokens(term.count, term.page)
            else:
                named += listed
        most = named if part is None else named + listed
        if term.only is not None:
            part = torch.where(term.only, named if part is None else part + named, kv.S)  # [B]
            named, most = 0, max(kv.S, most)
        self._add(named, most, part)

    def _add(self, now: int, most: int, part: Any = None) -> None:
        self._now += now
        self._most += most
        if part is not None:
            self._part = part if self._part is None else self._part + part

    def _tokens(self, count: Any, page: int) -> torch.Tensor:
        """fp32 [B|1]: tokens that count int [B|1, H, R] pages are, the mean of the heads."""
        if self._counted is None or self._counted[0] is not count or self._counted[1] != page:
            self.attended, self._times = self._summed(), 0
            self._counted = count, page, count.float().mean((1, 2)) * page
        return self._counted[2]

    def _summed(self) -> Any:
        """`attended`, the steps since the last sum included."""
        return self.attended + self._counted[2] * self._times if self._times else self.attended

    def close(self, kv: KV, ctx: Ctx, whole: bool = False) -> None:
        """End a step. whole: all that is held was attended."""
        now, most, part = self._now, self._most, self._part
        self._now, self._most, self._part = 0, 0, None
        if ctx.ragged:
            return self._close_ragged(now if part is None else part + now, ctx, whole)
        self.steps, self.held = self.steps + 1, self.held + kv.S
        if whole or part is None:
            self.alike += kv.S if whole else min(now, kv.S)
        elif most > kv.S:
            self.attended = self.attended + (part + now).clamp(max=kv.S)
        else:
            self.alike += now
            if self._counted is not None and part is self._counted[2]:
                self._times += 1
            else:
                self.attended = self.attended + part

    def _close_ragged(self, now: Any, ctx: Ctx, whole: bool) -> None:
        held = ctx.q_pos[:, -1] + 1  # [B]; 0 = no token in this step
        self.steps, self.held = self.steps + (held > 0), self.held + held
        if whole:
            now = held
        elif isinstance(now, torch.Tensor):
            now = torch.minimum(now, held.to(now.dtype))
        else:
            now = held.clamp(max=now)
        self.attended = self.attended + now

    def figures(self, batch: int, key: int, value: int) -> dict[str, Any]:
        """For status, may wait: steps, attended and scored per step, bytes read. key, value: bytes of a row's token."""
        steps, attended, alike, scored, held = (
            float(x.double().expand(batch).sum()) if isinstance(x, torch.Tensor) else float(x * batch)
            for x in (self.steps, self._summed(), self.alike, self.scored, self.held)
        )
        attended += alike
        read, dense = attended * (key + value) + scored * key, held * (key + value)
        per = max(steps, 1)
        return {"steps": round(steps / batch), "attended": attended / per, "scored": scored / per,
                "bytes_read": round(read), "bytes_read_dense": round(dense)}  # fmt: skip
