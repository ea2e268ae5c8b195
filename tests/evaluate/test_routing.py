"""Counts of routing are those of plain loops; what is planted is found, what is even is not."""

from __future__ import annotations

import dataclasses
import html.parser
import io
import json
import re
from itertools import pairwise

import numpy as np
import pytest
from rich.console import Console

from mixtral_jax.config import PRESETS
from mixtral_jax.evaluate.pictures import draw_routing
from mixtral_jax.evaluate.routing import Choices, RoutingCounter, RoutingCounts
from mixtral_jax.evaluate.routing_page import page, spelled
from mixtral_jax.evaluate.routing_report import names_of, study_json, tables, text_table
from mixtral_jax.evaluate.specialisation import (
    AgreementCounter,
    expected_by_chance,
    jensen_shannon,
    mutual_information,
    uniform_repetition,
)
from mixtral_jax.evaluate.study import Study, TextRouting
from mixtral_jax.evaluate.table import Entry
from mixtral_jax.evaluate.text import Dataset
from mixtral_jax.evaluate.token_classes import CLASSES, class_of, token_classes
from mixtral_jax.language_model import EMBEDDED_FOLDER
from mixtral_jax.tokenizer import Tokenizer

L, E, A = 3, 8, 2
CONFIG = dataclasses.replace(PRESETS["tiny"], num_hidden_layers=L)
MANY = 40_000  # tokens: shares of them are off by 0.0025 or less, one time in three


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(EMBEDDED_FOLDER)


def even(num_tokens: int, seed: int = 0) -> Choices:
    """Two different experts for each token, drawn evenly."""
    draw = np.random.default_rng(seed)
    ids = draw.random((L, num_tokens, E)).argsort(axis=-1)[..., :A]
    tokens = draw.integers(0, 5, num_tokens)
    weights = np.full(ids.shape, 0.5, np.float32)
    return Choices(tokens, np.arange(num_tokens), ids, weights)


def counted(*parts: Choices, num_classes: int = 5) -> RoutingCounts:
    counter = RoutingCounter(CONFIG, np.arange(5), num_classes)
    for part in parts:
        counter.add(part)
    return counter.result(64, 32)


def cut(choices: Choices, *places: int) -> list[Choices]:
    ids, positions, experts, weights, _ = choices
    return [
        Choices(ids[a:b], positions[a:b], experts[:, a:b], weights[:, a:b])
        for a, b in pairwise([0, *places, len(ids)])
    ]


def test_counts_are_those_of_loops():
    choices = even(50)
    positions = np.concatenate([np.arange(20), np.arange(30)])  # two documents
    choices = choices._replace(positions=positions)
    by_choice, by_class = np.zeros((L, A, E), int), np.zeros((L, 5, E), int)
    first, shared, pairs = np.zeros(L, int), np.zeros(L, int), 0
    for n in range(50):
        follows = n > 0 and positions[n] == positions[n - 1] + 1
        pairs += follows
        for layer in range(L):
            here = choices.expert_ids[layer, n].tolist()
            for choice, expert in enumerate(here):
                by_choice[layer, choice, expert] += 1
                by_class[layer, choices.token_ids[n], expert] += 1
            before = choices.expert_ids[layer, n - 1].tolist()
            first[layer] += follows and before[0] == here[0]
            shared[layer] += follows and bool({*before} & {*here})
    assert pairs == 48
    for parts in ([choices], cut(choices, 7), cut(choices, 20), cut(choices, 1, 19, 21, 49)):
        found = counted(*parts)
        assert (found.by_choice == by_choice).all()
        assert (found.by_class == by_class).all()
        assert (found.same_first == first).all()
        assert (found.same_any == shared).all()
        assert (found.pairs, found.tokens) == (48, 50)


def test_shares_add_up():
    found = counted(even(50))
    np.testing.assert_allclose(found.shares.sum(axis=1), 1)
    np.testing.assert_allclose(found.choice_shares.sum(axis=2), 1)
    assert (found.counts == found.by_class.sum(axis=1)).all()
    twice = found + counted(even(30, seed=1))
    assert (twice.tokens, twice.pairs, twice.counts[0].sum()) == (80, 49 + 29, 160)


def test_even_choices_repeat_as_expected():
    uniform = uniform_repetition(E, A)
    assert uniform == (1 / 8, pytest.approx(1 - 6 / 8 * 5 / 7))  # as the paper has them
    assert uniform_repetition(4, 1) == (1 / 4, 1 / 4)
    assert uniform_repetition(3, 2).any == 1
    found = counted(even(MANY))
    np.testing.assert_allclose(found.same_first / found.pairs, uniform.first, atol=0.01)
    np.testing.assert_allclose(found.same_any / found.pairs, uniform.any, atol=0.01)


def test_chance_is_what_even_texts_have():
    """The mean over many draws; a token's two experts differ, so E - 1 in place of E - A is off."""
    sizes = np.array([400, 100, 250])
    found = []
    for seed in range(250):
        loads = [counted(even(n, seed=10 * seed + i)).shares for i, n in enumerate(sizes)]
        found.append(jensen_shannon(np.stack(loads)).mean())
    expected = expected_by_chance(sizes, E, A)
    error = np.std(found) / np.sqrt(len(found))
    assert np.mean(found) == pytest.approx(expected, abs=4 * error)
    assert abs(np.mean(found) - expected * (E - 1) / (E - A)) > 4 * error


def test_planted_specialisation_is_found():
    """In layer 1 two texts have no expert in common, and the token says which expert."""
    one, other = even(MANY), even(MANY, seed=1)
    one.expert_ids[1] = [0, 1]
    other.expert_ids[1] = [2, 3]
    counts = [counted(one), counted(other)]
    divergence = jensen_shannon(np.stack([each.shares for each in counts]))
    assert divergence[1] == pytest.approx(1)  # bits: the expert tells the text
    chance = expected_by_chance(np.array([MANY, MANY]), E, A)
    assert divergence[[0, 2]].max() < 10 * chance < 1e-3
    pinned = even(MANY)
    pinned.expert_ids[1, :, 0] = pinned.token_ids
    pinned.expert_ids[1, :, 1] = 7
    information = mutual_information(counted(pinned).by_class)
    assert information[1] == pytest.approx(np.log2(5) / 2, abs=1e-3)  # the second choice: nothing
    assert information[[0, 2]].max() < 1e-3


def test_agreement():
    ours = even(100)
    same = AgreementCounter(L)
    for part in cut(ours, 30):
        same.add(part, part)
    assert same.result().tokens == 100
    assert (same.result().same_first == 1).all()
    assert (same.result().same_set == 1).all()
    turned = ours.expert_ids.copy()
    turned[0, :25] = turned[0, :25, ::-1]
    turned[1, :10, 1] = (
        turned[1, :10].sum(axis=-1) + np.where(turned[1, :10].sum(-1) % 2, 1, 3)
    ) % E
    clash = turned[1, :10, 0] == turned[1, :10, 1]
    turned[1, :10, 1][clash] = (turned[1, :10, 1][clash] + 4) % E
    changed = (np.sort(turned[1, :10]) != np.sort(ours.expert_ids[1, :10])).any(axis=-1).sum()
    counter = AgreementCounter(L)
    counter.add(ours, ours._replace(expert_ids=turned))
    assert counter.result().same_first.tolist() == [0.75, 1, 1]
    assert counter.result().same_set.tolist() == [1, 1 - changed / 100, 1]
    assert changed > 0


@pytest.mark.parametrize(
    ("piece", "name"),
    [
        ("▁12", "digits"), ("7", "digits"), ("▁Montag", "letters"), ("é", "letters"),
        ("x1", "letters"), ("▁+", "operators"), ("-", "operators"), ("==", "operators"),
        ("\u00d7", "operators"), (".", "punctuation"), ("▁«", "punctuation"), ("(+", "punctuation"),
        ("▁", "whitespace"), ("▁▁▁", "whitespace"), ("\n", "whitespace"),
    ],
)  # fmt: skip
def test_classes(piece, name):
    assert class_of(piece) == name


def test_classes_of_a_tokenizer(tokenizer):
    found = [CLASSES[i] for i in token_classes(tokenizer)]
    assert len(found) == tokenizer.vocab_size
    for name in ("<unk>", "<s>", "</s>", "[INST]"):
        assert found[tokenizer.pieces.index(name)] == "control"
    wanted = {"<0x0A>": "whitespace", "<0x41>": "letters", "<0x31>": "digits", "<0xE6>": "bytes"}
    for piece, name in wanted.items():
        assert found[tokenizer.pieces.index(piece)] == name
    assert {found[i] for i in tokenizer.encode("12+30", bos=False)} <= {
        "digits", "operators", "whitespace",
    }  # fmt: skip


EVIL = '</script><script>alert("1")</script>&amp;@data@\n日本'


def studied(tokenizer: Tokenizer, *texts: str, keep: int = 10**6) -> Study:
    found = []
    for i, text in enumerate(texts):
        ids = np.array(tokenizer.encode(text))
        choices = even(len(ids), seed=i)._replace(token_ids=ids)
        counter = RoutingCounter(CONFIG, token_classes(tokenizer), len(CLASSES))
        counter.add(choices)
        dataset = Dataset(file=f"<b>{i}.txt", bytes=len(text), sha256="0")
        kept = cut(choices, min(keep, len(ids)))[0]
        found.append(TextRouting(dataset=dataset, counts=counter.result(64, 32), kept=kept))
    total = found[0].counts
    for each in found[1:]:
        total = total + each.counts
    loads = np.stack([each.counts.shares for each in found])
    divergence = jensen_shannon(loads) if len(found) > 1 else None
    return Study(
        texts=tuple(found),
        total=total,
        divergence=divergence,
        by_chance=None if divergence is None else 0.5,
        agreement=None,
    )


class Elements(html.parser.HTMLParser):
    """What a browser would see: elements, their attributes, and the text of each kind."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta",):
            self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if "div" in self._open and "header" not in self._open:
            self.texts.setdefault("token", []).append(data)
        self.texts.setdefault(self._open[-1] if self._open else "", []).append(data)


def test_page_shows_the_text_and_escapes_it(tokenizer):
    made = page(studied(tokenizer, EVIL, "a <i>b"), "<title>", tokenizer)
    seen = Elements(made)
    names = [name for name, _ in seen.elements]
    assert names.count("script") == 2, "the data, and the program"
    assert {"b", "i"} & {*names} == set()
    assert names.count("title") == 1
    ids = tokenizer.encode(EVIL) + tokenizer.encode("a <i>b")
    wanted = [spelled(tokenizer, token_id)[0] for token_id in ids]
    shown = "".join(seen.texts["token"]).replace("\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "")
    assert shown == "".join(wanted)
    assert {"<s>", "<0x3C>", "\n"} <= {*wanted}
    data = json.loads(seen.texts["script"][0])
    assert data["tokens"] == wanted
    assert len(data["layers"]) == L
    firsts = [even(len(tokenizer.encode(EVIL))).expert_ids, even(7, seed=1).expert_ids]
    assert data["layers"][2]["experts"][: len(firsts[0][2])] == firsts[0][2].tolist()
    assert names.count("span") == len(ids) + 1, "every token, and the legend"


def test_page_needs_no_other_file(tokenizer):
    made = page(studied(tokenizer, "http is text here"), "title", tokenizer)
    for name, attributes in Elements(made).elements:
        assert name not in ("link", "img", "iframe", "base", "object", "embed")
        assert not {"src", "href", "srcset", "data"} & {*attributes}
    program = re.sub(r"<main>.*</main>", "", made, flags=re.DOTALL)
    assert not re.search(r"https?:|//|url\(|@import|fetch\(|import\(", program)
    assert "default-src 'none'" in made


def test_page_is_bounded(tokenizer):
    few = page(studied(tokenizer, "one two three four five six", keep=3), "title", tokenizer)
    assert "The first 3 tokens of " in few
    assert sum(name == "span" for name, _ in Elements(few).elements) == 3 + 1


def test_one_text_has_no_divergence(tokenizer):
    one, two = studied(tokenizer, "1 2 3"), studied(tokenizer, "1 2 3", "a b")
    entry = Entry(checkpoint="tiny")
    alone = study_json(one, entry, None, tokenizer, "1x1")
    assert alone["divergence"] is alone["other"] is None
    assert alone["text"]["file"] == "<b>0.txt"
    both = study_json(two, entry, None, tokenizer, "1x1")
    assert both["text"] is None
    assert [each["tokens"] for each in both["texts"]] == [each.counts.tokens for each in two.texts]
    assert both["divergence"]["most"] == 1
    json.dumps(both)
    for name, found in both["classes"].items():
        sums = np.sum(found["shares"], axis=1)
        np.testing.assert_allclose(sums, 1, atol=1e-5, err_msg=name)
    assert [len(list(tables(each, entry, None))) for each in (one, two)] == [2, 3]


def test_dropped_assignments_add_up(tokenizer):
    one, other = (even(10)._replace(dropped=n) for n in (3, 4))
    found = counted(one, other) + counted(one)
    assert found.dropped == 10
    study = studied(tokenizer, "1 2 3")
    study = dataclasses.replace(study, total=dataclasses.replace(study.total, dropped=10))
    assert study_json(study, Entry(checkpoint="tiny"), None, tokenizer, "1x1")["dropped"] == 10


def test_the_page_holds_no_numbers_that_json_has_not(tokenizer):
    study = studied(tokenizer, "1 2 3")
    kept = study.texts[0].kept
    assert kept is not None
    kept.weights[1, 2, 0] = np.nan
    with pytest.raises(ValueError, match="not JSON compliant"):
        page(study, "title", tokenizer)


def test_names_are_no_markup(tokenizer):
    study = studied(tokenizer, "1 2 3", "a b")
    texts = [
        dataclasses.replace(each, dataset=dataclasses.replace(each.dataset, file=f"m[{name}].txt"))
        for each, name in zip(study.texts, ("red", "b"), strict=True)
    ]
    console = Console(width=140, file=io.StringIO())
    console.print(text_table(dataclasses.replace(study, texts=tuple(texts))))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "m[red].txt" in shown
    assert "m[b].txt" in shown


@pytest.mark.parametrize("name", ["d$x^{$.txt", "$\\frac$.txt", "a_b^c.txt"])
def test_names_are_no_mathematics(tokenizer, tmp_path, name):
    study = studied(tokenizer, "1 2 3")
    dataset = dataclasses.replace(study.texts[0].dataset, file=name)
    study = dataclasses.replace(
        study, texts=(dataclasses.replace(study.texts[0], dataset=dataset),)
    )
    draw_routing(study, f"tiny on {name}", tmp_path / "loads.svg")
    drawn = (tmp_path / "loads.svg").read_text()
    assert drawn.count(f">{name}<") == 1
    assert f"tiny on {name}" in drawn


def test_names():
    files = [Dataset(file=name, bytes=1, sha256="") for name in ("a", "b", "a")]
    assert names_of(files) == ["a (1)", "b", "a (2)"]
