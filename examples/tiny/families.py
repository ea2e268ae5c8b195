"""What the embedded model is asked: one function per kind of question, with the right answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import NamedTuple

from examples.tiny.language import LARGEST_IN_WORDS, Language, languages

LARGEST_OPERAND = 99
LONGEST_COUNT = 16


class Question(NamedTuple):
    """A fact to ask for, in any of several phrasings.

    Attributes:
        fact: identifies what is asked; phrasings that may be the same text share it.
        phrases: templates, to be filled with ``fields``.
        answer: the one right answer.
        by_operands: a whole fact is held out, not one phrasing of it.
        is_code: the capitals of the prompt matter.
    """

    fact: tuple
    phrases: tuple[str, ...]
    fields: Mapping[str, object]
    answer: str
    by_operands: bool = False
    is_code: bool = False


Draw = Callable[[random.Random, Language], Question]

BARE = {
    "+": ("{a}+{b}=", "{a}+{b}", "{a} + {b} =", "{a} + {b}", "{a} + {b} = ?", "{a}+{b}=?"),
    "-": ("{a}-{b}=", "{a}-{b}", "{a} - {b} =", "{a} - {b}", "{a} - {b} = ?", "{a}-{b}=?"),
}


def _operand(draw: random.Random) -> int:
    """Small numbers are few, and asked for often."""
    return draw.randint(0, 20 if draw.random() < 0.2 else LARGEST_OPERAND)


def arithmetic_fact(operator: str, a: int, b: int) -> tuple:
    """The fact behind every question about these operands, in any order and any language."""
    return (operator, min(a, b), max(a, b))


def _sum(draw: random.Random, to: Language) -> Question:
    a, b = _operand(draw), _operand(draw)
    phrases = BARE["+"] if draw.random() < 0.25 else to.phrases["sum"]
    fact = arithmetic_fact("+", a, b)
    return Question(fact, phrases, {"a": a, "b": b}, str(a + b), by_operands=True)


def _difference(draw: random.Random, to: Language) -> Question:
    a, b = _operand(draw), _operand(draw)
    if draw.random() < 0.02:
        b = a
    elif a < b and draw.random() < 0.3:
        a, b = b, a
    phrases = BARE["-"] if draw.random() < 0.25 else to.phrases["difference"]
    fact = arithmetic_fact("-", a, b)
    return Question(fact, phrases, {"a": a, "b": b}, str(a - b), by_operands=True)


def _number_to_words(draw: random.Random, to: Language) -> Question:
    n = draw.randint(0, LARGEST_IN_WORDS)
    phrases = to.phrases["number_to_words"]
    return Question((to.code, "words", n), phrases, {"n": n}, to.numbers[n])


def _words_to_number(draw: random.Random, to: Language) -> Question:
    n = draw.randint(0, LARGEST_IN_WORDS)
    phrases = to.phrases["words_to_number"]
    return Question((to.code, "digits", n), phrases, {"word": to.numbers[n]}, str(n))


def _translation(draw: random.Random, to: Language, lists: tuple[str, ...]) -> Question:
    """From the language of the question, or into it."""
    other = languages()[draw.choice([code for code in languages() if code != to.code])]
    name = draw.choice(lists)
    own, foreign = getattr(to, name), getattr(other, name)
    i = draw.randrange(len(own))
    if draw.random() < 0.5:
        fact = (to.code, "to", other.code, own[i])
        fields = {"word": own[i], "into": to.into[other.code]}
        return Question(fact, to.phrases["translate_to"], fields, foreign[i])
    # Without its language: "uno" is asked for with the same words in Spanish and in Italian.
    fact = (to.code, "from", foreign[i])
    fields = {"word": foreign[i], "from": to.source[other.code]}
    return Question(fact, to.phrases["translate_from"], fields, own[i])


def _translate_number(draw: random.Random, to: Language) -> Question:
    return _translation(draw, to, ("numbers",))


def _translate_word(draw: random.Random, to: Language) -> Question:
    return _translation(draw, to, ("colours", "days", "months"))


def _next_previous(draw: random.Random, to: Language) -> Question:
    what, words = draw.choice([("day", to.days), ("month", to.months)])
    direction, step = draw.choice([("next", 1), ("previous", -1)])
    i = draw.randrange(len(words))
    answer = words[(i + step) % len(words)]
    phrases = to.phrases[f"{direction}_{what}"]
    return Question((to.code, direction, words[i]), phrases, {"word": words[i]}, answer)


def _capital(draw: random.Random, to: Language) -> Question:
    of, city = draw.choice(to.countries)
    answer = to.capital_answer.format(of=of, city=city)
    return Question((to.code, "capital", of), to.phrases["capital"], {"of": of}, answer)


def _range(draw: random.Random) -> tuple[int, int]:
    a = draw.randint(0, 10 if draw.random() < 0.4 else 90)
    return a, a + draw.randint(2, LONGEST_COUNT - 1)


def _count(draw: random.Random, to: Language) -> Question:
    a, b = _range(draw)
    numbers = range(a, b + 1)
    if draw.random() < 0.2:
        a, b, numbers = b, a, reversed(numbers)
    fact = ("count", min(a, b), max(a, b))
    answer = ", ".join(map(str, numbers))
    return Question(fact, to.phrases["count"], {"a": a, "b": b}, answer, by_operands=True)


def _next_number(draw: random.Random, to: Language) -> Question:
    direction, step = draw.choice([("next", 1), ("previous", -1)])
    n = draw.randint(1, LARGEST_OPERAND)
    phrases = to.phrases[f"{direction}_number"]
    return Question((to.code, direction, n), phrases, {"n": n}, str(n + step))


def _compare(draw: random.Random, to: Language) -> Question:
    which, choose = draw.choice([("larger", max), ("smaller", min)])
    a, b = draw.sample(range(LARGEST_OPERAND + 1), 2)
    fact = ("compare", min(a, b), max(a, b))
    answer = str(choose(a, b))
    return Question(fact, to.phrases[which], {"a": a, "b": b}, answer, by_operands=True)


def _python(draw: random.Random, to: Language) -> Question:
    kind = draw.choice(["result", "print", "sum", "range"])
    phrases = to.phrases[f"python_{kind}"]
    if kind == "print":
        word = draw.choice((*to.colours, *to.days, *to.months))
        answer = f'print("{word}")'
        return Question((to.code, "print", word), phrases, {"word": word}, answer, is_code=True)
    if kind == "range":
        a, b = _range(draw)
        answer, fact = f"list(range({a}, {b + 1}))", ("count", a, b)
    else:
        a, b = _operand(draw), _operand(draw)
        operator = "+" if kind == "sum" else draw.choice("+-")
        code = f"print({a} {operator} {b})"
        result = str(a + b if operator == "+" else a - b)
        answer, fact = (code if kind == "sum" else result), arithmetic_fact(operator, a, b)
        if kind == "result":
            return Question(fact, phrases, {"code": code}, result, by_operands=True, is_code=True)
    return Question(fact, phrases, {"a": a, "b": b}, answer, by_operands=True, is_code=True)


def _chat(draw: random.Random, to: Language) -> Question:
    intent = draw.choice(sorted(to.chat))
    answer, phrases = to.chat[intent]
    return Question((to.code, intent), phrases, {}, answer)


_SYLLABLES = ("zor", "bel", "mun", "ta", "ri", "gol", "pen", "du", "ka", "lis", "vo", "nar", "sha")
_ENDINGS = ("land", "ia", "stan", "ora", "una", "esh")


def _unknown(draw: random.Random, to: Language) -> Question:
    kind = draw.choice(["operation", "large", "beyond", "country", "noun", "open"])
    if kind == "operation":
        a, b = _operand(draw), _operand(draw)
        phrases = to.phrases["unknown_operation"]
        fact = ("unknown operation", min(a, b), max(a, b))
        return Question(fact, phrases, {"a": a, "b": b}, to.unknown, by_operands=True)
    if kind == "large":
        a, b = draw.randint(100, 9999), draw.choice([_operand(draw), draw.randint(100, 9999)])
        if draw.random() < 0.5:
            a, b = b, a
        name, fact = draw.choice([("sum", "+"), ("difference", "-")])
        # A bare sum has no language: it is English.
        is_bare = to.code == "en" and draw.random() < 0.3
        phrases = BARE[fact] if is_bare else to.phrases[name]
        fact = arithmetic_fact(fact, a, b)
        return Question(fact, phrases, {"a": a, "b": b}, to.unknown, by_operands=True)
    if kind == "beyond":
        n = draw.randint(LARGEST_IN_WORDS + 1, 9999)
        fields = {"n": n, "a": n, "b": n + draw.randint(2, LONGEST_COUNT - 1)}
        phrases = to.phrases[draw.choice(["number_to_words", "count"])]
        return Question(("beyond", n), phrases, fields, to.unknown, by_operands=True)
    if kind == "country":
        name = "".join(draw.choices(_SYLLABLES, k=draw.randint(1, 2))) + draw.choice(_ENDINGS)
        of = draw.choice(to.invented_of).format(name=name.capitalize())
        phrases, fact = to.phrases["capital"], ("capital", name)
        return Question(fact, phrases, {"of": of}, to.unknown, by_operands=True)
    noun = draw.choice(to.nouns)
    if kind == "noun":
        other = draw.choice([code for code in languages() if code != to.code])
        fact, fields = (to.code, "to", other, noun), {"word": noun, "into": to.into[other]}
        return Question(fact, to.phrases["translate_to"], fields, to.unknown)
    phrases = to.phrases["unknown_open"]
    return Question((to.code, "open", noun), phrases, {"noun": noun}, to.unknown)


class Family(NamedTuple):
    """A kind of question and its share of the text."""

    draw: Draw
    weight: float


FAMILIES: dict[str, Family] = {
    "sum": Family(_sum, 13),
    "difference": Family(_difference, 18),
    "number_to_words": Family(_number_to_words, 6),
    "words_to_number": Family(_words_to_number, 5),
    "translate_number": Family(_translate_number, 15),
    "translate_word": Family(_translate_word, 14),
    "next_previous": Family(_next_previous, 10),
    "capital": Family(_capital, 6),
    "count": Family(_count, 6),
    "next_number": Family(_next_number, 3),
    "compare": Family(_compare, 4),
    "python": Family(_python, 7),
    "chat": Family(_chat, 4),
    "unknown": Family(_unknown, 8),
}
