"""What the executors share in choosing a backend: the names, the forced one, what a CUDA half kernel needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from attnpatch.errors import ConfigError, VersionError

NAMES = ("fa4", "fa3", "cudnn", "flash", "sdpa", "torch", "flex", "triton", "fa2", "fa4+triton")
"""Backends of all executors. An executor that lacks a forced one makes its own choice and says so."""
HALF = (torch.float16, torch.bfloat16)


def here() -> torch.device:
    """The device that work goes to unless told: the current GPU, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


_found: dict[Any, Any] = {}  # a plain dict: torch.compile warns of lru_cache


def capability(device: torch.device) -> int:
    """CUDA major version of the device; 0 elsewhere."""
    if device.type != "cuda":
        return 0
    if device.index is None or torch.compiler.is_compiling():  # "cuda" is whichever is current
        return torch.cuda.get_device_capability(device)[0]
    if device not in _found:  # asked for several times a layer and step
        _found[device] = torch.cuda.get_device_capability(device)[0]
    return _found[device]


def has_triton() -> bool:
    """Whether Triton is installed."""
    if "triton" not in _found:
        _found["triton"] = find_spec("triton") is not None
    return _found["triton"]


def fa4(varlen: bool = False) -> Callable[..., Any] | None:
    """flash_attn.cute.flash_attn_func (or flash_attn_varlen_func) where FlashAttention 4 is installed."""
    return _attribute("flash_attn.cute", "flash_attn_varlen_func" if varlen else "flash_attn_func")


def older_flash(version: int) -> Callable[..., Any] | None:
    """flash_attn_func of an installed FlashAttention 2 or 3, or None."""
    return _attribute({2: "flash_attn", 3: "flash_attn_interface"}[version], "flash_attn_func")


def no_triton() -> str | None:
    """What keeps a Triton kernel from being launched here, or None."""
    if torch.compiler.is_compiling():
        return "is not traced by torch.compile"
    return None if has_triton() else "triton is not installed"


def _attribute(module: str, name: str) -> Any:
    """module.name, or None where it cannot be had; looked up once."""
    key = f"{module}.{name}"
    if key not in _found:
        try:
            _found[key] = getattr(import_module(module), name, None)  # flash_attn may hold only flash-attn-4
        except ImportError:
            _found[key] = None
    return _found[key]


def too_old(device: str, found: int, needed: int) -> str | None:
    """What is wrong with CUDA capability `found` of a device of that type, or None."""
    if device == "cuda" and found >= needed:
        return None
    return f"needs CUDA capability >= {needed}, this is {f'capability {found}' if device == 'cuda' else device}"


def not_half(dtype: torch.dtype) -> str | None:
    """What is wrong with a dtype for the half-precision kernels, or None."""
    return None if dtype in HALF else f"needs float16 or bfloat16, this is {str(dtype).removeprefix('torch.')}"


def differentiated(*given: torch.Tensor) -> bool:
    """Whether a gradient will be asked of a computation with these."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in given)


class ListCall(NamedTuple):
    """All that the choice of a backend that reads keys by lists depends on (`no_cuda_lists`)."""

    device: str
    capability: int  # CUDA major version; 0 elsewhere
    dtype: torch.dtype
    dim: int
    alike: bool  # q, k and v of one dtype and head dimension
    grad: bool

    @classmethod
    def of(cls, q: torch.Tensor, kv: Any) -> ListCall:
        """Of q [B, Hq, T, D] and kv with k, v [..., D]."""
        k, v = kv.k, kv.v
        alike = q.dtype == k.dtype == v.dtype and q.shape[3] == v.shape[-1]
        return cls(q.device.type, capability(q.device), q.dtype, q.shape[3], alike, differentiated(q, k, v))


def no_cuda_lists(c: Any) -> str | None:
    """What keeps a call from the Triton kernels that read keys by lists or stretches, or None."""
    if why := too_old(c.device, c.capability, 8):
        return why
    if c.dtype not in (*HALF, torch.float32):
        return f"needs float16, bfloat16 or float32, this is {str(c.dtype).removeprefix('torch.')}"
    if c.dim > 256:
        return f"needs a head dimension up to 256, this is {c.dim}"
    if not c.alike:
        return "needs queries, keys and values of one dtype and head dimension"
    if c.grad:
        return "has no backward pass"
    return None if has_triton() else "triton is not installed"


def no_cuda_half(c: Any, capability: int, dim: int) -> str | None:
    """What keeps a call from the CUDA half-precision kernels, or None."""
    if why := too_old(c.device, c.capability, capability) or not_half(c.dtype):
        return why
    if c.dim > dim or c.dim % 8:
        return f"needs a head dimension that is a multiple of 8 up to {dim}, this is {c.dim}"
    if getattr(c, "wide", 0) not in (0, c.dim):
        return "needs values as wide as the keys"
    if c.holes:
        return "cannot skip empty slots (padding or a ragged cache)"
    if getattr(c, "part", False):
        return "cannot leave keys out by position"
    return "takes no 4-D mask" if c.mask else None


def check_name(forced: str | None) -> None:
    """Raise ConfigError unless the name that ATTNPATCH_BACKEND gives is a backend's."""
    if forced and forced not in NAMES:
        raise ConfigError(f"ATTNPATCH_BACKEND={forced!r} is not a backend; allowed: {', '.join(NAMES)}.")


def _refusal(forced: str, what: str, why: str) -> ConfigError | VersionError:
    kind = VersionError if "not installed" in why else ConfigError
    return kind(f"ATTNPATCH_BACKEND={forced} cannot {what}: {why}. Unset it, or choose another backend.")


def check_forced(device: torch.device, dtype: torch.dtype, dim: int) -> None:
    """Raise before a forward where ATTNPATCH_BACKEND names nothing, or what a model of this kind can use nowhere.

    What single calls ask besides (padding, a log-sum-exp) shows when they come: `first_fit`.
    """
    if not (forced := os.environ.get("ATTNPATCH_BACKEND")):
        return
    check_name(forced)
    from attnpatch.executors import dense, pages

    found = [*dense.backends(device, dtype, dim), *pages.backends(device, dtype, dim, forced=True)]
    reasons = [why for name, usable, why in found if name == forced and not usable]
    if reasons and not any(usable for name, usable, _ in found if name == forced):
        raise _refusal(forced, "serve this model", reasons[0])


def first_fit(why_not: Mapping[str, Callable[[Any], str | None]], call: Any, forced: str | None) -> tuple[str, str]:
    """(backend, reason): the forced one if it is among `why_not` (fastest first), else the first that fits the call.

    Raises ConfigError for an unknown forced name or a call it cannot do, VersionError if its package is missing.
    """
    check_name(forced)
    if forced and forced in why_not:
        if why := why_not[forced](call):
            raise _refusal(forced, "do this call", why)
        return forced, "forced by ATTNPATCH_BACKEND"
    passed = [f"ATTNPATCH_BACKEND={forced} belongs to another executor"] if forced else []
    for name, reason in why_not.items():
        why = reason(call)
        if why is None:
            return name, "; ".join(["the fastest that fits", *passed])
        passed.append(f"not {name}: {why}")
    raise ConfigError("no attention backend fits: " + "; ".join(passed))  # unreachable: `torch` takes everything


def first_fit_once(
    chosen: dict[Any, tuple[str, str]], why_not: Mapping[str, Callable[[Any], str | None]], call: Any,
    forced: str | None,
) -> tuple[str, str]:  # fmt: skip
    """`first_fit`, made once per kind of call, which `chosen` holds. A plain dict: torch.compile warns of lru_cache."""
    if torch.compiler.is_compiling():
        return first_fit(why_not, call, forced)
    if (call, forced) not in chosen:
        chosen[call, forced] = first_fit(why_not, call, forced)
    return chosen[call, forced]
