"""Questions over made-up documents among distractors, and LongEval's record of lines."""

from __future__ import annotations

import random
from collections.abc import Callable

from attnpatch.testbed.filler import ADJECTIVES, NOUNS

from .sample import Sample
from .tasks_length import names

_FIRST = (
    "Anna Benjamin Clara Daniel Edith Felix Greta Henry Irene Jacob Karla Leonard Martha Nathan Olive Peter Quentin "
    "Rosa Samuel Teresa Ulric Vera Walter Xenia Yvonne Zachary Alma Bruno Celia Dorian Elsa Frank Gloria Hugo Ingrid "
    "Julian Kate Lucas Mabel Oscar"
).split()
_WORK = (
    "a baker|a botanist|a surveyor|a clockmaker|a painter|a librarian|a pilot|a physician|a teacher|a sculptor".split(
        "|"
    )
)
_GOODS = "clocks|lanterns|carpets|violins|glassware|bicycles|maps|paper|bells|umbrellas".split("|")
_ENDINGS = "ford ton bury field mouth stead worth dale".split()
_INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
_DOCUMENTS = f"{_INSTRUCTION}\n\nThe following are given documents.\n\n{{context}}\n\n{_INSTRUCTION}\n\n{{question}}"
_SENTENCES = 6


class _World:
    """People and companies that nobody has heard of, made one after another; names never repeat."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.people = rng, set[str]()

    def person(self) -> tuple[str, str, list[str]]:
        """(name, birthplace, sentences)"""
        rng = self.rng
        while True:
            name = f"{rng.choice(_FIRST)} {rng.choice(NOUNS).capitalize()}"
            if name in self.people:
                name = f"{name.split()[0]} {rng.choice('ABCDEFGHIJKLMNOPRSTVW')}. {rng.choice(NOUNS).capitalize()}"
            if name not in self.people:
                break
        self.people.add(name)
        born, place = rng.randint(1790, 1930), self.town()
        lines = [
            f"{name} was born in {born} in the town of {place}.",
            f"{name} worked as {rng.choice(_WORK)} for {rng.randint(4, 40)} years.",
            f"In {born + rng.randint(22, 40)} the family moved to {self.town()}.",
            f"The letters of {name} are kept in the archive of {self.town()}.",
            f"A street in {self.town()} bears the name.",
            f"{name} died in {born + rng.randint(50, 90)}.",
        ]
        return name, place, lines

    def town(self) -> str:
        return self.rng.choice(ADJECTIVES).capitalize() + self.rng.choice(_ENDINGS)

    def company(self, founder: str) -> tuple[str, list[str]]:
        """(name, sentences)"""
        rng = self.rng
        name = f"{rng.choice(ADJECTIVES).capitalize()} {rng.choice(NOUNS).capitalize()} & Sons"
        lines = [
            f"{name} was a maker of {rng.choice(_GOODS)}.",
            f"The company was founded by {founder} in {rng.randint(1830, 1960)}.",
            f"Its works stood in {self.town()}.",
        ]
        return name, lines


def build_questions(task: str, name: str, seed: str) -> Callable[[int], Sample]:
    """RULER's QA: one question, its document or (about half of the samples) two documents, among distractors.

    The documents are made up, so that no answer can be known beforehand; one unit is a sentence of a distractor.
    """
    rng = random.Random(seed)
    world = _World(rng)
    person, place, lines = world.person()
    gold = [f"{person}\n" + " ".join(lines)]
    question = f"In which town was {person} born?"
    two_steps = rng.random() < 0.5
    if two_steps:
        company, about = world.company(person)
        gold.append(f"{company}\n" + " ".join(about))
        question = f"In which town was the founder of {company} born?"
    places = sorted(rng.random() for _ in gold)
    rng.shuffle(gold)
    distractors: list[tuple[str, list[str]]] = []

    def build(n: int) -> Sample:
        full, rest = divmod(n, _SENTENCES)
        while len(distractors) <= full:
            other, its_place, sentences = world.person()
            if its_place != place:
                distractors.append((other, sentences))
        cut = [(who, sentences) for who, sentences in distractors[:full]]
        if rest:
            who, sentences = distractors[full]
            cut.append((who, sentences[:rest]))
        documents = [f"{who}\n" + " ".join(sentences) for who, sentences in cut]
        for number, (depth, document) in enumerate(zip(places, gold, strict=True)):
            documents.insert(min(len(documents), round(depth * len(cut)) + number), document)
        return Sample(
            id=name,
            task=task,
            context="\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(documents, 1)),
            questions=(f"Question: {question}",),
            answers=((place,),),
            metric="string_match_part",
            max_new_tokens=32,
            template=_DOCUMENTS,
            prefix=" Answer:",
            meta={"documents": len(documents), "steps": 1 + two_steps},
        )

    return build


_RECORD = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its corresponding "
    "<REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding "
    "<REGISTER_CONTENT> of a "
    "certain line index. Now the record start:\n\n"
)


def build_lines(task: str, name: str, seed: str) -> Callable[[int], Sample]:
    """LongEval's lines: key and number on each line, one of them is asked for. One unit is a line."""
    rng = random.Random(seed)
    wanted, depth, value = names(1, rng)[0], rng.random(), rng.randint(1, 50000)

    def build(n: int) -> Sample:
        other = random.Random(f"{seed}-lines")
        keys = [key for key in names(n + 1, other) if key != wanted][:n]
        numbers = random.Random(f"{seed}-values")
        lines = [(key, numbers.randint(1, 50000)) for key in keys]
        lines.insert(round(depth * len(lines)), (wanted, value))
        return Sample(
            id=name,
            task=task,
            context="\n".join(f"line {key}: REGISTER_CONTENT is <{number}>" for key, number in lines),
            questions=(f"Tell me what is the <REGISTER_CONTENT> in line {wanted}? I need the number.",),
            answers=((str(value),),),
            metric="last_number",
            max_new_tokens=24,
            template=_RECORD + "{context}\n\nNow the record is over. {question}",
            meta={"lines": len(lines), "depth": round(depth, 4)},
        )

    return build
