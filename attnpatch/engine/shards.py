"""Tensor parallelism: which heads of a layer this process holds, and what it asks of the processes with the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from attnpatch.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Shard:
    """This process's even part of the heads of every layer, in the order of rank; by default all of them.

    Heads are numbered as the model numbers them; `local` is the number of heads (query or KV) that are here. Methods
    that ask the other processes must do so in all of them alike: whether they do may not depend on the heads here.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    heads: int = 0  # query heads of the model

    @classmethod
    def of(cls, model: Any, heads: int) -> Shard:
        """The part that a transformers model with so many query heads was loaded with (tp_plan)."""
        size, mesh = getattr(model, "_tp_size", None) or 1, getattr(model, "_device_mesh", None)
        if size == 1 or mesh is None:
            return WHOLE
        mesh = mesh if mesh.ndim == 1 else mesh["tp"]
        return cls(mesh.get_local_rank(), mesh.size(), mesh.get_group(), heads)

    def fitting(self, local: int) -> Shard:
        """This, or the whole where a layer's query heads, `local` of them here, are not divided.

        Raises UnsupportedModelError where they are divided unevenly.
        """
        if self.size == 1 or local * self.size == self.heads:
            return self
        if local == self.heads:
            return WHOLE
        raise UnsupportedModelError(
            f"tensor parallelism gave this process {local} of {self.heads} query heads, with {self.size} "
            "processes; only an even division can be patched: start a number of processes that divides the heads."
        )

    # ---- heads that are here ---------------------------------------------------------------------------------
    def count(self, local: int) -> int:
        """Heads in all processes."""
        return local * self.size

    def first(self, local: int) -> int:
        """Number of the first head here."""
        return local * self.rank

    def here(self, numbers: Sequence[int], local: int) -> list[int]:
        """Those of the model's heads `numbers` that are here, counted from the first one here."""
        first = self.first(local)
        return [h - first for h in numbers if first <= h < first + local]

    def part(self, items: Sequence[T], local: int) -> Sequence[T]:
        """Of a list with an item a head, those of the heads here."""
        return items if self.size == 1 else items[self.first(local) : self.first(local) + local]

    def own(self, x: Tensor, local: int) -> Tensor:
        """Of x [B, H, ...] of all heads, the heads here."""
        return x if self.size == 1 else x[:, self.first(local) : self.first(local) + local]

    # ---- what all processes do together ----------------------------------------------------------------------
    def all(self, x: Tensor) -> Tensor:
        """x [B, H, ...] of the heads here -> of all heads; other dimensions are alike in all processes."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        torch.distributed.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=1)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all processes' x; the same bits in each."""
        if self.size == 1:
            return x
        return self.all(x[:, None]).sum(1)  # in the order of rank, whatever the backend does

    def most(self, n: int) -> int:
        """The largest n of all processes. Waits for them: at prompts only."""
        if self.size == 1:
            return n
        x = torch.tensor([n], device="cpu" if torch.distributed.get_backend(self.group) == "gloo" else "cuda")
        torch.distributed.all_reduce(x, torch.distributed.ReduceOp.MAX, group=self.group)
        return int(x)


WHOLE = Shard()
