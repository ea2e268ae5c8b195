"""Measures of single steps, gathered to the lines of the log.

Names are those of TRL and transformers where they have one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

# What a line of the log says -> the measure of a step. Those of dpo are left out of sft.
_NAMES = {
    "loss": "loss",
    "mean_token_accuracy": "accuracy",
    "aux_loss": "aux_loss",
    "router_z_loss": "z_loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "tokens": "tokens",
    "dropped": "dropped",
    "expert_load": "load",
    "router_entropy": "entropy",
    "pairs": "pairs",
    "rewards/margins": "margin",
    "rewards/accuracies": "reward_accuracy",
}
_REWARDS = ("rewards/margins", "rewards/accuracies")
_OF_DPO = ("pairs", *_REWARDS)
_LATEST, _SUMMED = ("learning_rate",), ("tokens", "dropped", "pairs")  # of others the mean is told


Found = dict[str, np.ndarray]


def fetch(measures: Any, *, is_dpo: bool) -> Found:
    """Waits for a step, and gives its measures by their names in the log, in float64.

    Args:
        measures: of finetune/step.py: arrays of the whole batch, alike in every process.
        is_dpo: whether the measures of preferences mean something.
    """
    asked = {k: v for k, v in _NAMES.items() if is_dpo or k not in _OF_DPO}
    found = jax.device_get([getattr(measures, name) for name in asked.values()])
    return {name: np.asarray(each, np.float64) for name, each in zip(asked, found, strict=True)}


def is_finite(found: Found) -> bool:
    """Whether loss and gradient are numbers: otherwise the weights are lost, or will be."""
    return bool(np.isfinite(found["loss"]) and np.isfinite(found["grad_norm"]))


class Window:
    """What the next line of the log has gathered so far."""

    def __init__(self):
        self.num_steps, self.num_tokens = 0, 0
        self._gathered: Found = {}

    def add(self, found: Found) -> None:
        """Adds a step."""
        for name, value in found.items():
            if name in _LATEST or name not in self._gathered:
                self._gathered[name] = value
            else:
                self._gathered[name] = self._gathered[name] + value
        self.num_steps += 1
        self.num_tokens += int(found["tokens"])

    def take(self) -> dict[str, Any]:
        """A line of means over the steps, and begins anew. ``num_tokens`` is of the whole run."""
        line: dict[str, Any] = {}
        for name, value in self._gathered.items():
            if name in _LATEST:
                line[name] = plain(value)
            elif name in _SUMMED:
                line[name] = plain(value.astype(np.int64))
            else:
                line[name] = plain(value / self.num_steps)
        line["num_tokens"] = self.num_tokens
        self.num_steps, self._gathered = 0, {}
        return line

    def state(self) -> dict[str, Any]:
        """For JSON, which keeps every bit of a float64."""
        gathered = {name: value.tolist() for name, value in self._gathered.items()}
        return {"steps": self.num_steps, "tokens": self.num_tokens, "gathered": gathered}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a ``state``."""
        self.num_steps, self.num_tokens = state["steps"], state["tokens"]
        self._gathered = {n: np.asarray(v, np.float64) for n, v in state["gathered"].items()}


def evaluated(batches: Sequence[Found]) -> dict[str, Any]:
    """A line about evaluated batches: means over their scored tokens; of dpo loss and rewards are
    means over pairs.

    The perplexity is e to the mean negative log-likelihood of a token; the loss of dpo is no such
    mean.
    """
    is_dpo = "pairs" in batches[0]

    def mean(name: str) -> float:
        unit = "pairs" if is_dpo and name in ("loss", *_REWARDS) else "tokens"
        weights = np.array([found[unit] for found in batches])
        values = np.array([found[name] for found in batches])
        return float((values * weights).sum() / max(weights.sum(), 1.0))

    names = ("loss", "mean_token_accuracy", "aux_loss", *(_REWARDS if is_dpo else ()))
    line: dict[str, Any] = {f"eval_{name}": plain(mean(name)) for name in names}
    if not is_dpo:
        line["eval_perplexity"] = plain(np.exp(min(mean("loss"), 700.0)))  # beyond: no float64
    for unit in ("tokens", "pairs") if is_dpo else ("tokens",):
        line[f"eval_{unit}"] = int(sum(found[unit] for found in batches))
    return line


def plain(value: Any) -> Any:
    """Numbers and lists for JSON; what is no number is None."""
    found = np.asarray(value).tolist()
    return _finite(found)


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
