"""What a server's rows may ask of the sampler beyond ``SamplingOptions``.

All are arrays over rows beside those of ``RowSampling``; where an option is off its array holds the
value that changes nothing, and a token is chosen exactly as ``sample`` chooses it. The work of an
option that no row of the batch asks for is skipped on the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from mixtral_jax.decode.sampling import (
    Best,
    Column,
    RowSampling,
    Sampled,
    SamplingOptions,
    choose,
    keep_likely,
    penalize,
    row_sampling,
)

NUM_BIASES = 300  # pairs of logit_bias that a row has room for, OpenAI's limit
NUM_BEST = 20  # most likely tokens reported beside a chosen one
_BITS = 32


class RowControls(NamedTuple):
    """The options of each row, as arrays.

    ``sampling`` holds the lower halves of the seeds, ``seed_high`` the upper ones. Unused pairs of
    ``bias_ids`` lie past the vocabulary.
    """

    sampling: RowSampling
    seed_high: UInt32[Column, " B"]
    typical_p: Float[Column, " B"]
    frequency_penalty: Float[Column, " B"]
    presence_penalty: Float[Column, " B"]
    bias_ids: Int[Column, "B biases"]
    bias_values: Float[Column, "B biases"]
    wants_best: Bool[Column, " B"]


class Mask(NamedTuple):
    """Tokens that a grammar allows next: bit ``v % 32`` of word ``v // 32``, where ``is_on``."""

    bits: UInt32[Column, "B words"]
    is_on: Bool[Column, " B"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Controls:
    """The options of one row; see RowControls. ``seed`` has 64 bits; ``options.seed`` is unused."""

    options: SamplingOptions
    seed: int = 0
    sample_id: int = 0
    typical_p: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    wants_best: bool = False


def row_controls(rows: Sequence[Controls], vocab_size: int) -> RowControls:
    """Options of rows as arrays (numpy: the jitted step places them)."""
    low = [dataclasses.replace(r.options, seed=r.seed % 2**32) for r in rows]
    ids = np.full((len(rows), NUM_BIASES), vocab_size, np.int32)
    values = np.zeros((len(rows), NUM_BIASES), np.float32)
    for b, row in enumerate(rows):
        for k, (token_id, value) in enumerate(row.logit_bias):
            ids[b, k], values[b, k] = token_id, value
    typical = [1.0 if r.typical_p is None else r.typical_p for r in rows]
    return RowControls(
        sampling=row_sampling(low, [r.sample_id for r in rows], vocab_size),
        seed_high=np.asarray([r.seed >> 32 for r in rows], np.uint32),
        typical_p=np.asarray(typical, np.float32),
        frequency_penalty=np.asarray([r.frequency_penalty for r in rows], np.float32),
        presence_penalty=np.asarray([r.presence_penalty for r in rows], np.float32),
        bias_ids=ids,
        bias_values=values,
        wants_best=np.asarray([r.wants_best for r in rows], np.bool_),
    )


def num_words(vocab_size: int) -> int:
    """Words of a packed mask."""
    return -(-vocab_size // _BITS)


def best_width(vocab_size: int) -> int:
    """How many of the most likely tokens are reported."""
    return min(NUM_BEST, vocab_size)


def add_bias(scores: Float[Array, "B V"], rows: RowControls) -> Float[Array, "B V"]:
    """``logit_bias`` (OpenAI): adds a value to the logits of some tokens."""
    pairs = (scores, rows.bias_ids, rows.bias_values)
    return jax.vmap(lambda row, ids, values: row.at[ids].add(values, mode="drop"))(*pairs)


def keep_allowed(scores: Float[Array, "B V"], mask: Mask) -> Float[Array, "B V"]:
    """-inf for tokens that a row's grammar does not allow."""
    shifts = jnp.arange(_BITS, dtype=jnp.uint32)
    bits = (jnp.asarray(mask.bits)[:, :, None] >> shifts) & 1
    allowed = bits.reshape(bits.shape[0], -1)[:, : scores.shape[-1]].astype(bool)
    return jnp.where(allowed | ~jnp.asarray(mask.is_on)[:, None], scores, -jnp.inf)


def keep_typical(
    scores: Float[Array, "B V"], typical_p: Float[Column, " B"]
) -> Float[Array, "B V"]:
    """Locally typical sampling (Meister et al. 2022), as transformers has it.

    Keeps the tokens whose information is closest to the expected one, the fewest whose probability
    reaches ``typical_p``, and tokens as far off as the last of them.
    """
    logs = jax.nn.log_softmax(scores, axis=-1)
    shares = jnp.exp(logs)
    entropy = -jnp.where(shares > 0, shares * logs, 0.0).sum(axis=-1, keepdims=True)
    distance = jnp.abs(-logs - entropy)
    nearest, share = jax.lax.sort((distance, shares), num_keys=1)
    num_below = (jnp.cumsum(share, axis=-1) < jnp.asarray(typical_p)[:, None]).sum(axis=-1)
    last = jnp.minimum(num_below, scores.shape[-1] - 1)[:, None]
    limit = jnp.take_along_axis(nearest, last, axis=-1)
    is_off = jnp.asarray(typical_p)[:, None] >= 1
    return jnp.where((distance <= limit) | is_off, scores, -jnp.inf)


def likeliest(logprobs: Float[Array, "*B V"], is_wanted: jax.Array) -> Best:
    """The ``best_width`` likeliest tokens ``[*B, n]``, best first; zeros if unwanted."""
    shape = (*logprobs.shape[:-1], best_width(logprobs.shape[-1]))

    def find() -> Best:
        values, ids = jax.lax.top_k(logprobs, shape[-1])
        return Best(ids.astype(jnp.int32), values)

    def leave() -> Best:
        return Best(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))

    return jax.lax.cond(is_wanted, find, leave)


def sample_controlled(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"],
    counts: Int[Array, "B V"],
    rows: RowControls,
    mask: Mask,
    step: Int[Array, " B"],
) -> tuple[Sampled, Best]:
    """``sample`` with every option: the order is that of transformers and TGI.

    Bias, repetition penalty, frequency and presence penalties, grammar; temperature, top-k, top-p,
    min-p; typical.

    Args:
        logits: raw, f32.
        seen: tokens of the prompt and of the answer so far.
        counts: how often the answer so far has each token.
        rows: options per row.
        mask: what grammars allow.
        step: tokens generated so far per row.

    Returns:
        Sampled, and the likeliest tokens (nonsense unless some row wants them).
    """
    scores = jax.lax.cond(
        (rows.bias_values != 0).any(), lambda: add_bias(logits, rows), lambda: logits
    )
    scores = penalize(scores, seen, rows.sampling.repetition_penalty)
    frequency = jnp.asarray(rows.frequency_penalty)[:, None]
    presence = jnp.asarray(rows.presence_penalty)[:, None]
    scores -= counts * frequency + (counts > 0) * presence
    scores = jax.lax.cond(mask.is_on.any(), lambda: keep_allowed(scores, mask), lambda: scores)

    def keep(scores: jax.Array, basic: RowSampling) -> jax.Array:
        likely = keep_likely(scores, basic)
        is_asked = (rows.typical_p < 1).any()
        return jax.lax.cond(is_asked, lambda: keep_typical(likely, rows.typical_p), lambda: likely)

    sampled = choose(logits, scores, rows.sampling, step, keep=keep, seed_high=rows.seed_high)
    best = likeliest(jax.nn.log_softmax(logits, axis=-1), jnp.asarray(rows.wants_best).any())
    return sampled, best
