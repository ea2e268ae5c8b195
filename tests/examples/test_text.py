"""The text of the embedded model: right answers, an honest split, the same every time."""

from __future__ import annotations

import collections
import itertools
import random
import re
import string
from typing import NamedTuple

import pytest

from examples.tiny import text
from examples.tiny.families import FAMILIES, Question
from examples.tiny.language import CODES, LARGEST_IN_WORDS, languages
from examples.tiny.text import Conversation, Example, Plain

NUM_DOCUMENTS = 30_000


@pytest.fixture(scope="module")
def documents() -> list[Conversation | Plain]:
    return list(itertools.islice(text.documents(7), NUM_DOCUMENTS))


@pytest.fixture(scope="module")
def trained(documents) -> list[Example]:
    return [turn for d in documents if isinstance(d, Conversation) for turn in d.turns]


@pytest.fixture(scope="module")
def held_out() -> list[Example]:
    return text.held_out(600, seed=0)


def test_a_seed_names_a_stream():
    first, again, other = (list(itertools.islice(text.documents(s), 50)) for s in (3, 3, 4))
    assert first == again != other
    assert text.held_out(5, seed=1) == text.held_out(5, seed=1) != text.held_out(5, seed=2)


# The split.


def texts(examples: list[Example]) -> set[str]:
    return {text.normalised(example.prompt) for example in examples}


def test_held_out_prompts_never_occur_in_training(trained, held_out):
    assert not texts(trained) & texts(held_out)
    planted = [*trained, held_out[17]._replace(prompt=held_out[17].prompt.lower())]
    assert texts(planted) & texts(held_out), "one in other capitals would be seen"


class Places(NamedTuple):
    """Where a text occurs, over all facts and phrasings, and what is answered."""

    held_out: set[bool]
    answers: set[str]


@pytest.fixture(scope="module")
def everything() -> dict[str, Places]:
    """Nearly every fact of every family (of numbers a part), in all of its phrasings."""
    draw = random.Random(0)
    found: dict[str, Places] = collections.defaultdict(lambda: Places(set(), set()))
    seen = set()
    for name, family in FAMILIES.items():
        for to in languages().values():
            for _ in range(1600 if name.startswith("translate") else 500):
                question = family.draw(draw, to)
                key = (question.fact, question.phrases)
                if key in seen:
                    continue
                seen.add(key)
                for i, phrase in enumerate(question.phrases):
                    place = found[text.normalised(phrase.format_map(question.fields))]
                    place.held_out.add(text.is_held_out(question, i))
                    place.answers.add(question.answer)
    return found


def test_no_text_is_both_held_out_and_trained(everything):
    assert len(everything) > 50_000
    assert not [prompt for prompt, place in everything.items() if len(place.held_out) > 1]
    share = sum(True in place.held_out for place in everything.values()) / len(everything)
    assert 0.1 < share < 0.2


def test_one_text_has_one_answer(everything):
    assert not {k: place.answers for k, place in everything.items() if len(place.answers) > 1}


EQUATION = re.compile(r"(-?\d+) ([+-]) (\d+)")


def operands_held_out(a: str, operator: str, b: str) -> bool:
    question = Question(text.arithmetic_fact(operator, int(a), int(b)), (), {}, "", True)
    return text.is_held_out(question, 0)


def test_held_out_operands_never_occur_with_their_result(documents, trained):
    """Whatever the language, the phrasing, the order, Python or plain lines."""
    plain = [d.text for d in documents if isinstance(d, Plain)]
    codes = [e.prompt for e in trained if e.family == "python" and "print(" in e.prompt]
    found = [match for line in plain + codes for match in EQUATION.findall(line)]
    assert len(found) > 500
    assert not [match for match in found if operands_held_out(*match)]
    pairs = itertools.product(map(str, range(100)), "+-", map(str, range(100)))
    share = sum(operands_held_out(*pair) for pair in pairs) / 20_000
    assert 0.07 < share < 0.13, "and some are held out"


def test_held_out_counts_never_occur_in_plain_lines(documents, held_out):
    counts = {example.answer for example in held_out if example.family == "count"}
    plain = {document.text for document in documents if isinstance(document, Plain)}
    digits = {line for line in plain if re.fullmatch(r"[\d, ]+", line)}
    assert len(digits) > 100
    assert not digits & counts


def test_a_fact_is_never_held_out_in_most_of_its_phrasings():
    draw = random.Random(0)
    for family in FAMILIES.values():
        for _ in range(300):
            question = family.draw(draw, languages()[draw.choice(CODES)])
            if not question.by_operands:
                num = len(question.phrases)
                assert num >= 6, question
                out = sum(text.is_held_out(question, i) for i in range(num))
                assert 1 <= out <= num / 3.5, question


def test_every_family_is_asked_in_every_language(trained, held_out):
    for examples in (trained, held_out):
        seen = {(example.family, example.language) for example in examples}
        assert seen == set(itertools.product(FAMILIES, CODES))
    counts = collections.Counter(example.family for example in held_out)
    assert min(counts.values()) >= 90


# The answers, by another way than the one that made them.


def numbers(prompt: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", prompt)]


def test_sums_and_differences_are_right(trained, held_out):
    for example in trained + held_out:
        if example.family == "sum":
            assert int(example.answer) == sum(numbers(example.prompt))
        elif example.family == "difference":
            a, b = numbers(example.prompt)
            # "Subtract 3 from 10", "Resta 3 de 10", "Soustrais", "Sottrai", "Ziehe 3 von 10 ab"
            is_turned = re.search("subtract|resta|soustrais|sottrai|ziehe", example.prompt, re.I)
            assert int(example.answer) == (b - a if is_turned else a - b), example


def test_python_answers_run(trained):
    checked = collections.Counter()
    for example in trained:
        if example.family != "python":
            continue
        if code := re.search(r"print\((.*)\)", example.prompt):
            assert str(eval(code[1])) == example.answer
            checked["result"] += 1
        elif example.answer.startswith("list("):
            a, b = numbers(example.prompt)
            assert eval(example.answer) == list(range(a, b + 1))
            checked["range"] += 1
        elif example.answer.startswith('print("'):
            assert eval(example.answer[len("print(") : -1]) in example.prompt
            checked["word"] += 1
        else:
            assert eval(example.answer[len("print(") : -1]) == sum(numbers(example.prompt))
            checked["sum"] += 1
    assert len(checked) == 4
    assert min(checked.values()) > 50


LARGER = re.compile("larger|greater|plus grand|größer|grösser|mayor|maggior", re.I)
SMALLER = re.compile("smaller|less|plus petit|kleiner|menor|minor", re.I)
BEFORE = re.compile(
    "before|precede|avant|précéd|précèd|vor |voraus|antes|anterior|prima|precedente", re.I
)

# What a person knows, in each language: a part of what the families ask.
KNOWN = {
    ("en", "What is 42 in words?"): "forty-two",
    ("en", "Which number is seventeen?"): "17",
    ("en", 'What is "red" in German?'): "rot",
    ("en", 'What is "Wednesday" in Spanish?'): "miércoles",
    ("en", "Which day comes after Sunday?"): "Monday",
    ("en", "Which day comes before Monday?"): "Sunday",
    ("en", "Which month comes after December?"): "January",
    ("en", "What is the capital of Japan?"): "The capital of Japan is Tokyo.",
    ("fr", "Écris 81 en lettres."): "quatre-vingt-un",
    ("fr", "Écris soixante et onze en chiffres."): "71",
    ("fr", "Que veut dire « grey » en français ?"): "gris",
    ("fr", "Que veut dire « noir » en italien ?"): "nero",
    ("fr", "Quel jour vient avant lundi ?"): "dimanche",
    ("fr", "Quel mois vient après juillet ?"): "août",
    ("fr", "Quelle est la capitale de la Suisse ?"): "La capitale de la Suisse est Berne.",
    ("de", "Schreibe 35 in Worten."): "fünfunddreißig",
    ("de", "Was heißt „sábado“ auf Deutsch?"): "Samstag",
    ("de", "Was heißt „lila“ auf Englisch?"): "purple",
    ("de", "Welcher Tag kommt nach Dienstag?"): "Mittwoch",
    ("de", "Welcher Monat kommt vor März?"): "Februar",
    ("de", "Was ist die Hauptstadt der Türkei?"): "Die Hauptstadt der Türkei ist Ankara.",
    ("es", "Escribe 22 en letras."): "veintidós",
    ("es", "¿Qué es «blue» en español?"): "azul",
    ("es", "¿Qué es «agosto» en francés?"): "août",
    ("es", "¿Qué día viene después del viernes?"): "sábado",
    ("es", "¿Qué mes viene antes de enero?"): "diciembre",
    ("es", "¿Cuál es la capital de Cuba?"): "La capital de Cuba es La Habana.",
    ("it", "Scrivi 28 in lettere."): "ventotto",
    ("it", "Che cos'è «vendredi» in italiano?"): "venerdì",
    ("it", "Che cos'è «rosso» in inglese?"): "red",
    ("it", "Quale giorno viene prima di giovedì?"): "mercoledì",
    ("it", "Quale mese viene dopo aprile?"): "maggio",
    ("it", "Qual è la capitale dell'Egitto?"): "La capitale dell'Egitto è Il Cairo.",
}


def test_facts_are_those_that_a_person_knows(everything):
    found = {question: everything[text.normalised(question[1])].answers for question in KNOWN}
    assert found == {question: {answer} for question, answer in KNOWN.items()}


def test_counts_and_comparisons_are_right(trained):
    for example in trained:
        if example.family == "count":
            a, b = numbers(example.prompt)
            step = 1 if a < b else -1
            assert numbers(example.answer) == list(range(a, b + step, step))
        elif example.family == "compare":
            is_larger = LARGER.search(example.prompt)
            assert bool(is_larger) != bool(SMALLER.search(example.prompt)), example
            choose = max if is_larger else min
            assert int(example.answer) == choose(numbers(example.prompt))
        elif example.family == "next_number":
            (n,) = numbers(example.prompt)
            is_before = BEFORE.search(example.prompt)
            assert int(example.answer) == (n - 1 if is_before else n + 1), example


def test_words_of_the_languages_are_parallel():
    english = languages()["en"]
    assert [to.numbers[21] for to in languages().values()] == [
        "twenty-one",
        "vingt et un",
        "einundzwanzig",
        "veintiuno",
        "ventuno",
    ]
    for to in languages().values():
        for name in ("colours", "days", "months", "numbers", "countries"):
            assert len(getattr(to, name)) == len(getattr(english, name))
        for name in ("days", "months", "numbers"):
            assert len(set(getattr(to, name))) == len(getattr(to, name)), (to.code, name)
        assert len(to.numbers) == LARGEST_IN_WORDS + 1
        assert to.phrases.keys() == english.phrases.keys()
        assert to.chat.keys() == english.chat.keys()
        assert to.into.keys() == to.source.keys() == set(CODES)


def fields(phrase: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(phrase) if name}


def test_every_phrasing_names_what_it_asks_for():
    for to in languages().values():
        for family, phrases in to.phrases.items():
            wanted = set.union(*map(fields, languages()["en"].phrases[family]))
            for phrase in phrases:
                optional = {"from"} if "word" in wanted else set()
                assert wanted - optional <= fields(phrase) | optional, (to.code, phrase)
                assert fields(phrase) <= wanted, (to.code, phrase)


# The way people type.


def test_variants_of_a_prompt_are_one_text():
    draw = random.Random(1)
    french = languages()["fr"]
    question = Question(("fact",), (), {}, "")
    prompt = "Comment dit-on « rouge » en anglais ?"
    variants = {text.varied(draw, prompt, question, french) for _ in range(500)}
    assert len(variants) > 20
    assert {text.normalised(variant) for variant in variants} == {text.normalised(prompt)}
    assert {prompt, prompt.upper(), prompt.lower()} <= variants
    assert "comment dit-on rouge en anglais" in variants


def test_bare_forms_and_capitals_are_asked(trained):
    prompts = [example.prompt for example in trained]
    assert any(re.fullmatch(r"\d+\+\d+=", prompt) for prompt in prompts)
    assert any(re.fullmatch(r"\d+-\d+", prompt) for prompt in prompts)
    words = [prompt for prompt in prompts if re.search("[a-z]{3}", prompt.lower())]
    for change, least in ((str.upper, 0.03), (str.lower, 0.06)):
        assert sum(change(prompt) == prompt for prompt in words) / len(words) > least


def test_what_lies_outside_is_not_known(trained):
    unknown = {to.code: to.unknown for to in languages().values()}
    asked = [example for example in trained if example.family == "unknown"]
    assert len(asked) > 500
    assert all(example.answer == unknown[example.language] for example in asked)
    assert any("*" in example.prompt for example in asked)
