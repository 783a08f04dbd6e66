"""Evicting methods that take a budget, at one budget, on the same needles: right answers, Wilson intervals, time."""

import argparse
import time
from contextlib import nullcontext

from transformers import AutoModelForCausalLM, AutoTokenizer

from attnpatch import list_patches, patched, testbed
from attnpatch.testbed import tasks
from attnpatch.testbed.score import wilson

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="testbed", help="a folder or hub id of a chat model; default: the embedded one")
parser.add_argument("--length", type=int, default=1024, help="about how many tokens a prompt has")
parser.add_argument("--samples", type=int, default=10)
parser.add_argument("--budget", default="0.25")
args = parser.parse_args()
if args.model == "testbed":
    model, tokenizer = testbed.load()
else:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", device_map="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)

cases = [tasks.make("needle", args.length, keys=4, seed=seed) for seed in range(args.samples)]
print(f"{'method':14} right of {args.samples}   95 % interval   seconds")
evicting = [n for n, m in list_patches().items() if m.stage == "evict" and hasattr(m, "budget") and not m.needs_profile]
for name in ("dense", *evicting):
    right, start = 0, time.perf_counter()
    with patched(model, name, budget=args.budget) if name != "dense" else nullcontext():
        for case in cases:
            ids = tokenizer.apply_chat_template(
                case.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).to(model.device)
            out = model.generate(**ids, max_new_tokens=len(case.answer_ids) + 8, do_sample=False)
            answer = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
            right += case.answer_text.strip() in answer
    low, high = wilson(right, len(cases))
    print(f"{name:14} {right:11}   {100 * low:3.0f} to {100 * high:3.0f} %   {time.perf_counter() - start:7.1f}")
