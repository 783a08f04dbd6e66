"""probe: call a method's hook from outside on plain tensors, to check what it chooses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnpatch.errors import ConfigError, InputError

if TYPE_CHECKING:
    from torch import Tensor

STATE = ("layer", "n_layers", "softcap", "event", "tail", "prompt_len", "turn")
"""Keywords of `probe` that say where the hook is called; no hyperparameter may be called so."""


def probe(
    patch: Any, q: Tensor, k: Tensor, /, v: Tensor | None = None, *,
    scaling: float | None = None, padding: Tensor | None = None, **state: Any,
) -> Any:  # fmt: skip
    """What `patch` decides for a prompt: its KeepSet, or the Selections of a method that selects; None = dense.

    A generator is run to its end: the list of its Selections (or KeepSets) comes back.

    patch: a name or a Patch object. q: [B, Hq, N, D] (or the last queries [B, Hq, T, D]); k, v: [B, Hkv, N, D],
    rotated as the model rotates them. padding: bool [B, N], True for real tokens; slots of the answer then count a
    row's real tokens. state: layer, n_layers, softcap, event ("prompt" | "chunk"), tail, prompt_len, turn (of a method
    that re-numbers positions: see Ctx), budget and the patch's own hyperparameters. Raises InputError on shapes that do
    not fit, ConfigError on an unknown keyword.
    """
    import torch

    from attnpatch.api import resolve
    from attnpatch.decisions import Selection
    from attnpatch.executors import dense

    known: dict[str, Any] = {name: state.pop(name) for name in STATE if name in state}
    patches = resolve(patch, **state)
    if len(patches) != 1:
        raise ConfigError("probe takes one patch; probe them one by one.")
    method, v = patches[0], k if v is None else v
    q_pos, kv, ctx = _call(method, q, k, v, scaling, padding, known)
    if method.query_tail:
        last = q_pos.argsort(dim=-1, stable=True)[:, -method.query_tail :]
        ctx.tail = q.gather(2, last[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
        ctx.tail_pos = q_pos.gather(1, last)
        if known.get("tail") is not None:
            ctx.tail = known["tail"]
    with torch.no_grad():
        if "select" in method.hooks() and "keep" not in method.hooks():
            kv.holes = False  # pads lie behind the real tokens
            return _run_through(method.select(q, kv, ctx), q, kv, ctx)
        if "observe" in method.hooks():
            ctx.lse = dense.run(q, kv, Selection(), ctx, want_lse=True)[1]
            method.observe(q, kv, ctx)
        return _kept(method.keep(q, kv, ctx)) if "keep" in method.hooks() else None


def _call(method: Any, q: Any, k: Any, v: Any, scaling: Any, padding: Any, known: dict[str, Any]) -> Any:
    """(q_pos [B, T], kv, ctx) of a prompt, its real tokens moved to the front."""
    import torch

    from attnpatch.engine.call import KV, Ctx

    _check(q, k, v, padding, known)
    batch, n, rows = k.shape[0], k.shape[2], q.shape[2]
    real = torch.ones(batch, n, dtype=torch.bool, device=k.device) if padding is None else padding.bool()
    order = (~real).to(torch.uint8).argsort(dim=-1, stable=True)  # real tokens first
    pos = torch.where(real, real.long().cumsum(-1) - 1, -1).gather(1, order)
    k, v = (x.gather(2, order[:, None, :, None].expand_as(x)) for x in (k, v))
    q_pos = torch.where(real, real.long().cumsum(-1) - 1, -1)[:, n - rows :]
    kv = KV(k, v, pos[:, None].to(torch.int32), holes=padding is not None)
    lengths = known.get("prompt_len") or tuple(real.sum(-1).tolist())
    ctx = Ctx(
        known.get("layer", 0), known.get("n_layers", 1), "prefill", known.get("event", "prompt"), q_pos, tuple(lengths),
        k.shape[-1] ** -0.5 if scaling is None else scaling, known.get("softcap"),
    )  # fmt: skip
    ctx.ragged, ctx.turn = padding is not None, known.get("turn")
    ctx.bytes_per_token = float((k[0, :, 0].numel() + v[0, :, 0].numel()) * k.element_size() * ctx.n_layers)

    def at(layer: int) -> KV:
        if layer != ctx.layer:
            raise ConfigError(f"{method.name} decides for earlier layers too, which probe has not; probe layer 0.")
        return kv

    ctx.at = at
    return q_pos, kv, ctx


def _check(q: Any, k: Any, v: Any, padding: Any, known: dict[str, Any]) -> None:
    """Raise InputError on tensors that do not fit, ConfigError on a wrong event or layer."""
    import torch

    if not all(isinstance(x, torch.Tensor) for x in (q, k, v, *(() if padding is None else (padding,)))):
        raise InputError("q, k, v and padding must be tensors: give [B, Hq, T<=N, D], [B, Hkv, N, D] and bool [B, N].")
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    fits = q.ndim == k.ndim == v.ndim == 4 and (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3])
    if not fits or 0 in (*q.shape, *k.shape) or q.shape[1] % k.shape[1] or q.shape[2] > k.shape[2]:
        raise InputError(f"{shapes} do not fit: give [B, Hq, T<=N, D], [B, Hkv, N, D].")
    if v.shape[:3] != k.shape[:3]:
        raise InputError(f"{shapes} do not fit: v needs k's rows, heads and length.")
    if padding is not None and padding.shape != (k.shape[0], k.shape[2]):
        raise InputError(f"padding {tuple(padding.shape)} does not fit k {tuple(k.shape)}: give bool [B, N].")
    if (event := known.get("event", "prompt")) not in ("prompt", "chunk"):
        raise ConfigError(f"event={event!r} is not allowed; choose one of 'prompt', 'chunk'.")
    layer = known.get("layer", 0)
    if not 0 <= layer < (n_layers := known.get("n_layers", layer + 1)):
        raise ConfigError(f"layer={layer}, n_layers={n_layers}: layers count from 0 to n_layers - 1.")


def _kept(decision: Any) -> Any:
    """A KeepSet, or the list of those that a generator yields."""
    from collections.abc import Generator

    return list(decision) if isinstance(decision, Generator) else decision


def _run_through(decision: Any, q: Any, kv: Any, ctx: Any) -> Any:
    """The terms of a decision; a generator is sent what each term would have given."""
    from collections.abc import Generator

    from attnpatch.engine.terms import each_term, turned
    from attnpatch.executors import dispatch

    if not isinstance(decision, Generator):
        return decision
    terms: list[Any] = []

    def compute(term: Any) -> Any:
        terms.append(term)
        query = q if ctx.turn is None else turned(q, term, ctx)  # what a term gives does not count unless turned
        return dispatch.run(query, kv, term, ctx, True)

    each_term(decision, compute)
    return terms
