"""Methods that read little while decoding, with room for everything: dense in every family, mode and dtype."""

from __future__ import annotations

import pytest
import torch
from oracle import CACHE, CONFIGS, tiny
from transformers import DynamicCache

import attnpatch

ALL = {
    "quest": {"budget": 1000},
    "recycled": {"budget": 1000},
    "hip": {"mask_k": 1000, "dense_layers": 0},
    "tokenselect": {},
}
TURNS = {
    "chunked": [(16, 50), (32, 50), (50, 50), *[(n, 50) for n in (51, 52)], (60, 60), *[(n, 60) for n in (61, 62)]],
    "whole": [(50, 50), (51, 50), (52, 50), (60, 60), (61, 60)],
}  # tokens fed so far, and where the prompt of that turn ends


def feed(model, cache, ends, ids, mask):
    """Logits of all tokens, fp32."""
    logits, start = [], 0
    for end, prompt in ends:
        if isinstance(cache, attnpatch.PatchCache):
            cache.expect(prompt)
        pos = (mask[:, :end].cumsum(-1) - 1).clamp(min=0)[:, start:]
        given = {} if bool(mask.all()) else {"attention_mask": mask[:, :end], "position_ids": pos}
        with torch.no_grad():
            logits.append(model(input_ids=ids[:, start:end], **given, **{CACHE: cache}).logits.float())
        start = end
    return torch.cat(logits, 1)


@pytest.mark.parametrize("pads", [0, 23], ids=["alike", "padded"])
@pytest.mark.parametrize("mode", TURNS)
@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_turns_and_pads(name, mode, pads):
    """fp32 within rounding; bf16 no further from fp32 (of the same weights) than the stock model in bf16 is."""
    half, full, ends = tiny(name, torch.bfloat16), tiny(name), TURNS[mode]
    full.load_state_dict({k: v.float() for k, v in half.state_dict().items()})
    ids = torch.randint(2, 97, (2, ends[-1][0]), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :pads] = 0
    real = mask.bool()
    wanted, stock = (feed(m, DynamicCache(config=m.config), ends, ids, mask)[real] for m in (full, half))
    rounding = (stock - wanted).square().mean().sqrt()
    for patch, hyper in ALL.items():
        for model in (full, half):
            with attnpatch.patched(model, patch, **hyper):
                got = feed(model, attnpatch.PatchCache(model), ends, ids, mask)[real]
            if model is full:
                torch.testing.assert_close(got, wanted, atol=5e-5, rtol=0)
            else:
                assert (got - wanted).square().mean().sqrt() <= 1.2 * rounding, patch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_beams_over_padded_chunks(name, dtype):
    """fp32 as stock; bf16 as the engine's own dense attention, whose rounding is another than stock's."""
    model, ids = tiny(name, dtype), torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    search = {"attention_mask": mask, "max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    if dtype == torch.float32:
        wanted = model.generate(ids * mask, **search)
    else:
        with attnpatch.patched(model, "snapkv", budget=1000):
            wanted = model.generate(ids * mask, **search)
    for patch, hyper in ALL.items():
        with attnpatch.patched(model, patch, **hyper):
            assert torch.equal(model.generate(ids * mask, **search), wanted), patch
            chunked = model.generate(ids * mask, **search, prefill_chunk_size=16)
            assert dtype == torch.bfloat16 or torch.equal(chunked, wanted), patch
