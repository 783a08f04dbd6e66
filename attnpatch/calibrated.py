"""What a patch reads from a calibration profile: its figures, and the settings they were found with."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnpatch.errors import ConfigError

if TYPE_CHECKING:
    from attnpatch.profile import Profile


def load(patch: Any, config: Any, tensor: str) -> list[list[Any]]:
    """Figures [layer][query head] of the profile that `patch.profile` names, for the model of this decoder config.

    The settings it was made with become the patch's. Raises ConfigError: no such profile, another patch's or another
    model's, damaged, or a setting given beside it that contradicts it.
    """
    from attnpatch.profile import Profile, structure

    if not isinstance(patch.profile, (str, Path)):
        raise ConfigError(f"{patch.name}: profile={patch.profile!r} is no path; name the folder of a profile.")
    found = Profile.load(patch.profile, patch.name)
    found.check(config)
    shape = structure(config)
    table = found.tensors.get(tensor)
    if table is None or tuple(table.shape) != (shape["layers"], shape["heads"]):
        raise ConfigError(
            f"profile {str(patch.profile)!r} is damaged ({tensor!r} is no table of {shape['layers']} layers x "
            f"{shape['heads']} heads); make it again."
        )
    _adopt(patch, found)
    return table.tolist()


def _adopt(patch: Any, found: Profile) -> None:
    values = found.about.get("hyperparameters") or {}
    for f in fields(patch):
        have = getattr(patch, f.name)
        if f.name not in values or have == values[f.name]:
            continue
        if have != f.default:
            raise ConfigError(
                f"{patch.name}: {f.name}={have!r} contradicts the profile, which was made with {values[f.name]!r}; "
                f"leave {f.name} out, or calibrate again with it."
            )
        setattr(patch, f.name, values[f.name])
