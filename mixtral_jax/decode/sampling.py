"""Choosing the next token: one compiled sampler for every mix of options in a batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from mixtral_jax.errors import USAGE, MixtralError

NUM_SEEDS = 2**32


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
        seed: in [0, 2^32). A row's text depends on its prompt, this and its sample number only.
        stop: texts that end the answer; cut from it.
        num_samples: answers per prompt.
        ignore_eos: generate past the end-of-text token.
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

    def __post_init__(self):
        _check("max-new-tokens", self.max_new_tokens >= 1, "at least 1", self.max_new_tokens)
        _check("temperature", _finite(self.temperature, 0), "0 or more", self.temperature)
        top_k, top_p, min_p = self.top_k, self.top_p, self.min_p
        _check("top-k", top_k is None or top_k >= 1, "at least 1", top_k)
        _check("top-p", top_p is None or 0 < top_p <= 1, "above 0, up to 1", top_p)
        _check("min-p", min_p is None or 0 <= min_p <= 1, "from 0 to 1", min_p)
        penalty = self.repetition_penalty
        _check("repetition-penalty", _finite(penalty, 0) and penalty > 0, "above 0", penalty)
        _check("seed", 0 <= self.seed < NUM_SEEDS, "from 0 to 2^32 - 1", self.seed)
        _check("stop", all(self.stop), "texts that are not empty", list(self.stop))
        _check("num-samples", self.num_samples >= 1, "at least 1", self.num_samples)


def _finite(value: float, least: float) -> bool:
    return math.isfinite(value) and value >= least


def _check(name: str, is_fine: bool, expected: str, got: object) -> None:
    if not is_fine:
        raise MixtralError(f"--{name}", expected=expected, got=got, code=USAGE)


class RowSampling(NamedTuple):
    """The options of each row, as arrays: a batch may mix them without another compilation.

    Where an option is off its array holds the value that keeps every token.
    """

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    repetition_penalty: Float[Array, " B"]
    seed: UInt32[Array, " B"]
    sample_id: Int[Array, " B"]
    ignore_eos: Bool[Array, " B"]


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


class Sampled(NamedTuple):
    """A token per row, its log-probability under the raw logits, and rows with unusable logits."""

    tokens: Int[Array, " B"]
    logprobs: Float[Array, " B"]
    is_bad: Bool[Array, " B"]


def penalize(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, " B"]
) -> Float[Array, "B V"]:
    """Repetition penalty (Keskar et al. 2019): seen tokens lose, whatever their logit's sign."""
    factor = penalty[:, None]
    return jnp.where(seen, jnp.where(logits < 0, logits * factor, logits / factor), logits)


def keep_likely(logits: Float[Array, "B V"], rows: RowSampling) -> Float[Array, "B V"]:
    """Temperature, then top-k, top-p and min-p, in the order of transformers.

    Every filter keeps the tokens above some logit, so one sort finds the threshold; tokens equal to
    it are kept. Rejected tokens get -inf.
    """
    scaled = logits / jnp.maximum(rows.temperature, 1e-6)[:, None]
    best_first = -jnp.sort(-scaled, axis=-1)
    rank = jnp.arange(logits.shape[-1])[None, :]
    in_top_k = rank < rows.top_k[:, None]
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
        Sampled. A row with NaN or without any finite logit is bad; its token means nothing.
    """
    is_bad = jnp.isnan(logits).any(axis=-1) | ~jnp.isfinite(logits).any(axis=-1)
    penalized = penalize(logits, seen, rows.repetition_penalty)
    greedy = jnp.argmax(penalized, axis=-1)

    def noise(seed: jax.Array, sample_id: jax.Array, step: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample_id), step)
        return jax.random.gumbel(key, logits.shape[-1:], jnp.float32)

    def draw() -> jax.Array:
        likely = keep_likely(penalized, rows)
        drawn = jnp.argmax(likely + jax.vmap(noise)(rows.seed, rows.sample_id, step), axis=-1)
        return jnp.where(rows.temperature > 0, drawn, greedy)

    tokens = jax.lax.cond((rows.temperature > 0).any(), draw, lambda: greedy)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    return Sampled(tokens.astype(jnp.int32), chosen, is_bad)
