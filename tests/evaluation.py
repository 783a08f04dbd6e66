"""What the tests of evaluation share: a small model with a word tokenizer, and samples in its words."""

from __future__ import annotations

from attnpatch.evaluate.sample import Sample

END = 1
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<user> {{ m['content'] }} {% else %}<bot> {{ m['content'] }} "
    "<end> {% endif %}{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
)


def tokenizer(template: str | None = CHAT):
    """A word-level tokenizer of w0 ... w59, with or without a chat template."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<end>", "<user>", "<bot>", *(f"w{i}" for i in range(60))]
    inner = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<end>")
    made.add_special_tokens({"additional_special_tokens": ["<user>", "<bot>"]})
    made.chat_template = template
    return made


def model(dtype=None, **overrides):
    """A random Llama of two layers for that tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    values = dict(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=END, bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**values, **overrides})).to(dtype or torch.float32).eval()


def text(length: int, seed: int = 0) -> str:
    """Words w0 ... w59 in an order that looks random."""
    return " ".join(f"w{(i * i * 7 + i * 13 + seed * 29) % 60}" for i in range(length))


def sample(number: int = 0, length: int = 40, questions=1, **values) -> Sample:
    """One sample in those words; its accepted answer is w1. questions: how many, or which."""
    if isinstance(questions, int):
        questions = tuple(text(3 + q, number + q + 5) for q in range(questions))
    fixed = dict(
        id=f"s{number}", task="words", context=text(length, number), questions=questions,
        answers=(("w1",),) * len(questions), metric="exact", max_new_tokens=4,
    )  # fmt: skip
    return Sample(**{**fixed, **values})


def exact(prediction, answers, sample):
    """100 where the prediction is one of the answers."""
    return 100.0 * (prediction.strip() in answers)
