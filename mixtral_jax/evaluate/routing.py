"""What the router of every layer chose for each token of a text, and counts of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from mixtral_jax.config import ModelConfig
from mixtral_jax.evaluate import scores
from mixtral_jax.evaluate.perplexity import DEFAULT_BATCH, batches_of, refuse_nan
from mixtral_jax.evaluate.windows import Windowing, windows
from mixtral_jax.language_model import LanguageModel
from mixtral_jax.sharding import hosts
from mixtral_jax.sharding.agreement import short


class Choices(NamedTuple):
    """Tokens in the order of the text, and the experts that each went to.

    ``positions`` count from the beginning of a token's document; ``expert_ids`` stand first choice
    first, beside the weights with which the experts' outputs are summed. ``dropped`` counts the
    assignments that were left out while these tokens were read, in all layers, those of tokens read
    as context only among them (0 unless overflow="drop").
    """

    token_ids: Int[np.ndarray, " N"]
    positions: Int[np.ndarray, " N"]
    expert_ids: Int[np.ndarray, "L N A"]
    weights: Float[np.ndarray, "L N A"]
    dropped: int = 0


def entropy_bits(shares: Float[np.ndarray, "*batch E"]) -> Float[np.ndarray, "*batch"]:
    """Of distributions over the last axis."""
    logs = np.log2(np.where(shares > 0, shares, 1.0))
    return -(shares * logs).sum(axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingCounts:
    """Assignments of tokens to experts.

    Attributes:
        by_choice: ints ``[L, A, E]``: tokens whose first, second, ... choice an expert was.
        by_class: ints ``[L, classes, E]``: assignments of the tokens of each class; no classes
            where none were given.
        same_first: per layer, pairs of consecutive tokens with the same first choice.
        same_any: per layer, pairs that share an expert, whichever choice it was.
        pairs: of consecutive tokens of one document.
        tokens: that were routed: all of each document but the last, once each.
        context: tokens of a window.
        stride: tokens between the beginnings of two windows.
        dropped: assignments left out, over all layers (0 unless overflow="drop"). They are counted
            above too, where the router sent them.
    """

    by_choice: Int[np.ndarray, "L A E"]
    by_class: Int[np.ndarray, "L classes E"]
    same_first: Int[np.ndarray, " L"]
    same_any: Int[np.ndarray, " L"]
    pairs: int
    tokens: int
    context: int
    stride: int
    dropped: int = 0

    @property
    def counts(self) -> Int[np.ndarray, "L E"]:
        """Of assignments; each layer's add up to tokens x experts per token."""
        return self.by_choice.sum(axis=1)

    @property
    def shares(self) -> Float[np.ndarray, "L E"]:
        """Of the layer's assignments."""
        return self.counts / self.counts.sum(axis=1, keepdims=True)

    @property
    def choice_shares(self) -> Float[np.ndarray, "L A E"]:
        """Of the layer's first choices, of its second ones, ..."""
        return self.by_choice / self.tokens

    @property
    def entropy(self) -> Float[np.ndarray, " L"]:
        """Of each layer's shares, as a share of ln E: 1 is an even load, 0 one expert for all."""
        shares = self.shares
        return entropy_bits(shares) / np.log2(max(shares.shape[1], 2))

    def __add__(self, other: RoutingCounts) -> RoutingCounts:
        """Of two texts together."""
        summed = ("by_choice", "by_class", "same_first", "same_any", "pairs", "tokens", "dropped")
        sums = {name: getattr(self, name) + getattr(other, name) for name in summed}
        return dataclasses.replace(self, **sums)


class RoutingCounter:
    """Adds choices up.

    Args:
        config: of the model whose choices they are.
        classes: of each token id, numbers below ``num_classes``; None counts no classes.
        num_classes: how many there are.
    """

    def __init__(
        self,
        config: ModelConfig,
        classes: Int[np.ndarray, " V"] | None = None,
        num_classes: int = 0,
    ):
        L, E, A = config.num_hidden_layers, config.num_local_experts, config.num_experts_per_tok
        self._classes = classes
        self._by_choice = np.zeros((L, A, E), np.int64)
        self._by_class = np.zeros((L, num_classes, E), np.int64)
        self._same_first, self._same_any = np.zeros((2, L), np.int64)
        self._pairs = self._tokens = self._dropped = 0
        self._last: Choices | None = None

    def add(self, choices: Choices) -> None:
        """Counts the choices that follow those before."""
        L, N, _ = choices.expert_ids.shape
        self._tokens += N
        self._dropped += choices.dropped
        layers = np.arange(L)[:, None]
        for choice in range(self._by_choice.shape[1]):
            np.add.at(self._by_choice[:, choice], (layers, choices.expert_ids[..., choice]), 1)
        if self._classes is not None:
            classes = self._classes[choices.token_ids]
            where = (layers[..., None], classes[None, :, None], choices.expert_ids)
            np.add.at(self._by_class, where, 1)
        # The first token here may follow the last one of the batch before.
        last = self._last
        positions, ids = choices.positions, choices.expert_ids
        if last is not None:
            positions = np.concatenate([last.positions[-1:], positions])
            ids = np.concatenate([last.expert_ids[:, -1:], ids], axis=1)
        follows = positions[1:] == positions[:-1] + 1
        before, after = ids[:, :-1][:, follows], ids[:, 1:][:, follows]
        self._pairs += int(follows.sum())
        self._same_first += (before[..., 0] == after[..., 0]).sum(axis=1)
        shares_one = (before[..., :, None] == after[..., None, :]).any(axis=(-2, -1))
        self._same_any += shares_one.sum(axis=1)
        self._last = choices

    def result(self, context: int, stride: int) -> RoutingCounts:
        """The sums."""
        return RoutingCounts(
            by_choice=self._by_choice,
            by_class=self._by_class,
            same_first=self._same_first,
            same_any=self._same_any,
            pairs=self._pairs,
            tokens=self._tokens,
            context=context,
            stride=stride,
            dropped=self._dropped,
        )


def choices_of(
    models: Sequence[LanguageModel],
    documents: Iterable[Iterable[int]],
    *,
    windowing: Windowing | None = None,
    batch: int = DEFAULT_BATCH,
) -> Iterator[tuple[Choices, ...]]:
    """What models chose for the same tokens, in order, a batch of windows at a time.

    A token is counted where the next one would be scored by ``perplexity``, so the last token of a
    document is not; documents are read apart from each other. Arguments and errors are those of
    ``perplexity``; logits are not computed, but hidden states that are NaN are refused as they are.

    Yields:
        The choices of each model.
    """
    context, stride = (windowing or Windowing()).fit([lm.config for lm in models])
    hosts.agree("routing", lambda: {"context, stride, batch": short((context, stride, batch))})
    cut = (window for ids in documents for window in windows(ids, context, stride))
    for rows, _ in batches_of(models[0], cut, batch):
        places = rows.begin[:, None] + np.arange(rows.tokens.shape[1])
        tokens, positions = rows.tokens[rows.is_scored], places[rows.is_scored]
        found = []
        for lm in models:
            read = scores.read(lm, rows)
            parts = (read.expert_ids, read.expert_weights, read.dropped, read.is_finite)
            ids, weights, dropped, is_finite = map(np.asarray, hosts.fetch(parts))
            refuse_nan(lm, "hidden states", rows.is_scored & ~is_finite, rows)
            ids, weights = (each[:, rows.is_scored] for each in (ids, weights))
            found.append(Choices(tokens, positions, ids, weights, int(dropped.sum())))
        yield tuple(found)


def expert_load(
    lm: LanguageModel,
    token_ids: Iterable[int],
    *,
    windowing: Windowing | None = None,
    batch: int = DEFAULT_BATCH,
) -> RoutingCounts:
    """Counts the experts that a text's tokens are sent to; see ``choices_of``."""
    context, stride = (windowing or Windowing()).fit([lm.config])
    counter = RoutingCounter(lm.config)
    for (choices,) in choices_of([lm], [token_ids], windowing=windowing, batch=batch):
        counter.add(choices)
    return counter.result(context, stride)
