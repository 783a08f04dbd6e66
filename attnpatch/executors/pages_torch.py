"""The `torch` backend of `pages`: any selection on any device, and lists gathered key by key on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from attnpatch.errors import InputError
from attnpatch.executors import naive
from attnpatch.executors.backends import differentiated
from attnpatch.executors.blocks import pack, softmax, without_garbage
from attnpatch.executors.column_sums import MAX_BLOCK, compute_dtype, matmul, operand, rows_per_block
from attnpatch.executors.lists import one_list, unpack
from attnpatch.executors.threads import on_all_threads

ROWS = 128
"""Most query rows computed at once; also the block of a call without lists."""

Result = tuple[torch.Tensor, torch.Tensor | None]


class Stripe(NamedTuple):
    """The query rows of a call that the selection covers."""

    start: int  # first row
    rows: int
    first: int  # slot of the first row

    @property
    def end(self) -> int:
        """Keys that the last row can see."""
        return self.first + self.rows


def stripe_of(q: torch.Tensor, kv: Any, selection: Any) -> Stripe:
    start, stop, step = (selection.rows or slice(None)).indices(q.shape[2])
    if stop <= start or step != 1:
        raise InputError(f"Selection.rows={selection.rows} of {q.shape[2]} query rows; give some, with step 1.")
    return Stripe(start, stop - start, kv.k.shape[2] - q.shape[2] + start)


def _steps(selection: Any, rows: int, most: int) -> Iterator[tuple[int, int, int]]:
    """(list, first row, end row) of blocks of at most `most` rows that share a list."""
    bq = selection.bq if selection.bq and selection.index is not None else rows
    for start in range(0, rows, bq):
        stop = min(start + bq, rows)
        for at in range(start, stop, most):
            yield start // bq, at, min(at + most, stop)


def run(q: torch.Tensor, kv: Any, selection: Any, ctx: Any, want_lse: bool) -> Result:
    plain = not kv.holes and ctx.softcap is None and ctx.window is None and ctx.mask is None
    return (_gathered if plain and q.device.type == "cpu" else _masked)(q, kv, selection, ctx, want_lse)


def _masked(q: torch.Tensor, kv: Any, selection: Any, ctx: Any, want_lse: bool) -> Result:
    """Any selection on any device, block by block of query rows with a mask over all keys: costs as much as dense."""
    (batch, heads, length, _), (kv_heads, slots) = q.shape, kv.k.shape[1:3]
    stripe = stripe_of(q, kv, selection)
    pos, q_pos = kv.pos, ctx.q_pos
    if not kv.holes:  # slots say it all, and positions need not exist
        pos = torch.arange(slots, device=q.device).expand(batch, 1, -1)
        q_pos = pos[:, 0, slots - length :]
    keys, values = operand(kv.k).transpose(-1, -2), operand(without_garbage(kv.v, kv))
    outs: list[torch.Tensor] = []
    logsums: list[Any] = []
    for which, start, stop in _steps(selection, stripe.rows, rows_per_block(batch, heads, slots, ROWS)):
        rows = slice(stripe.start + start, stripe.start + stop)
        end = slots if kv.holes or ctx.mask is not None else stripe.first + stop
        part, held = one_list(selection, which, end), SimpleNamespace(k=kv.k[:, :, :end], pos=pos[..., :end])
        mask = None if ctx.mask is None else ctx.mask[:, :, rows, :end]
        seen = naive.visible(held, q_pos[:, rows], ctx.window, mask)
        seen = naive._per_query_head(seen, heads) & naive.selected(part, held, q_pos[:, rows], heads)  # [B, Hq, r, end]
        logits = matmul(operand(pack(q[:, :, rows], kv_heads)), keys[..., :end]) * ctx.scaling
        if ctx.softcap is not None:
            logits = torch.tanh(logits / ctx.softcap) * ctx.softcap
        probs, lse = softmax(logits.view(batch, heads, 1, stop - start, end), seen, True)
        probs = probs.view(batch, kv_heads, -1, end)  # [B, Hkv, G*r, end]
        outs.append(matmul(probs.to(values.dtype), values[:, :, :end]).view(batch, heads, stop - start, -1))
        logsums.append(lse)  # [B, Hq, 1, r]
    out = torch.cat(outs, dim=2).to(q.dtype).transpose(1, 2)
    return out, torch.cat(logsums, dim=-1).squeeze(2) if want_lse else None


class _Lists:
    """The slots that each (row, list head) of a CPU call attends, list by list."""

    def __init__(self, selection: Any, stripe: Stripe) -> None:
        given = [x for x in (selection.index, selection.columns) if x is not None]
        self.heads = max((x.shape[1] for x in given), default=1)
        self.page, self.sink, self.window = selection.page, selection.sink, selection.window
        self.columns, self.pages = selection.columns, None
        if selection.index is not None:
            self.pages = unpack(selection.index, selection.count, -(-stripe.end // selection.page))
        self.within = torch.arange(self.page)

    def _of(self, x: torch.Tensor, b: int, head: int) -> torch.Tensor:
        return x[b if x.shape[0] > 1 else 0, head * x.shape[1] // self.heads]

    def slots(self, b: int, head: int, which: int, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Ascending slots below `end` that some row of first .. end - 1 attends, window aside all of the rows.

        Second: bool [end], the slots that need no window; None where there is none.
        """
        listed = torch.empty(0, dtype=torch.long)
        if self.pages is not None:
            pages = self._of(self.pages, b, head)[which].nonzero()  # [n, 1]
            listed = (pages * self.page + self.within).flatten()
            listed = listed[: torch.searchsorted(listed, end)]
        if self.columns is None and not self.sink and not self.window:
            return listed, None
        always = torch.zeros(end, dtype=torch.bool)
        always[listed] = True
        if self.columns is not None:
            columns = self._of(self.columns, b, head).long()
            always[columns[(columns >= 0) & (columns < end)]] = True
        always[: self.sink] = True
        near = always.clone()
        if self.window:
            near[max(0, first - self.window + 1) :] = True
        return near.nonzero().flatten(), always


def _bias(
    scratch: torch.Tensor, slots: torch.Tensor, first: int, rows: int, always: torch.Tensor | None, window: int
) -> torch.Tensor:
    """Additive mask [G*r, n]: -inf where a slot is behind the row, or before its window and there for the window only.

    scratch: [G, R >= r, N >= n], zero but for its last R columns; the last n are used, so only those R are written.
    """
    bias, row = scratch[:, :rows, scratch.shape[2] - slots.shape[0] :], torch.arange(first, first + rows)[:, None]
    tail = slots[-scratch.shape[1] :]  # only slots of the block's own rows can lie behind a row
    bias[..., bias.shape[2] - tail.shape[0] :] = torch.where(tail > row, float("-inf"), 0.0)
    if window and always is not None:
        low, high = torch.searchsorted(slots, torch.tensor([first - window + 1, first + rows - window])).tolist()
        edge = slots[low:high]
        bias[..., low:high].masked_fill_((row - edge >= window) & ~always[edge], float("-inf"))
    return bias.flatten(0, 1)


class _Gathering:
    """A CPU call: the keys of each list are gathered and attended by all query rows and heads that share it.

    A list after the other, head by head, for lists differ in length and padding them would cost more. The calls are
    too short for several threads each, so every thread computes lists of its own.
    """

    def __init__(self, q: torch.Tensor, kv: Any, selection: Any, ctx: Any) -> None:
        (batch, heads, _, dim), kv_heads = q.shape, kv.k.shape[1]
        self.q, self.kv, self.scaling, self.window = q, kv, ctx.scaling, selection.window
        self.stripe = stripe_of(q, kv, selection)
        self.lists = lists = _Lists(selection, self.stripe)
        # kv heads that share a list, and query heads that share it on each of them
        self.spread, self.group = max(1, kv_heads // lists.heads), heads // max(kv_heads, lists.heads)
        self.most = max(1, min(ROWS, selection.bq or ROWS, MAX_BLOCK // (4 * self.group * self.stripe.end)))
        self.out = q.new_zeros(batch, self.stripe.rows, heads, dim)
        self.lse = q.new_full((batch, heads, self.stripe.rows), float("-inf"), dtype=compute_dtype(q))
        self.fresh = differentiated(q, kv.k, kv.v)
        steps = list(_steps(selection, self.stripe.rows, self.most))[::-1]  # the longest first
        self.todo = iter([(b, h, *step) for step in steps for b in range(batch) for h in range(lists.heads)])

    def work(self) -> None:
        """Compute lists until none is left. Several threads may do so at once."""
        scratch = self.q.new_zeros(self.group, self.most, self.stripe.end)
        for b, head, which, start, stop in self.todo:
            listed, always = self.lists.slots(b, head, which, self.stripe.first + start, self.stripe.first + stop)
            if len(listed):
                self._attend(scratch, b, head, start, stop, listed, always)

    def _attend(
        self, scratch: torch.Tensor, b: int, head: int, start: int, stop: int, listed: torch.Tensor,
        always: torch.Tensor | None,
    ) -> None:  # fmt: skip
        spread, group, kv_heads = self.spread, self.group, self.kv.k.shape[1]
        first, rows = self.stripe.first + start, slice(self.stripe.start + start, self.stripe.start + stop)
        bias = _bias(scratch.clone() if self.fresh else scratch, listed, first, stop - start, always, self.window)
        at, kv_at = head * spread * group, head * kv_heads // self.lists.heads
        mine, kv_mine = slice(at, at + spread * group), slice(kv_at, kv_at + spread)
        part, logsum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # SDPA, which hides the log-sum-exp
            self.q[b, mine, rows].reshape(1, spread, -1, self.q.shape[3]),
            self.kv.k[b, kv_mine].index_select(1, listed)[None],
            self.kv.v[b, kv_mine].index_select(1, listed)[None],
            0.0,
            False,
            attn_mask=bias,
            scale=self.scaling,
        )
        blind = 0 if self.window else max(0, int(listed[0]) - first)  # rows before the first slot listed
        part, logsum = part.reshape(spread * group, -1, part.shape[-1]), logsum.reshape(spread * group, -1)
        self.out[b, start + blind : stop, mine] = part[:, blind:].transpose(0, 1)
        self.lse[b, mine, start + blind : stop] = logsum[:, blind:]
        if self.window and not self.fresh:
            scratch[..., self.stripe.end - len(listed) :] = 0


def _gathered(q: torch.Tensor, kv: Any, selection: Any, ctx: Any, want_lse: bool) -> Result:
    call = _Gathering(q, kv, selection, ctx)
    if call.fresh:  # autograd belongs to one thread
        call.work()
    else:
        on_all_threads(call.work)
    return call.out, call.lse if want_lse else None
