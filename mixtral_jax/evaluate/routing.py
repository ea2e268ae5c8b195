"""How a text is spread over the experts of every layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Int

from mixtral_jax.evaluate import scores
from mixtral_jax.evaluate.perplexity import DEFAULT_BATCH, batches
from mixtral_jax.evaluate.windows import Windowing
from mixtral_jax.language_model import LanguageModel
from mixtral_jax.sharding import hosts
from mixtral_jax.sharding.agreement import short


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertLoad:
    """Assignments of tokens to experts.

    Attributes:
        counts: ints ``[L, E]``; each layer's add up to tokens x experts per token.
        tokens: that were routed: all of the text but the last, once each.
        context: tokens of a window.
        stride: tokens between the beginnings of two windows.
    """

    counts: Int[np.ndarray, "L E"]
    tokens: int
    context: int
    stride: int

    @property
    def shares(self) -> Float[np.ndarray, "L E"]:
        """Of the layer's assignments."""
        return self.counts / self.counts.sum(axis=1, keepdims=True)

    @property
    def entropy(self) -> Float[np.ndarray, " L"]:
        """Of each layer's shares, as a share of ln E: 1 is an even load, 0 one expert for all."""
        shares = self.shares
        logs = np.log(np.where(shares > 0, shares, 1.0))
        return -(shares * logs).sum(axis=1) / np.log(max(shares.shape[1], 2))


def expert_load(
    lm: LanguageModel,
    token_ids: Iterable[int],
    *,
    windowing: Windowing | None = None,
    batch: int = DEFAULT_BATCH,
) -> ExpertLoad:
    """Counts the experts that a text's tokens are sent to.

    A token is counted where the next one would be scored by ``perplexity``; arguments and errors
    are the same, without those of logits, which are not computed.
    """
    context, stride = (windowing or Windowing()).fit([lm.config])
    hosts.agree("routing", lambda: {"context, stride, batch": short((context, stride, batch))})
    counts = np.zeros((lm.config.num_hidden_layers, lm.config.num_local_experts), np.int64)
    tokens = 0
    for rows, _ in batches(lm, token_ids, context, stride, batch):
        chosen = hosts.fetch(scores.read(lm, rows).expert_ids)[:, rows.is_scored]
        tokens += chosen.shape[1]
        for layer, ids in enumerate(chosen):
            counts[layer] += np.bincount(ids.reshape(-1), minlength=counts.shape[1])
    return ExpertLoad(counts=counts, tokens=tokens, context=context, stride=stride)
