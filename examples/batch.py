"""A batch of prompts of different lengths: left padding changes no row's answer, and each row has its own budget."""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from attnpatch import patched, status, testbed
from attnpatch.testbed import tasks

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="testbed", help="a folder or hub id of a chat model; default: the embedded one")
parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048], help="about how many tokens each")
args = parser.parse_args()
if args.model == "testbed":
    model, tokenizer = testbed.load()
else:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", device_map="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)

cases = [tasks.make("needle", length, seed=1) for length in args.lengths]
tokenizer.padding_side = "left"  # generate continues at the right end
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
batch = tokenizer.apply_chat_template(
    [case.messages for case in cases], add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
).to(model.device)
real = batch["attention_mask"].sum(-1).tolist()  # real tokens of each row
with patched(model, "pyramidkv", budget=0.25):  # a ratio counts each row's real tokens
    out = model.generate(**batch, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    layers = status(model).layers
    held = sum((layer.positions[:, 0] >= 0).sum(-1) for layer in layers) / len(layers)  # of the first KV head
for row, case in enumerate(cases):
    answer = tokenizer.decode(out[row, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    print(f"{real[row]:5} tokens, a layer holds {held[row]:.0f} on average: expected {case.answer_text}, got {answer}")
