"""SALE: every pair of the prompt is looked at in few bits, and blocks are read whose estimate stands out."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from attnpatch.errors import ConfigError
from attnpatch.patch import Patch, option, register

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.decisions import Selection
    from attnpatch.engine.call import KV, Ctx

FLOOR = 1e-5  # a smaller threshold means a dense head
STEPS = (0.008, 0.004, 0.002, 0.001, 0.0005, 0.00025, 0.000125, 0.0)  # what calibration chooses from


class Keys(NamedTuple):
    """The keys of a layer as the estimate needs them."""

    low: Any  # Low of k - mean [B, Hkv, n, D], n up to a whole page
    mean: Tensor  # fp32 [B, Hkv, 1, D] over each row's keys
    bias: Tensor  # fp32 [B, Hq, n] mean query . (k - mean)
    query: Tensor  # fp32 [B, Hq, 1, D] mean over each row's queries in this call


@register("sale")
@dataclass
class SALE(Patch):
    """SALE (arXiv 2505.24179; BirdChristopher/SALE). Prompt only, decoding stays dense.

    A block of queries reads the first block of keys and its last `local_window` and more, exactly; the log-sum-exp of
    that is the yardstick. Of the blocks between, those are read in which one estimated weight is above `tau` times it.
    The estimate multiplies queries and keys rounded to `bits` bits, after their means are taken off; the mean query's
    part is kept in full. `tau` is one number, or a table [layer][query head] over the covered layers (`calibrate`);
    below 1e-5 a head is dense.

    Chosen here where the spec leaves it open: the threshold is fixed from the first part (the reference's two-pass
    form); scales belong to single tokens unless `scales` says otherwise; the mean of the keys is over all keys held,
    that of the queries over this chunk's. A row of a batch with no more than `dense_up_to` tokens is dense. Query
    blocks lie at absolute multiples of `block_size_q`.
    """

    tau: Any = option(0.004, "least weight, relative to first and local keys; a number, or a list per layer and head")
    bits: int = option(4, "bits of the estimate's queries and keys", choices=(4, 8))
    scales: str = option("token", "what shares a scale: one token, or a CUDA thread's", choices=("token", "thread"))
    block_size_q: int = option(64, "queries of a block", choices=(32, 64, 128))
    block_size_k: int = option(32, "keys of a block; the first block is always read", choices=(16, 32, 64))
    local_window: int = option(128, "last keys of every query that are always read", low=1)
    segment: int = option(128, "the part between is a multiple of this many keys; the rest is local", low=1)
    dense_up_to: int = option(1024, "tokens up to which a row is dense", low=0)

    title = "SALE"
    paper = "arXiv 2505.24179"
    tensor_parallel = True
    stage = "prefill"
    phases = frozenset({"prefill"})
    merges = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.segment % self.block_size_k:
            raise ConfigError(
                f"{self.name}: segment={self.segment} is not a multiple of block_size_k={self.block_size_k}; "
                "change one of them."
            )
        table = self.tau if isinstance(self.tau, (list, tuple)) else [[self.tau]]
        if not table or not all(isinstance(row, (list, tuple)) and len(row) == len(table[0]) > 0 for row in table):
            raise ConfigError(f"{self.name}: a tau table needs one list per layer, each one number per query head.")
        for value in (x for row in table for x in row):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
                raise ConfigError(
                    f"{self.name}: tau={value!r} is out of range; give tau >= 0, e.g. 0.004, or a list per layer of "
                    "one such number per query head."
                )

    def select(self, q: Tensor, kv: KV, ctx: Ctx) -> Generator[Selection, Any, None] | None:
        if ctx.softcap is not None or kv.S <= self.dense_up_to:
            return None
        return self._terms(q, kv, ctx, self.thresholds(q, ctx))

    def thresholds(self, q: Tensor, ctx: Ctx) -> Tensor:
        """This layer's thresholds fp32 [Hq, 1], on the device. Raises ConfigError if the table does not fit."""
        import torch

        table, heads = self.tau, ctx.shard.count(q.shape[1])
        if not isinstance(table, (list, tuple)):
            return torch.full((q.shape[1], 1), float(table), device=q.device)
        if (len(table), len(table[0])) != (ctx.n_layers, heads):
            raise ConfigError(
                f"{self.name}: the tau table is {len(table)} layers x {len(table[0])} heads, the model has "
                f"{ctx.n_layers} patched layers x {heads} query heads; give a table of that size, or one number."
            )
        return self.constants.of(ctx.shard.part(table[ctx.layer], q.shape[1]), q.device, torch.float32)[:, None]

    def _between(self, block: Any) -> Any:
        """First local page of query block `block` (int or int tensor): pages 1 .. this - 1 are estimated."""
        free = block * self.block_size_q - self.local_window - self.block_size_k
        whole = free // self.segment if isinstance(free, int) else free.div(self.segment, rounding_mode="floor")
        whole = max(0, whole) if isinstance(whole, int) else whole.clamp(min=0)
        return 1 + whole * (self.segment // self.block_size_k)

    def _terms(self, q: Tensor, kv: KV, ctx: Ctx, tau: Tensor) -> Generator[Selection, Any, None]:
        """Per stripe of query blocks: first and local keys, then what stands out beside them."""
        import torch

        from attnpatch.decisions import Selection
        from attnpatch.executors import lists, selecting

        bq, page, start = self.block_size_q, self.block_size_k, kv.S - q.shape[2]
        end = selecting.lengths(ctx.q_pos)  # [B]
        keys = self.keys(q, kv, end, ctx.ragged)
        short = (end <= self.dense_up_to)[:, None, None, None]
        for rows, first, last in selecting.stripes(start, q.shape[2], bq, q.shape[0] * q.shape[1] * max(1, bq // page)):
            block = torch.arange(first, last, device=q.device)[:, None]  # [R, 1]
            at = torch.arange(-(-min(last * bq, kv.S) // page), device=q.device)
            tokens = end[:, None, None, None]
            local, real = self._between(block), block * bq < tokens  # [R, 1], [B, 1, R, 1]
            near = (
                ((at == 0) | (at >= local) | short) & (at * page < torch.minimum((block + 1) * bq, tokens)) & real
            )  # [B, 1, R, W]
            index, count = lists.pack(near)
            _, lse = yield Selection(index=index, count=count, page=page, bq=bq, rows=rows)
            width = self._between(last - 1)
            if width == 1:
                continue
            above = self.above(q[:, :, rows], keys, lse, tau, ctx, start + rows.start, width)  # [B, Hq, R, width]
            at = at[:width]
            index, count = lists.pack(above & (at > 0) & (at < local) & real & ~short)
            yield Selection(index=index, count=count, page=page, bq=bq, rows=rows)

    def keys(self, q: Tensor, kv: KV, end: Tensor, ragged: bool) -> Keys:
        """Spec step 1 of the keys. q [B, Hq, T, D], the last T of the S tokens; end int [B] tokens of each row."""
        import torch

        from attnpatch.executors import low_bit, selecting
        from attnpatch.executors.column_sums import compute_dtype

        dtype, start = compute_dtype(q), kv.S - q.shape[2]
        k = selecting.without_pads(kv.k, end) if ragged else kv.k
        total = end.clamp(min=1)[:, None, None, None]
        mean = k.sum(2, keepdim=True, dtype=dtype) / total  # [B, Hkv, 1, D]
        queries = selecting.without_pads(q, end, start) if ragged else q
        asked = (end - start).clamp(min=1)[:, None, None, None]
        query = queries.sum(2, keepdim=True, dtype=dtype) / asked  # [B, Hq, 1, D]
        smooth = k - mean  # wide, as the mean is
        smooth = selecting.without_pads(smooth, end) if ragged else smooth
        if odd := -smooth.shape[2] % self.block_size_k:
            smooth = torch.nn.functional.pad(smooth, (0, 0, 0, odd))
        bias = selecting.pair_scores(query, smooth)[:, :, 0]  # [B, Hq, n]
        smooth = smooth.to(q.dtype)
        kind = None if self.scales == "token" else "key"
        return Keys(low_bit.quantise(smooth, self.bits, kind=kind), mean, bias, query)

    def above(
        self, q: Tensor, keys: Keys, lse: Tensor, tau: Tensor, ctx: Ctx, start: int, width: int
    ) -> Tensor:  # fmt: skip
        """bool [B, Hq, R, width] (spec step 3): pages with an estimated weight above tau of exp(lse).

        q [B, Hq, r, D] from position `start`; lse fp [B, Hq, r] of the first and local keys; tau fp [Hq, 1].
        """
        import torch

        from attnpatch.executors import low_bit, selecting

        pos = start + torch.arange(q.shape[2], device=q.device)
        pad = (pos > ctx.q_pos.amax(-1, keepdim=True))[:, None]  # [B, 1, r]
        q = q.masked_fill(pad[..., None], 0.0) if ctx.ragged else q
        kind = None if self.scales == "token" else "query"
        low = low_bit.quantise((q - keys.query).to(q.dtype), self.bits, kind=kind, start=start)
        # what was taken off with the keys' mean is the same for all keys of a query, but the yardstick has it
        off = selecting.pair_scores(q.to(keys.mean.dtype), keys.mean)[..., 0]  # [B, Hq, r]
        level = torch.where(tau < FLOOR, float("-inf"), tau.log())
        limit = ((lse + level) / ctx.scaling - off).masked_fill(pad, float("inf"))
        part = slice(0, width * self.block_size_k)
        held = low_bit.Low(keys.low.values[:, :, part], keys.low.scale[:, :, part])
        bq, page = self.block_size_q, self.block_size_k
        block = torch.arange(start // bq, -(-(start + q.shape[2]) // bq), device=q.device)
        return low_bit.pages_above(
            low, held, keys.bias[..., part], limit, start=start, page=page, block=bq, begin=1,
            until=self._between(block),
        )  # fmt: skip


def layer_thresholds(q: Tensor, kv: KV, ctx: Ctx, theta: float, **settings: Any) -> list[float]:
    """Spec step 5 for one layer: the largest of `STEPS` per query head with sum |O - O'| < theta * N on this prompt.

    q, kv, ctx as a hook gets them, of one unpadded prompt. 0 = the head is dense. settings: SALE's, but tau.
    """
    import torch

    from attnpatch.decisions import Selection
    from attnpatch.engine.terms import summed
    from attnpatch.executors import dispatch

    dense = dispatch.run(q, kv, Selection(), ctx)[0].float()
    found = torch.zeros(q.shape[1], dtype=torch.float64)
    for tau in STEPS[:-1]:
        patch = SALE(**{**settings, "tau": tau})
        decision = patch.select(q, kv, ctx)
        if decision is None:
            raise ConfigError(
                f"sale: a prompt of {kv.S} tokens is dense (dense_up_to={patch.dense_up_to}) and tells nothing of tau; "
                "calibrate with a longer one."
            )
        error = (summed(decision, q, kv, ctx)[0].float() - dense).abs().sum((0, 1, 3))  # [Hq]
        good = (error < theta * kv.S).cpu() & (found == 0)
        found[good] = tau
    return found.tolist()


def calibrate(model: Any, input_ids: Tensor, theta: float = 0.4, **settings: Any) -> list[list[float]]:
    """The `tau` table [layer][query head] of a model from one prompt int64 [1, N] of retrieval kind (spec step 5).

    theta: allowed error a token, summed over channels (0.4 for Llama-3.1-8B, 2.0 for Qwen2.5-32B in the paper); above
    0. Layers are fed dense outputs, so each stands alone. The model must not be patched. settings: SALE's, but tau.
    """
    import torch

    from attnpatch.api import patched

    if not theta >= 0 or isinstance(theta, bool):
        raise ConfigError(f"sale: theta={theta!r} is out of range; give a number of at least 0, e.g. 0.4.")
    if input_ids.ndim != 2 or input_ids.shape[0] != 1:
        raise ConfigError(f"sale: calibration takes one prompt [1, N], not {tuple(input_ids.shape)}; give one row.")
    if "tau" in settings:
        raise ConfigError("sale: tau is what calibration finds; leave it out.")
    table: list[list[float]] = []
    with patched(model, _Watcher(theta=theta, settings=settings, table=table)), torch.no_grad():
        model.get_decoder()(input_ids)
    return table


@dataclass
class _Watcher(Patch):
    """Dense attention; notes each layer's thresholds."""

    theta: Any = option(0.4, "allowed error a token")
    settings: Any = option(None, "SALE's other hyperparameters")
    table: Any = option(None, "where the thresholds go, layer by layer")

    name = "sale-calibration"
    title = "SALE calibration"
    paper = "arXiv 2505.24179"

    def observe(self, q: Tensor, kv: KV, ctx: Ctx) -> None:
        self.table.append(layer_thresholds(q, kv, ctx, self.theta, **(self.settings or {})))
