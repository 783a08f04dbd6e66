"""Libraries around a patched model: pipeline, PEFT, accelerate offload, torchao, tensor parallel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import tiny

import attnpatch

SNAP = {"budget": 12, "window_size": 4, "kernel_size": 3}
ROOT = Path(__file__).resolve().parents[1]


def prompt(length: int = 40) -> torch.Tensor:
    return torch.randint(2, 97, (1, length), generator=torch.Generator().manual_seed(3))


def greedy(model, ids):
    return model.generate(ids, max_new_tokens=6, do_sample=False)


def test_pipeline(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, pipeline

    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w2"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="w2", pad_token="w0")
    model = tiny("llama")
    text = " ".join(f"w{i}" for i in prompt()[0].tolist())
    ids = tokenizer(text, return_tensors="pt").input_ids
    with attnpatch.patched(model, "snapkv", **SNAP):
        expected = text + tokenizer.decode(greedy(model, ids)[0, ids.shape[1] :])
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
        assert pipe(text, max_new_tokens=6, do_sample=False)[0]["generated_text"] == expected


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft calls the deprecated name
def test_peft_wrapped_model():
    peft = pytest.importorskip("peft", reason="peft is a development dependency")
    model, ids = tiny("llama"), prompt()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    wrapped.eval()
    attnpatch.patch_model(wrapped, "snapkv", **SNAP)
    got = wrapped.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    report = attnpatch.status(wrapped)
    attnpatch.unpatch_model(wrapped)
    assert report.layers[0].held == 17
    with attnpatch.patched(model, "snapkv", **SNAP):
        assert torch.equal(got, greedy(model, ids))  # a fresh adapter adds nothing


def test_accelerate_cpu_offload(tmp_path):
    from accelerate import cpu_offload

    model, ids = tiny("llama"), prompt()
    with attnpatch.patched(model, "snapkv", **SNAP):
        expected = greedy(model, ids)
    for first in (True, False):
        model = tiny("llama")
        if first:
            cpu_offload(model, execution_device=torch.device("cpu"))
        attnpatch.patch_model(model, "snapkv", **SNAP)
        if not first:
            cpu_offload(model, execution_device=torch.device("cpu"))
        assert torch.equal(greedy(model, ids), expected)
        assert attnpatch.status(model).layers[0].held == 17


def test_torchao_weights():
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model, ids = tiny("llama"), prompt()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    expected = greedy(model, ids)
    with attnpatch.patched(model, "snapkv", budget=64):
        assert torch.equal(greedy(model, ids), expected)
    with attnpatch.patched(model, "snapkv", **SNAP):
        assert greedy(model, ids)[0, 40] == expected[0, 40]
        assert attnpatch.status(model).layers[0].held == 17


PARALLEL = """
import os, sys, torch
sys.path.insert(0, {tests!r})
from transformers import AutoModelForCausalLM
import attnpatch
from attnpatch.engine.compat import cache_name
torch.distributed.init_process_group("gloo")
ids = torch.randint(2, 97, (1, 40), generator=torch.Generator().manual_seed(3))
whole = AutoModelForCausalLM.from_pretrained({path!r}).eval()
split = AutoModelForCausalLM.from_pretrained({path!r}, tp_plan="auto").eval()
out = []
for model in (whole, split):
    with attnpatch.patched(model, "snapkv", budget=12, window_size=4, kernel_size=3):
        cache = attnpatch.PatchCache(model)
        out.append(model.generate(ids, max_new_tokens=6, do_sample=False, **{{cache_name(): cache}}))
heads = cache.layers[0].keys.shape[1]
if torch.distributed.get_rank() == 0:
    print("EQUAL", torch.equal(out[0], out[1]), "HEADS", heads)
torch.distributed.destroy_process_group()
"""


def test_tensor_parallel_on_two_processes(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "model")
    script = tmp_path / "run.py"
    script.write_text(PARALLEL.format(tests=str(ROOT / "tests"), path=str(tmp_path / "model")))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29533", str(script)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert "EQUAL True HEADS 1" in done.stdout, done.stdout + done.stderr[-3000:]
