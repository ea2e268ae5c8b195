"""Counters and histograms of the engine. Pure Python; a lock makes snapshots consistent."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from mixtral_jax.serve.request import EngineStats, Histogram

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
LENGTHS = tuple(float(2**n) for n in range(18))

# What is observed, and in which buckets.
HISTOGRAMS: Mapping[str, tuple[float, ...]] = {
    "queue_seconds": SECONDS,
    "prefill_call_seconds": SECONDS,
    "decode_call_seconds": SECONDS,
    "decode_step_seconds": SECONDS,
    "text_seconds": SECONDS,
    "request_seconds": SECONDS,
    "time_per_token_seconds": SECONDS,
    "time_to_first_token_seconds": SECONDS,
    "batch_size": SIZES,
    "next_batch_size": SIZES,
    "prompt_length": LENGTHS,
    "generated_length": LENGTHS,
    "max_new_length": LENGTHS,
}


class Metrics:
    """What happened since the start. Thread-safe."""

    def __init__(self, num_layers: int, num_experts: int):
        self._lock = threading.Lock()
        self._counters: Counter[str] = Counter()
        self._buckets = {name: [0] * (len(bounds) + 1) for name, bounds in HISTOGRAMS.items()}
        self._sums = dict.fromkeys(HISTOGRAMS, 0.0)
        self._experts = np.zeros((num_layers, num_experts), np.int64)
        self._dropped: dict[int | None, np.ndarray] = {}
        self._num_layers = num_layers

    def count(self, name: str, number: int = 1) -> None:
        """Adds to a counter."""
        with self._lock:
            self._counters[name] += number

    def observe(self, name: str, *values: float) -> None:
        """Adds observations to a histogram."""
        with self._lock:
            for value in values:
                self._buckets[name][bisect_left(HISTOGRAMS[name], value)] += 1
                self._sums[name] += value

    def add_experts(self, counts: np.ndarray) -> None:
        """Assignments ``[L, E]`` of a request that ended."""
        with self._lock:
            self._experts += counts

    def set_dropped(self, pool: int | None, dropped: np.ndarray) -> None:
        """Assignments ``[L]`` that a pool, or reading prompts (None), has left out so far."""
        with self._lock:
            self._dropped[pool] = dropped

    def snapshot(self, gauges: Mapping[str, float], extra: Mapping[str, int]) -> EngineStats:
        """Everything, with what is asked of others at this moment."""
        with self._lock:
            histograms = {name: self._histogram(name) for name in HISTOGRAMS}
            dropped = sum(self._dropped.values(), np.zeros((self._num_layers,), np.int64))
            return EngineStats(
                counters={**self._counters, **extra},
                gauges=dict(gauges),
                histograms=histograms,
                expert_load=tuple(tuple(row) for row in self._experts.tolist()),
                dropped=tuple(np.asarray(dropped).tolist()),
            )

    def _histogram(self, name: str) -> Histogram:
        buckets = self._buckets[name]
        cumulative = tuple(_running_sums(buckets))
        return Histogram(
            bounds=HISTOGRAMS[name],
            counts=cumulative[:-1],
            count=cumulative[-1],
            sum=self._sums[name],
        )


def _running_sums(numbers: Iterable[int]) -> Iterable[int]:
    total = 0
    for number in numbers:
        total += number
        yield total
