"""Choosing the next token: one compiled sampler for every mix of options in a batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from mixtral_jax.errors import USAGE, MixtralError

NUM_SEEDS = 2**32
MOST_DRAFTS = 64  # tokens that a step can speculate on


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """What a generation asks for; names and meanings as in transformers and TGI.

    Attributes:
        max_new_tokens: tokens to generate at most.
        temperature: divides the logits; 0 is greedy.
        top_k: keep this many best tokens (all, if None).
        top_p: keep the smallest set of best tokens whose probability reaches this.
        min_p: keep tokens at least this fraction as probable as the best.
        repetition_penalty: above 1 makes tokens of the prompt and of the answer less likely.
        seed: in [0, 2^32). In float32 a row's text depends on its prompt, this and its sample
            number only.
        stop: texts that end the answer; cut from it.
        num_samples: answers per prompt.
        ignore_eos: generate past the end-of-text token.
        speculate: draft so many tokens per step from what the text repeats, and keep those that
            would have been generated anyway: the same text, sooner. Switches itself off where it
            does not pay. Off, if None.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    num_samples: int = 1
    ignore_eos: bool = False
    speculate: int | None = None

    def __post_init__(self):
        top_k, top_p, min_p = self.top_k, self.top_p, self.min_p
        penalty, stop, drafts = self.repetition_penalty, self.stop, self.speculate
        is_draft = _is_integer(drafts, 1) and drafts is not None and drafts <= MOST_DRAFTS
        is_stop = isinstance(stop, tuple) and all(isinstance(s, str) and s for s in stop)
        for name, is_fine, expected in (
            ("max_new_tokens", _is_integer(self.max_new_tokens, 1), "an integer, at least 1"),
            ("temperature", _is_number(self.temperature), "a number, 0 or more"),
            ("top_k", top_k is None or _is_integer(top_k, 1), "an integer, at least 1"),
            ("top_p", top_p is None or (_is_number(top_p) and 0 < top_p <= 1), "above 0, up to 1"),
            ("min_p", min_p is None or (_is_number(min_p) and min_p <= 1), "from 0 to 1"),
            (
                "repetition_penalty",
                _is_number(penalty) and 0 < penalty <= 100,
                "above 0, up to 100",
            ),
            ("seed", _is_integer(self.seed, 0) and self.seed < NUM_SEEDS, "from 0 to 2^32 - 1"),
            ("stop", is_stop, "texts that are not empty"),
            ("num_samples", _is_integer(self.num_samples, 1), "an integer, at least 1"),
            ("speculate", drafts is None or is_draft, f"an integer, 1 to {MOST_DRAFTS}"),
        ):
            if not is_fine:
                what, got = "--" + name.replace("_", "-"), repr(getattr(self, name))
                raise MixtralError(what, expected=expected, got=got, code=USAGE)


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, Real) and not isinstance(value, bool)
    return is_real and 0 <= float(value) < math.inf


# Made on the host as numpy; arrays of the device inside the jitted step.
Column: TypeAlias = jax.Array | np.ndarray


class RowSampling(NamedTuple):
    """The options of each row, as arrays: a batch may mix them without another compilation.

    Where an option is off its array holds the value that keeps every token.
    """

    temperature: Float[Column, " B"]
    top_k: Int[Column, " B"]
    top_p: Float[Column, " B"]
    min_p: Float[Column, " B"]
    repetition_penalty: Float[Column, " B"]
    seed: UInt32[Column, " B"]
    sample_id: Int[Column, " B"]
    ignore_eos: Bool[Column, " B"]


def row_sampling(
    options: Sequence[SamplingOptions], sample_ids: Sequence[int], vocab_size: int
) -> RowSampling:
    """Options of rows as arrays (numpy: the jitted step places them)."""

    def column(values: list, dtype: type) -> np.ndarray:
        return np.asarray(values, dtype)

    return RowSampling(
        temperature=column([o.temperature for o in options], np.float32),
        top_k=column([min(o.top_k or vocab_size, vocab_size) for o in options], np.int32),
        top_p=column([1.0 if o.top_p is None else o.top_p for o in options], np.float32),
        min_p=column([o.min_p or 0.0 for o in options], np.float32),
        repetition_penalty=column([o.repetition_penalty for o in options], np.float32),
        seed=column([o.seed for o in options], np.uint32),
        sample_id=column(list(sample_ids), np.int32),
        ignore_eos=column([o.ignore_eos for o in options], np.bool_),
    )


class Best(NamedTuple):
    """The most likely tokens under the raw logits, best first."""

    ids: Int[Array, "B n"]
    logprobs: Float[Array, "B n"]


class Sampled(NamedTuple):
    """A token per row, its log-probability under the raw logits, and rows with unusable logits."""

    tokens: Int[Array, " B"]
    logprobs: Float[Array, " B"]
    is_bad: Bool[Array, " B"]


def penalize(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Column, " B"]
) -> Float[Array, "B V"]:
    """Repetition penalty (Keskar et al. 2019): seen tokens lose, whatever their logit's sign."""
    factor = penalty[:, None]
    return jnp.where(seen, jnp.where(logits < 0, logits * factor, logits / factor), logits)


def keep_likely(logits: Float[Array, "B V"], rows: RowSampling) -> Float[Array, "B V"]:
    """Temperature, then top-k, top-p and min-p, in the order of transformers.

    Every filter keeps the tokens above some logit, so one sort finds the threshold. Tokens equal to
    it are kept, by top-p too, where transformers lets its sort decide. Rejected tokens get -inf.
    """
    scaled = logits / jnp.maximum(rows.temperature, 1e-6)[:, None]
    best_first = -jnp.sort(-scaled, axis=-1)
    rank = jnp.arange(logits.shape[-1])[None, :]
    worst_of_k = jnp.take_along_axis(best_first, rows.top_k[:, None] - 1, axis=-1)
    in_top_k = best_first >= worst_of_k
    probabilities = jax.nn.softmax(jnp.where(in_top_k, best_first, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The first token is always kept. top_p = 1 keeps all, though a sum of f32 may reach 1 early.
    in_top_p = (before < rows.top_p[:, None]) | (rows.top_p[:, None] >= 1) | (rank == 0)
    in_min_p = probabilities >= rows.min_p[:, None] * probabilities[:, :1]
    kept = in_top_k & in_top_p & in_min_p
    threshold = jnp.where(kept, best_first, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(scaled >= threshold, scaled, -jnp.inf)


def sample(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"],
    rows: RowSampling,
    step: Int[Array, " B"],
) -> Sampled:
    """Chooses the next token of every row.

    Args:
        logits: raw, f32.
        seen: tokens of the prompt and of the answer so far.
        rows: options per row.
        step: tokens generated so far per row; with seed and sample_id it keys the random numbers,
            so that no row's choice depends on its neighbours.

    Returns:
        Sampled. A row with NaN, an infinite logit or none above -inf is bad; its token means
        nothing.
    """
    return choose(logits, penalize(logits, seen, rows.repetition_penalty), rows, step)


def choose(
    logits: Float[Array, "B V"],
    scores: Float[Array, "B V"],
    rows: RowSampling,
    step: Int[Array, " B"],
    *,
    keep: Callable[[jax.Array, RowSampling], jax.Array] = keep_likely,
    seed_high: UInt32[Column, " B"] | None = None,
) -> Sampled:
    """The choice that ``sample`` makes, of scores that penalties have made of the logits.

    Args:
        logits: raw, f32; the log-probabilities are theirs.
        scores: what to choose by.
        rows: options per row.
        step: as in ``sample``.
        keep: divides the scores by the temperature, and puts -inf where a token is rejected.
        seed_high: upper halves of seeds of 64 bits; none is the same as zeros.
    """
    # Asked by itself: a maximum over NaN is not always NaN on the CPU (docs/log.md).
    is_bad = jnp.isnan(logits).any(axis=-1) | ~jnp.isfinite(logits.max(axis=-1))
    greedy = jnp.argmax(scores, axis=-1)
    high = jnp.zeros_like(rows.seed) if seed_high is None else seed_high

    def noise(seed: Column, high: Column, sample_id: Column, step: jax.Array) -> jax.Array:
        key = jax.random.key(seed)
        key = jnp.where(high == 0, key, jax.random.fold_in(key, high))
        key = jax.random.fold_in(jax.random.fold_in(key, sample_id), step)
        return jax.random.gumbel(key, logits.shape[-1:], jnp.float32)

    def draw() -> jax.Array:
        drawn = jax.vmap(noise)(rows.seed, high, rows.sample_id, step)
        drawn = jnp.argmax(keep(scores, rows) + drawn, axis=-1)
        return jnp.where(rows.temperature > 0, drawn, greedy)

    tokens = jax.lax.cond((rows.temperature > 0).any(), draw, lambda: greedy)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    return Sampled(tokens.astype(jnp.int32), chosen, is_bad)


# Raw logits, tokens seen, options, steps taken: next tokens, and the likeliest where reported.
Chooser: TypeAlias = Callable[
    [jax.Array, jax.Array, RowSampling, jax.Array], tuple[Sampled, Best | None]
]


def choose_alone(
    logits: jax.Array, seen: jax.Array, rows: RowSampling, step: jax.Array
) -> tuple[Sampled, None]:
    """``sample`` as a Chooser that reports no other tokens."""
    return sample(logits, seen, rows, step), None
