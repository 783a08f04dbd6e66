"""The vocabulary between methods and executors. Grows with the first method that needs a word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attnpatch.errors import InputError

if TYPE_CHECKING:
    import torch


def ranked(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices int64 [..., count] of the highest scores fp32 [..., n >= count], best first; ties: the later first."""
    import torch

    bits = scores.float().view(torch.int32)
    # score and place in one integer that orders as the pair does
    key = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) | torch.arange(scores.shape[-1], device=scores.device)
    return key.topk(count, dim=-1).values & 0xFFFFFFFF


@dataclass(frozen=True, eq=False)
class Selection:
    """Which (query, key) pairs are attended: a set, so a pair named twice counts once; never a key after the query.

    Without fields: every held key not after the query (dense causal). With lists, columns, sink or window a key is
    attended if its page is listed, or it is a listed column, or its position is below `sink`, or fewer than `window`
    behind the query. Several Selections that cover the same rows add up (their sets must be disjoint).
    Lists name slots (of the kv given to the executor), not positions; sink and window go by position.
    """

    index: torch.Tensor | None = None  # int32 [B|1, H, R, W] pages, ascending, packed left; H one of 1, Hkv, Hq
    # int32 [B|1, H, R] meant entries of the W; None = W. The host never reads it. One tensor given at several steps
    # says the same in each (it is counted once)
    count: torch.Tensor | None = None
    page: int = 1  # keys per index unit: index i names slots i * page .. i * page + page - 1
    bq: int = 0  # query rows that share a list, counted from the first row of `rows`; 0 = one list for all rows
    columns: torch.Tensor | None = None  # int32 [B|1, H, C] slots for every row besides its list; -1 = unused
    distinct: bool = False  # promise: no column is repeated, nor lies in a listed page; saves looking for it
    sink: int = 0  # keys at positions 0 .. sink - 1
    window: int = 0  # the last keys of each query, itself included
    skip: int = 0  # keys at positions below are left out, whatever names them
    at: torch.Tensor | None = None  # int [B, rows] or [B, Hq, rows] positions the queries are rotated to, not their own
    rows: slice | None = None  # query rows of this call that the term covers; None = all
    # "rank": keys count as if they stood side by side, at their places in the list (`rank_lists`); None = as they are
    positions: str | None = None
    # int32 [B|1, H, R, g], with page 1 and without bq, columns, sink, window and count: list r is for these rows (of
    # `rows`), in any order, -1 = unused, no row in two lists; other rows get nothing. Lists need not ascend, may hold
    # -1 (unused), and name no slot twice unless by entries of weight -inf
    groups: torch.Tensor | None = None
    weight: torch.Tensor | None = None  # fp32, as index, with groups: added to the logits; -inf = not attended
    # bool [B], of a decode step with lists: rows that attend what is named; the others attend every key they may
    only: torch.Tensor | None = None
    # with only: where an executor may leave "logits" fp32 [B, Hq, S] of these other rows, scaled, soft-capped and to
    # base 2, and "lse" fp32 [B, Hq, n], to base 2, of the parts it read the keys in; -inf = an empty one
    leave: dict[str, torch.Tensor] | None = None

    @property
    def named(self) -> bool:
        """Whether keys are named at all; otherwise every held key not after the query is meant (from `skip` on)."""
        return self.index is not None or self.columns is not None or bool(self.sink or self.window)

    @property
    def dense(self) -> bool:
        """Whether every held key not after the query is attended."""
        return not self.named and not self.skip


@dataclass(frozen=True, eq=False)
class ColumnReweight:
    """New attention weights for a few key columns; keys, values and the cache stay as they are.

    "renorm": the softmax numerator of a column is multiplied by its factor and the row renormalised, which is the same
    as adding log(factor) to its logit. Factors must be above 0.
    "give_back": the weight of a column is multiplied by its factor, and what is freed goes to the row's other visible
    keys in proportion to their weights. Factors must lie in 0..1. Where the other keys hold less than 1e-3 (1/64 for
    bfloat16 output, 1/512 for float16) they get less, down to nothing, and the columns keep the rest: rounding would
    outweigh them otherwise. A row sums to one always.
    "scale_logit": the logit of a column is multiplied by its factor, before a soft cap, as if its key were; the row is
    renormalised. Factors must be above 0.
    Factor 1 changes nothing. A column after the query, or one that was evicted, is left out. No position is listed
    twice in a head, also not by two methods.
    """

    columns: torch.Tensor  # int32 [B|1, H, C] token positions, -1 = unused; H one of 1, Hkv, Hq
    factor: torch.Tensor  # fp32 [B|1, H', C], H' one of 1, Hkv, Hq
    rule: str = "renorm"  # "renorm" | "give_back" | "scale_logit"
    rows: torch.Tensor | None = None  # bool [B, Hq, T] query rows that are changed; None = all

    def validate(self, batch: int, heads: int, kv_heads: int, rows: int) -> None:
        """Raise InputError unless shapes, factors and columns fit q [batch, heads, rows, D]. Waits for the device."""
        for name, x in (("columns", self.columns), ("factor", self.factor)):
            if x.ndim != 3 or x.shape[0] not in (1, batch) or x.shape[1] not in (1, kv_heads, heads):
                wanted = f"[1 or {batch}, 1 or {kv_heads} or {heads}, C]"
                raise InputError(f"ColumnReweight {name} of shape {tuple(x.shape)}; expected {wanted}.")
        if self.columns.shape[-1] != self.factor.shape[-1]:
            raise InputError(f"{self.columns.shape[-1]} columns, but {self.factor.shape[-1]} factors; give one each.")
        if self.rule not in ("renorm", "give_back", "scale_logit"):
            raise InputError(f"rule {self.rule!r} is not allowed; choose one of 'renorm', 'give_back', 'scale_logit'.")
        low, high = self.factor.amin(), self.factor.amax()
        if bool((low < 0) | (high > 1)) if self.rule == "give_back" else bool(low <= 0):
            wanted = "within 0..1" if self.rule == "give_back" else "above 0"
            raise InputError(f"rule {self.rule!r} needs factors {wanted}; got {float(low)} to {float(high)}.")
        ordered = self.columns.sort(-1).values
        if bool(((ordered.diff(dim=-1) == 0) & (ordered[..., 1:] >= 0)).any()):
            raise InputError("ColumnReweight lists a position twice in a head; list it once.")
        if self.rows is not None and tuple(self.rows.shape) != (batch, heads, rows):
            raise InputError(f"rows of shape {tuple(self.rows.shape)}; expected [{batch}, {heads}, {rows}].")


@dataclass(frozen=True, eq=False)
class Virtual:
    """Entries that stand for tokens which are gone: seen by every later query, each counted exp(logw) times.

    They have no position, and are older than whatever comes. k, v: [B, Hkv, E, D], fp32 or as the model's; logw: fp32
    [B, Hkv, E] is added to an entry's logit, after a soft cap; -inf = there is none.
    """

    k: torch.Tensor
    v: torch.Tensor
    logw: torch.Tensor

    def rows(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> Virtual:
        """With a row operation applied to all three."""
        return Virtual(pick(self.k), pick(self.v), pick(self.logw))


@dataclass(frozen=True)
class KeepSet:
    """Which slots of a cache layer stay. Give `index` (rebuild) or `drop` (overwrite in place), never both.

    index: integer [B, H', M], ascending, H' in {1, Hkv}: slots that stay.
    count: integer [B, H'] or None: how many of the M are meant (rows shorter than the budget); None = all M.
    drop:  integer [B, H', 1]: the slot that the newest entry overwrites, O(1); -1 = none.
    shrink: with drop, the layer gives a slot up; every row must then drop or have a free slot.
    packed: the counts of the heads differ, and the layer stores them without padding.
    limited: with packed, KV heads that hold `limit` entries at most from now on, for they drop one at each step beyond
    it; the layer gives them no room to grow. Say `limit` (the most of any row) at each drop too, where it changes.
    extra: what stands for the entries that went, now and before; the layer attends it until another is given.
    layer: number of the covered layer that is meant, this or an earlier one; None = this one.
    loses: bool [B], rows that lose an entry, where heads of other processes lose some too; None = what is seen here.
    """

    index: torch.Tensor | None = None
    count: torch.Tensor | None = None
    drop: torch.Tensor | None = None
    shrink: bool = True
    packed: bool = False
    layer: int | None = None
    limited: tuple[int, ...] = ()
    limit: int = 0
    extra: Virtual | None = None
    loses: torch.Tensor | None = None

    def validate(self, batch: int, kv_heads: int, slots: int) -> None:
        """Raise InputError unless shapes, ranges and order fit a layer of [batch, kv_heads, slots]."""
        given = self.index if self.index is not None else self.drop
        if given is None or (self.index is not None and self.drop is not None):
            raise InputError("a KeepSet needs exactly one of index and drop.")
        if given.ndim != 3 or given.shape[0] != batch or given.shape[1] not in (1, kv_heads):
            raise InputError(f"KeepSet of shape {tuple(given.shape)}; expected [{batch}, 1 or {kv_heads}, M].")
        if given.numel() and (int(given.min()) < (0 if self.drop is None else -1) or int(given.max()) >= slots):
            raise InputError(f"KeepSet names slots outside 0..{slots - 1}.")
        if self.drop is not None and self.drop.shape[-1] != 1:
            raise InputError("KeepSet drop names one slot of each head; to drop several, give index.")
        if self.index is not None and self.count is None and bool((given.diff(dim=-1) <= 0).any()):
            raise InputError("KeepSet index must ascend without repeats.")
        if self.extra is not None:
            shapes = self.extra.k.shape[:3], self.extra.v.shape[:3], self.extra.logw.shape
            if len(set(shapes)) > 1 or shapes[0][:2] != (batch, kv_heads):
                raise InputError(
                    f"KeepSet extra of shapes {', '.join(str(tuple(s)) for s in shapes)}; expected [{batch}, "
                    f"{kv_heads}, E] for all three."
                )

    @classmethod
    def top(
        cls, scores: torch.Tensor, capacity: Sequence[int] | torch.Tensor, pos: torch.Tensor,
        tail: int | Sequence[int] = 0, head: int = 0, ragged: bool = True, layer: int | None = None,
    ) -> KeepSet:  # fmt: skip
        """The best `capacity[b]` slots of each row, always with its first `head` and last `tail` tokens.

        scores: fp32 [B, H', S]; pos: int [B, 1|H', S] true positions, -1 = empty slot (never kept).
        tail may differ by row. Ties go to the later slot. Rows with fewer tokens are filled up and counted.
        ragged=False: no slot is empty and all rows are alike, so the host need not wait for the device.
        capacity int [B, H']: by head too; the layer then stores the heads without padding. layer: see the class.
        """
        import torch

        heads = scores.shape[1]
        pos = pos.expand(-1, heads, -1)  # [B, H', S]
        valid = pos >= 0
        last = pos.amax(dim=-1, keepdim=True)  # newest position of the row
        alike = isinstance(tail, int) or len(set(tail)) == 1
        if alike:
            oldest = last - (tail if isinstance(tail, int) else tail[0])
        else:
            oldest = last - torch.as_tensor(tail, device=pos.device)[:, None, None]
        pinned = valid & ((pos > oldest) | (pos < head))
        # finite, so that no real slot ties with an empty one
        rank = scores.float().clamp(min=torch.finfo(torch.float32).min)
        rank = rank.masked_fill(pinned, float("inf")).masked_fill(~valid, float("-inf"))
        by_head = isinstance(capacity, torch.Tensor)
        width = min(int(capacity.max()) if by_head else max(capacity), scores.shape[-1])  # type: ignore[union-attr]
        index = ranked(rank, width)  # [B, H', width]
        if not ragged and not by_head:
            return cls(index=index.sort(dim=-1).values, layer=layer)
        if by_head:
            room = capacity.to(scores.device).clamp(max=width)  # type: ignore[union-attr]  # [B, H']
        else:
            room = torch.as_tensor(list(capacity), device=scores.device)[:, None].clamp(max=width)  # [B, 1]
        count = torch.minimum(valid.sum(-1), room)  # [B, H']
        meant = torch.arange(width, device=scores.device) < count[..., None]
        ascending = torch.where(meant, index, index + scores.shape[-1]).sort(dim=-1).values
        index = torch.where(meant, ascending, ascending - scores.shape[-1])
        full = by_head or len(set(capacity)) == 1
        if full:  # at a prompt the host may wait, in a graph it may not
            full = not torch.compiler.is_compiling() and not bool((count < width).any())
        return cls(index=index, count=None if full else count, packed=by_head, layer=layer)

    @classmethod
    def those(
        cls, stay: torch.Tensor, limited: tuple[int, ...] = (), limit: int = 0, extra: Virtual | None = None
    ) -> KeepSet:
        """The slots that bool [B, Hkv, S] names, heads stored without padding. Waits for the device.

        limited, limit, extra: see the class.
        """
        import torch

        count = stay.sum(-1)
        width = int(count.max())
        place = torch.where(stay, stay.long().cumsum(-1) - 1, width)  # what goes is written behind
        index = place.new_zeros(*stay.shape[:2], width + 1)
        index.scatter_(-1, place, torch.arange(stay.shape[-1], device=stay.device).expand_as(place))
        return cls(index=index[..., :width], count=count, packed=True, limited=limited, limit=limit, extra=extra)

    @classmethod
    def drop_worst(
        cls, scores: torch.Tensor, pos: torch.Tensor, limit: torch.Tensor, shrink: bool = True
    ) -> KeepSet:  # fmt: skip
        """One slot to overwrite in each head: the lowest score where a row holds more than `limit[b]`, else none (-1).

        scores: fp32 [B, H', S], +inf = protected; pos: int [B, 1|H', S]; limit: int [B]. Ties drop the older token.
        Never waits for the device. shrink: see the class.
        """
        import torch

        pos = pos.expand(-1, scores.shape[1], -1)
        valid = pos >= 0
        over = valid.sum(-1, keepdim=True) > limit[:, None, None]  # [B, H', 1]
        lowest = scores.masked_fill(~valid, float("inf"))
        worst = valid & (lowest == lowest.amin(-1, keepdim=True))
        far = torch.iinfo(pos.dtype).max
        oldest = torch.where(worst, pos, far).argmin(-1, keepdim=True)
        return cls(drop=torch.where(over, oldest, -1), shrink=shrink)
