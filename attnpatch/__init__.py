"""attnpatch: training-free long-context methods for HuggingFace LLMs, one line to apply.

Importing this package imports neither torch nor transformers; names load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_NAMES = {
    "patch_model": "attnpatch.api",
    "unpatch_model": "attnpatch.api",
    "patched": "attnpatch.api",
    "status": "attnpatch.report",
    "verify": "attnpatch.verifying",
    "calibrate": "attnpatch.calibrating",
    "probe": "attnpatch.probing",
    "retrieve": "attnpatch.retrieving",
    "list_patches": "attnpatch.patch",
    "Patch": "attnpatch.patch",
    "register": "attnpatch.patch",
    "Budget": "attnpatch.budget",
    "PatchCache": "attnpatch.engine.cache",
    "Recipe": "attnpatch.recipe",
    "load_recipe": "attnpatch.recipe",
    "AttnPatchError": "attnpatch.errors",
}
__all__ = ["__version__", *_NAMES]

if TYPE_CHECKING:
    from attnpatch.api import patch_model, patched, unpatch_model
    from attnpatch.budget import Budget
    from attnpatch.calibrating import calibrate
    from attnpatch.engine.cache import PatchCache
    from attnpatch.errors import AttnPatchError
    from attnpatch.patch import Patch, list_patches, register
    from attnpatch.probing import probe
    from attnpatch.recipe import Recipe, load_recipe
    from attnpatch.report import status
    from attnpatch.retrieving import retrieve
    from attnpatch.verifying import verify


def __getattr__(name: str) -> object:
    if name in _NAMES:
        return getattr(import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'attnpatch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
