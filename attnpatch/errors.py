"""Typed errors. Each message says what is wrong, what is allowed, and what to do next."""

from __future__ import annotations

from collections.abc import Iterable


class AttnPatchError(Exception):
    """Base of everything attnpatch raises on purpose."""


class ConfigError(AttnPatchError, ValueError):
    """A hyperparameter, budget, recipe or patch name is wrong."""


class UnsupportedModelError(AttnPatchError, TypeError):
    """The model's structure does not fit: not a decoder, no attention interface, weights on the meta device ..."""


class UnsupportedModeError(AttnPatchError, RuntimeError):
    """A generation mode (assisted decoding, static cache, ...) that cannot be right under the active patch."""


class PatchStateError(AttnPatchError, RuntimeError):
    """Patched twice, not patched, attention implementation changed behind the patch, cache of another model ..."""


class VersionError(AttnPatchError, ImportError):
    """transformers or torch outside the tested range, or an optional package is missing."""


class InputError(AttnPatchError, ValueError):
    """Bad tensors from the user: empty prompt, NaN in the mask, wrong shapes."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """The hint that names the allowed one nearest to a wrong name, with a space before it; "" where none is near."""
    import difflib  # only where something is wrong already

    near = difflib.get_close_matches(given, allowed, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
