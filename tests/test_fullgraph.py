"""torch.compile(model, fullgraph=True) of a patched model: no graph break where a method only evicts."""

from __future__ import annotations

import pytest
import torch
from oracle import CACHE, tiny

import attnpatch

HYPER = {
    "snapkv": {"budget": 12, "window_size": 4},
    "h2o": {"budget": 12},
    "streamingllm": {"budget": 12, "positions": "original"},
}


def run(forward, model, mask):
    """Logits of a prompt of 20 tokens and of two steps, and the cache."""
    ids = torch.randint(1, 97, (2, 22), generator=torch.Generator().manual_seed(0))
    cache, logits = attnpatch.PatchCache(model), []
    for start, stop in ((0, 20), (20, 21), (21, 22)):
        pos = (mask[:, :stop].cumsum(-1) - 1).clamp(min=0)[:, start:]
        given = {} if bool(mask.all()) else {"attention_mask": mask[:, :stop], "position_ids": pos}
        logits.append(forward(input_ids=ids[:, start:stop], **{CACHE: cache}, **given).logits)
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize(
    ("patch", "pads"), [("snapkv", 0), ("h2o", 5), ("streamingllm", 0)], ids=["snapkv", "h2o-padded", "streamingllm"]
)
def test_a_patched_model_compiles_into_one_graph(patch, pads):
    model, mask = tiny("llama", num_hidden_layers=1), torch.ones(2, 22, dtype=torch.long)
    mask[1, :pads] = 0
    torch.compiler.reset()
    with attnpatch.patched(model, patch, **HYPER[patch]), torch.no_grad():
        wanted, plain = run(model, model, mask)
        got, cache = run(torch.compile(model, fullgraph=True, backend="eager"), model, mask)
    torch.compiler.reset()
    real = mask[:, :22].bool()
    torch.testing.assert_close(got[real], wanted[real], atol=1e-5, rtol=0)
    assert [x.held for x in cache.patched] == [x.held for x in plain.patched] and not cache.patched[0].complete
    for mine, theirs in zip(cache.patched, plain.patched, strict=True):
        assert torch.equal(mine.pos, theirs.pos)
