"""One type for every budget: tokens, a ratio of the prompt, or bytes of KV."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from attnpatch.errors import ConfigError

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_BYTES = re.compile(r"^\s*([0-9]*\.?[0-9]+)\s*([kmg]i?b|b)\s*$", re.IGNORECASE)
_ALLOWED = "a whole number of tokens (1024), a ratio of the prompt in (0, 1] (0.25), or bytes ('512MiB')"


@dataclass(frozen=True)
class Budget:
    """How many KV entries a layer may hold per KV head and sequence.

    kind: "tokens" (value = entries), "ratio" (value in (0, 1], of the prompt's real tokens, rounded up) or
    "bytes" (value = bytes of K and V together, over all patched layers, of one sequence).
    """

    kind: str
    value: float

    @classmethod
    def parse(cls, spec: Budget | int | float | str) -> Budget:
        """`1024`, `0.25`, `"512MiB"`, `"1024"`, `"0.25"` -> Budget. Raises ConfigError naming the allowed forms."""
        if isinstance(spec, Budget):
            return spec
        if isinstance(spec, bool) or not isinstance(spec, (int, float, str)):
            raise ConfigError(f"budget {spec!r} is not a budget; give {_ALLOWED}.")
        if isinstance(spec, str):
            if match := _BYTES.match(spec):
                return cls._checked("bytes", float(match[1]) * _UNITS[match[2].lower()], spec)
            try:
                spec = float(spec) if re.search(r"[.e]", spec, re.IGNORECASE) else int(spec)
            except ValueError:
                raise ConfigError(f"budget {spec!r} is not a budget; give {_ALLOWED}.") from None
        if isinstance(spec, int):
            return cls._checked("tokens", spec, spec)
        if math.isfinite(spec) and spec > 1 and spec == int(spec):
            return cls._checked("tokens", int(spec), spec)
        return cls._checked("ratio", spec, spec)

    @classmethod
    def _checked(cls, kind: str, value: float, spec: object) -> Budget:
        if not (math.isfinite(value) and value > 0) or (kind == "ratio" and value > 1):
            raise ConfigError(f"budget {spec!r} is out of range; give {_ALLOWED}, above zero.")
        return cls(kind, value)

    def tokens(self, length: int, bytes_per_token: float | None = None) -> int:
        """Entries allowed for a prompt of `length` real tokens (at least 1).

        bytes_per_token: bytes of K and V of one token over all patched layers; needed for a budget in bytes.
        """
        if self.kind == "ratio":
            # the small subtraction keeps 0.1 * 30 = 3.0000000000000004 at 3
            return max(1, math.ceil(self.value * length - 1e-9))
        if self.kind == "bytes":
            if not bytes_per_token:
                raise ConfigError("a budget in bytes needs the model's bytes per token; give tokens or a ratio here.")
            return max(1, int(self.value // bytes_per_token))
        return int(self.value)

    def __str__(self) -> str:
        """Text that `parse` reads back to the same budget."""
        if self.kind == "ratio":
            return repr(float(self.value))
        if self.kind == "tokens":
            return str(int(self.value))
        whole = self.value == int(self.value) and int(self.value) % 2**20 == 0
        return f"{int(self.value) // 2**20}MiB" if whole else f"{int(self.value)}B"
