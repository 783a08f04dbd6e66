"""Echo and induction heads on repeated random tokens (RazorAttention, arXiv 2407.15891, algorithm A)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from attnpatch.errors import ConfigError
from attnpatch.profiling import shared

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.engine.call import KV, Ctx
    from attnpatch.profile import Profile

_ROWS = 1024  # query rows at once


@dataclass
class Copies(shared.Observer):
    """seen: [B, Hq, 2] fp32, mean attention to earlier copies of a token, and to what followed them."""

    first: int = 1  # slot of the first repeated token
    block: int = 2  # tokens that are repeated
    repeats: int = 4

    @property
    def needs_lse(self) -> bool:
        return True

    def observe(self, q: Tensor, kv: KV, ctx: Ctx) -> None:
        lse: Any = ctx.lse
        total = q.new_zeros((*q.shape[:2], 2), dtype=torch.float32)
        for start in range(self.first + self.block, q.shape[2], _ROWS):
            stop = min(start + _ROWS, q.shape[2])
            for back in range(self.block, (self.repeats - 1) * self.block + 1, self.block):
                low = max(start, self.first + back)  # rows with a copy so far back
                if low >= stop:
                    break
                for which in range(2):
                    keys = kv.k[:, :, low - back + which : stop - back + which]
                    weight = _weights(q[:, :, low:stop], keys, lse[:, :, low:stop], ctx)
                    total[..., which] += weight.sum(-1)
        self.seen[ctx.index] = total / (q.shape[2] - self.first - self.block)


def _weights(q: Tensor, k: Tensor, lse: Tensor, ctx: Ctx) -> Tensor:
    """Weight of key i for query i: q [B, Hq, n, D], k [B, Hkv, n, D], lse [B, Hq, n] -> fp32 [B, Hq, n]."""
    heads = q.float().unflatten(1, (k.shape[1], -1))  # [B, Hkv, G, n, D]
    logits = (heads * k.float()[:, :, None]).sum(-1).flatten(1, 2) * ctx.scaling
    if ctx.softcap is not None:
        logits = torch.tanh(logits / ctx.softcap) * ctx.softcap
    return (logits - lse).exp()


def echo_heads(
    model: Any, tokenizer: Any = None, *, block: int = 2500, repeats: int = 4, trials: int = 1, seed: int = 0,
    ids: Tensor | None = None,
) -> Profile:  # fmt: skip
    """Profile "echo-heads": needs no data. A block of random tokens is repeated behind the first token, in one forward.

    For every position of the later repeats: `echo` = attention to all earlier copies of its token, `induction` = to the
    tokens that followed them; means, fp32 [L, Hq], of the whole softmax row, the first token included. `kv_echo` and
    `kv_induction` fp32 [L, Hkv]: the largest of each group. Tokens are uniform over the vocabulary without special and
    added ones. Sliding-window layers: NaN. The paper takes 2500 x 4.

    trials: sequences with other tokens, averaged. ids: int [block] to repeat instead (behind `tokenizer`'s first token,
    if it is given). `retrieval_set` makes RazorAttention's set of heads from it.
    """
    shared.check_counts(repeats=repeats, trials=trials)
    observer = Copies()
    with shared.observed(model, observer) as subject:
        block = block if ids is None else ids.shape[0]
        if isinstance(block, bool) or not isinstance(block, int) or block < 2 or repeats < 2:
            raise ConfigError(f"block={block!r}, repeats={repeats!r}: give at least 2 tokens and 2 repeats.")
        if tokenizer is None and ids is None:
            raise ConfigError("echo_heads needs a tokenizer, whose vocabulary it draws from, or ids=[block].")
        start = shared.opening(tokenizer) if tokenizer is not None else []
        observer.first, observer.block, observer.repeats = len(start), block, repeats
        total: Any = 0
        for trial in range(trials):
            one = ids
            if one is None:
                one = shared.draw(shared.ordinary_ids(tokenizer, subject.model.config), (block,), seed * 7919 + trial)
            row = torch.cat([torch.tensor(start, dtype=torch.int64), one.cpu().long().repeat(repeats)])
            shared.run_prompt(subject, row[None])
            total = total + subject.stacked(observer)[:, 0]  # [L', Hq, 2]
    echo, induction = (subject.full(x) for x in (total / trials).unbind(-1))
    tensors = {
        "echo": echo,
        "induction": induction,
        "kv_echo": shared.group_max(echo, subject.kv_heads),
        "kv_induction": shared.group_max(induction, subject.kv_heads),
    }
    return shared.made("echo-heads", subject, tensors, block=block, repeats=repeats, trials=trials, seed=seed)


def retrieval_set(profile: Profile, induction_ratio: float = 0.14, echo_ratio: float = 0.01) -> Tensor:
    """RazorAttention's retrieval heads: bool [L, Hkv], the top share of all KV heads by induction, and by echo.

    round(ratio x heads) of each, counted over the layers that were measured; ties: the lower layer, then head.
    """
    if profile.kind != "echo-heads":
        raise ConfigError(f"a {profile.kind} profile has no induction and echo scores; make an echo-heads profile.")
    chosen = torch.zeros_like(profile.tensors["kv_echo"], dtype=torch.bool)
    for name, ratio in (("kv_induction", induction_ratio), ("kv_echo", echo_ratio)):
        if not 0 <= ratio <= 1:
            raise ConfigError(f"a ratio of {ratio!r} is out of range; give shares of the KV heads between 0 and 1.")
        score = profile.tensors[name].flatten()
        known = int((~score.isnan()).sum())
        order = score.nan_to_num(float("-inf")).argsort(descending=True, stable=True)
        chosen.view(-1)[order[: round(ratio * known)]] = True
    return chosen
