"""XAttention: block lists for the prompt from antidiagonal sums of the logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnpatch.errors import ConfigError
from attnpatch.patch import Patch, option, register

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.decisions import Selection
    from attnpatch.engine.call import KV, Ctx

MOST = 1.01


def reference_chunk(length: int) -> int:
    """Query rows that the reference estimates at once for a prompt of `length` tokens (the released code)."""
    power = 1 << max(0, length - 1).bit_length()
    return max(2048, min(max(2048, power), 2**28 // power))


@register("xattention")
@dataclass
class XAttention(Patch):
    """XAttention (arXiv 2503.16428, ICML 2025; mit-han-lab/x-attention). Prompt only, decoding stays dense.

    The softmax of antidiagonal sums over `stride` x `stride` tiles estimates each block's mass. A row of query blocks
    reads the first block, its own, and the largest others until they hold `threshold` of the row's mass, the crossing
    one included. `threshold` is one number, or a table [layer][query head] over the covered layers.

    Ties go to the more recent block. The softmax scale is the model's own. The reference treats the first chunk of a
    prompt differently (up to one block more a row); `first_chunk_quirk` does as it does. A prefix that is no multiple
    of `stride` changes the estimate of the first block of a chunk only: its first tile lacks the cached queries.
    """

    threshold: Any = option(0.9, "share of the estimated mass to read, 0 to 1.01; or a list per layer and query head")
    stride: int = option(16, "side of the tiles whose antidiagonals are summed; divides block_size", choices=(4, 8, 16))
    block_size: int = option(128, "tokens of a block", choices=(32, 64, 128))
    first_chunk_quirk: bool = option(False, "the reference's rule for the query blocks of its first chunk")

    title = "XAttention"
    paper = "arXiv 2503.16428"
    tensor_parallel = True
    stage = "prefill"
    phases = frozenset({"prefill"})

    def __post_init__(self) -> None:
        super().__post_init__()
        table = self.threshold if isinstance(self.threshold, (list, tuple)) else [[self.threshold]]
        if not table or not all(isinstance(row, (list, tuple)) and len(row) == len(table[0]) > 0 for row in table):
            raise ConfigError(
                f"{self.name}: a threshold table needs one list per layer, each one number per query head."
            )
        for value in (x for row in table for x in row):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MOST:
                raise ConfigError(
                    f"{self.name}: threshold={value!r} is out of range; give 0 <= threshold <= {MOST}, e.g. 0.9, or a "
                    "list per layer of one such number per query head."
                )

    def select(self, q: Tensor, kv: KV, ctx: Ctx) -> Iterator[Selection] | None:
        if ctx.softcap is not None or kv.S <= 2 * self.block_size:  # the first block and the diagonal are everything
            return None
        return self._stripes(q, kv, ctx, self._thresholds(q, ctx))

    def _thresholds(self, q: Tensor, ctx: Ctx) -> Tensor | float:
        """This layer's thresholds: a number, or [Hq, 1]. Raises ConfigError if the table does not fit."""
        from attnpatch.executors.column_sums import compute_dtype

        if not isinstance(self.threshold, (list, tuple)):
            return float(self.threshold)
        shape, wanted = (len(self.threshold), len(self.threshold[0])), (
            ctx.n_layers, ctx.shard.count(q.shape[1])
        )  # fmt: skip
        if shape != wanted:
            raise ConfigError(
                f"{self.name}: the threshold table is {shape[0]} layers x {shape[1]} heads, the model has {wanted[0]} "
                f"patched layers x {wanted[1]} query heads; give a table of that size, or one number."
            )
        row = ctx.shard.part(self.threshold[ctx.layer], q.shape[1])
        return self.constants.of(row, q.device, compute_dtype(q))[:, None]

    def _stripes(self, q: Tensor, kv: KV, ctx: Ctx, threshold: Tensor | float) -> Iterator[Selection]:
        """Spec steps 1-5, stripe by stripe.

        The reference sums in float64. Sums in the mass's own float32 move the share at which a row stops by some 1e-6
        of it, as the order of sums in the estimate itself does.
        """
        from attnpatch.decisions import Selection
        from attnpatch.executors import antidiagonal, mass_lists, selecting

        size, start = self.block_size, kv.S - q.shape[2]
        end = selecting.lengths(ctx.q_pos)
        keys = selecting.without_pads(kv.k, end) if ctx.ragged else kv.k
        keys = antidiagonal.reduced(keys, size, self.stride)
        for rows, first, last in selecting.stripes(start, q.shape[2], size, q.shape[0] * q.shape[1]):
            at = start + rows.start
            part = selecting.without_pads(q[:, :, rows], end, at) if ctx.ragged else q[:, :, rows]
            mass = antidiagonal.run(
                part, keys, start=at, end=end, block=size, stride=self.stride, scaling=ctx.scaling
            )  # [B, Hq, R, W]
            early = self._early(ctx, first, last, q.device) if self.first_chunk_quirk else None
            index, count = mass_lists.run(mass, end, size, first, threshold, early=early)
            del mass  # not while its lists are read
            yield Selection(index=index, count=count, page=size, bq=size, rows=rows)

    def _early(self, ctx: Ctx, first: int, last: int, device: Any) -> Tensor:
        """bool [B, 1, R]: query blocks first .. last - 1 that begin in the reference's first chunk."""
        import torch

        chunk = self.constants.of([reference_chunk(n) for n in ctx.prompt_len], device)  # [B]
        begin = torch.arange(first, last, device=device) * self.block_size
        return (begin < chunk[:, None])[:, None]
