"""How likely continuations of contexts are, many at once: what multiple choice is scored by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mixtral_jax.errors import BAD_DATA, MixtralError
from mixtral_jax.evaluate import scores
from mixtral_jax.evaluate.perplexity import batches_of, name_of
from mixtral_jax.evaluate.windows import Rows, Window
from mixtral_jax.language_model import LanguageModel
from mixtral_jax.sharding import hosts


class Likelihood(NamedTuple):
    """Of a continuation: the sum of its tokens' log-probabilities, in nats.

    ``is_greedy``: each of its tokens is the likeliest one where it stands.
    """

    logprob: float
    is_greedy: bool


class Likelihoods(NamedTuple):
    """Of each window, and the expert assignments left out while they were read, over all layers
    (0 unless overflow="drop").
    """

    each: list[Likelihood]
    dropped: int


def likelihoods(
    lm: LanguageModel,
    cut: Sequence[Window],
    *,
    batch: int,
    watch: Callable[[int], Any] | None = None,
) -> Likelihoods:
    """Likelihoods of the scored tokens of windows that are independent of each other.

    Windows of about one length are read together, so padding at most doubles what is read, and one
    program serves all of a power of two.

    Args:
        lm: a model on any mesh.
        cut: windows of at least two tokens; those from ``first`` on are scored.
        batch: windows read at a time. It changes speed and memory, and no number beyond rounding.
        watch: called with how many windows have just been read.

    Raises:
        MixtralError: exit code 65 for ids outside the vocabulary, or logits that are NaN.
    """
    groups: dict[int, list[int]] = {}
    for place, window in enumerate(cut):
        longest = max(len(window.token_ids) - 1, scores.LENGTH_BUCKET)
        groups.setdefault((longest - 1).bit_length(), []).append(place)
    found: dict[int, Likelihood] = {}
    dropped = 0
    for size in sorted(groups, reverse=True):  # what does not fit into the memory fails at once
        places = sorted(groups[size], key=lambda place: -len(cut[place].token_ids))
        ordered, at = [cut[place] for place in places], 0
        for rows, taken in batches_of(lm, ordered, batch):
            read = places[at : at + len(taken)]
            scored = _score(lm, rows, len(taken))
            found.update(zip(read, scored.each, strict=True))
            dropped += scored.dropped
            at += len(taken)
            if watch is not None:
                watch(len(taken))
    return Likelihoods([found[place] for place in range(len(cut))], dropped)


def _score(lm: LanguageModel, rows: Rows, count: int) -> Likelihoods:
    sums, greedy, at = np.zeros(len(rows.tokens)), np.ones(len(rows.tokens), bool), 0
    read = scores.read(lm, rows)
    for logits in scores.logits_in_parts(lm, read.x):
        part = slice(at, at := at + logits.shape[1])
        here, targets = rows.is_scored[:, part], rows.targets[:, part]
        judged = scores.judge(logits, targets)
        if (here & ~(judged.is_finite & np.isfinite(judged.logprobs))).any():
            what, fix = f"{name_of(lm)}: logits are NaN", "convert or download the weights again"
            raise MixtralError(what, fix=fix, code=BAD_DATA)
        sums += np.where(here, judged.logprobs, 0).sum(axis=1, dtype=np.float64)
        greedy &= ((judged.best == targets) | ~here).all(axis=1)
    pairs = zip(sums[:count].tolist(), greedy[:count].tolist(), strict=True)
    dropped = int(hosts.fetch(read.dropped).sum())
    return Likelihoods([Likelihood(*pair) for pair in pairs], dropped)
