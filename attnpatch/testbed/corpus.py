"""Tokenizer and pre-tokenised text for training the testbed.

``python -m attnpatch.testbed.corpus --books DIR --out DIR`` reads book shards (bz2 JSON lines with a ``text`` field),
trains the tokenizer on the training shards and writes ``tokenizer.json``, ``train.npy``, ``held_out.npy`` and
``filler.npy`` (uint16 token ids) and ``words.json`` (lowercase words of the books, for extra keys).
"""

from __future__ import annotations

import argparse
import bz2
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .filler import ADJECTIVES, NOUNS, filler

VOCABULARY = 4096
HELD_OUT = (6, 7)  # shards never trained on
SPECIALS = ("<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "<|begin|>{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>"
    "{% else %}<|user|>{{ message['content'] }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def read_books(folder: Path, shards: list[int], characters: int, rng: random.Random) -> Iterator[str]:
    """Pieces of up to 200,000 characters of the shards' books, ``characters`` in all, equally from each shard."""
    for shard in shards:
        left = characters // len(shards)
        with bz2.open(folder / f"books_{shard:02d}.jsonl.bz2", "rt", encoding="utf-8") as lines:
            books = [json.loads(line)["text"] for line in lines]
        rng.shuffle(books)
        for text in books:
            start = rng.randint(0, max(0, len(text) - 200_000))
            piece = re.sub(r"[ \t]+\n", "\n", text[start : start + min(200_000, left)])
            yield " " + piece.strip()
            left -= len(piece)
            if left <= 0:
                break


def synthetic_lines(count: int, rng: random.Random) -> Iterator[str]:
    """Text in the tasks' wordings, so that their words get tokens of their own."""
    for _ in range(count):
        a, b, v = rng.choice(ADJECTIVES), rng.choice(NOUNS), rng.randint(1, 99_999)
        yield f"\nline {a}-{b}: REGISTER_CONTENT is <{v}>"
        yield f" Remember the code of {a} {b}: {v}. Variable {a} {b} = {v}. For {a} {b}, the code is {v}."
        yield f"What is the value of variable {a} {b}? Tell me what is the <REGISTER_CONTENT> in line {a}-{b}?"


def train_tokenizer(texts: Iterator[str]):
    """Byte-level BPE of 4096 tokens in which every digit is a token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and a ``tokenizer_config.json`` that carries the chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 65536,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def tokenise(texts: Iterator[str], tokenizer):
    """Token ids of all texts, joined: uint16 ``[tokens]``."""
    import numpy as np

    parts = [np.array(tokenizer.encode(text).ids, dtype=np.uint16) for text in texts]
    return np.concatenate(parts)


def main(argv: list[str] | None = None) -> None:
    """Prepare everything that ``train.py`` reads."""
    import numpy as np

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--books", type=Path, required=True, help="folder with books_NN.jsonl.bz2")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train-characters", type=int, default=44_000_000)
    parser.add_argument("--held-out-characters", type=int, default=6_000_000)
    parser.add_argument("--tokenizer-characters", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    shards = [shard for shard in range(8) if shard not in HELD_OUT]
    sample = list(read_books(args.books, shards, args.tokenizer_characters, random.Random(args.seed)))
    sample.append(filler(200_000, random.Random(args.seed + 1)))
    sample.extend(synthetic_lines(12_000, random.Random(args.seed + 2)))
    tokenizer = train_tokenizer(iter(sample))
    save_tokenizer(tokenizer, args.out)
    counts = Counter(re.findall(r"\b[a-z]{3,12}\b", " ".join(sample[:-36_000])))
    words = sorted(word for word, count in counts.items() if count >= 4)
    (args.out / "words.json").write_text(json.dumps(words), encoding="utf-8")
    plan = (("train", shards, args.train_characters), ("held_out", list(HELD_OUT), args.held_out_characters))
    for name, numbers, characters in plan:
        ids = tokenise(read_books(args.books, numbers, characters, random.Random(args.seed + 3)), tokenizer)
        np.save(args.out / f"{name}.npy", ids)
        print(name, len(ids), "tokens", flush=True)
    texts = (filler(100_000, random.Random(args.seed + 10 + i)) for i in range(30))
    np.save(args.out / "filler.npy", tokenise(texts, tokenizer))


if __name__ == "__main__":
    main()
