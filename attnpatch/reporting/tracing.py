"""Run one prompt dense and patched, and note what each layer kept."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from attnpatch.errors import ConfigError, InputError
from attnpatch.profiling.shared import Observer
from attnpatch.reporting.trace import Layer, Trace

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.engine.call import KV, Ctx
    from attnpatch.patch import Patch

WINDOW = 32  # last prompt tokens whose attention is looked at: SnapKV's window
_WHOLE = 8  # tokens that one character may take


@dataclass
class Eye(Observer):
    """seen: (look, best rank, worst rank) of the needle by layer, from the last prompt tokens' attention.

    needle: prompt positions. The window's own tokens are not ranked: methods keep them anyway.
    """

    needle: list[int] = field(default_factory=list)
    window: int = WINDOW

    name = "eye"

    def observe(self, q: Tensor, kv: KV, ctx: Ctx) -> None:
        if ctx.event != "prompt":
            return
        groups, rows = q.shape[1] // kv.k.shape[1], min(self.window, q.shape[2])
        tail = q[0, :, -rows:].float().unflatten(0, (-1, groups))  # [Hkv, G, w, D]
        scores = tail @ kv.k[0].float().mT[:, None] * ctx.scaling  # [Hkv, G, w, S]
        if ctx.softcap is not None:
            scores = ctx.softcap * torch.tanh(scores / ctx.softcap)
        slots = torch.arange(kv.S, device=q.device)
        late = slots > slots[-rows:, None]  # [w, S]
        weight = scores.masked_fill(late, float("-inf")).softmax(-1).mean(2)  # [Hkv, G, S]
        at = torch.tensor(self.needle, device=q.device)
        look = weight[..., at].sum(-1).max()
        votes = weight.mean(1)[:, : max(kv.S - rows, 1)]  # [Hkv, S - w]
        inside = at[at < votes.shape[1]]
        if not len(inside):  # the needle lies in the window itself
            self.seen[ctx.index] = (look, None, None)
            return
        ranks = (votes[:, None] > votes[:, inside, None]).sum(-1) + 1  # [Hkv, needle]
        head = ranks.amax(1).argmin()
        self.seen[ctx.index] = (look, ranks[head].amin(), ranks[head].amax())


def trace(
    model: Any, tokenizer: Any, ids: Tensor, patches: Sequence[Patch], *, name: str, needle: str = "",
    spans: Sequence[tuple[int, int]] = (), expected: str = "", max_new_tokens: int = 32,
) -> Trace:  # fmt: skip
    """The trace of ids [1, N] under `patches`; dense and patched answers are greedy. The model is un-patched again.

    needle: a text of the prompt (every occurrence is marked), or spans: [start, end) of its tokens. Raises InputError
    where the needle does not occur, ConfigError for a method that writes its own prompt.
    """
    if own := [p.name for p in patches if "prepare" in p.hooks()]:
        raise ConfigError(
            f"{own[0]} puts a prompt of its own in the place of this one, so there is nothing to trace; take a method "
            "that evicts or selects (attnpatch list)."
        )
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] < 2:
        raise InputError(f"ids {tuple(ids.shape)} are not one prompt; give ids [1, N] of at least 2 tokens.")
    ids = ids.cpu()
    tokens = pieces(tokenizer, ids[0].tolist())
    found = [(int(a), int(b)) for a, b in spans] or (find(tokens, needle) if needle else [])
    eye = Eye(needle=[i for a, b in found for i in range(a, b)])
    dense, _ = answer(model, tokenizer, ids, [eye] if found else [], max_new_tokens)
    patched, after = answer(model, tokenizer, ids, list(patches), max_new_tokens)
    layers = [layer(row, ids.shape[1], eye.needle, eye.seen.get(row.index)) for row in after.layers]
    return Trace(
        name, {p.name: {k: str(v) for k, v in p.hyperparameters().items()} for p in patches}, tokens, layers, found,
        dense, patched, expected, after.note if not after.note.startswith("nothing was evicted") else "", WINDOW,
    )  # fmt: skip


def answer(model: Any, tokenizer: Any, ids: Tensor, patches: list[Any], count: int) -> tuple[str, Any]:
    """(what the model says, its status as the prompt ended, None without patches)."""
    from contextlib import nullcontext

    from attnpatch.api import patched
    from attnpatch.engine.compat import greedy_options, input_device, pad_id
    from attnpatch.report import status

    ids = ids.to(input_device(model))
    states: list[Any] = []
    pad = pad_id(tokenizer)

    def note(*_: Any) -> None:
        if not states:
            states.append(status(model))

    with patched(model, patches) if patches else nullcontext(), torch.inference_mode():
        hook = model.get_decoder().register_forward_hook(note) if patches else None
        try:
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, pad_token_id=pad,
                **greedy_options(model),
            )  # fmt: skip
        finally:
            if hook is not None:
                hook.remove()
    text = tokenizer.decode(out[0, ids.shape[1] :].tolist(), skip_special_tokens=True)
    return text.strip(), states[0] if states else None


def layer(row: Any, count: int, needle: list[int], look: Any) -> Layer:
    """A layer's status as a row of the trace."""
    made = Layer(row.index, reason=row.reason, note=row.note)
    if row.density is not None:
        made.density = [round(x, 4) for x in row.density[0].tolist()]
    if look is not None:
        made.look, made.best, made.worst = (None if x is None else x.item() for x in look)
    if not row.covered or row.positions is None:
        made.reason = made.reason or "left alone"
        return made
    pos = row.positions[0].long()  # [Hkv, S]
    there = torch.zeros(pos.shape[0], count + 1, dtype=torch.bool)
    there.scatter_(1, pos.masked_fill((pos < 0) | (pos >= count), count), True)
    there = there[:, :count]  # [Hkv, N]
    share = there.float().mean(0)
    digits = (share * 8).round().clamp(1, 8).long()  # 1..8: some heads
    digits = digits.masked_fill(share == 0, 0).masked_fill(share == 1, 9)
    made.kept = "".join(map(str, digits.tolist()))
    made.heads = there.sum(1).tolist()
    made.needle = there[:, needle].sum(1).tolist() if needle else []
    return made


# ---- text --------------------------------------------------------------------------------------------------------
def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each token; where several make one character, the first has it and the others have none."""
    anchor = next((i for i in ids if "\ufffd" not in tokenizer.decode([i])), ids[0])
    lead = tokenizer.decode([anchor])
    known: dict[tuple[int, ...], str] = {}

    def said(part: list[int]) -> str:
        key = tuple(part)
        if key not in known:  # behind another token, so that a space in front is not stripped
            whole = tokenizer.decode([anchor, *part])
            known[key] = whole[len(lead) :] if whole.startswith(lead) else tokenizer.decode(part)
        return known[key]

    made, at = [], 0
    while at < len(ids):
        size = next((n for n in range(1, _WHOLE + 1) if "\ufffd" not in said(ids[at : at + n])), 1)
        size = min(size, len(ids) - at)
        made += [said(ids[at : at + size]), *[""] * (size - 1)]
        at += size
    return made


def find(tokens: list[str], needle: str) -> list[tuple[int, int]]:
    """[start, end) token spans of every occurrence of a text. Raises InputError where there is none."""
    text, starts = "".join(tokens), [0]
    for piece in tokens:
        starts.append(starts[-1] + len(piece))
    spans, at = [], text.find(needle)
    while at >= 0:
        end = at + len(needle)
        spans.append((bisect_right(starts, at) - 1, bisect_left(starts, end)))
        at = text.find(needle, end)
    if not spans:
        raise InputError(f"the needle {needle!r} does not occur in the prompt; give a text as it stands there.")
    return spans
