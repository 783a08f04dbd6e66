"""verify(model, patch): does the patch keep its promises on this very model?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from attnpatch.errors import PatchStateError


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


def verify(model: Any, patch: Any, *, length: int = 128, seed: int = 0, **hyperparameters: Any) -> Verification:
    """Check a patch on the user's own, un-patched model with random tokens.

    1. A budget of at least the prompt's length gives the dense logits. 2. The executor that computes each layer
    equals its naive form; names the worst layer and head. 3. Un-patching is bit-exact.
    length: prompt tokens. Leaves the model un-patched. Raises PatchStateError on a patched model.
    """
    import torch

    from attnpatch.api import patched
    from attnpatch.engine.families import unwrap

    base = unwrap(model)
    if hasattr(base, "_attnpatch"):
        raise PatchStateError("verify needs the un-patched model; call unpatch_model(model) first.")
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
    with patched(base, patch, **{**hyperparameters, "budget": length + 1}):
        worst = (logits() - before).abs().max().item() / scale
        executor = _compare_executor(base, ids, 1e-4 if exact else 3e-2)
    after = logits()
    allowed = 1e-4 if exact else 5e-2
    return Verification(
        [
            Check("budget >= length equals dense (logits)", worst <= allowed, worst, allowed),
            executor,
            Check("un-patching is bit-exact", torch.equal(before, after), (after - before).abs().max().item(), 0.0),
        ]
    )


def _compare_executor(model: Any, ids: Any, allowed: float) -> Check:
    """Run one forward with every executor call repeated by the naive form; the worst layer and head."""
    import torch

    from attnpatch.executors import dispatch, naive

    found: list[tuple[float, int, int]] = []
    original = dispatch.run

    def both(q: Any, kv: Any, selection: Any, ctx: Any, want_lse: bool = False) -> Any:
        out, lse = original(q, kv, selection, ctx, want_lse)
        rows, slots = q.shape[2], kv.k.shape[2]
        if kv.pos is None or ctx.q_pos is None:
            pos = torch.arange(slots, device=q.device, dtype=torch.int32).expand(q.shape[0], 1, -1)
            kv.pos, ctx.q_pos = pos, torch.arange(slots - rows, slots, device=q.device).expand(q.shape[0], -1)
        expected = naive.run(q, kv, selection, ctx, False)[0][:, selection.rows or slice(None)]
        error = (out - expected).float().abs().amax(dim=(0, 1, 3)) / expected.float().abs().max().clamp(min=1e-6)
        found.append((error.max().item(), len(found), int(error.argmax())))
        return out, lse

    dispatch.run = both
    try:
        with torch.no_grad():
            model(input_ids=ids)
    finally:
        dispatch.run = original
    error, layer, head = max(found)
    name = "the executor equals its naive form (attention output)"
    return Check(name, error <= allowed, error, allowed, f"worst: layer {layer}, head {head}")
