"""Where sparse attention starts to pay on this machine: measured once (`attnpatch doctor --calibrate`), kept on disk.

The engine runs a prompt dense that is shorter than the measured length, or whose chosen pages (and columns beside them)
are a larger share than the measured one; and a decode step over fewer keys than the length measured for steps. Without
a measurement a method runs where it is asked to.

The length is enough for the methods whose share their settings bound, whatever the prompt (hip reads `mask_k` keys,
sink and window, hyperattention its blocks and samples: a share that falls with the length). It is all that can be had
for those that add terms up, of which one decides the next (sale): when the share is known, the work is done.

ATTNPATCH_AUTO_DENSE=0 switches all of this off; ATTNPATCH_CACHE names the folder of the file (default: attnpatch in
XDG_CACHE_HOME or ~/.cache).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from attnpatch.errors import ConfigError
from attnpatch.switches import switch
from attnpatch.whole import write_json

if TYPE_CHECKING:
    import torch

REMEDY = "delete it, or measure again: attnpatch doctor --calibrate"


class Limits(NamedTuple):
    """What was measured for one method."""

    tokens: int  # keys from which choosing and computing take no longer than dense attention
    share: float  # share of the causal pages from which computing them takes longer than dense; 1 = not asked for
    paid: bool = True  # False: at no measured length; `tokens` is then the longest one plus 1, and longer is unknown
    # keys a query whose cost the lists have besides: at S keys, besides / S of the share is theirs
    besides: float = 0.0

    def most(self, keys: int) -> float:
        """The share that pays at so many keys."""
        return max(0.0, self.share - self.besides / keys)


def steps(method: str) -> str:
    """The name under which limits of a method's decode steps are kept."""
    return f"{method} steps"


def path() -> Path:
    """The file of all measurements."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ATTNPATCH_CACHE") or Path(base) / "attnpatch") / "breakeven.json"


def machine(device: torch.device, dtype: torch.dtype) -> str:
    """What a measurement is good for: the device, the kind of number, and the versions of what computes."""
    import torch

    from attnpatch import __version__

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = [f"attnpatch {__version__}", f"torch {torch.__version__}"]
    for package in ("flash-attn-4", "triton"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join([name, "half" if dtype.itemsize == 2 else "float", *versions])


@contextmanager
def ignored() -> Iterator[None]:
    """Every method runs where it is asked to: what measures methods must not be told when they pay."""
    before = os.environ.get("ATTNPATCH_AUTO_DENSE")
    os.environ["ATTNPATCH_AUTO_DENSE"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["ATTNPATCH_AUTO_DENSE"]
        else:
            os.environ["ATTNPATCH_AUTO_DENSE"] = before


_known: dict[Any, dict[str, dict[str, Limits]]] = {}  # (path, change time) -> machine -> method -> limits
_machines: dict[Any, str] = {}


def load() -> dict[str, dict[str, Limits]]:
    """Machine -> method -> limits; {} without a file. Raises ConfigError for a file that cannot be read."""
    file = path()
    if not file.is_file():
        return {}
    key = (file, file.stat().st_mtime_ns)
    if key not in _known:
        try:
            read = json.loads(file.read_text(encoding="utf-8"))
            found = {m: {n: _limits(x) for n, x in row.items()} for m, row in read.items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise ConfigError(f"{file} is not a file of break-even lengths ({error}); {REMEDY}.") from None
        _known.clear()
        _known[key] = found
    return _known[key]


def _limits(x: dict[str, Any]) -> Limits:
    """One method's entry. Raises as a malformed one does."""
    found = Limits(int(x["tokens"]), float(x["share"]), bool(x.get("paid", True)), float(x.get("besides", 0)))
    if found.tokens < 0 or not 0 <= found.share <= 1 or not 0 <= found.besides < float("inf"):  # NaN is in no range
        raise ValueError(f"tokens {found.tokens}, share {found.share}, besides {found.besides}")
    return found


def folder() -> Path:
    """The folder of the file, made if need be. Raises ConfigError where nothing can be written."""
    where = path().parent
    try:
        where.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{where} cannot be written ({error.strerror}); set ATTNPATCH_CACHE to a folder that can."
        ) from None
    if not os.access(where, os.W_OK):
        raise ConfigError(f"{where} cannot be written; set ATTNPATCH_CACHE to a folder that can.")
    return where


def save(where: str, limits: dict[str, Limits]) -> Path:
    """Put one machine's measurements into the file, beside what it holds of others."""
    try:
        others = load()
    except ConfigError:  # measuring again is the remedy that it names
        others = {}
    folder()
    file, all_limits = path(), {**others, where: limits}
    body = {m: {n: x._asdict() for n, x in row.items()} for m, row in all_limits.items()}
    write_json(file, body)
    return file


def limits(method: str, device: torch.device, dtype: torch.dtype) -> Limits | None:
    """What was measured here for `method`, or for `steps(method)`; or None."""
    if not switch("ATTNPATCH_AUTO_DENSE", True):
        return None
    found = load()
    if not found:
        return None
    if (device, dtype) not in _machines:
        _machines[device, dtype] = machine(device, dtype)
    return found.get(_machines[device, dtype], {}).get(method)
