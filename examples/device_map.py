"""A model spread over two or more GPUs: each layer's KV cache lives, and is evicted, where the layer runs.

`--device-map auto` spreads over the GPUs there are, or stays on the CPU; accelerate moves activations between them.
"""

import argparse
from itertools import groupby

from transformers import AutoModelForCausalLM, AutoTokenizer

from attnpatch import PatchCache, patched, testbed
from attnpatch.testbed import tasks

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="testbed", help="a folder or hub id of a chat model; default: the embedded one")
parser.add_argument("--device-map", default="auto", help="auto, balanced, sequential, cpu, cuda:0 ...")
parser.add_argument("--length", type=int, default=2048, help="about how many tokens the prompt has")
parser.add_argument("--budget", default="0.25")
args = parser.parse_args()
folder = testbed.path() if args.model == "testbed" else args.model
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map=args.device_map).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)

case = tasks.make("needle", args.length, seed=1)
ids = tokenizer.apply_chat_template(
    case.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
).to(model.device)  # inputs go to the device of the first layer
with patched(model, "pyramidkv", budget=args.budget):  # patch after loading: accelerate's hooks stay as they are
    cache = PatchCache(model)
    out = model.generate(**ids, past_key_values=cache, max_new_tokens=16, do_sample=False)
answer = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
print(f"expected {case.answer_text}, got {answer}")
for device, group in groupby(enumerate(cache.layers), key=lambda pair: pair[1].keys.device):
    layers = list(group)
    held = sum(x.numel() * x.element_size() for _, layer in layers for x in (layer.keys, layer.values))
    print(f"{device}: layers {layers[0][0]} to {layers[-1][0]}, {held / 2**20:.2f} MiB of KV")
