"""A context and a question fed as two turns in a padded batch give what each row's whole prompt gives alone."""

from __future__ import annotations

import pytest
import torch
from oracle import CONFIGS, tiny

import attnpatch
from attnpatch.engine.compat import out_of_memory
from attnpatch.evaluate import feeding

ROWS = [(23, 3), (41, 5), (30, 1)]  # tokens of context and question
EVEN = [(23, 4), (41, 4), (30, 4)]  # no padding between them: a sliding window would count it


def ids(length, seed):
    return torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("patch", [None, "snapkv"], ids=["dense", "full budget"])
@pytest.mark.parametrize("name", CONFIGS)
def test_two_turns_equal_one_prompt(name, patch):
    model = tiny(name)
    model.generation_config.eos_token_id = None
    sizes = EVEN if feeding.has_windows(model) else ROWS
    heads, asks = ([ids(r[i], 10 * i + n) for n, r in enumerate(sizes)] for i in (0, 1))
    wanted = []
    with torch.inference_mode():
        for head, ask in zip(heads, asks, strict=True):
            wanted.append(feeding.generate(model, *feeding.pad([head + ask], 0, "cpu"), 6, 0)[0][0].tolist())
        if patch:
            attnpatch.patch_model(model, patch, budget=400, window_size=4)
        (a, mask_a), (b, mask_b) = feeding.pad(heads, 0, "cpu"), feeding.pad(asks, 0, "cpu")
        cache, logits = feeding.prefill(model, a, mask_a)
        assert logits.shape == (3, model.config.vocab_size)
        both, mask = torch.cat([a, b], 1), torch.cat([mask_a, mask_b], 1)
        copy = feeding.copied(cache)
        for kept in (cache, copy):  # the copy has not moved on
            assert kept.get_seq_length() == a.shape[1]
            new, after = feeding.generate(model, both, mask, 6, 0, kept)
            assert new.tolist() == wanted and after is kept
    held, dense = feeding.bytes_of(cache)
    assert held == dense > 0


def test_models_with_windows():
    assert [n for n in CONFIGS if feeding.has_windows(tiny(n))] == ["mistral_sw", "gemma2", "gemma3"]


def test_out_of_memory_is_told_from_other_errors():
    assert out_of_memory(torch.OutOfMemoryError()) and out_of_memory(MemoryError())
    assert out_of_memory(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"))
    assert not out_of_memory(RuntimeError("shapes"))


def test_what_memory_ran_out_for_is_not_called_uncopyable():
    class Full:
        def __deepcopy__(self, memo):
            raise torch.OutOfMemoryError

    class Host:
        def __deepcopy__(self, memo):
            raise TypeError("cannot be pickled")

    assert feeding.copied(Host()) is None
    with pytest.raises(torch.OutOfMemoryError):
        feeding.copied(Full())
