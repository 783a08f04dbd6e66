"""A hierarchical search: groups of key blocks are split in two, and the better halves kept, until each is one block."""

from __future__ import annotations

from collections.abc import Callable

import torch

from attnpatch.errors import ConfigError
from attnpatch.executors.backends import HALF, capability, has_triton
from attnpatch.executors.column_sums import MAX_BLOCK, compute_dtype
from attnpatch.executors.launching import on
from attnpatch.executors.lists import best
from attnpatch.executors.row_lists import take

REPRESENTATIVES = ("center", "first", "last")
GROUPS = 2**15
"""Most groups of the Triton form."""

Lists = tuple[torch.Tensor, torch.Tensor]


def first_groups(region: torch.Tensor, groups: int) -> Lists:
    """Starts and sizes int32 [..., groups] of groups that tile the key blocks 0 .. region - 1 (region int [...]).

    HiP, the code's power-of-two aligned boundaries; the last group ends with the region, where the code loses a tail.
    """
    device = region.device
    power = 1 << (region[..., None] >= 2 ** torch.arange(1, 31, device=device)).sum(-1)  # 2^floor(log2 region)
    step = (power + groups - 1) // groups
    edge = region[..., None].long() * torch.arange(groups + 1, device=device) // groups
    edge = edge // step[..., None] * step[..., None]
    edge[..., -1] = region
    return edge[..., :-1].to(torch.int32), edge.diff(dim=-1).to(torch.int32)


def rounds(region: int, groups: int) -> int:
    """Halvings after which groups over at most `region` blocks hold one block each; more change nothing."""
    if region <= groups:
        return 0
    step = -(-(1 << (region.bit_length() - 1)) // groups)
    widest = max(2 * step, -(-region // groups) + step - 1)  # of any group, and of the last one
    return (widest - 1).bit_length()


def split(start: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """start, size [..., G] -> those of the halves [..., 2G], in order; a group of one gives an empty left half."""
    left = size // 2
    start = torch.stack([start, start + left], dim=-1).flatten(-2)
    return start, torch.stack([left, size - left], dim=-1).flatten(-2)


def _scores(samples: torch.Tensor, k: torch.Tensor, limit: torch.Tensor, slot: torch.Tensor, per: int) -> torch.Tensor:
    """fp32 [B, Hq, r, M]: highest q . k over the sampled queries and the `per` keys of each entry.

    slot: [B, Hq, r, M * per]. The lowest finite number where no pair counts (key > limit).
    """
    dtype = compute_dtype(samples)
    keys = take(k, slot.clamp(max=k.shape[2] - 1)).to(dtype)  # [B, Hq, r, M * per, D]
    dots = samples.to(dtype) @ keys.transpose(-1, -2)  # [B, Hq, r, n, M * per]
    dots = torch.where(slot[:, :, :, None] <= limit[:, None, ..., None], dots, torch.finfo(torch.float32).min)
    return dots.amax(3).unflatten(-1, (-1, per)).amax(-1).float()


def _round(
    samples: torch.Tensor, k: torch.Tensor, limit: torch.Tensor, start: torch.Tensor, size: torch.Tensor,
    origin: int, block: int, stride: int, representative: str,
) -> Lists:  # fmt: skip
    """The better halves of the groups start, size int32 [B, Hq, R, G], ascending, as many as there were groups.

    samples: [B, Hq, R, n, D]; limit: int [B, R, n], the last slot that counts for each.
    """
    batch, heads, lists, groups = start.shape
    offset = torch.arange(stride - 1, block, stride, device=k.device)  # sampled keys of a block
    width = 2 * groups * offset.shape[0]
    step = max(1, MAX_BLOCK // (batch * heads * width * max(k.shape[3], samples.shape[3])))
    starts, sizes = [], []
    for begin in range(0, lists, step):
        part = slice(begin, begin + step)
        child, length = split(start[:, :, part], size[:, :, part])  # [B, Hq, r, 2G]
        at = {"center": length // 2, "first": torch.zeros_like(length), "last": (length - 1).clamp(min=0)}
        slot = origin + (child + at[representative])[..., None] * block + offset
        scores = _scores(samples[:, :, part], k, limit[:, part], slot.flatten(-2).long(), offset.shape[0])
        kept = best(scores.masked_fill(length == 0, float("-inf")), groups)
        starts.append(child.gather(-1, kept))
        sizes.append(length.gather(-1, kept))
    return torch.cat(starts, dim=2), torch.cat(sizes, dim=2)


def packed(start: torch.Tensor, size: torch.Tensor, origin: int, block: int, page: int, slots: int) -> Lists:
    """The pages that groups of one block lie in, each once: index int32 [..., G], packed left, and count int32 [...].

    start, size (0 = no block): int32 [..., G], ascending; block i begins at slot origin + i * block. Behind the pages
    stands slots // page.
    """
    at, meant = (origin + start * block) // page, size > 0
    if page > block:
        # equal pages are neighbours, but for empty groups, which stand where the next group starts
        at = torch.where(meant, at, -1).cummax(dim=-1).values
        meant = meant & (torch.nn.functional.pad(at[..., :-1], (1, 0), value=-1) != at)
    width = meant.shape[-1]
    place = torch.where(meant, meant.cumsum(dim=-1) - 1, width)  # the others come into a column that is cut off
    index = torch.full((*at.shape[:-1], width + 1), slots // page, dtype=torch.int32, device=at.device)
    return index.scatter(-1, place, at.to(torch.int32))[..., :width], meant.sum(dim=-1, dtype=torch.int32)


def _run_torch(
    q: torch.Tensor, k: torch.Tensor, q_pos: torch.Tensor, last: torch.Tensor, groups: int, sink: int, window: int,
    block: int, stride: int, page: int, representative: str, longest: int,
) -> Lists:  # fmt: skip
    heads, (slots, dim) = q.shape[1], k.shape[2:]
    row = (q_pos - (slots - q.shape[2])).clamp(0, q.shape[2] - 1).flatten(1)[:, None, :, None]
    samples = q.gather(2, row.long().expand(-1, heads, -1, dim)).unflatten(2, q_pos.shape[1:])  # [B, Hq, R, n, D]
    limit = torch.where(q_pos < 0, -1, q_pos - window)  # -1: an absent query scores nothing
    region = ((last + 1 - window - sink).clamp(min=0) + block - 1) // block  # [B, R] key blocks
    start, size = (x[:, None].expand(-1, heads, -1, -1) for x in first_groups(region, groups))
    for _ in range(rounds(-(-max(0, longest - window - sink) // block), groups)):
        start, size = _round(samples, k, limit, start, size, sink, block, stride, representative)
    return packed(start, size, sink, block, page, slots)


def _run_triton(q: torch.Tensor, *args: object) -> Lists:
    from attnpatch.executors import _halving_triton

    with on(q.device):
        return _halving_triton.launch(q, *args)  # type: ignore[arg-type]


_RUN: dict[str, Callable[..., Lists]] = {"triton": _run_triton, "torch": _run_torch}


def choose(q: torch.Tensor, samples: int, groups: int) -> tuple[str, str]:
    """(backend, reason) for these queries, so many sampled ones and groups of a list."""
    if capability(q.device) < 8:
        return "torch", "not triton: needs CUDA capability >= 8"
    if q.dtype not in HALF or q.shape[-1] > 256 or samples > 128 or groups > GROUPS:
        return "torch", (
            "not triton: needs float16 or bfloat16, head dimension up to 256, at most 128 sampled queries and "
            f"{GROUPS} groups"
        )
    return ("triton", "the fastest that fits") if has_triton() else ("torch", "not triton: triton is not installed")


def run(
    q: torch.Tensor, k: torch.Tensor, q_pos: torch.Tensor, last: torch.Tensor, *, groups: int, sink: int = 0,
    window: int = 1, block: int = 1, stride: int = 1, page: int = 0, representative: str = "center",
    longest: int | None = None, _backend: str | None = None,
) -> Lists:  # fmt: skip
    """The search of each head and list by itself: pages int32 [B, Hq, R, groups], ascending, and count [B, Hq, R].

    q: [B, Hq, T, D], the queries at positions S - T .. S - 1 (a single one may be at any); k: [B, Hkv, S, D], slots in
    order of position; q_pos: int [B, R, n] sampled queries of each list (-1 = absent); last: int [B, R], the position
    of the list's last query (-1 = none); longest: no query is at this position or behind (None: S).
    Between `sink` and the last query's `window` lie blocks of `block` keys, the last may reach into the window.
    `groups` groups tile them; then each is split in two, and as many halves as there were groups are kept, until none
    holds more than one block. A half is scored by one block of it (`representative`: its center, first or last): the
    highest raw dot product, in fp32, of a sampled query and every `stride`-th key before its window. Halves without
    such a pair come last, empty ones after them; ties go to the later half.
    Pages of `page` keys (a multiple of block, 0: block) that hold a found block are listed, each once; S // page stands
    behind them.
    """
    if representative not in REPRESENTATIVES:
        raise ConfigError(f"representative={representative!r}; choose one of {', '.join(REPRESENTATIVES)}.")
    name = _backend or choose(q, q_pos.shape[2], groups)[0]
    longest = k.shape[2] if longest is None else longest
    return _RUN[name](q, k, q_pos, last, groups, sink, window, block, stride, page or block, representative, longest)
