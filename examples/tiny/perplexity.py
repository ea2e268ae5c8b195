"""Log-probabilities of held-out text as generation would meet it: read through the cache."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from examples.tiny.text import Conversation
from examples.tiny.tokens import encode
from mixtral_jax.kernels.scaled_kv import storage_dtype
from mixtral_jax.language_model import LanguageModel
from mixtral_jax.model.cache import KVCache, init_cache
from mixtral_jax.model.placement import Placement
from mixtral_jax.model.transformer import Mixtral

ROWS = 64
CHUNK = 16


class Scored(NamedTuple):
    """The log-probability of every token but the first of each conversation, one after another."""

    logprobs: np.ndarray  # float64 [tokens]
    is_answer: np.ndarray  # bool [tokens]

    def perplexity(self, *, of_answers: bool) -> float:
        """Of the answers' tokens, or of prompts and answers."""
        return float(np.exp(-self.logprobs[self.is_answer if of_answers else ...].mean()))


class _Read(NamedTuple):
    logprobs: Float[Array, "B T"]
    cache: KVCache


@functools.partial(jax.jit, static_argnames=("placement",), donate_argnames=("cache",))
def _read(
    model: Mixtral,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    cache: KVCache,
    *,
    placement: Placement,
) -> _Read:
    hidden = model.hidden(tokens, valid, cache=cache, placement=placement)
    assert hidden.cache is not None
    logs = jax.nn.log_softmax(model.unembed(hidden.x, placement))
    return _Read(jnp.take_along_axis(logs, targets[..., None], axis=-1)[..., 0], hidden.cache)


def score_through_cache(lm: LanguageModel, conversations: Sequence[Conversation]) -> Scored:
    """Teacher-forced, ``CHUNK`` tokens at a time.

    All keys and values, those of the chunk's own tokens too, are read from a cache of
    ``lm.kv_dtype``, unlike in ``lm.logits``, which needs none.
    """
    assert lm.tokenizer is not None
    encoded = [encode(conversation, lm.tokenizer) for conversation in conversations]
    longest = max(len(document.token_ids) for document in encoded) - 1
    slots = -(-longest // CHUNK) * CHUNK
    logprobs, is_answer = [], []
    for first in range(0, len(encoded), ROWS):
        documents = encoded[first : first + ROWS]
        ids = np.zeros((ROWS, slots + 1), np.int32)
        for row, document in enumerate(documents):
            ids[row, : len(document.token_ids)] = document.token_ids
        lengths = np.array([len(d.token_ids) for d in documents] + [1] * (ROWS - len(documents)))
        valid = np.arange(slots) < lengths[:, None] - 1
        dtype = storage_dtype(lm.kv_dtype, lm.model.embed_tokens.get_value().dtype)
        cache, parts = init_cache(lm.config, rows=ROWS, slots=slots, dtype=dtype), []
        for start in range(0, slots, CHUNK):
            here, following = slice(start, start + CHUNK), slice(start + 1, start + CHUNK + 1)
            read = _read(
                lm.model,
                ids[:, here],
                ids[:, following],
                valid[:, here],
                cache,
                placement=lm.placement,
            )
            cache = read.cache
            parts.append(jax.device_get(read.logprobs))
        scores = np.concatenate(parts, axis=1)
        for row, document in enumerate(documents):
            logprobs.append(scores[row, : lengths[row] - 1].astype(np.float64))
            is_answer.append(np.asarray(document.is_answer[1:]))
    return Scored(np.concatenate(logprobs), np.concatenate(is_answer))
