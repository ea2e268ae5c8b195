"""Exact windowed perplexity of a model, and how far another model is from it.

Perplexity is ``exp(-mean log p(token | tokens before it in its window))`` over every token but the
first (windows.py says which token is scored behind how many others). Log-probabilities are f32, of
f32 logits; sums are f64 on the host.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from mixtral_jax.decode.generate import row_bucket
from mixtral_jax.errors import BAD_DATA, USAGE, MixtralError
from mixtral_jax.evaluate import scores
from mixtral_jax.evaluate.windows import Rows, Window, Windowing, stack, windows
from mixtral_jax.language_model import LanguageModel
from mixtral_jax.sharding import hosts
from mixtral_jax.sharding.agreement import short

DEFAULT_BATCH = 8
# What two models must have alike for their routing to be compared: in words, and in a config.
ROUTED = {
    "layers": "num_hidden_layers",
    "experts": "num_local_experts",
    "experts per token": "num_experts_per_tok",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Of one model on one text.

    Attributes:
        perplexity: exp(nll).
        nll: mean negative log-likelihood, in nats per scored token.
        tokens: of the text, the first one included.
        scored: tokens that count: all but the first.
        windows: how many were read.
        context: tokens of a window.
        stride: tokens between the beginnings of two windows.
        dropped: expert assignments left out, over all layers (0 unless overflow="drop").
    """

    perplexity: float
    nll: float
    tokens: int
    scored: int
    windows: int
    context: int
    stride: int
    dropped: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Divergence:
    """How far a model is from a first one, over the places of all scored tokens.

    Attributes:
        kl: mean KL(first || other) of the distributions of the next token, in nats.
        top1_agreement: share of places where both think the same token the likeliest.
        routing_agreement: share of (layer, place) where both chose the same set of experts; None
            where the models differ in layers, experts or experts per token.
    """

    kl: float
    top1_agreement: float
    routing_agreement: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models on one text, read in the same windows."""

    first: Perplexity
    other: Perplexity
    divergence: Divergence


def perplexity(
    lm: LanguageModel,
    token_ids: Iterable[int],
    *,
    windowing: Windowing | None = None,
    batch: int = DEFAULT_BATCH,
) -> Perplexity:
    """The perplexity of token ids, which may be a stream of any length.

    Args:
        lm: a model on any mesh.
        token_ids: of a text; the first one (its <s>) is read and not scored.
        windowing: context and stride.
        batch: windows read at a time. It changes speed and memory, and no number beyond rounding.

    Raises:
        MixtralError: exit code 64 for a context, stride or batch that cannot be; 65 for fewer than
            two tokens, ids outside the vocabulary, or logits that are NaN or infinite.
    """
    context, stride = (windowing or Windowing()).fit([lm.config])
    hosts.agree("perplexity", lambda: {"context, stride, batch": short((context, stride, batch))})
    total = _Total(lm)
    for rows, taken in batches(lm, token_ids, context, stride, batch):
        read = scores.read(lm, rows)
        total.read(read, taken)
        at = 0
        for logits in scores.logits_in_parts(lm, read.x):
            part = slice(at, at := at + logits.shape[1])
            total.judge(scores.judge(logits, rows.targets[:, part]), rows, part)
    return total.result(context, stride)


def compare(
    first: LanguageModel,
    other: LanguageModel,
    token_ids: Iterable[int],
    *,
    windowing: Windowing | None = None,
    batch: int = DEFAULT_BATCH,
) -> Comparison:
    """Two models on the same tokens; arguments and errors as for ``perplexity``.

    Both lie on the devices at once.

    Raises:
        MixtralError: also exit code 65 where their vocabularies differ.
    """
    check_vocabulary(first, other)
    context, stride = (windowing or Windowing()).fit([first.config, other.config])
    hosts.agree("compare", lambda: {"context, stride, batch": short((context, stride, batch))})
    totals = _Total(first), _Total(other)
    between = _Between(can_route=routes_alike(first, other))
    for rows, taken in batches(first, token_ids, context, stride, batch):
        reads = scores.read(first, rows), scores.read(other, rows)
        for total, read in zip(totals, reads, strict=True):
            total.read(read, taken)
        between.route(reads[0], reads[1], rows)
        at = 0
        parts = (
            scores.logits_in_parts(lm, r.x) for lm, r in zip((first, other), reads, strict=True)
        )
        for logits in zip(*parts, strict=True):
            part = slice(at, at := at + logits[0].shape[1])
            ours, theirs = (scores.judge(each, rows.targets[:, part]) for each in logits)
            totals[0].judge(ours, rows, part)
            totals[1].judge(theirs, rows, part)
            between.judge(ours, theirs, scores.divergence(*logits), rows, part)
    results = [total.result(context, stride) for total in totals]
    divergence = between.result(results[0].scored)
    return Comparison(first=results[0], other=results[1], divergence=divergence)


def check_vocabulary(first: LanguageModel, other: LanguageModel) -> None:
    """Refuses models whose token ids do not mean the same.

    A model without a tokenizer is believed to have the other's, if it has as many ids.

    Raises:
        MixtralError: exit code 65.
    """
    what, fix = f"{name_of(other)}", "compare checkpoints that have one tokenizer"
    ours, theirs = first.config.vocab_size, other.config.vocab_size
    if ours != theirs:
        expected = f"{ours} token ids, as {name_of(first)}"
        raise MixtralError(what, expected=expected, got=theirs, fix=fix, code=BAD_DATA)
    if first.tokenizer is None or other.tokenizer is None:
        return
    pieces = first.tokenizer.pieces, other.tokenizer.pieces
    if pieces[0] != pieces[1]:
        pairs = enumerate(zip(*pieces, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(map(len, pieces)))
        shown = [repr(each[at]) if at < len(each) else "none" for each in pieces]
        expected = f"the vocabulary of {name_of(first)} (token {at} is {shown[0]})"
        raise MixtralError(what, expected=expected, got=shown[1], fix=fix, code=BAD_DATA)


def name_of(lm: LanguageModel) -> str:
    """How errors call a model."""
    return "the model" if lm.folder is None else str(lm.folder)


def routes_alike(first: LanguageModel, other: LanguageModel) -> bool:
    """Whether the routing of two models can be compared: layers, experts, experts per token."""
    fields = ROUTED.values()
    return all(getattr(first.config, name) == getattr(other.config, name) for name in fields)


def batches(
    lm: LanguageModel, token_ids: Iterable[int], context: int, stride: int, batch: int
) -> Iterator[tuple[Rows, list[Window]]]:
    """The windows of a text as rows; see ``batches_of``."""
    return batches_of(lm, windows(token_ids, context, stride), batch)


def batches_of(
    lm: LanguageModel, cut: Iterable[Window], batch: int
) -> Iterator[tuple[Rows, list[Window]]]:
    """Windows as rows, with the windows themselves; a shape is kept once it has been needed.

    Raises:
        MixtralError: exit code 64 for a batch below 1; 65 for fewer than two tokens, or ids outside
            the vocabulary.
    """
    if batch < 1:
        raise MixtralError("--batch", expected="at least 1", got=batch, fix="--batch 8", code=USAGE)
    source, num_rows, length = iter(cut), 0, 0
    while taken := list(islice(source, batch)):
        _check_ids(taken, lm.config.vocab_size)
        num_rows = max(num_rows, row_bucket(len(taken), lm.spec.data))
        longest = max(len(window.token_ids) for window in taken) - 1
        length = max(length, scores.length_bucket(longest, num_rows))
        yield stack(taken, num_rows, length), taken
    if not num_rows:
        expected, fix = "at least 2 tokens", "give a longer text"
        raise MixtralError("the text", expected=expected, got="fewer", fix=fix, code=BAD_DATA)


def _check_ids(taken: list[Window], vocab_size: int) -> None:
    """JAX would clamp ids past the vocabulary silently."""
    for window in taken:
        wrong = next((i for i in window.token_ids if not 0 <= i < vocab_size), None)
        if wrong is not None:
            expected, fix = f"0 to {vocab_size - 1}", "use the tokenizer of this checkpoint"
            raise MixtralError("token id", expected=expected, got=wrong, fix=fix, code=BAD_DATA)


def refuse_nan(lm: LanguageModel, what: str, is_bad: np.ndarray, rows: Rows) -> None:
    """Refuses numbers of a model that are NaN or infinite.

    Args:
        lm: whose they are.
        what: they are.
        is_bad: bools ``[B, T]``, places of the rows.
        rows: that were read.

    Raises:
        MixtralError: exit code 65.
    """
    if is_bad.any():
        # A NaN token spoils the earlier ones of its window too, where it is masked only.
        begin = rows.begin[is_bad.any(axis=1)].min()
        what = f"{name_of(lm)}: {what} are NaN in the window that begins at token {begin}"
        fix = "the weights are damaged: convert or download them again"
        raise MixtralError(what, fix=fix, code=BAD_DATA)


class _Total:
    """Sums of one model."""

    def __init__(self, lm: LanguageModel):
        self._lm = lm
        self._nll, self._scored, self._windows, self._dropped = 0.0, 0, 0, 0

    def read(self, read: scores.Read, taken: list[Window]) -> None:
        self._windows += len(taken)
        self._dropped += int(hosts.fetch(read.dropped).sum())

    def judge(self, judged: scores.Judged, rows: Rows, part: slice) -> None:
        here = rows.is_scored[:, part]
        is_bad = here & ~(judged.is_finite & np.isfinite(judged.logprobs))
        refuse_nan(self._lm, "logits", is_bad, rows)
        self._nll -= judged.logprobs[here].sum(dtype=np.float64)
        self._scored += int(here.sum())

    def result(self, context: int, stride: int) -> Perplexity:
        nll = float(self._nll) / self._scored
        if nll > math.log(np.finfo(np.float64).max):
            what = f"{name_of(self._lm)}: perplexity is infinite, exp({nll:.1f})"
            fix = "is this checkpoint a trained one?"
            raise MixtralError(what, fix=fix, code=BAD_DATA)
        return Perplexity(
            perplexity=math.exp(nll),
            nll=nll,
            tokens=self._scored + 1,
            scored=self._scored,
            windows=self._windows,
            context=context,
            stride=stride,
            dropped=self._dropped,
        )


class _Between:
    """Sums of two models."""

    def __init__(self, *, can_route: bool):
        self._can_route = can_route
        self._kl, self._agreeing, self._routed, self._layers = 0.0, 0, 0, 0

    def route(self, first: scores.Read, other: scores.Read, rows: Rows) -> None:
        if self._can_route:
            chosen = hosts.fetch((first.expert_ids, other.expert_ids))
            ours, theirs = (np.sort(ids, axis=-1) for ids in chosen)
            self._layers = len(ours)
            self._routed += int((ours == theirs).all(axis=-1)[:, rows.is_scored].sum())

    def judge(
        self,
        first: scores.Judged,
        other: scores.Judged,
        kl: np.ndarray,
        rows: Rows,
        part: slice,
    ) -> None:
        here = rows.is_scored[:, part]
        self._kl += kl[here].sum(dtype=np.float64)
        self._agreeing += int((first.best == other.best)[here].sum())

    def result(self, scored: int) -> Divergence:
        routed = self._routed / (scored * self._layers) if self._can_route else None
        return Divergence(
            kl=float(self._kl) / scored,
            top1_agreement=self._agreeing / scored,
            routing_agreement=routed,
        )
