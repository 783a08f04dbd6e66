"""What tests/test_tensor_parallel.py runs in each of its processes: every method on a whole and on a divided model."""

from __future__ import annotations

import sys

import torch
from oracle import CACHE, output_cache

import attnpatch
from attnpatch.profile import Profile, structure

LAYERS, HEADS, KV_HEADS, PROMPT = 3, 8, 4, 300
MODEL = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
         "max_position_embeddings": 1024}  # fmt: skip
EVICT = {"budget": 40, "window_size": 8, "kernel_size": 3}
CASES = {
    "snapkv": ("snapkv", EVICT),
    "pyramidkv": ("pyramidkv", {**EVICT, "beta": 2.0}),
    "h2o": ("h2o", {"budget": 40}),
    "streamingllm": ("streamingllm", {"budget": 40}),
    "random": ("random", {"budget": 40, "window_size": 8}),
    "bytes": ("snapkv", {**EVICT, "budget": "60KiB"}),
    "adakv": ("adakv", {**EVICT, "alpha": 0.0}),
    "adakv-again": ("adakv", {**EVICT, "alpha": 0.2, "recompress": True, "normalize": True}),
    "adakv-floor": ("adakv", {"budget": 40, "safeguard": "floor", "scorer": "h2o"}),
    "cake": ("cake", {"budget": 40, "window_size": 8}),
    "compresskv": ("compresskv", {**EVICT, "heads": [[7, 1, 2, 5], [0, 1, 2, 3], [6, 5, 7, 4]]}),
    "compresskv-all": ("compresskv", {**EVICT, "heads": "all", "layer_scores": [1, 2, 3], "min_budget": 9}),
    "taskkv": ("taskkv", {"budget": 0.5, "sink": 4, "recent": 16, "last_full": 1, "semantic_k": 16}),
    "taskkv-none": ("taskkv", {"budget": 0.4, "sink": 4, "recent": 16, "last_full": 1, "supplement": 0}),
    "duoattention": ("duoattention", {"sink": 4, "recent": 16}),
    "duoattention-streaming": ("duoattention", {"sink": 4, "recent": 16, "prefill": "streaming"}),
    "razorattention": ("razorattention", {"induction_ratio": 0.4, "local_capacity": 16}),
    "act": ("act", {"heads": {0: [1, 6], 1: [7], 2: [0, 4]}, "threshold": 0.02}),
    "act-all": ("act", {"heads": "all", "skip_first": 0, "decode": "running", "threshold": 0.02}),
    "zerotuning": ("zerotuning", {"gamma": 3.0, "heads": [0, 5, 6]}),
    "zerotuning-table": ("zerotuning", {"gamma": [[1.0 + h * (i + 1) for h in range(HEADS)] for i in range(LAYERS)]}),
    "minference": ("minference", {"heads": [[[30 + 4 * h, 100] for h in range(HEADS)]] * LAYERS}),
    "minference-profile": ("minference", {}),
    "flexprefill": ("flexprefill", {"gamma": 0.5, "min_budget": None}),
    "xattention": ("xattention", {"threshold": [[0.1 * (h + 1) for h in range(HEADS)]] * LAYERS, "block_size": 32}),
    "sale": ("sale", {"tau": [[0.1 * h for h in range(HEADS)]] * LAYERS, "dense_up_to": 64,
                      "local_window": 32, "segment": 32}),
    "hip": ("hip", {"mask_k": 32, "sink": 4, "sliding_window": 32, "num_dense_queries": 0, "dense_layers": 0}),
    "hyperattention": ("hyperattention", {"min_seq_len": 64, "block_size": 16, "sample_size": 8}),
    "longheads": ("longheads", {"window_size": 16, "atten_length": 64, "begin": 64}),
    "quest": ("quest", {"budget": 48}),
    "recycled": ("recycled", {"budget": 40, "min_budget": 40, "stride": 2, "threshold": 0.5}),
    "tokenselect": ("tokenselect", {"top_k": 32, "n_local": 16, "n_init": 4, "chunk": 64, "threshold": 0.5}),
    "tokenselect-true": ("tokenselect", {"top_k": 32, "n_local": 16, "n_init": 4, "positions": "true",
                                         "selection": "head_vote", "pool_kernel": 3}),
}  # fmt: skip


def hyper(case: str, config) -> tuple[str, dict]:
    """The method and settings of a case; profiles are made of this model."""
    patch, given = CASES[case]
    generator = torch.Generator().manual_seed(7)
    if patch in ("duoattention", "razorattention"):
        scores = torch.rand(LAYERS, KV_HEADS, generator=generator)
        scores[0] = torch.tensor([0.9, 0.8, 0.1, 0.2])  # one process has all of a layer's best
        kind, names = "retrieval-heads", ("kv_score",)
        if patch == "razorattention":
            kind, names = "echo-heads", ("kv_induction", "kv_echo")
        given = {**given, "profile": Profile(kind, dict.fromkeys(names, scores), structure(config))}
    if case == "minference-profile":
        sizes = torch.randint(30, 120, (LAYERS, HEADS, 2), generator=generator)
        given = {"profile": Profile("minference", {"sizes": sizes, "pattern": torch.ones(LAYERS, HEADS)},
                                    structure(config))}  # fmt: skip
    return patch, given


def run(model, case: str | None):
    """(logits of prompt, steps and a second turn [B, N, V], held positions by layer [B][H] as sorted lists)."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 97, (2, PROMPT + 5 + 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    if case is not None:
        patch, given = hyper(case, model.config)
        attnpatch.patch_model(model, patch, **given)
    out, cache, at = [], None, 0
    with torch.no_grad():
        for size in (PROMPT, *[1] * 5, 8, *[1] * 4):
            end = at + size
            position_ids = (mask[:, :end].cumsum(-1) - 1).clamp(min=0)[:, at:end]
            kwargs = {} if cache is None else {CACHE: cache}
            step = model(input_ids=ids[:, at:end], attention_mask=mask[:, :end], position_ids=position_ids, **kwargs)
            out.append(step.logits)
            cache, at = output_cache(step), end
    held = []
    if case is not None:
        for layer in cache.layers:
            pos = layer.pos.expand(-1, layer.keys.shape[1], -1)
            held.append([[sorted(p for p in head if p >= 0) for head in row] for row in pos.tolist()])
        attnpatch.unpatch_model(model)
    return torch.cat(out, dim=1)[mask[:, :at].bool()], held


def own(held, rank: int, size: int):
    """Of `held`, the heads of a process."""
    part = KV_HEADS // size
    return [[row[rank * part : (rank + 1) * part] for row in layer] for layer in held]


def main(path: str) -> None:
    from transformers import AutoModelForCausalLM

    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    whole = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    split = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", tp_plan="auto").eval()
    dense, _ = run(whole, None)
    for case in sys.argv[2:] or CASES:
        expected, kept = run(whole, case)
        found, here = run(split, case)
        same = here == own(kept, rank, size)
        off, moved = ((found - x).abs().max().item() for x in (expected, dense))
        print(f"{case} rank={rank} same={same} off={off:.1e} acts={moved > 1e-2}\n", end="", flush=True)  # one write
    try:
        attnpatch.patch_model(split, "infiniretri")
    except attnpatch.errors.UnsupportedModeError as error:
        print(f"refused rank={rank} {error}\n", end="", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
