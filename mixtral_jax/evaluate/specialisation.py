"""How much experts differ by text or by kind of token, and how often they repeat."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from mixtral_jax.evaluate.routing import Choices, entropy_bits


class Repetition(NamedTuple):
    """Shares of consecutive tokens with the same first choice, and with an expert in common."""

    first: float
    any: float


def uniform_repetition(num_experts: int, top_k: int) -> Repetition:
    """What independent, even choices would give: 1/8 and 1 - (6/8)(5/7) for two of eight experts.

    As in table 5 of "Mixtral of Experts" (arXiv 2401.04088, section 5).
    """
    disjoint = math.comb(num_experts - top_k, top_k) / math.comb(num_experts, top_k)
    return Repetition(first=1 / num_experts, any=1 - disjoint)


def jensen_shannon(loads: Float[np.ndarray, "groups L E"]) -> Float[np.ndarray, " L"]:
    """The generalized Jensen-Shannon divergence of distributions over experts, in bits.

    The entropy of their mean less the mean of their entropies, all groups weighted alike: J. Lin,
    "Divergence Measures Based on the Shannon Entropy", IEEE Transactions on Information Theory
    37(1), 1991, equation 5.1. It is the mutual information of the group and the expert of an
    assignment whose group is drawn evenly: 0 where all loads are equal, log2(groups) at most.

    Args:
        loads: shares, which add up to one over the experts.
    """
    return entropy_bits(loads.mean(axis=0)) - entropy_bits(loads).mean(axis=0)


def expected_by_chance(tokens: Int[np.ndarray, " groups"], num_experts: int, top_k: int) -> float:
    """``jensen_shannon`` of samples of one distribution, to first order in 1 / tokens, in bits.

    The bias of an entropy's estimate (G. Miller, "Note on the bias of information estimates",
    1955), which is (E - 1) / (2 n) nats for n independent draws. A token draws A different experts:
    a share p then varies as p (1 - A p) / (A tokens), which makes it (E - A) / (2 A tokens).
    Tokens are taken as independent; those of a text are not quite.
    """
    weight = 1 / len(tokens)
    spread = (weight / tokens).sum() - (weight**2 / tokens).sum()
    return float((num_experts - top_k) / (2 * top_k * math.log(2)) * spread)


def mutual_information(counts: Int[np.ndarray, "L groups E"]) -> Float[np.ndarray, " L"]:
    """Of the group and the expert of an assignment, in bits; groups weigh what they hold.

    T. Cover and J. Thomas, "Elements of Information Theory", 2nd edition, section 2.4.
    """
    joint = counts / counts.sum(axis=(1, 2), keepdims=True)
    apart = entropy_bits(joint.sum(axis=1)) + entropy_bits(joint.sum(axis=2))
    return apart - entropy_bits(joint.reshape(len(joint), -1))


class Agreement(NamedTuple):
    """Shares of tokens for which two models chose alike, per layer."""

    same_first: Float[np.ndarray, " L"]
    same_set: Float[np.ndarray, " L"]
    tokens: int


class AgreementCounter:
    """Compares two models' choices for the same tokens."""

    def __init__(self, num_layers: int):
        self._first, self._set = np.zeros((2, num_layers), np.int64)
        self._tokens = 0

    def add(self, ours: Choices, theirs: Choices) -> None:
        """Counts one batch."""
        self._tokens += len(ours.token_ids)
        self._first += (ours.expert_ids[..., 0] == theirs.expert_ids[..., 0]).sum(axis=1)
        first, other = (np.sort(each.expert_ids, axis=-1) for each in (ours, theirs))
        self._set += (first == other).all(axis=-1).sum(axis=1)

    def result(self) -> Agreement:
        """The shares."""
        return Agreement(self._first / self._tokens, self._set / self._tokens, self._tokens)
