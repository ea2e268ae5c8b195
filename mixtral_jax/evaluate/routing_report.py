"""A study of routing as tables for people, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.markup import escape
from rich.table import Table

from mixtral_jax.evaluate.report import tokenizer_line
from mixtral_jax.evaluate.routing import RoutingCounts
from mixtral_jax.evaluate.specialisation import mutual_information, uniform_repetition
from mixtral_jax.evaluate.study import Study
from mixtral_jax.evaluate.table import Entry
from mixtral_jax.evaluate.text import Dataset
from mixtral_jax.evaluate.token_classes import CLASSES
from mixtral_jax.tokenizer import Tokenizer

_DIVERGENCE = "generalized Jensen-Shannon divergence of the texts' loads, bits (Lin 1991)"
_INFORMATION = "mutual information of a token's class and its expert, bits"


def names_of(texts: Sequence[Dataset]) -> list[str]:
    """Of texts: the files' names, numbered where two have the same."""
    files = [text.file for text in texts]
    return [
        file if files.count(file) == 1 else f"{file} ({files[:i].count(file) + 1})"
        for i, file in enumerate(files)
    ]


def study_json(
    study: Study, entry: Entry, other: Entry | None, tokenizer: Tokenizer, mesh: str
) -> dict[str, Any]:
    """One line: of all texts together, then of each."""
    datasets = [dataclasses.asdict(each.dataset) for each in study.texts]
    line = {
        "checkpoint": entry.checkpoint,
        **_counts_json(study.total),
        "context": study.total.context,
        "stride": study.total.stride,
        "mesh": mesh,
        "text": datasets[0] if len(datasets) == 1 else None,
        "tokenizer": tokenizer_line(tokenizer),
        "texts": [
            dataset | _counts_json(each.counts)
            for dataset, each in zip(datasets, study.texts, strict=True)
        ],
        "divergence": None,
        "other": None,
    }
    if study.divergence is not None:
        line["divergence"] = {
            "measure": _DIVERGENCE,
            "per_layer": _rounded(study.divergence),
            "by_chance": study.by_chance,
            "most": float(np.log2(len(study.texts))),
        }
    if study.agreement is not None and other is not None:
        line["other"] = {
            "checkpoint": other.checkpoint,
            "scheme": other.scheme,
            "tokens": study.agreement.tokens,
            "dropped": study.other_dropped,
            "same_first": _rounded(study.agreement.same_first),
            "same_set": _rounded(study.agreement.same_set),
        }
    return line


def _counts_json(counts: RoutingCounts) -> dict[str, Any]:
    _, A, E = counts.by_choice.shape
    uniform = uniform_repetition(E, A)
    pairs = max(counts.pairs, 1)
    return {
        "counts": counts.counts.tolist(),
        "shares": _rounded(counts.shares),
        "entropy": _rounded(counts.entropy),
        "choice_shares": _rounded(counts.choice_shares),
        "repetition": {
            "pairs": counts.pairs,
            "first": _rounded(counts.same_first / pairs),
            "any": _rounded(counts.same_any / pairs),
            "uniform": {"first": uniform.first, "any": uniform.any},
        },
        "classes": {
            name: {"tokens": tokens, "shares": _rounded(_shares(counts.by_class[:, i]))}
            for i, (name, tokens) in enumerate(zip(CLASSES, class_tokens(counts), strict=True))
            if tokens
        },
        "class_information": _rounded(mutual_information(counts.by_class)),
        "tokens": counts.tokens,
        "dropped": counts.dropped,
    }


def class_tokens(counts: RoutingCounts) -> list[int]:
    """How many tokens of each class were routed."""
    return (counts.by_class[0].sum(axis=-1) // counts.by_choice.shape[1]).tolist()


def _shares(counts: np.ndarray) -> np.ndarray:
    return counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)


def _rounded(values: np.ndarray) -> Any:
    return np.round(values, 6).tolist()


def load_table(counts: RoutingCounts) -> Table:
    """Every layer's least and most used expert, how even its load is, and how often it repeats."""
    _, A, E = counts.by_choice.shape
    uniform = uniform_repetition(E, A)
    pairs = max(counts.pairs, 1)
    first, shared = (f"{share:.1%}" for share in uniform)
    table = Table(
        "layer", "least", "most", "first choices, most", "evenness",
        f"same first choice ({first} if uniform)", f"an expert in common ({shared})",
    )  # fmt: skip
    for layer, (shares, entropy) in enumerate(zip(counts.shares, counts.entropy, strict=True)):
        table.add_row(
            str(layer),
            _named(shares, shares.argmin()),
            _named(shares, shares.argmax()),
            _named(counts.choice_shares[layer, 0], counts.choice_shares[layer, 0].argmax()),
            f"{entropy:.3f}",
            f"{counts.same_first[layer] / pairs:.1%}",
            f"{counts.same_any[layer] / pairs:.1%}",
        )
    return table


def class_table(counts: RoutingCounts) -> Table:
    """Per layer and class of tokens, the expert that gets most of it, and its share."""
    tokens = class_tokens(counts)
    present = [i for i, count in enumerate(tokens) if count]
    heads = [f"{CLASSES[i]} ({tokens[i]:,})" for i in present]
    table = Table("layer", *heads, "information, bits")
    information = mutual_information(counts.by_class)
    for layer, by_class in enumerate(counts.by_class):
        shares = _shares(by_class)
        cells = [most_of(shares[i]) for i in present]
        table.add_row(str(layer), *cells, f"{information[layer]:.3f}")
    return table


def text_table(study: Study) -> Table:
    """Per layer and text, the expert that gets most of it, and how far apart the texts are."""
    assert study.divergence is not None
    assert study.by_chance is not None
    names = names_of([each.dataset for each in study.texts])
    table = Table(
        "layer", *map(escape, names), f"divergence, bits ({study.by_chance:.4f} by chance)"
    )
    for layer, divergence in enumerate(study.divergence):
        loads = [each.counts.shares[layer] for each in study.texts]
        cells = [most_of(load) for load in loads]
        table.add_row(str(layer), *cells, f"{divergence:.4f}")
    return table


def agreement_table(study: Study) -> Table:
    """Per layer, how often two models chose alike."""
    assert study.agreement is not None
    table = Table("layer", "same first choice", "same set")
    for layer, (first, same) in enumerate(zip(*study.agreement[:2], strict=True)):
        table.add_row(str(layer), f"{first:.2%}", f"{same:.2%}")
    return table


def tables(study: Study, entry: Entry, other: Entry | None) -> Iterator[tuple[str, Table]]:
    """All that there is to show, each under a line that says what it is."""
    yield "loads, of all assignments, and pairs of consecutive tokens:", load_table(study.total)
    about = f"the expert that gets most of each class of tokens, and the {_INFORMATION}:"
    yield about, class_table(study.total)
    if study.divergence is not None:
        yield f"the expert that gets most of each text, and the {_DIVERGENCE}:", text_table(study)
    if study.agreement is not None and other is not None:
        yield f"tokens for which {other.name} chooses as {entry.name}:", agreement_table(study)


def most_of(shares: Float[np.ndarray, " E"]) -> str:
    """The expert with the largest share, and that."""
    return f"{shares.argmax()}: {shares.max():.1%}"


def _named(shares: np.ndarray, expert: Any) -> str:
    return f"{shares[expert]:.1%} (expert {expert})"
