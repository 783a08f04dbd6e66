"""Tensors that are copied to a device once, and the sparse prefills captured by CUDA graphs thanks to them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from attnpatch.patches.hyperattention import HyperAttention
from attnpatch.patches.minference import MInference
from attnpatch.patches.sale import SALE
from attnpatch.patches.xattention import XAttention
from selections import layer, structured

from attnpatch.bench.prefill import terms
from attnpatch.engine.terms import summed
from attnpatch.executors import constants

CPU = torch.device("cpu")


def test_a_tensor_is_made_once_for_each_device_and_dtype():
    known = constants.Constants()
    a = known.of([[1, 2], (3, 4)], CPU)
    assert a.tolist() == [[1, 2], [3, 4]] and a is known.of([(1, 2), [3, 4]], CPU)
    assert known.of([1, 2], CPU, torch.float64).dtype == torch.float64 and known.of([1, 2], CPU).dtype == torch.int64
    assert known.of([1, 2], torch.device("meta")).device.type == "meta"
    assert known.get("a", CPU, lambda: torch.ones(2)) is known.get("a", CPU, lambda: pytest.fail("made twice"))
    with torch.inference_mode():
        made = known.of([5], CPU, torch.float32)
    assert made.dtype == torch.float32 and known.of([5], CPU).dtype == torch.int64
    x = torch.ones(1, requires_grad=True)
    (x * made).backward()
    assert x.grad == 5


def test_the_oldest_goes(monkeypatch):
    monkeypatch.setattr(constants, "MOST", 2)
    known = constants.Constants()
    first = known.of([1], CPU)
    assert known.of([2], CPU) is known.of([2], CPU) and first is known.of([1], CPU)
    known.of([3], CPU)
    assert len(known._made) == 2 and known.of([1], CPU) is not first


def test_they_are_no_part_of_what_the_user_said():
    patch, other = MInference(), MInference()
    before = repr(patch), patch.hyperparameters()
    assert patch.constants is patch.constants is not other.constants
    patch.constants.of([1], CPU)
    assert patch == other and (repr(patch), patch.hyperparameters()) == before
    for made in (copy.deepcopy(patch), pickle.loads(pickle.dumps(patch))):
        assert made == patch and not made.constants._made


PATCHES = [
    MInference(vertical=60, slash=120),
    MInference(heads=[[[60, 120], [90, 150]] * 2]),
    MInference("tri_shape", sink=20, window=70),
    XAttention(threshold=[[0.9, 0.8] * 2], first_chunk_quirk=True),
    HyperAttention(min_seq_len=128, block_size=32, sample_size=32),
    HyperAttention(min_seq_len=128, block_size=32, sample_size=32, strict=True),
    SALE(tau=[[0.004, 0.0] * 2], dense_up_to=128),
]


def ids(patch):
    return f"{patch.name}-{getattr(patch, 'pattern', '')}-{getattr(patch, 'strict', '')}"


@pytest.mark.parametrize("patch", PATCHES, ids=ids)
def test_a_second_call_copies_nothing(patch, monkeypatch):
    q, kv, ctx = layer(*structured(700))
    found = terms(patch, q, kv, ctx)
    monkeypatch.setattr(torch, "tensor", lambda *args, **kwargs: pytest.fail("made a tensor of host numbers"))
    for a, b in zip(terms(patch, q, kv, ctx), found, strict=True):
        for name in ("index", "count", "columns", "groups", "weight"):
            x, y = getattr(a, name), getattr(b, name)
            assert x is y is None or torch.equal(x, y)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: on a CPU the test above shows what it can")
@pytest.mark.parametrize("patch", PATCHES, ids=ids)
def test_a_graph_captures_the_whole_layer(patch):
    q, kv, ctx = layer(*(x.to("cuda", torch.bfloat16) for x in structured(700, dim=64)))
    kv.pos, ctx.q_pos, ctx.ragged = kv.pos.cuda(), ctx.q_pos.cuda(), False
    expected = summed(patch.select(q, kv, ctx), q, kv, ctx)[0]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        summed(patch.select(q, kv, ctx), q, kv, ctx)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = summed(patch.select(q, kv, ctx), q, kv, ctx)[0]
    for n in range(3):  # what the graph reads is not given up, however many come after
        patch.constants.of([n] * 7, q.device)
    out.zero_()
    graph.replay()
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
