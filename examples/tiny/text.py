"""The text of the embedded model: examples, conversations and plain lines, fresh for ever.

Deterministic: a seed names a stream. What is held out never occurs in a stream of training text:
for numbers a pair of operands (in any order, language, phrasing, and inside Python), for other
facts pairs of a fact and a phrasing.
"""

from __future__ import annotations

import itertools
import random
import re
import zlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

from examples.tiny.families import FAMILIES, LARGEST_OPERAND, Question, arithmetic_fact
from examples.tiny.language import CODES, Language, languages

Split = Literal["train", "held_out"]

HELD_OUT_OPERANDS = 10  # one fact of so many
HELD_OUT_PHRASINGS = 7  # one phrasing of so many; never more than one of fewer
LONGEST_CONVERSATION = 8
LONGEST_MARATHON = 80  # turns of the few conversations that fill the model's context
MARATHONS = 0.006  # of the conversations of several turns


class Example(NamedTuple):
    """One prompt with its right answer."""

    family: str
    language: str
    prompt: str
    answer: str


class Conversation(NamedTuple):
    """Turns of a chat; ``system`` belongs to the last one, as in the v3 format."""

    turns: tuple[Example, ...]
    system: str | None = None


class Plain(NamedTuple):
    """Text without the chat format."""

    text: str


def is_held_out(question: Question, phrasing: int) -> bool:
    """Whether this fact in this phrasing is kept from training."""
    code = zlib.crc32(repr(question.fact).casefold().encode())
    if question.by_operands:
        return code % HELD_OUT_OPERANDS == 0
    return (code + phrasing) % min(HELD_OUT_PHRASINGS, len(question.phrases)) == 0


def example(
    draw: random.Random, *, split: Split, family: str | None = None, language: str | None = None
) -> Example:
    """One example of a split, of a random family and language unless they are given."""
    if family is None:
        family = draw.choices(_NAMES, cum_weights=_SHARES)[0]
    to = languages()[language or draw.choice(CODES)]
    while True:
        question = FAMILIES[family].draw(draw, to)
        phrasing = draw.randrange(len(question.phrases))
        if is_held_out(question, phrasing) == (split == "held_out"):
            prompt = question.phrases[phrasing].format_map(question.fields)
            return Example(family, to.code, varied(draw, prompt, question, to), question.answer)


def held_out(per_family: int, *, seed: int) -> list[Example]:
    """Different held-out prompts, so many of each family (or all there are)."""
    examples = []
    for family in FAMILIES:
        draw = random.Random(f"held out {family} {seed}")
        seen: dict[str, Example] = {}
        for _ in range(50 * per_family):
            drawn = example(draw, split="held_out", family=family)
            seen.setdefault(normalised(drawn.prompt), drawn)
            if len(seen) == per_family:
                break
        examples += seen.values()
    return examples


def documents(seed: int, *, marathons: float = MARATHONS) -> Iterator[Conversation | Plain]:
    """Training text without end; ``marathons`` is the share of long ones among the conversations
    of several turns."""
    draw = random.Random(f"train {seed}")
    while True:
        if draw.random() < 0.04:
            yield Plain(plain(draw))
            continue
        num_turns = 1
        if draw.random() < 0.35:
            num_turns = draw.randint(2, LONGEST_CONVERSATION)
            if draw.random() < marathons:
                num_turns = draw.randint(LONGEST_CONVERSATION + 1, LONGEST_MARATHON)
        language = None if draw.random() < 0.2 else draw.choice(CODES)
        turns = tuple(example(draw, split="train", language=language) for _ in range(num_turns))
        system = None
        if draw.random() < 0.06:
            system = draw.choice(languages()[turns[-1].language].systems)
        yield Conversation(turns, system)


_QUOTES = re.compile(r"« | »|[«»„“”\"]")
_SPACED = re.compile(r" ([?!:;])")


def varied(draw: random.Random, prompt: str, question: Question, to: Language) -> str:
    """The prompt as one person or another would type it: quotes, punctuation, capitals."""
    style = draw.random()
    if style < 0.4:
        prompt = _QUOTES.sub("" if style < 0.25 else "'", prompt)
    if "greeting" in question.fact or "thanks" in question.fact or "goodbye" in question.fact:
        prompt = _exclaimed(draw, prompt.rstrip("!. "), to)
    elif draw.random() < 0.1:
        prompt = prompt.rstrip("?.! ")
    if to.code == "fr" and draw.random() < 0.5:
        prompt = _SPACED.sub(r"\1", prompt)
    if question.is_code:
        return prompt
    style = draw.random()
    if style < 0.08:
        return prompt[0].lower() + prompt[1:]
    if style < 0.18:
        return prompt.lower()
    if style < 0.25:
        return prompt.upper()
    return prompt.title() if style < 0.27 else prompt


def _exclaimed(draw: random.Random, prompt: str, to: Language) -> str:
    end = draw.choice(["", "!", "."])
    if end == "!" and to.code == "fr":
        return f"{prompt} !"
    if end == "!" and to.code == "es" and draw.random() < 0.5:
        return f"¡{prompt}!"
    return prompt + end


def normalised(prompt: str) -> str:
    """A prompt without what ``varied`` changes: two variants of one phrasing are one text."""
    letters = prompt.upper().casefold()  # ß becomes ss either way
    letters = re.sub(r"\s*([+*/=-])\s*", r"\1", re.sub(r"[^\w+*/=()-]", " ", letters))
    return " ".join(letters.rstrip("= ").split())


def plain(draw: random.Random) -> str:
    """Lines to be continued: sums, sequences, sentences."""
    to = languages()[draw.choice(CODES)]
    kind = draw.choice(["arithmetic", "sequence", "sequence", "capitals"])
    if kind == "arithmetic":
        return " ".join(_equation(draw) for _ in range(draw.randint(2, 5)))
    if kind == "capitals":
        chosen = draw.sample(to.countries, draw.randint(1, 3))
        return " ".join(to.capital_answer.format(of=of, city=city) for of, city in chosen)
    if draw.random() < 0.25:
        return _digits(draw)
    words = draw.choice([to.days, to.months, to.numbers[1:21]])
    start, length = draw.randrange(len(words)), draw.randint(4, 14)
    taken = [words[i % len(words)] for i in range(start, start + length)]
    return ", ".join(taken if words != to.numbers[1:21] else taken[: len(words) - start])


def _digits(draw: random.Random) -> str:
    while True:
        a = draw.randint(0, 95)
        b = a + draw.randint(3, 14)
        if not is_held_out(Question(("count", a, b), (), {}, "", by_operands=True), 0):
            return ", ".join(map(str, range(a, b + 1)))


def _equation(draw: random.Random) -> str:
    while True:
        a, b = draw.randint(0, LARGEST_OPERAND), draw.randint(0, LARGEST_OPERAND)
        operator = draw.choice("+-")
        fact = arithmetic_fact(operator, a, b)
        if not is_held_out(Question(fact, (), {}, "", by_operands=True), 0):
            return f"{a} {operator} {b} = {a + b if operator == '+' else a - b}."


_NAMES = list(FAMILIES)
_SHARES = list(itertools.accumulate(family.weight for family in FAMILIES.values()))
