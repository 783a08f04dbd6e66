"""Train tiny Qwen3 and Gemma3 models on the testbed's needles, for tests of these architectures.

    python -m attnpatch.testbed.siblings --arch qwen3 --corpus DIR --out DIR --seconds 120

Both have about 2 million parameters, use the testbed's tokenizer and see rows of 128 to 1024 tokens.  The Gemma3 has
five layers of sliding attention (64 tokens) and one of full attention.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from .data import Corpus, Feed, Stage
from .score import make_set, report
from .train import Trainer

STAGES = [
    Stage("128", ((128, 1.0),), (1, 0, 0), 0.0, 0.0, (1.0, 1.0), (10, 30), 0.97),
    Stage("256", ((256, 0.8), (128, 0.2)), (1, 0, 0), 0.2, 0.1, (0.9, 0.6), (8, 15), 0.97),
    Stage("1024", ((1024, 0.7), (256, 0.3)), (1, 0, 0), 0.3, 0.2, (0.5, 0.01), (1e9, 1e9)),
]
SETS = tuple(("needle", length, keys, 500, "books") for length in (256, 512, 1024) for keys in (1, 4))
_SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def new_sibling(arch: str):
    """A Qwen3 or Gemma3 (text) with random weights."""
    if arch == "qwen3":
        from transformers import Qwen3Config, Qwen3ForCausalLM

        rope = {"rope_type": "default", "rope_theta": 100000.0}
        return Qwen3ForCausalLM(Qwen3Config(**_SHAPE, rope_parameters=rope)).float()
    if arch == "gemma3":
        from transformers import Gemma3ForCausalLM, Gemma3TextConfig

        rope = {
            "full_attention": {"rope_type": "default", "rope_theta": 100000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        }
        kinds = ["sliding_attention"] * 5 + ["full_attention"]
        config = Gemma3TextConfig(
            **_SHAPE, layer_types=kinds, sliding_window=64, query_pre_attn_scalar=64, rope_parameters=rope
        )
        return Gemma3ForCausalLM(config).float()
    raise ValueError(f"unknown architecture {arch!r}: choose qwen3 or gemma3")


class PlainForward:
    """Hidden states and logits through the transformers model itself."""

    def __init__(self, model) -> None:
        self.model = model

    def __call__(self, ids, dtype):
        """Hidden states after the final norm, ``[rows * length, hidden]``."""
        import torch

        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1).to(dtype)

    def logits(self, hidden):
        """Logits ``[n, vocabulary]``."""
        import torch.nn.functional as F

        return F.linear(hidden, self.model.get_input_embeddings().weight.to(hidden.dtype)).float()


def main(argv: list[str] | None = None) -> None:
    """Train, evaluate and export one sibling."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=("qwen3", "gemma3"), required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--log-every", type=float, default=5.0)
    parser.add_argument("--muon-rate", type=float, default=3e-3)
    parser.add_argument("--adam-rate", type=float, default=8e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    corpus, held_out = Corpus(args.corpus), Corpus(args.corpus, "held_out")
    sets = [((*s[:3], args.cases, s[4]), make_set(held_out, (*s[:3], args.cases, s[4]), 10**6)) for s in SETS]
    feed = Feed(corpus, STAGES, args.tokens, args.workers, args.seed, 0)
    torch.manual_seed(args.seed)
    model = new_sibling(args.arch)
    trainer = Trainer(args, corpus, feed, STAGES, lambda: sets[:1], model, PlainForward(model))
    trainer.run()
    feed.stop()
    rows = report(trainer.plain, sets, trainer.device, trainer.dtype)
    folder = args.out / args.arch
    trainer.model.to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(args.corpus / name, folder / name)
    (folder / "figures.json").write_text(json.dumps({"rows": rows, "step": trainer.progress.step}, indent=1) + "\n")
    print("done", sum(p.numel() for p in model.parameters()), flush=True)


if __name__ == "__main__":
    main()
