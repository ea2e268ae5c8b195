"""The experts that lie on the device: copied there when needed or guessed, and taken away again.

Which goes first is decided by what is known: layers are visited in turn, so an expert of the layer
just visited is needed last. Of the layer that holds most experts (among several, of the one whose
next visit is furthest away) the least recently used one goes. Where each layer can keep some, this
is an LRU within each layer; a plain LRU over all of them would, with room for fewer experts than a
pass visits, always have just dropped what comes next.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from mixtral_jax.kernels.experts import ExpertWeights
from mixtral_jax.offload.ledger import Ledger
from mixtral_jax.offload.parts import num_bytes

Key = tuple[int, int]  # layer, expert


@dataclasses.dataclass(kw_only=True)
class Counts:
    """What was visited and copied.

    Attributes:
        kept: visits of experts that were on the device since an earlier visit.
        guessed: of those that were copied ahead because the visit was expected.
        copied: of those that were copied when they were needed.
        prefetched: copies made ahead, needed later or not.
        copied_bytes: from the host to the device, all together.
        waited: seconds of the host spent starting copies, and waiting until they were there.
    """

    kept: int = 0
    guessed: int = 0
    copied: int = 0
    prefetched: int = 0
    copied_bytes: int = 0
    waited: float = 0.0

    @property
    def visits(self) -> int:
        """Of all experts."""
        return self.kept + self.guessed + self.copied

    @property
    def hit_rate(self) -> float:
        """Share of the visits whose expert was on the device, or on its way, when asked for."""
        return (self.kept + self.guessed) / self.visits if self.visits else 1.0

    def since(self, before: Counts) -> Counts:
        """What came after an earlier look at the same counts."""
        then = vars(before)
        return Counts(**{name: now - then[name] for name, now in vars(self).items()})


@dataclasses.dataclass
class _Entry:
    weights: ExpertWeights
    num_bytes: int
    came: Literal["kept", "guessed", "copied"]
    used: int  # the clock at its last use
    read: Any = None  # there when the last program that reads it has ended

    def is_idle(self) -> bool:
        parts = jax.tree.leaves((self.weights, self.read))
        return all(part.is_ready() for part in parts)


class DeviceExperts:
    """Experts on one device, within the room that a ledger leaves.

    Args:
        host: ``host[layer][e]`` in pinned memory. (Of a numpy array the CPU backend would adopt
            the memory instead of copying it.)
        ledger: entered under ``experts``.
        device: where they go.
        prefetch: copy what the next layer is expected to need.
    """

    def __init__(
        self,
        host: Sequence[Sequence[ExpertWeights]],
        ledger: Ledger,
        device: Any,
        *,
        prefetch: bool = True,
    ):
        self._host, self._ledger, self._prefetch = host, ledger, prefetch
        self._sharding = SingleDeviceSharding(device)
        self._entries: dict[Key, _Entry] = {}
        self._clock = 0
        self.counts = Counts()

    def __len__(self):
        return len(self._entries)

    def make_room(self, num_bytes: int) -> None:
        """Takes experts away until so many bytes are free, or none is left."""
        while self._ledger.room < num_bytes and self._entries:
            self._evict(self._victim(0, self._entries.keys()))

    def visits(
        self, layer: int, needed: np.ndarray, guess: np.ndarray
    ) -> Iterator[tuple[int, ExpertWeights]]:
        """Yields each expert that a layer needs, in order, on the device; call ``read`` after each.

        Where there is room for fewer than the layer needs, they take turns.

        Args:
            layer: whose experts.
            needed: int ``[E]``, rows of each expert.
            guess: the same for the next layer, as far as can be told; zeros for none.
        """
        wanted = [int(e) for e in np.flatnonzero(needed)]
        expected = [int(e) for e in np.argsort(-guess, kind="stable") if guess[e]]
        pending = {(layer, e) for e in wanted}
        for e in wanted:
            key = (layer, e)
            is_all = self._bring(layer, sorted(pending), pending)
            if key not in self._entries:  # all that is there is needed later
                self._copy(key, layer, {key}, "copied")
            if is_all and self._prefetch:
                self._bring_ahead(layer, expected, {(layer, e) for e in wanted})
                expected = []
            entry = self._entries[key]
            self._wait(entry)
            setattr(self.counts, entry.came, getattr(self.counts, entry.came) + 1)
            entry.came = "kept"
            self._clock += 1
            entry.used = self._clock
            yield e, entry.weights
            pending.discard(key)

    def read(self, layer: int, expert: int, sign: jax.Array) -> None:
        """Notes that an expert may go when ``sign`` is there."""
        self._entries[layer, expert].read = sign

    def _bring(self, layer: int, keys: Sequence[Key], pending: set[Key]) -> bool:
        """Copies what a layer still needs as far as there is room; whether that was all."""
        for key in keys:
            if key not in self._entries and not self._copy(key, layer, pending, "copied"):
                return False
        return True

    def _bring_ahead(self, layer: int, expected: list[int], needed: set[Key]) -> None:
        """Copies what the next layer is expected to need, taking away only what is idle."""
        following = (layer + 1) % len(self._host)
        spared = needed | {(following, e) for e in expected}
        for e in expected:
            key = (following, e)
            if key not in self._entries:
                if not self._copy(key, layer, spared, "guessed", only_idle=True):
                    return
                self.counts.prefetched += 1

    def _copy(
        self,
        key: Key,
        layer: int,
        spared: set[Key],
        why: Literal["copied", "guessed"],
        *,
        only_idle: bool = False,
    ) -> bool:
        """Starts copying an expert; False if nothing may go to make room for it."""
        layer_id, expert = key
        source = self._host[layer_id][expert]
        size = num_bytes(source)
        while self._ledger.room < size:
            others = [
                other
                for other, entry in self._entries.items()
                if other not in spared and not (only_idle and not entry.is_idle())
            ]
            if not others:
                return False
            self._evict(self._victim(layer, others))
        self._ledger.hold("experts", size)
        began = time.perf_counter()
        try:
            weights = jax.device_put(source, self._sharding)  # from pinned memory: asynchronous
        except BaseException:  # no memory, or Ctrl-C
            self._ledger.hold("experts", -size)
            raise
        self.counts.waited += time.perf_counter() - began
        self.counts.copied_bytes += size
        self._clock += 1
        self._entries[key] = _Entry(weights, size, why, self._clock)
        return True

    def _victim(self, layer: int, keys: Any) -> Key:
        """Which of these goes first while ``layer`` is visited; see the module."""
        held, num_layers = Counter(key[0] for key in self._entries), len(self._host)

        def order(key: Key) -> tuple[int, int, int]:
            ahead = (key[0] - layer - 1) % num_layers  # layers until its next visit
            return held[key[0]], ahead, -self._entries[key].used

        return max(keys, key=order)

    def _evict(self, key: Key) -> None:
        """Takes an expert away, once nothing reads it any more."""
        entry = self._entries[key]
        try:
            self._wait(entry)
            jax.block_until_ready(entry.read)
        except Exception:  # a copy or what read it has failed: there is nothing to wait for
            self._drop(key)
            raise
        self._drop(key)

    def _drop(self, key: Key) -> None:
        entry = self._entries.pop(key)
        for part in jax.tree.leaves(entry.weights):
            part.delete()
        self._ledger.hold("experts", -entry.num_bytes)

    def _wait(self, entry: _Entry) -> None:
        """Until its copy is there."""
        parts = jax.tree.leaves(entry.weights)
        if not all(part.is_ready() for part in parts):
            began = time.perf_counter()
            jax.block_until_ready(parts)
            self.counts.waited += time.perf_counter() - began
