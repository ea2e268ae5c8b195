"""Strategies: which tables of rules place a model. The tables themselves are in rules.py."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import BAD_CONFIG, USAGE, MixtralError
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.rules import ACTIVATION_RULES, WEIGHT_RULES, Rules

Attention = Literal["data", "tensor"]
_WIDE = ("expert", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strategy:
    """How everything but the experts is placed; experts always lie over expert x tensor.

    Attributes:
        attention: ``data``: every device of the expert axis has all attention weights and rows of
            its own (throughput). ``tensor``: heads and vocabulary are split over expert x tensor,
            and all of them work on the same rows (latency).
        fsdp: weights at rest are split over data as well, and gathered where they are used.
    """

    attention: Attention = "data"
    fsdp: bool = False

    def __post_init__(self):
        if self.attention not in get_args(Attention):
            expected, got = ", ".join(get_args(Attention)), repr(self.attention)
            raise MixtralError("--attention", expected=expected, got=got, code=USAGE)

    def weight_rules(self) -> Rules:
        """Where weights lie while they are used."""
        if self.attention == "data":
            return WEIGHT_RULES
        return {**WEIGHT_RULES, "vocab": _WIDE, "heads": _WIDE, "kv_heads": _WIDE}

    def rest_rules(self) -> Rules:
        """Where weights lie at rest."""
        return {**self.weight_rules(), "embed": "data"} if self.fsdp else self.weight_rules()

    def activation_rules(self) -> Rules:
        """Where activations lie; ``batch`` is for the placement to add."""
        if self.attention == "data":
            return ACTIVATION_RULES
        return {**ACTIVATION_RULES, "vocab_parts": _WIDE, "heads": _WIDE, "kv_heads": _WIDE}

    def check(self, config: ModelConfig, spec: MeshSpec) -> None:
        """Refuses a mesh whose axes do not divide what they split (exit code 78)."""
        split: list[tuple[str, int, int, str]] = []
        if self.attention == "tensor":
            ways, fix = spec.expert * spec.tensor, "choose a smaller mesh, or --attention data"
            split += [
                ("num_key_value_heads", config.num_key_value_heads, ways, fix),
                ("vocab_size", config.vocab_size, ways, fix),
            ]
        if self.fsdp:
            fix = "choose another data axis, or leave out --fsdp"
            split.append(("hidden_size", config.hidden_size, spec.data, fix))
        for name, size, ways, fix in split:
            if size % ways:
                raise MixtralError(
                    f"mesh {spec} with {self}",
                    expected=f"axes whose product divides {name} {size}",
                    got=ways,
                    fix=fix,
                    code=BAD_CONFIG,
                )

    def __str__(self):
        return f"attention={self.attention}" + (", fsdp" if self.fsdp else "")
