"""verify(model, patch): does the patch keep its promises on this very model?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from attnpatch.errors import ConfigError, PatchStateError


@dataclass
class Check:
    """One promise: the worst error found, what is allowed, and where the worst was."""

    name: str
    ok: bool
    error: float
    allowed: float
    where: str = ""


@dataclass
class Verification:
    """The result of `verify`."""

    checks: list[Check]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "checks": [asdict(check) for check in self.checks]}

    def __str__(self) -> str:
        rows = [f"{'ok  ' if c.ok else 'FAIL'} {c.name}: worst error {c.error:.2e} (allowed {c.allowed:.0e}) {c.where}"
                for c in self.checks]  # fmt: skip
        return "\n".join(rows)


def verify(model: Any, patch: Any, *, length: int | None = None, seed: int = 0, **hyperparameters: Any) -> Verification:
    """Check a patch on the user's own, un-patched model with random tokens.

    1. A budget of at least the prompt's length gives the dense logits (for methods that have a budget). 2. The executor
    that computes each layer equals its naive form; names the worst layer and head. 3. Un-patching is bit-exact.
    length: prompt tokens; default 128, or 1536 for a method that makes prefill sparse (short prompts run dense).
    Leaves the model un-patched. Raises PatchStateError on a patched model.
    """
    import torch

    from attnpatch.api import patched, resolve
    from attnpatch.engine.families import unwrap

    base = unwrap(model)
    if hasattr(base, "_attnpatch"):
        raise PatchStateError("verify needs the un-patched model; call unpatch_model(model) first.")
    patches = resolve(patch, **hyperparameters)
    if length is not None and length < 1:
        raise ConfigError(f"length={length}: give the number of prompt tokens to check, at least 1.")
    length = length or (1536 if any("prefill" in p.phases for p in patches) else 128)
    owners = [p.name for p in patches if hasattr(p, "budget")]
    weight = next(base.parameters())
    vocab = base.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab, (1, length), generator=generator).to(weight.device)
    exact = weight.dtype in (torch.float32, torch.float64)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return base(input_ids=ids).logits.float()

    before = logits()
    scale = max(1.0, before.abs().max().item())
    checks = []
    with patched(base, list(patches)):
        checks.append(_compare_executor(base, ids, 1e-4 if exact else 3e-2))
    if len(owners) == len(patches):
        allowed = 1e-4 if exact else 5e-2
        with patched(base, list(patches), **{name: {"budget": length + 2} for name in owners}):
            worst = (logits() - before).abs().max().item() / scale
        checks.insert(0, Check("budget >= length equals dense (logits)", worst <= allowed, worst, allowed))
    after = logits()
    worst = (after - before).abs().max().item()
    return Verification([*checks, Check("un-patching is bit-exact", torch.equal(before, after), worst, 0.0)])


def _compare_executor(model: Any, ids: Any, allowed: float) -> Check:
    """Run one forward with every executor call repeated by the naive form; the worst layer and head."""
    import torch

    from attnpatch.executors import dispatch, naive

    found: list[tuple[float, int, int]] = []
    sparse: list[bool] = []
    original = dispatch.run

    def both(q: Any, kv: Any, selection: Any, ctx: Any, want_lse: bool = False) -> Any:
        out, lse = original(q, kv, selection, ctx, want_lse)
        rows, slots = q.shape[2], kv.k.shape[2]
        if kv.pos is None or ctx.q_pos is None:
            pos = torch.arange(slots, device=q.device, dtype=torch.int32).expand(q.shape[0], 1, -1)
            kv.pos, ctx.q_pos = pos, torch.arange(slots - rows, slots, device=q.device).expand(q.shape[0], -1)
        expected = naive.run(q, kv, selection, ctx, False)[0][:, selection.rows or slice(None)]
        sparse.append(selection.named)
        error = (out - expected).float().abs().amax(dim=(0, 1, 3)) / expected.float().abs().max().clamp(min=1e-6)
        found.append((error.max().item(), ctx.layer, int(error.argmax())))
        return out, lse

    dispatch.run = both
    try:
        with torch.no_grad():
            model(input_ids=ids)
    finally:
        dispatch.run = original
    error, layer, head = max(found)
    name = "the executor equals its naive form (attention output)"
    where = f"worst: covered layer {layer}, head {head}; {sum(sparse)} of {len(sparse)} calls sparse"
    return Check(name, error <= allowed, error, allowed, where)
