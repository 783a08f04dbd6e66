"""Profiling: what the heads of a model do, measured once by forwards and kept as a `Profile`.

One function a kind: `sinks`, `retrieval_heads`, `semantic_heads`, `echo_heads`, `layer_errors`, `minference`. All are
inference only, leave the model as it was, and never build an N x N matrix. Only layers of full attention are
measured; the rows of sliding-window layers are NaN (-1 or 0 in integer tensors). Names load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

_NAMES = {
    "sinks": "attnpatch.profiling.attention_sinks",
    "retrieval_heads": "attnpatch.profiling.decoding_heads",
    "semantic_heads": "attnpatch.profiling.decoding_heads",
    "echo_heads": "attnpatch.profiling.repeated_tokens",
    "retrieval_set": "attnpatch.profiling.repeated_tokens",
    "layer_errors": "attnpatch.profiling.eviction_errors",
    "minference": "attnpatch.profiling.prompt_patterns",
    "Trial": "attnpatch.profiling.trials",
    "needle_trials": "attnpatch.profiling.trials",
    "ranking": "attnpatch.profiling.reading",
    "merged": "attnpatch.profiling.reading",
    "masked": "attnpatch.engine.masking",
}
KINDS = ("sinks", "retrieval-heads", "semantic-heads", "echo-heads", "layer-errors", "minference")
__all__ = [
    "KINDS", "Trial", "echo_heads", "layer_errors", "masked", "merged", "minference", "needle_trials", "ranking",
    "retrieval_heads", "retrieval_set", "semantic_heads", "sinks",
]  # fmt: skip

if TYPE_CHECKING:
    from attnpatch.engine.masking import masked
    from attnpatch.profiling.attention_sinks import sinks
    from attnpatch.profiling.decoding_heads import retrieval_heads, semantic_heads
    from attnpatch.profiling.eviction_errors import layer_errors
    from attnpatch.profiling.prompt_patterns import minference
    from attnpatch.profiling.reading import merged, ranking
    from attnpatch.profiling.repeated_tokens import echo_heads, retrieval_set
    from attnpatch.profiling.trials import Trial, needle_trials


def __getattr__(name: str) -> object:
    if name in _NAMES:
        return getattr(import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'attnpatch.profiling' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
