"""TCA-style attention computed from its specification, row by row and token by token, on a stock eager model."""

from __future__ import annotations

import math

import torch
from oracle import CACHE
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask


def configuration(mu, sigma, b):
    """Step A2: {k: p_k}; mu None = dense."""
    menu = [2**i for i in range(int(math.log2(b)) + 1)]
    if mu is None:
        return {k: float(k == b) for k in menu}
    p = {k: math.exp(-((math.log2(k) - mu) ** 2) / (2 * sigma**2)) for k in menu}
    return {k: x / sum(p.values()) for k, x in p.items()}


def planned(p, nb):
    """Step B3: the counts that the blocks get, best first: largest remainders, ties to the larger k."""
    real = {k: x * nb for k, x in p.items()}
    whole = {k: math.floor(x + 1e-9) for k, x in real.items()}
    order = sorted(p, key=lambda k: (-round((real[k] - whole[k]) * 1e9), -k))
    for k in order[: nb - sum(whole.values())]:
        whole[k] += 1
    return [k for k in sorted(p, reverse=True) for _ in range(whole[k])]


def weights(rows, k, scaling=None, softcap=None, at=None):
    """Mean softmax weights float64 [Hkv, N] of queries rows [Hq, w, D] (the last tokens, or all at position `at`)."""
    (heads, n, dim), w = k.shape, rows.shape[1]
    logits = rows.double() @ k.double().repeat_interleave(rows.shape[0] // heads, 0).transpose(1, 2)
    logits = logits * (dim**-0.5 if scaling is None else scaling)
    logits = logits if not softcap else softcap * torch.tanh(logits / softcap)
    if at is None:
        late = torch.arange(n)[None] > torch.arange(n - w, n)[:, None]
        logits = logits.masked_fill(late, float("-inf"))
    return logits.softmax(-1).mean(1).unflatten(0, (heads, -1)).mean(1)


def strongest(a, members, count):
    """Step B4: the `count` strongest of `members`, ties to the later."""
    return set(sorted(members, key=lambda j: (a[j], j), reverse=True)[:count])


def kept(a, n, p, b, metric="mass", held=None):
    """Steps B1 to B5 for one head: a maps positions to weights; held: positions that are there (None = all n)."""
    held, nb = set(range(n)) if held is None else held, -(-n // b)
    blocks = [[j for j in range(i * b, min(n, i * b + b)) if j in held] for i in range(nb)]
    order = []
    for block in blocks:
        mass = sum(a[j] for j in block)
        if metric == "mass":
            order.append(mass)
            continue
        entropy = -sum(a[j] / mass * math.log(a[j] / mass) for j in block if a[j] > 0)
        order.append(-math.exp(entropy) / len(block) * (1 - mass))
    ranked = sorted(range(nb), key=lambda i: (order[i], i), reverse=True)
    counts = dict(zip(ranked, planned(p, nb), strict=True))
    counts |= dict.fromkeys((0, nb - 2, nb - 1), b)
    return set().union(*(strongest(a, block, counts[i]) for i, block in enumerate(blocks)))


def median(p):
    """Step C: the lower median k."""
    total = 0.0
    for k in sorted(p):
        total += p[k]
        if total >= 0.5:
            return k


class Reference:
    """A stock eager model that attends and keeps what TCA says; `kept`[layer][row][KV head] are sets of positions."""

    def __init__(self, model, least, b, mu, sigma=1.0, order="mass", rows=1, prefill=True, decode=True):
        self.model, self.cache, self.kept = model, DynamicCache(config=model.config), {}
        self.p, self.least, self.b, self.order, self.rows = configuration(mu, sigma, b), least, b, order, rows
        self.prefill, self.decode, self.begin, self.steps, self.seen = prefill, decode, {}, 0, 0
        AttentionInterface.register("tca-reference", self.attention)
        AttentionMaskInterface.register("tca-reference", eager_mask)
        model.set_attn_implementation("tca-reference")

    def close(self):
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop("tca-reference", None)

    def forward(self, ids, mask=None):
        """Logits of ids [B, T]; mask [B, seen + T]."""
        mask = torch.ones(ids.shape[0], self.seen + ids.shape[1]).long() if mask is None else mask
        self.real = mask.bool()
        self.steps += ids.shape[1] == 1 and bool(self.begin)
        pos = (mask.cumsum(-1) - 1).clamp(min=0)[:, self.seen :]
        with torch.no_grad():
            out = self.model(ids, attention_mask=mask, position_ids=pos, **{CACHE: self.cache}).logits
        self.seen += ids.shape[1]
        return out

    def attention(self, module, q, k, v, attention_mask, scaling, sliding_window=None, softcap=None, **kwargs):
        wide = [x.repeat_interleave(module.num_key_value_groups, 1) for x in (k, v)]
        logits = q @ wide[0].transpose(-1, -2) * scaling
        logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
        logits = logits if attention_mask is None else logits + attention_mask
        if sliding_window is None:
            for row in range(q.shape[0]):
                self._row(module, row, q[row], k[row], logits[row], scaling, softcap)
        probs = torch.softmax(logits.float(), -1).nan_to_num()
        return (probs.to(v.dtype) @ wide[1]).transpose(1, 2).contiguous(), None

    def _row(self, module, row, q, k, logits, scaling, softcap):
        """Mask logits [Hq, T, S] of one row in place, then decide what it keeps."""
        layer, heads, length = module.layer_idx, k.shape[0], q.shape[1]
        slots = self.real[row].nonzero().flatten()
        n, fresh = len(slots), int(self.real[row, self.seen :].sum())
        old, first = n - fresh, self.seen == 0
        sets = self.kept.setdefault((layer, row), [set() for _ in range(heads)])
        call = {"scaling": scaling, "softcap": softcap}
        now = [s | set(range(old, n)) for s in sets]
        chosen = now
        if n >= self.least and (layer, row) not in self.begin and length > 1:
            a = weights(q[:, length - min(self.rows, fresh) :], k[:, slots], **call)
            chosen = [kept(a[h].tolist(), n, self.p, self.b, self.order) for h in range(heads)]
            self.begin[layer, row] = (-(-n // self.b) - 2) * self.b
        sparse = first and self.prefill
        i, j = torch.arange(old, n)[:, None], torch.arange(n)[None]
        for h in range(heads):
            named = torch.zeros(n, dtype=torch.bool)
            named[list(chosen[h] if sparse else now[h])] = True
            seen = (j <= i) & (named | (sparse & (i - j < 2 * self.b)))
            for g in range(h * module.num_key_value_groups, (h + 1) * module.num_key_value_groups):
                block = torch.full((fresh, k.shape[1]), float("-inf"))
                block[:, slots] = logits[g][length - fresh :][:, slots].masked_fill(~seen, float("-inf"))
                logits[g, length - fresh :] = block
        if length == 1 and self.decode and self.steps % self.b == 0 and (layer, row) in self.begin:
            chosen = self._thin(layer, row, q, k[:, slots], now, n, call)
        self.kept[layer, row] = chosen

    def _thin(self, layer, row, q, k, now, n, call):
        end = max(self.begin[layer, row], (n - 2 * self.b) // self.b * self.b)
        found = []
        for h, held in enumerate(now):
            places, group = sorted(held), q.shape[0] // k.shape[0]
            a = weights(q[h * group : (h + 1) * group], k[h : h + 1, places], at=n - 1, **call)[0].tolist()
            a, stay = dict(zip(places, a, strict=True)), set(held)
            for start in range(self.begin[layer, row], end, self.b):
                block = held & set(range(start, start + self.b))
                stay -= block - strongest(a, block, median(self.p))
            found.append(stay)
        self.begin[layer, row] = end
        return found
