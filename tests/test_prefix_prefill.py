"""Sparse prefills behind a cached prefix, through the engine: chunks of a prompt, later turns, padded batches.

Each attention call is held against masked dense attention over the pairs that the method's specification names for it.
"""

from __future__ import annotations

import math

import pytest
import test_flexprefill as flex
import test_hip as hip
import test_infinitehip as infinitehip
import test_minference as minference
import torch
from oracle import CACHE, tiny
from selections import largest

import attnpatch

HYPER = {
    "flexprefill": {"block_size": 16, "min_budget": 32, "gamma": 0.7, "tau": 0.3},
    "xattention": {"block_size": 32, "stride": 8, "threshold": 0.6},
    "minference": {"vertical": 40, "slash": 100},
    "hip": {**hip.SMALL, "dense_layers": 0},
    "infinitehip": infinitehip.SMALL,
}


def blocks(chosen, size, prefix, slots):
    """bool [Hq, T, S] of {absolute query block: key blocks} per head."""
    seen = torch.zeros(len(chosen), slots, slots, dtype=torch.bool)
    for h, own in enumerate(chosen):
        for i, keys in own.items():
            for j in keys:
                seen[h, i * size : (i + 1) * size, j * size : (j + 1) * size] = True
    return seen[:, prefix:]


def flexprefill(q, k, prefix):
    """The last 16 queries of the chunk vote over all keys; blocks are absolute."""
    given = {"b": 16, "min_budget": 32, "gamma": 0.7, "tau": 0.3}
    return blocks(flex.from_the_spec(q, k, prefix, **given)[0], 16, prefix, k.shape[1])


def xattention(q, k, prefix, b=32, stride=8, threshold=0.6):
    """Only the chunk's own queries count, in absolute tiles; the first may be partial."""
    slots, sets = k.shape[1], []
    groups, nb, tile = math.ceil(slots / stride), math.ceil(slots / b), b // stride
    for h in range(q.shape[0]):
        whole = torch.zeros(2, groups * stride, q.shape[-1], dtype=torch.float64)
        whole[0, prefix:slots], whole[1, :slots] = q[h], k[h * k.shape[0] // q.shape[0]]
        x = sum(whole[0, stride - 1 - s :: stride] @ whole[1, s::stride].T for s in range(stride))
        x = (x * q.shape[-1] ** -0.5 / stride).masked_fill(torch.ones(groups, groups).triu(1).bool(), -math.inf)
        x, own = x.softmax(-1), {}
        x[: prefix // stride] = 0  # cached queries
        for i in range(prefix // b, nb):
            row = [x[i * tile : (i + 1) * tile, j * tile : (j + 1) * tile].sum().item() for j in range(i + 1)]
            own[i] = {0, i}
            for j in largest([-1.0 if j in own[i] else m for j, m in enumerate(row)], len(row)):
                if sum(row[j] for j in own[i]) >= threshold * sum(row):
                    break
                own[i].add(j)
        sets.append(own)
    return blocks(sets, b, prefix, slots)


def vertical_slash(q, k, prefix):
    """The chunk's last 64 queries vote over all keys; distances are true ones."""
    return minference.vertical_slash(q, k, 40, 100)[:, prefix:]


def hip_keys(q, k, prefix):
    patch, seen = hip.HiP(**HYPER["hip"]), torch.zeros(q.shape[0], q.shape[1], k.shape[1], dtype=torch.bool)
    for h in range(q.shape[0]):
        for t, keys in enumerate(hip.naive_keys(q[h], k[h * k.shape[0] // q.shape[0]], patch, prefix)):
            seen[h, t, sorted(keys)] = True
    return seen


def stages(q, k, prefix):
    patch = infinitehip.InfiniteHiP(**HYPER["infinitehip"])
    seen = torch.zeros(q.shape[0], q.shape[1], k.shape[1], dtype=torch.bool)
    for t, keys in enumerate(infinitehip.naive_keys(q, k, patch, prefix)):
        seen[:, t, sorted(keys)] = True
    return seen


SPEC = {"flexprefill": flexprefill, "xattention": xattention, "minference": vertical_slash, "hip": hip_keys,
        "infinitehip": stages}  # fmt: skip
SHORT = {"flexprefill": 32, "xattention": 64, "minference": 100, "hip": 0, "infinitehip": 0}
"""Rows up to here are dense."""


@pytest.fixture
def calls(monkeypatch):
    """What each call of a selecting method was given and gave: (q, k, v, q_pos, out, note) of layer 1 in prefill."""
    from attnpatch.engine import attention

    found, attend = [], attention.attend

    def watched(patch, call, layer, index, q, kv, ctx, lse):
        result = attend(patch, call, layer, index, q, kv, ctx, lse)
        if ctx.phase == "prefill" and index == 1:
            found.append(tuple(x.clone() for x in (q, kv.k, kv.v, ctx.q_pos, result[0])) + (layer.note,))
        return result

    monkeypatch.setattr(attention, "attend", watched)
    return found


def check(patch, found, sparse=True):
    """Each call's output is dense attention under what the specification names. Returns the (prefix, rows) of each."""
    shapes, left_out = [], not sparse
    for q, k, v, q_pos, out, note in found:
        assert bool(note) != sparse, note
        for b in range(q.shape[0]):
            real = q_pos[b] >= 0
            rows, n = int(real.sum()), int(q_pos[b].max()) + 1
            if not rows:
                assert (out[b] == 0).all()
                continue
            prefix = n - rows
            query, keys, values = q[b, :, :rows], k[b, :, :n], v[b, :, :n]
            causal = torch.arange(n) <= torch.arange(prefix, n)[:, None]
            seen = causal.expand(q.shape[1], -1, -1)
            if sparse and n > SHORT[patch]:
                seen = seen & SPEC[patch](query, keys, prefix)
                left_out = left_out or not torch.equal(seen, causal.expand_as(seen))
            group = q.shape[1] // k.shape[1]
            keys, values = (x.double().repeat_interleave(group, 0) for x in (keys, values))
            logits = query.double() @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5
            wanted = logits.masked_fill(~seen, -math.inf).softmax(-1) @ values
            torch.testing.assert_close(out[b, :rows].double(), wanted.transpose(0, 1), atol=1e-4, rtol=1e-4)
        shapes.append((k.shape[2] - q.shape[2], q.shape[2]))
    assert left_out or n < 200, "nothing was left out"
    return shapes


def prompt(length, seed=3):
    return torch.randint(2, 97, (2, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [300, 257], ids=["odd", "last-chunk-of-one"])
@pytest.mark.parametrize("patch", HYPER)
def test_chunks_of_a_prompt(patch, length, calls):
    with attnpatch.patched(tiny("llama"), patch, **HYPER[patch]) as model:
        model.generate(prompt(length), max_new_tokens=2, do_sample=False, prefill_chunk_size=128)
        assert check(patch, calls) == [(0, 128), (128, 128), (256, length - 256)]
        assert not any(layer.note for layer in attnpatch.status(model).layers)


@pytest.mark.parametrize("patch", HYPER)
def test_a_second_turn(patch, calls):
    with attnpatch.patched(tiny("qwen3"), patch, **HYPER[patch]) as model:
        cache = attnpatch.PatchCache(model)
        out = model.generate(prompt(181), max_new_tokens=3, do_sample=False, **{CACHE: cache})
        model.generate(torch.cat([out, prompt(75, 4)], 1), max_new_tokens=2, do_sample=False, **{CACHE: cache})
    assert check(patch, calls) == [(0, 181), (183, 76)]


@pytest.mark.parametrize("patch", HYPER)
def test_padding(patch, calls):
    """A padded prompt is chosen for row by row; behind prefixes of different lengths it is dense, as status says."""
    ids, mask = prompt(260), torch.ones(2, 260, dtype=torch.long)
    mask[1, :61] = 0
    with attnpatch.patched(tiny("llama"), patch, **HYPER[patch]) as model:
        model.generate(ids * mask, attention_mask=mask, max_new_tokens=2, do_sample=False)
        assert check(patch, calls) == [(0, 260)]
        calls.clear()
        model.generate(
            ids * mask, attention_mask=mask, max_new_tokens=2, do_sample=False, prefill_chunk_size=128
        )  # fmt: skip
        assert check(patch, calls[:1]) == [(0, 128)]
        assert check(patch, calls[1:], sparse=False) == [(128, 128), (256, 4)]
        assert {x.note for x in attnpatch.status(model).layers} == {"dense: a later turn of a padded batch"}
