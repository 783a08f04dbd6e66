"""A method of your own in one file: register it, write a recipe that says where its values come from, use it."""

import argparse
from dataclasses import dataclass

from transformers import AutoModelForCausalLM, AutoTokenizer

from attnpatch import Recipe, patched, register, testbed
from attnpatch.decisions import KeepSet
from attnpatch.executors import column_sums
from attnpatch.patch import EvictPatch, option
from attnpatch.testbed import tasks


@register("lastlook")
@dataclass
class LastLook(EvictPatch):
    """Keeps what the very last prompt token attends to, and the last entries."""

    window_size: int = option(16, "last entries always kept", low=1)
    title, query_tail = "Last look (an example)", 1  # the engine hands over the last query as ctx.tail [B, Hq, 1, D]

    def keep(self, q, kv, ctx):
        capacity = ctx.capacity(self.budget)  # entries of each row
        if kv.S <= min(capacity):
            return None  # the prompt fits
        votes = column_sums.run(ctx.tail, kv, q_pos=ctx.tail_pos, scaling=ctx.scaling, softcap=ctx.softcap)
        votes = column_sums.group_mean(votes, kv.k.shape[1])  # [B, Hkv, S], one set of entries for each KV head
        return KeepSet.top(votes, capacity, kv.pos, tail=min(self.window_size, min(capacity)))


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="testbed", help="a folder or hub id of a chat model; default: the embedded one")
name = parser.parse_args().model
model, tokenizer = testbed.load()
if name != "testbed":
    model, tokenizer = (cls.from_pretrained(name) for cls in (AutoModelForCausalLM, AutoTokenizer))
recipe = Recipe("lastlook", {"budget": 0.1}, sources={"budget": "a guess"}, name="mine")  # recipe.save("mine.yaml")
chat = (case := tasks.make("needle", 2048, seed=1)).messages
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
with patched(model, recipe):
    out = model.generate(**ids, max_new_tokens=16, do_sample=False)
print(f"{recipe.to_yaml()}expected {case.answer_text}, got {tokenizer.decode(out[0, ids['input_ids'].shape[1] :])}")
