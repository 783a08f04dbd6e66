"""Tensor parallel: each process has a part of every layer's heads and evicts for those.

torchrun --standalone --nproc-per-node=2 examples/tensor_parallel.py   (GPUs with NCCL, or CPU processes with Gloo)
What is kept does not depend on the number of processes: methods that share a budget among the heads of a layer (adakv)
or let them vote together (tokenselect) ask the other processes, and those that cannot (infiniretri, tca) are refused.
"""

import argparse
import os

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from attnpatch import PatchCache, patched, testbed
from attnpatch.testbed import tasks

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="testbed", help="a folder or hub id of a chat model; default: the embedded one")
parser.add_argument("--length", type=int, default=2048, help="about how many tokens the prompt has")
parser.add_argument("--patch", default="pyramidkv", help="a method with a budget")
parser.add_argument("--budget", default="0.25")
args = parser.parse_args()
if "LOCAL_RANK" not in os.environ:
    parser.error("start it with torchrun: torchrun --standalone --nproc-per-node=2 examples/tensor_parallel.py")
folder = testbed.path() if args.model == "testbed" else args.model
if torch.cuda.is_available():
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", tp_plan="auto").eval()
tokenizer = AutoTokenizer.from_pretrained(folder)

case = tasks.make("needle", args.length, seed=1)  # the same prompt in every process
ids = tokenizer.apply_chat_template(case.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
with patched(model, args.patch, budget=args.budget):
    cache = PatchCache(model)
    out = model.generate(**ids.to(model.device), past_key_values=cache, max_new_tokens=16, do_sample=False)
answer = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
rank, layer = torch.distributed.get_rank(), cache.layers[0]
print(f"rank {rank}: {layer.keys.shape[1]} KV heads, {layer.held} of {cache.get_seq_length()} held, got {answer}")
if rank == 0:
    print(f"expected {case.answer_text}")
torch.distributed.destroy_process_group()
