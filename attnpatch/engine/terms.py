"""From what methods decide to attention output: the terms of a selection, added up; then changed column weights."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from attnpatch.decisions import Selection, Virtual
from attnpatch.engine.stopwatch import Stopwatch
from attnpatch.errors import ConfigError
from attnpatch.executors import dense, dispatch, lists, merging, reweight
from attnpatch.switches import switch

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.breakeven import Limits
    from attnpatch.engine.call import KV, Call, Ctx
    from attnpatch.engine.layer import PatchLayer
    from attnpatch.patch import Patch

Result = tuple[torch.Tensor, torch.Tensor | None]
DENSE = Selection()
HELD = 2**30  # bytes of lists that may wait until the share of the whole prompt is known


def attend(patch: Patch, call: Call, layer: PatchLayer, index: int, q: Tensor, kv: KV, ctx: Ctx, lse: bool) -> Result:
    """Attention of q [B, Hq, T, D] over what `patch` selects; (out [B, T, Hq, D], lse [B, Hq, T] if asked for)."""
    # what keeps the compiler out takes its time in each layer, so it is only asked where there is a compiler
    work = _untraced if torch.compiler.is_compiling() else _attend
    return work(patch, call, layer, q, kv, ctx, lse)


def _attend(patch: Patch, call: Call, layer: PatchLayer, q: Tensor, kv: KV, ctx: Ctx, lse: bool) -> Result:
    if not torch.is_inference_mode_enabled():  # methods write into what they keep
        for name, x in kv.rows.items():
            kv.rows[name] = x.clone() if x.is_inference() else x
    limits = None if patch.repositions else call.limits(patch, q)  # dense would leave the trained positions
    note = _not_now(patch, layer, kv, ctx) or _too_short(patch, kv, limits)
    watch = layer.watch = layer.watch or Stopwatch(q.device)
    begin = watch.mark() if ctx.phase == "prefill" and not note else None
    decision = None if note else patch.select(q, kv, ctx)
    if decision is None:
        note = note or "dense: the method's own choice"
    if ctx.phase == "prefill" or "prefill" not in call.plan.selectors:  # steps leave what is said of the prompt
        layer.note = note
    step = ctx.event == "step"
    if decision is None:
        if step:
            layer.tally.close(kv, ctx, whole=True)
            plain = not (lse or kv.holes) and ctx.softcap is None and ctx.mask is None and ctx.window is None
            out = dense.single(q, kv.k, kv.v, ctx.scaling) if plain else None
            if out is not None:
                return out, None
        return dispatch.run(q, kv, DENSE, ctx, lse)
    if limits is not None and (most := limits.most(kv.S)) < 1 and not patch.merges:
        decision, share = _told(patch, decision, q, kv, ctx)
        if share is not None and share > most:
            layer.note = f"dense: {share:.0%} of the pages chosen, more than the {most:.0%} that pay here"
            watch.note("all", begin)
            return dispatch.run(q, kv, DENSE, ctx, lse)
    if step and isinstance(decision, Selection) and decision.rows is None:  # nothing to add up
        result = dispatch.run(turned(q, decision, ctx), kv, decision, ctx, lse or patch.merges)
        layer.tally.term(decision, kv)
        layer.tally.close(kv, ctx)
        _explain(layer, q, kv, decision, ctx)
        return result
    total = _Total(q, lse or patch.merges)

    def compute(term: Selection) -> Result:
        query = turned(q, term, ctx)
        since = None if begin is None else watch.mark()
        result = dispatch.run(query, kv, term, ctx, total.want_lse)
        again = total.add(term.rows, *result)
        if step:
            layer.tally.term(term, kv)
        if since is not None:
            watch.note("computing", since)
        _record(layer, term, q.shape[2], kv.S, again=again)
        _explain(layer, q, kv, term, ctx)
        return result

    each_term(decision, compute)
    if step:
        layer.tally.close(kv, ctx)
    if begin is not None:
        watch.note("all", begin)
    return total.result()


# a graph break inside would turn a generator into the tuple of what it yields unanswered
_untraced = torch.compiler.disable(_attend)


def _explain(layer: PatchLayer, q: Tensor, kv: KV, term: Selection, ctx: Ctx) -> None:
    """Note once what computes the layer's lists."""
    if not layer.backend and (term.index is not None or term.columns is not None):
        layer.backend = dispatch.explain(q, kv, term, ctx)


def _told(patch: Patch, decision: Any, q: Tensor, kv: KV, ctx: Ctx) -> tuple[Any, float | None]:
    """The decision, and the share of the causal pages that it names. Waits for the device: once a layer, in prefill.

    Its terms are held meanwhile, up to HELD bytes of lists; beyond, the method chooses once more.
    """
    held: list[Selection] = []
    size = 0

    def given() -> Iterator[Selection]:
        nonlocal size
        for term in decision if isinstance(decision, (list, Generator)) else [decision]:
            size += sum(x.nbytes for x in (term.index, term.count) if x is not None)
            if size <= HELD:
                held.append(term)
            else:
                held.clear()
            yield term

    share = lists.share(given(), q.shape[2], kv.S, ctx.q_pos if ctx.ragged else None)
    return (held if size <= HELD else patch.select(q, kv, ctx)), share


def each_term(
    decision: Selection | list[Selection] | Generator[Selection, Any, None], compute: Callable[[Selection], Result]
) -> None:
    """Compute the terms of a decision; a generator receives each term's (out, lse) as the value of its yield."""
    if not isinstance(decision, Generator):
        for term in decision if isinstance(decision, list) else [decision]:
            compute(term)
        return
    answer = None
    while True:
        try:
            term = decision.send(answer)
        except StopIteration:
            return
        answer = compute(term)


def summed(decision: Any, q: Tensor, kv: KV, ctx: Ctx, lse: bool = True) -> Result:
    """(out [B, T, Hq, D], lse [B, Hq, T] if asked for) of a decision, outside a model; for what measures a method."""
    total = _Total(q, lse)

    def compute(term: Selection) -> Result:
        result = dispatch.run(turned(q, term, ctx), kv, term, ctx, lse)
        total.add(term.rows, *result)
        return result

    each_term(decision, compute)
    return total.result()


def reweigh(patches: Sequence[Patch], q: Tensor, kv: KV, ctx: Ctx, out: Tensor, lse: Tensor | None) -> Tensor:
    """out [B, T, Hq, D] after each method changed the weights of its columns, in turn; lse [B, Hq, T] stays as it is.

    A later method sees in ctx.lse the log-sum-exp by which all columns that no method listed have their new weights.
    """
    now: Any = lse
    ctx.out, ctx.lse = out, now
    for patch in patches:
        decision = patch.reweight(q, kv, ctx)
        if decision is None:
            continue
        if switch("ATTNPATCH_DEBUG", False):  # waits for the device
            decision.validate(q.shape[0], q.shape[1], kv.k.shape[1], q.shape[2])
        out, now = reweight.run(out, now, q, kv, decision, ctx, want_lse=patch is not patches[-1])
        ctx.out, ctx.lse = out, now
    return out


def _not_now(patch: Patch, layer: PatchLayer, kv: KV, ctx: Ctx) -> str:
    """Why this call runs dense without asking the method; "" = it is asked."""
    if not (kv.complete and layer.aligned) and patch.needs_complete_kv:
        return "dense: earlier entries were evicted"
    if kv.holes and ctx.event != "step" and patch.needs_complete_kv:
        return "dense: a later turn of a padded batch"
    return "dense: a 4-D attention mask" if ctx.mask is not None else ""


def _too_short(patch: Patch, kv: KV, limits: Limits | None) -> str:
    if limits is None or kv.S >= limits.tokens:
        return ""
    return f"dense: {kv.S} tokens, and {patch.name} pays here from {limits.tokens} (attnpatch doctor)"


def turned(q: Tensor, term: Selection, ctx: Ctx) -> Tensor:
    """q [B, Hq, T, D] with the rows of the term rotated to the positions `term.at`; q itself where there are none."""
    if term.at is None:
        return q
    rows = term.rows or slice(None)
    if term.at.ndim == 2:
        moved = ctx.turn(q[:, :, rows], term.at - ctx.q_pos[:, rows])
    else:  # every head on its own, as a row of a batch
        by = (term.at - ctx.q_pos[:, None, rows]).flatten(0, 1)
        moved = ctx.turn(q[:, :, rows].flatten(0, 1)[:, None], by).view_as(q[:, :, rows])
    if term.rows is None:
        return moved
    whole = q.clone()
    whole[:, :, rows] = moved
    return whole


def _record(layer: PatchLayer, term: Selection, rows: int, slots: int, again: bool = False) -> None:
    """Add a term's listed pages, its sink and its window to the layer's density; the host does not wait.

    again: an earlier term covers the same rows, so that their causal pages are counted.
    """
    if term.index is None or not (term.bq or term.groups is not None):
        return
    bq, index = term.bq or 1, term.index
    cell = bq * term.page  # pairs of a page and a list
    start, stop, _ = (term.rows or slice(None)).indices(rows)
    first, last = slots - rows + start, slots - rows + stop
    most = cell * sum(-(-min(end, last) // term.page) for end in range(min(first + bq, last), last + bq, bq))
    layer.grid += 0 if again else most
    width = index.new_full(index.shape[:-1], index.shape[-1]) if term.count is None else term.count
    if term.groups is not None:
        named = index >= 0 if term.weight is None else (index >= 0) & (term.weight > float("-inf"))
        width = named.sum(-1) * (term.groups >= 0).sum(-1)  # [B|1, H, R]
    pages = width.float().sum(-1).expand(layer.keys.shape[0], -1) * cell
    if near := term.sink + term.window:  # a row of n keys sees min(n, near) of them; lists may name some again
        ramp = range(first + 1, min(last, near) + 1)
        beside = sum(ramp) + near * max(0, last - max(first, near))
        pages = (pages + beside).clamp(max=most)
    layer.pages = pages if layer.pages is None else layer.pages + pages


def with_extra(extra: Virtual, q: Tensor, ctx: Ctx, out: Tensor, lse: Any) -> tuple[Tensor, Tensor]:
    """out [B, T, Hq, D], lse [B, Hq, T] with the entries of `extra` attended besides, by every query."""
    wide = lse.dtype
    packs = q.to(wide).unflatten(1, (extra.k.shape[1], -1))  # [B, Hkv, G, T, D]
    absent = (extra.logw == float("-inf"))[..., None]  # [B, Hkv, E, 1]
    keys, values = (x.to(wide).masked_fill(absent, 0)[:, :, None] for x in (extra.k, extra.v))
    logits = packs @ keys.transpose(-1, -2) * ctx.scaling  # [B, Hkv, G, T, E]
    if ctx.softcap is not None:
        logits = torch.tanh(logits / ctx.softcap) * ctx.softcap
    logits = logits + extra.logw.to(wide).clamp(min=-1e30)[:, :, None, None]  # finite, so that gradients are
    mass = logits.logsumexp(-1)  # [B, Hkv, G, T]
    theirs = (logits.softmax(-1) @ values).flatten(1, 2).transpose(1, 2)  # [B, T, Hq, D]
    return merging.run(out, lse, theirs, mass.flatten(1, 2))


class _Total:
    """The sum of terms: rows covered once are copied, rows covered again are merged in fp32."""

    def __init__(self, q: Tensor, want_lse: bool) -> None:
        self.q, self.want_lse = q, want_lse
        self.out: Any = None  # [B, T, Hq, D]
        self.lse: Any = None  # [B, Hq, T]
        self.covered: list[tuple[int, int]] = []  # disjoint

    def add(self, rows: slice | None, out: Tensor, lse: Tensor | None) -> bool:
        """out [B, rows, Hq, D], lse [B, Hq, rows]. Whether an earlier term covered these rows."""
        batch, heads, length, dim = self.q.shape
        start, stop, _ = (rows or slice(None)).indices(length)
        if self.out is None and (start, stop) == (0, length):
            self.out, self.lse = out, lse
        elif self.out is None:
            self.out = out.new_zeros(batch, length, heads, out.shape[-1])
            self.lse = None if lse is None else lse.new_full((batch, heads, length), float("-inf"))
        again = sum(max(0, min(b, stop) - max(a, start)) for a, b in self.covered) == stop - start
        if again:
            self._merge(start, stop, out, lse)
        elif any(start < b and a < stop for a, b in self.covered):
            raise ConfigError("terms of one decision must cover the same query rows, or rows that do not overlap.")
        elif self.out is not out:
            self.out[:, start:stop] = out
            if lse is not None:
                self.lse[:, :, start:stop] = lse
        if not again:
            self.covered.append((start, stop))
        return again

    def _merge(self, start: int, stop: int, out: Tensor, lse: Any) -> None:
        if lse is None:
            raise ConfigError("terms that share query rows need `merges = True` on the patch.")
        merged, both = merging.run(self.out[:, start:stop], self.lse[:, :, start:stop], out, lse)
        if (start, stop) == (0, self.q.shape[2]):
            self.out, self.lse = merged, both
        else:
            self.out[:, start:stop], self.lse[:, :, start:stop] = merged, both

    def result(self) -> Result:
        if self.out is None:
            raise ConfigError("a generator `select` must yield at least one Selection, or be no generator.")
        return self.out, self.lse
