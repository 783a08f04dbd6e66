"""Profile: what was measured of a model's heads and layers once, for methods that need it.

A folder of two files: `profile.json` (kind, version, structure of the model, how it was made) and `profile.safetensors`
(the figures). Layers are counted as the model counts them, heads are query heads unless a tensor's name says `kv`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnpatch.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
_JSON, _TENSORS = "profile.json", "profile.safetensors"


def structure(config: Any) -> dict[str, Any]:
    """What tells one model's structure from another's; config: the decoder's (or the model's) configuration."""
    config = config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    return {
        "model_type": config.model_type,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "vocab_size": config.vocab_size,
    }


@dataclass(frozen=True, eq=False)
class Profile:
    """Figures of one model, e.g. kind "retrieval-heads" with tensors {"score": fp32 [layers, heads]}.

    model: `structure` of the model it was made from. about: settings, data, seeds, versions; JSON values only.
    """

    kind: str
    tensors: dict[str, Tensor]
    model: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: str | Path) -> Path:
        """Write both files into `folder`, made if need be. Raises ConfigError where a file of that name stands."""
        from safetensors.torch import save_file

        target = Path(folder)
        if target.is_file():
            raise ConfigError(f"{target} is a file; a profile is a folder, name another path.")
        target.mkdir(parents=True, exist_ok=True)
        save_file({name: x.detach().cpu().contiguous() for name, x in self.tensors.items()}, target / _TENSORS)
        head = {"version": VERSION, "kind": self.kind, "model": self.model, "about": self.about}
        (target / _JSON).write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")
        return target

    @classmethod
    def load(cls, folder: str | PathLike[str], *kinds: str) -> Profile:
        """Read a profile of one of `kinds`. ConfigError: no profile there, damaged, of another kind or version."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        source = Path(folder)
        try:
            head = json.loads((source / _JSON).read_text(encoding="utf-8"))
            tensors = load_file(source / _TENSORS)
            version, found, model, about = (head[key] for key in ("version", "kind", "model", "about"))
        except OSError as error:
            missing = getattr(error, "filename", None) or source / _TENSORS
            raise ConfigError(
                f"no profile at {str(source)!r} ({missing} cannot be read); a profile is a folder with {_JSON} and "
                f"{_TENSORS}; make one with: attnpatch profile or attnpatch calibrate."
            ) from None
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ConfigError(f"profile {str(source)!r} is damaged ({error}); make it again.") from None
        if version != VERSION:
            raise ConfigError(
                f"profile {str(source)!r} has version {version}, this release reads {VERSION}; make it again."
            )
        if found not in kinds:
            wanted = " or ".join(map(repr, kinds))
            raise ConfigError(f"profile {str(source)!r} is of kind {found!r}, but {wanted} is needed; name another.")
        return cls(found, tensors, model, about)

    def check(self, config: Any) -> None:
        """Raise ConfigError unless it was made from a model of the same structure."""
        wanted = structure(config)
        other = {key: (self.model.get(key), value) for key, value in wanted.items() if self.model.get(key) != value}
        if other:
            found = ", ".join(f"{key} {have!r} instead of {want!r}" for key, (have, want) in other.items())
            raise ConfigError(
                f"the {self.kind} profile was made for another model ({found}); make one of this model, or name the "
                "profile that belongs to it."
            )
        for name, x in self.tensors.items():
            if x.ndim and x.shape[0] != wanted["layers"]:
                raise ConfigError(
                    f"the {self.kind} profile is incomplete: {name!r} holds {x.shape[0]} layers, the model has "
                    f"{wanted['layers']}; make it again."
                )
