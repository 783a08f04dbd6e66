"""TCA-style attention: the last query orders the blocks of the prompt, and each block keeps a number of its tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

from attnpatch.errors import ConfigError
from attnpatch.patch import Patch, option, register

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.decisions import KeepSet, Selection
    from attnpatch.engine.call import KV, Ctx

LOCAL = 2  # last blocks that stay whole
MIDDLE = 1.5  # mu below its maximum, where none is given
LEAST = 4  # blocks below which a row is dense


def shares(mu: float | None, sigma: float, block: int) -> list[float]:
    """Share of the blocks that keep b, b/2, ..., 1 tokens (b = `block`, a power of two): log-Gaussian, sums to 1.

    p_k ~ exp(-(log2 k - mu)^2 / (2 sigma^2)). mu None: every block keeps all.
    """
    top = block.bit_length() - 1
    if mu is None or math.isnan(mu):
        return [1.0] + [0.0] * top
    logs = [-((x - mu) ** 2) / (2 * sigma**2) for x in range(top, -1, -1)]
    weights = [math.exp(x - max(logs)) for x in logs]  # so that a narrow one does not vanish
    return [w / sum(weights) for w in weights]


def ratio(share: list[float]) -> float:
    """Tokens that a configuration keeps of a block, as a share, on average."""
    return sum(p / 2**i for i, p in enumerate(share))


def median(share: list[float]) -> int:
    """The smallest k of b, b/2, ..., 1 that at least half of the blocks do not exceed."""
    total = 0.0
    for i in range(len(share) - 1, -1, -1):
        total += share[i]
        if total >= 0.5 - 1e-12:
            return 1 << (len(share) - 1 - i)
    return 1 << (len(share) - 1)


def allotted(share: Tensor, blocks: Tensor) -> Tensor:
    """How many of a row's blocks keep b, b/2, ..., 1 tokens: int64 [B, H, K], largest remainders, so the sum is exact.

    share: fp64 [H, K]; blocks: int [B]. Ties go to the larger count.
    """
    real = share * blocks[:, None, None]
    base = (real + 1e-9).floor()  # the small addition keeps 0.3 * 10 at 3
    rest = ((real - base) * 1e9).round()
    place = rest.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (base + (place < (blocks[:, None, None] - base.sum(-1, keepdim=True)))).long()


def places(scores: Tensor) -> Tensor:
    """The place of each score fp32 [..., n], 0 = the highest; ties: the later first."""
    import torch

    from attnpatch.decisions import ranked

    order = ranked(scores, scores.shape[-1])
    return torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )


@register("tca")
@dataclass
class TCA(Patch):
    """TCA-style (after arXiv 2512.09238), experimental: the paper's body was not at hand, no code was published, and
    results say nothing of the paper.

    The last query of the prompt weighs all keys. Blocks of `block_size` keys are ordered by it, and in that order keep
    all, half, a quarter, ... one of their tokens, the strongest. How many blocks keep how much is a log-Gaussian over
    log2 of the count: p_k ~ exp(-(log2 k - mu)^2 / (2 sigma^2)). The prompt's queries attend the kept tokens and the
    last two blocks' length before themselves; the kept tokens are what the cache holds. While decoding, tokens that are
    two blocks old are thinned a block at a time. Every KV head has its own tokens and may have its own mu and sigma:
    `attnpatch calibrate --patch tca` finds the cheapest that keeps each head's output within a bound, in one pass, and
    writes a `profile`. A head that none serves keeps everything.

    Known of the paper: the counts 1, 2, 4, ..., b, the log-Gaussian, the choice for each head, the last query, one
    mechanism for prompt and decoding. Ours, all else: b = 64; blocks ranked by attention mass (order "redundancy" is a
    guess); largest remainders, ties to the larger count, the later block, the later token; one choice for the query
    heads of a KV head, by the mean of their weights; first block and last two whole, which takes places in the ranking
    too; the band; a median count for blocks thinned in decoding, by the query of that step, looked for every
    `block_size` steps (those steps wait for the device); rows of fewer than `dense_below` tokens, or of four blocks,
    dense, in decoding too; a chunk of a prompt fed in several attends by its own last query. mu and sigma without a
    profile are a middle of the road, not the paper's: 4.5 and 1 in blocks of 64, about 42 % of what lies between the
    first and the last blocks.
    """

    mu: float | None = option(
        None, "log2 of the tokens most blocks keep, 0 to log2 of block_size; null = 1.5 below the latter", low=0
    )
    sigma: float = option(1.0, "how widely the counts of a head's blocks spread, in powers of two", low=0)
    profile: Any = option(None, "folder with mu and sigma of each head, from `attnpatch calibrate`")
    block_size: int = option(64, "keys of a block", choices=(4, 8, 16, 32, 64, 128, 256))
    order: str = option(
        "mass", "what orders the blocks: their attention mass, or a guess", choices=("mass", "redundancy")
    )
    query_rows: int = option(1, "last queries whose mean weight counts", low=1)
    dense_below: int = option(1024, "rows of fewer tokens are dense and kept whole", low=0)
    dense_layers: int = option(0, "first covered layers that are dense and kept whole", low=0)
    prefill: bool = option(True, "the prompt attends the kept tokens and the band; False: all of it")
    decode: bool = option(True, "thin blocks that leave the last two while decoding; False: the prompt only")
    recompress: bool = option(False, "compress again at the end of each later turn's prompt")

    title = "TCA-style (experimental)"
    paper = "arXiv 2512.09238"
    query_aware = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._table: list[list[tuple[float, float]]] | None = None  # (mu, sigma), [layer of the model][query head]
        top = self.block_size.bit_length() - 1
        if self.mu is not None and not self.mu <= top:
            raise ConfigError(
                f"{self.name}: mu={self.mu} is too large; blocks of {self.block_size} allow 0 to {top} ({top} with "
                "sigma=0.01 keeps everything)."
            )
        if not 0 < self.sigma < math.inf:
            raise ConfigError(f"{self.name}: sigma={self.sigma} is out of range; give a number above 0, such as 1.")
        if self.profile is None:
            return
        self.profile = str(self.profile) if isinstance(self.profile, PathLike) else self.profile
        if (self.mu, self.sigma) != (TCA.mu, TCA.sigma):
            raise ConfigError(f"{self.name}: the profile holds mu and sigma; leave them out, or the profile.")

    @classmethod
    def searcher(cls) -> Any:
        from attnpatch.patches._tca_search import TCASearch

        return TCASearch

    def fits(self, config: Any) -> None:
        if self.profile is None:
            return
        from attnpatch.calibrated import load

        mus, sigmas = (load(self, config, name) for name in ("mu", "sigma"))
        self.adopt([list(zip(a, b, strict=True)) for a, b in zip(mus, sigmas, strict=True)])

    def adopt(self, table: list[list[tuple[float, float]]]) -> None:
        """Take (mu, sigma) of every [layer of the model][query head]; mu NaN = keeps everything. Raises ConfigError."""
        top = self.block_size.bit_length() - 1
        for mu, sigma in (pair for row in table for pair in row):
            if not math.isnan(mu) and not (0 <= mu <= top and 0 < sigma < math.inf):
                raise ConfigError(
                    f"profile {self.profile!r} is damaged (mu {mu} and sigma {sigma} in blocks of {self.block_size}); "
                    "make it again."
                )
        self._table = table

    # ---- declared --------------------------------------------------------------------------------------------
    @property
    def evict_at(self) -> frozenset[str]:
        return frozenset({"prompt", "step"} if self.decode else {"prompt"})

    @property
    def phases(self) -> frozenset[str]:
        return frozenset({"prefill"} if self.prefill else ())

    @property
    def query_tail(self) -> int:
        return self.query_rows

    @property
    def least(self) -> int:
        """Tokens from which a row is compressed (D)."""
        return max(self.dense_below, LEAST * self.block_size)

    # ---- what is kept ----------------------------------------------------------------------------------------
    def configured(self, heads: int, kv_heads: int, ctx: Ctx) -> list[list[float]]:
        """`shares` of each KV head of this layer. Raises ConfigError if the profile was not read."""
        if self.profile is not None and self._table is None:
            raise ConfigError(f"{self.name}: a profile is read by patch_model, which knows the model; call that.")
        if ctx.layer < self.dense_layers:
            return [shares(None, 1.0, self.block_size)] * kv_heads
        if self._table is None:
            mu = self.block_size.bit_length() - 1 - MIDDLE if self.mu is None else self.mu
            return [shares(mu, self.sigma, self.block_size)] * kv_heads
        row = self._table[ctx.index]
        return [shares(*row[h * (heads // kv_heads)], self.block_size) for h in range(kv_heads)]

    def scores(self, rows: Tensor, at: Tensor, kv: KV, ctx: Ctx) -> Tensor:
        """Mean weight that rows [B, Hq, w, D] at positions [B, w] (-1 = none) give each slot, fp32 [B, Hkv, S]."""
        from attnpatch.executors import column_sums

        sums = column_sums.run(rows, kv, q_pos=at, scaling=ctx.scaling, softcap=ctx.softcap, newest=not ctx.ragged)
        voters = (at >= 0).sum(-1).clamp(min=1)[:, None, None]
        return column_sums.group_mean(sums, kv.k.shape[1]) / voters

    def cells(self, scores: Tensor, pos: Tensor, blocks: int) -> Tensor:
        """scores [B, H, S] of slots at positions pos [B, H, S] (-1 = empty) as [B, H, blocks, b]; -inf = not held."""
        size = blocks * self.block_size
        grid = scores.new_full((*scores.shape[:2], size + 1), float("-inf"))
        grid.scatter_(-1, pos.long().masked_fill(pos < 0, size), scores)  # empty slots go to a column that is cut off
        return grid[..., :size].unflatten(-1, (blocks, self.block_size))

    def importance(self, cells: Tensor) -> Tensor:
        """What blocks are ordered by, fp32 [B, H, blocks] (B2); -inf = holds nothing."""
        import torch

        held = cells > float("-inf")
        weights = cells.masked_fill(~held, 0.0)
        mass, size = weights.sum(-1), held.sum(-1)
        order = mass
        if self.order == "redundancy":
            inside = weights / mass.clamp(min=1e-30)[..., None]
            entropy = torch.special.entr(inside).sum(-1)
            entropy = torch.where(mass > 0, entropy, size.clamp(min=1).log())  # no weight at all is spread evenly
            order = -entropy.exp() / size.clamp(min=1) * (1 - mass)
        return order.masked_fill(size == 0, float("-inf"))

    def chosen(self, scores: Tensor, pos: Tensor, share: list[list[float]], blocks: int) -> Tensor:
        """bool [B, H, S]: slots that stay (B1 to B5). scores fp32 [B, H, S]; pos int [B, 1|H, S], -1 = empty.

        share: `shares` of each head; blocks: number of blocks of the longest row.
        """
        import torch

        size, pos = self.block_size, pos.expand_as(scores)
        n = pos.amax((1, 2)) + 1  # [B]
        cells = self.cells(scores, pos, blocks)
        table = torch.tensor(share, dtype=torch.float64).to(scores.device, non_blocking=True)  # [H, K]
        own = -(-n // size)  # blocks of the row
        ends = allotted(table, own).cumsum(-1)  # [B, H, K]
        place = places(self.importance(cells))  # [B, H, blocks]
        step = (place[..., None] >= ends[:, :, None]).sum(-1).clamp(max=table.shape[1] - 1)
        count = size >> step
        number = torch.arange(blocks, device=scores.device)
        whole = (number == 0) | (number >= own[:, None] - LOCAL) | (n < self.least)[:, None]  # [B, blocks]
        count = torch.where(whole[:, None], size, count)
        stay = (places(cells) < count[..., None]).flatten(-2)
        return stay.gather(-1, pos.long().clamp(min=0)) & (pos >= 0)

    def term(self, stay: Tensor, rows: slice | None = None) -> Selection:
        """What the prompt's queries attend (B6): kept slots bool [B, H, S] and the band."""
        import torch

        from attnpatch.decisions import Selection
        from attnpatch.executors import lists

        width = int(stay.sum(-1).max())  # in prefill the host may wait
        index, count = lists.pack(stay, width)
        unused = torch.arange(width, device=stay.device) >= count[..., None]
        columns = index.masked_fill(unused, -1)
        return Selection(columns=columns, distinct=True, window=LOCAL * self.block_size, rows=rows)

    # ---- hooks -----------------------------------------------------------------------------------------------
    def select(self, q: Tensor, kv: KV, ctx: Ctx) -> Selection | None:
        from attnpatch.executors import selecting

        share = self.configured(q.shape[1], kv.k.shape[1], ctx)
        if kv.S < self.least or all(p[0] == 1 for p in share):
            return None
        rows, at = selecting.probe_rows(q, ctx, self.query_rows, kv.S - q.shape[2])
        scores = self.scores(rows, at, kv, ctx)
        return self.term(self.chosen(scores, kv.pos, share, -(-kv.S // self.block_size)))

    def keep(self, q: Tensor, kv: KV, ctx: Ctx) -> KeepSet | None:
        if ctx.event == "step":
            return self.thinned(q, kv, ctx)
        import torch

        from attnpatch.decisions import KeepSet

        share = self.configured(q.shape[1], kv.k.shape[1], ctx)
        acts = [n >= self.least and not whole for n, whole in zip(ctx.prompt_len, ctx.kept_whole, strict=True)]
        if not any(acts) or all(p[0] == 1 for p in share):
            return None
        size = self.block_size
        scores = self.scores(*ctx.last_queries(), kv, ctx)
        acting, n = torch.tensor([acts, ctx.prompt_len], device=scores.device)
        stay = self.chosen(scores, kv.pos, share, -(-max(ctx.prompt_len) // size))
        real = (kv.pos >= 0).expand_as(stay)
        stay = torch.where(acting.bool()[:, None, None], stay, real)
        # where thinning goes on from, 0 in rows that are left alone
        before = kv.state.get(self.name, torch.zeros_like(n))
        kv.state[self.name] = torch.where(acting.bool(), (-(-n // size) - LOCAL) * size, before)
        kv.plain.setdefault(self.name, 0)
        ctx.report["share of entries kept (experimental)"] = stay.sum() / real.sum()
        return KeepSet.those(stay)

    def thinned(self, q: Tensor, kv: KV, ctx: Ctx) -> KeepSet | None:
        """Every b steps: blocks that left the last two since keep their strongest tokens (C)."""
        import torch

        from attnpatch.decisions import KeepSet

        if self.name not in kv.plain:
            return None
        kv.plain[self.name] += 1
        if kv.plain[self.name] % self.block_size:
            return None
        size, pos = self.block_size, kv.pos.expand(-1, kv.k.shape[1], -1)
        begin, n = kv.state[self.name], pos.amax((1, 2)) + 1  # [B]
        end = torch.where(begin > 0, torch.maximum(begin, (n // size - LOCAL) * size), begin)
        due = (pos >= begin[:, None, None]) & (pos < end[:, None, None])
        kv.state[self.name] = end
        if not bool(due.any()):  # waits for the device, once in b steps
            return None
        cells = self.cells(self.scores(q, ctx.q_pos, kv, ctx), pos, -(-int(n.max()) // size))
        counts = [median(p) for p in self.configured(q.shape[1], kv.k.shape[1], ctx)]
        count = torch.tensor(counts, device=q.device)[:, None, None]
        stay = (places(cells) < count).flatten(-2).gather(-1, pos.long().clamp(min=0))
        return KeepSet.those((stay | ~due) & (pos >= 0))
