"""Several questions about one text on one PatchCache: each turn feeds only its new tokens."""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from attnpatch import PatchCache, patched, testbed
from attnpatch.testbed import tasks

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="testbed", help="a folder or hub id of a chat model; default: the embedded one")
parser.add_argument("--length", type=int, default=2048, help="about how many tokens the first turn has")
parser.add_argument("--budget", default="0.25")
args = parser.parse_args()
if args.model == "testbed":
    model, tokenizer = testbed.load()
else:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", device_map="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)

talk, chat = tasks.turns(args.length, questions=3, seed=0), []
with patched(model, "snapkv", budget=args.budget):
    cache = PatchCache(model)  # yours to keep; without one, generate makes a fresh one each time
    for number, (question, expected) in enumerate(talk.turns):
        chat.append({"role": "user", "content": question if number else talk.context + question})
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        new = ids["input_ids"].shape[1] - cache.get_seq_length()
        # transformers 5.24 renamed this argument to cache; a patched model takes it under both names
        out = model.generate(**ids.to(model.device), past_key_values=cache, max_new_tokens=16, do_sample=False)
        answer = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        chat.append({"role": "assistant", "content": answer})
        held, seen = cache.layers[0].held, cache.get_seq_length()
        print(f"turn {number + 1}: {new} new tokens, a layer holds {held} of {seen}: expected {expected}, got {answer}")
print("The first question chose what stayed: what later turns ask for may be gone (see Limits in the README).")
