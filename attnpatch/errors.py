"""Typed errors. Each message says what is wrong, what is allowed, and what to do next."""


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
