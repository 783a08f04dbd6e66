"""Small operations on the slots of keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def own(x: Tensor) -> Tensor:
    """x, copied where it is a part of something larger (a fused projection), which it would keep alive."""
    whole = torch.compiler.is_compiling() or x.untyped_storage().nbytes() > x.numel() * x.element_size()
    return x.clone(memory_format=torch.contiguous_format) if whole else x


def allocated(*tensors: Tensor) -> int:
    """Bytes of the memory behind tensors: all of what a view keeps alive, and what two share once."""
    storages = [x.untyped_storage() for x in tensors]
    return sum({s.data_ptr() or id(s): s.nbytes() for s in storages}.values())


def gather(x: Tensor, index: Tensor) -> Tensor:
    """x [B, H, S, D] at index [B, H, M] -> [B, H, M, D]."""
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))


def moved(x: Tensor, source: Tensor, to: Tensor) -> Tensor:
    """x [B, H', S], H' in {1, Hkv}, with what lies in slot `source` [B, Hkv, 1] written into slot `to` as well."""
    heads = x.shape[1]
    return x.scatter(-1, to[:, :heads], x.gather(-1, source[:, :heads]))
