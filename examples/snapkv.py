"""SnapKV on the embedded model: find a needle in 4096 tokens with a tenth of the KV cache."""

import torch

from attnpatch import patched, status, testbed
from attnpatch.testbed import tasks

model, tokenizer = testbed.load()
case = tasks.make("needle", 4096, seed=0)
with patched(model, "snapkv", budget=0.1):
    out = model.generate(
        torch.tensor([case.prompt_ids]), max_new_tokens=8, do_sample=False, return_dict_in_generate=True
    )
    print("expected", case.answer_text, "| got", tokenizer.decode(out.sequences[0, len(case.prompt_ids) :]))
    print(status(model))
