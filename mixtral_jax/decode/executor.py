"""What runs the passes of a generation: the resident model, or one that lies elsewhere in part."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.decode import steps
from mixtral_jax.decode.sampling import RowSampling
from mixtral_jax.decode.steps import DecodeState, Emitted, Limits
from mixtral_jax.model.placement import Placement
from mixtral_jax.model.transformer import Mixtral


@runtime_checkable
class Executor(Protocol):
    """Runs passes; states are donated and given back, as in ``decode/steps.py``."""

    def start(
        self,
        last_tokens: Int[np.ndarray, " B"],
        is_padding: Bool[np.ndarray, " B"],
        *,
        slots: int,
        chunk: int,
        dtype: Any,
    ) -> DecodeState:
        """The state before any token was read; see ``steps.empty_state``.

        ``chunk`` is the number of prompt tokens per row that each ``prefill`` to come reads.
        """
        ...

    def prefill(
        self, state: DecodeState, tokens: Int[np.ndarray, "B T"], counts: Int[np.ndarray, " B"]
    ) -> DecodeState:
        """See ``steps.prefill``."""
        ...

    def decode_step(
        self, state: DecodeState, rows: RowSampling, limits: Limits, num_steps: int
    ) -> tuple[DecodeState, Emitted]:
        """See ``steps.decode_step``."""
        ...

    def score(
        self, tokens: Int[np.ndarray, "B T"], valid: Bool[np.ndarray, "B T"]
    ) -> Float[Array, "B T V"]:
        """Teacher-forced logits, f32."""
        ...


@functools.partial(jax.jit, static_argnames=("placement",))
def score(
    model: Mixtral, tokens: Int[Array, "B T"], valid: Bool[Array, "B T"], *, placement: Placement
) -> Float[Array, "B T V"]:
    """Teacher-forced logits, f32."""
    return model(tokens, valid, placement=placement)


@dataclasses.dataclass(frozen=True)
class Resident:
    """The whole model on its devices: each pass is one compiled program."""

    model: Mixtral
    placement: Placement

    def start(
        self,
        last_tokens: Int[np.ndarray, " B"],
        is_padding: Bool[np.ndarray, " B"],
        *,
        slots: int,
        chunk: int,
        dtype: Any,
    ) -> DecodeState:
        """See Executor."""
        del chunk
        return steps.empty_state(
            self.model.config,
            last_tokens,
            is_padding,
            slots=slots,
            dtype=dtype,
            placement=self.placement,
        )

    def prefill(
        self, state: DecodeState, tokens: Int[np.ndarray, "B T"], counts: Int[np.ndarray, " B"]
    ) -> DecodeState:
        """See Executor."""
        return steps.prefill(self.model, state, tokens, counts, placement=self.placement)

    def decode_step(
        self, state: DecodeState, rows: RowSampling, limits: Limits, num_steps: int
    ) -> tuple[DecodeState, Emitted]:
        """See Executor."""
        count = np.int32(num_steps)
        return steps.decode_step(self.model, state, rows, limits, count, placement=self.placement)

    def score(
        self, tokens: Int[np.ndarray, "B T"], valid: Bool[np.ndarray, "B T"]
    ) -> Float[Array, "B T V"]:
        """See Executor."""
        return score(self.model, tokens, valid, placement=self.placement)
