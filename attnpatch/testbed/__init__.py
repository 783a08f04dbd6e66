"""The embedded model: a small Llama trained to retrieve over long context, its tokenizer and its tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def path() -> Path:
    """Folder of the weights, tokenizer and model card."""
    return Path(__file__).with_name("weights")


def load(dtype: Any = None, device: Any = None) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer). dtype: default float32 on CPUs, bfloat16 on CUDA. Raises FileNotFoundError."""
    if not (path() / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the embedded model's weights are not in {path()}; reinstall attnpatch, or train them: "
            "python -m attnpatch.testbed.train --help."
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = torch.device(device or "cpu")
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(path(), dtype=dtype).to(device).eval()
    return model, AutoTokenizer.from_pretrained(path())
