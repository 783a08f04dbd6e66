"""Quest: each decode step reads the pages of keys that may hold the largest dot products with its query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnpatch.budget import Budget
from attnpatch.errors import ConfigError
from attnpatch.patch import Patch, option, register

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.decisions import Selection
    from attnpatch.engine.call import KV, Ctx


@register("quest")
@dataclass
class Quest(Patch):
    """Quest (arXiv 2406.10774; mit-han-lab/Quest). Sparse decoding; the prefill is dense, the cache stays complete.

    Of each page of keys the smallest and largest value of every channel are kept. A decode step bounds q . k of each
    page by them, and attends the max(`min_pages`, budget // page_size) best pages, where these are not everything.
    Chosen here where the spec leaves it open: the page of the newest key is always among them (`keep_last`); ties go
    to the later page; pages count a row's real tokens; a ratio is of the keys held.
    """

    budget: Any = option("2048", "keys attended per head and decode step: tokens, or a ratio of those held")
    page_size: int = option(16, "keys of a page", low=1)
    min_pages: int = option(3, "fewest pages attended", low=1)
    dense_layers: int = option(2, "first layers that stay dense", low=0)
    keep_last: bool = option(True, "always attend the page of the newest key")
    gqa: str = option(
        "per_query_head", "pages of each query head, or of each KV head by the group's best bound",
        choices=("per_query_head", "group_max"),
    )  # fmt: skip

    title = "Quest"
    paper = "arXiv 2406.10774"
    tensor_parallel = True
    stage = "decode"
    phases = frozenset({"decode"})

    def __post_init__(self) -> None:
        self.budget = Budget.parse(self.budget)
        super().__post_init__()
        if self.budget.kind == "bytes":
            raise ConfigError(
                f"quest: budget {self.budget} is in bytes, but nothing is evicted; give tokens or a ratio."
            )

    def pages(self, keys: int) -> int:
        """Pages that a query attends of `keys` keys, if there are as many."""
        return max(self.min_pages, self.budget.tokens(keys) // self.page_size)

    def select(self, q: Tensor, kv: KV, ctx: Ctx) -> Selection | None:
        """None (dense), or the pages of each head as one list."""

        from attnpatch.decisions import Selection
        from attnpatch.executors import page_bounds, top_slots

        width = self.pages(kv.S)
        if ctx.layer < self.dense_layers or width * self.page_size >= kv.S:
            return None
        newest = ctx.q_pos[:, -1]  # [B]
        bounds = self.bounds(kv, newest)
        scores = page_bounds.scores(
            q, bounds, self.page_size, newest + 1 if kv.holes else None,
            last=newest if self.keep_last else None, largest=self.gqa == "group_max",
        )  # fmt: skip  # [B, Hq|Hkv, n]
        ctx.tally.scored += 2 * bounds.shape[2]  # of each page two vectors
        # shorter rows may attend fewer pages
        most = self._count(newest + 1)[:, None] if kv.holes else None  # [B, 1]
        index, count = top_slots.run(scores, width, most)
        return Selection(index[:, :, None], count[:, :, None] if kv.holes else None, self.page_size)

    def _count(self, keys: Tensor) -> Tensor:
        """`pages`, but no more than there are, for keys int [B]: int32 [B]."""
        import torch

        if self.budget.kind == "ratio":
            wanted = (keys.double() * self.budget.value - 1e-9).ceil().long().clamp(min=1) // self.page_size
        else:
            wanted = torch.full_like(keys, self.pages(0))
        held = (keys + self.page_size - 1) // self.page_size
        return torch.minimum(wanted.clamp(min=self.min_pages), held).to(torch.int32)

    def bounds(self, kv: KV, newest: Tensor) -> Tensor:
        """Bounds [B, Hkv, n, 2D] of all pages (`page_bounds`), kept with the layer and brought up to date.

        newest: int [B], slot of each row's newest key, -1 where the step brought none.
        """
        import torch

        from attnpatch.executors import page_bounds

        old, done, page = kv.rows.get("page_bounds"), kv.plain.get("page_bounds", 0), self.page_size
        kv.plain["page_bounds"] = kv.S  # slots that are summarised
        pages = -(-kv.S // page)
        if old is not None and kv.S - done <= 1:
            old = kv.rows["page_bounds"] = page_bounds.widened(old, pages)
            page_bounds.add(old, kv.k, page, newest)
            return old
        # appended since: a prompt, a later turn. Rows of a padded batch end where only the device knows: all anew
        first = done // page if old is not None and not kv.holes else 0
        filled = kv.pos >= 0 if kv.holes else None
        new = page_bounds.summarise(kv.k[:, :, first * page :], page, filled)
        kv.rows["page_bounds"] = new if not first or old is None else torch.cat([old[:, :, :first], new], dim=2)
        return kv.rows["page_bounds"]
