"""The routing of several texts by one model or two: all that the report shows."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Float

from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import BAD_DATA, MixtralError
from mixtral_jax.evaluate.perplexity import (
    DEFAULT_BATCH,
    ROUTED,
    check_vocabulary,
    name_of,
)
from mixtral_jax.evaluate.routing import Choices, RoutingCounter, RoutingCounts, choices_of
from mixtral_jax.evaluate.specialisation import (
    Agreement,
    AgreementCounter,
    expected_by_chance,
    jensen_shannon,
)
from mixtral_jax.evaluate.text import Dataset, TextFile
from mixtral_jax.evaluate.token_classes import CLASSES, token_classes
from mixtral_jax.evaluate.windows import Windowing
from mixtral_jax.language_model import LanguageModel
from mixtral_jax.quantize.calibration import jsonl_documents
from mixtral_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRouting:
    """One text; ``kept`` are the choices for its first tokens, None if none were to be kept."""

    dataset: Dataset
    counts: RoutingCounts
    kept: Choices | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Several texts.

    Attributes:
        texts: in the order given.
        total: of all texts together.
        divergence: per layer, ``jensen_shannon`` of the loads of the texts; None of one text.
        by_chance: what it would be if all texts were alike, about.
        agreement: with the other model; None without one.
        other_dropped: assignments left out by the other model, as ``RoutingCounts.dropped``.
    """

    texts: tuple[TextRouting, ...]
    total: RoutingCounts
    divergence: Float[np.ndarray, " L"] | None
    by_chance: float | None
    agreement: Agreement | None
    other_dropped: int = 0


def documents_of(
    text: TextFile, tokenizer: Tokenizer, progress: Callable[[int], None] | None = None
) -> Iterator[Iterable[int]]:
    """The documents of a text as token ids, each with <s> first.

    A .jsonl file has one in each line, ``{"text": ...}`` or ``{"messages": [...]}`` (put into the
    model's chat format); any other file is one document.

    Raises:
        MixtralError: exit code 65 for a line that is neither, what is not UTF-8, or not the text
            that it was before.
    """
    if text.path.suffix.lower() != ".jsonl":
        yield text.token_ids(tokenizer, progress)
        return
    digest, size = hashlib.sha256(), 0

    def read(line: bytes) -> None:
        nonlocal size
        digest.update(line)
        size += len(line)
        if progress is not None:
            progress(size)

    for document in jsonl_documents(text.path, tokenizer, read):
        yield [tokenizer.bos_id, *document]
    text.check_unchanged(digest.hexdigest())


def study(
    models: Sequence[LanguageModel],
    texts: Sequence[TextFile],
    *,
    tokenizer: Tokenizer,
    windowing: Windowing | None = None,
    batch: int = DEFAULT_BATCH,
    keep: int = 0,
    watch: Callable[[TextFile], Callable[[int], None]] | None = None,
) -> Study:
    """Reads texts and counts.

    Args:
        models: one, or two that are compared. Both lie on the devices at once.
        texts: one or more.
        tokenizer: of the first model.
        windowing: as for ``perplexity``.
        batch: as for ``perplexity``.
        keep: tokens of each text whose choices are kept.
        watch: called when a text begins; gives what is told of the bytes read.

    Raises:
        MixtralError: as ``choices_of`` and ``documents_of``; exit code 65 too for two models of
            different vocabularies, layers, experts or experts per token.
    """
    for other in models[1:]:
        check_vocabulary(models[0], other)
        check_architecture(other.config, name_of(other), models[0].config, name_of(models[0]))
    sizes = (windowing or Windowing()).fit([lm.config for lm in models])
    classes = token_classes(tokenizer)
    agreement = AgreementCounter(models[0].config.num_hidden_layers)
    found, other_dropped = [], 0
    for text in texts:
        counter, kept = RoutingCounter(models[0].config, classes, len(CLASSES)), _Kept(keep)
        documents = documents_of(text, tokenizer, watch(text) if watch else None)
        for ours, *theirs in choices_of(models, documents, windowing=windowing, batch=batch):
            counter.add(ours)
            kept.add(ours)
            for choices in theirs:
                agreement.add(ours, choices)
                other_dropped += choices.dropped
        counts = counter.result(*sizes)
        found.append(TextRouting(dataset=text.dataset, counts=counts, kept=kept.choices))
    total = found[0].counts
    for each in found[1:]:
        total = total + each.counts
    divergence = by_chance = None
    if len(found) > 1:
        divergence = jensen_shannon(np.stack([each.counts.shares for each in found]))
        tokens = np.array([each.counts.tokens for each in found])
        config = models[0].config
        experts, top_k = config.num_local_experts, config.num_experts_per_tok
        by_chance = expected_by_chance(tokens, experts, top_k)
    return Study(
        texts=tuple(found),
        total=total,
        divergence=divergence,
        by_chance=by_chance,
        agreement=agreement.result() if len(models) > 1 else None,
        other_dropped=other_dropped,
    )


def check_architecture(config: ModelConfig, name: str, first: ModelConfig, first_name: str) -> None:
    """Refuses a model whose routing cannot be compared with the first's.

    Raises:
        MixtralError: exit code 65.
    """
    ours, theirs = (
        ", ".join(f"{getattr(each, field)} {word}" for word, field in ROUTED.items())
        for each in (first, config)
    )
    if theirs != ours:
        fix, expected = "compare checkpoints of one architecture", f"{ours}, as {first_name}"
        raise MixtralError(name, expected=expected, got=theirs, fix=fix, code=BAD_DATA)


class _Kept:
    """The choices for the first tokens."""

    def __init__(self, room: int):
        self._room, self._parts = room, list[Choices]()

    def add(self, choices: Choices) -> None:
        count = min(self._room, len(choices.token_ids))
        if count:
            self._room -= count
            ids, positions, experts, weights, _ = choices
            part = (ids[:count], positions[:count], experts[:, :count], weights[:, :count])
            self._parts.append(Choices(*part))

    @property
    def choices(self) -> Choices | None:
        if not self._parts:
            return None
        ids, positions, experts, weights, _ = zip(*self._parts, strict=True)
        return Choices(
            np.concatenate(ids),
            np.concatenate(positions),
            np.concatenate(experts, axis=1),
            np.concatenate(weights, axis=1),
        )
