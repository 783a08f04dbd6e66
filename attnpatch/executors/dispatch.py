"""Which executor takes a Selection."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from attnpatch.errors import InputError
from attnpatch.executors import dense, ragged

COARSE = 16  # query rows and keys of a list from which the block-sparse kernels take it

_modules: dict[str, Any] = {}  # those asked for so far; the import system takes longer to say the same


def executor(selection: Any, rows: int) -> str:
    """Name of the executor module for a Selection over `rows` queries."""
    if selection.index is None and selection.columns is None:
        return "dense"
    if selection.positions == "rank":
        return "rank_lists"
    if selection.groups is not None:
        return "scattered"
    if rows == 1:
        return "gather_decode"
    return "pages" if selection.bq >= COARSE and selection.page >= COARSE else "row_lists"


def run(
    q: torch.Tensor, kv: Any, selection: Any, ctx: Any, want_lse: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of the rows that `selection` covers: out [B, rows, Hq, D], lse [B, Hq, rows] or None."""
    if getattr(kv, "packed", None) is not None and selection.dense:
        return ragged.run(q, kv.packed, ctx, want_lse)
    if selection.index is None and selection.columns is None:
        return dense.run(q, kv, selection, ctx, want_lse)
    if selection.skip:
        raise InputError("Selection.skip goes with sink and window; lists leave keys out by not naming them.")
    name = executor(selection, q.shape[2])
    if selection.only is not None and name != "gather_decode":
        raise InputError(f"Selection.only goes with the lists of a decode step; {name} knows no rows without them.")
    return _module(name).run(q, kv, selection, ctx, want_lse)


def _module(name: str) -> Any:
    """The executor of that name, imported at its first call."""
    if name not in _modules:
        _modules[name] = import_module(f"attnpatch.executors.{name}")
    return _modules[name]


def explain(q: torch.Tensor, kv: Any, selection: Any, ctx: Any) -> str:
    """Executor, backend and the reason for it, in words, for a Selection with lists."""
    name = executor(selection, q.shape[2])
    backend, reason = _module(name).choose(q, kv, selection, ctx)
    return f"{name} by {backend} ({reason})"
