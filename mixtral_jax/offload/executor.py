"""The layered executor: a loop over layers on the host, which brings experts to the device.

After each layer's router the host reads which experts its rows chose, sees to it that they are on
the device, and runs them one by one in ascending order, which is the order in which the resident
model adds them up: what was on the device before changes no number.
"""

from __future__ import annotations

import dataclasses
import time
import weakref
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.decode import steps
from mixtral_jax.decode.sampling import RowSampling
from mixtral_jax.decode.steps import DecodeState, Emitted, Limits
from mixtral_jax.errors import BAD_CONFIG, MixtralError
from mixtral_jax.model.attention import LayerKV
from mixtral_jax.model.placement import LocalPlacement, Routing
from mixtral_jax.offload.experts import Counts, DeviceExperts
from mixtral_jax.offload.ledger import Ledger, size_for
from mixtral_jax.offload.parts import Least, Parts
from mixtral_jax.offload.passes import Compiler, Pass, ahead_of, layers_of, without_kv
from mixtral_jax.offload.programs import Begun


@dataclasses.dataclass(frozen=True, kw_only=True)
class OffloadReport:
    """What an executor did since it was made, or since ``clear``.

    Attributes:
        budget: device bytes that may be used.
        peak: the most that the ledger held at once.
        at_peak: by kind.
        allocator_peak: what the backend says that it had allocated at most; None where it does not
            say (the CPU).
        resident_experts: on the device now.
        num_experts: of all layers.
        counts: visits and copies.
        seconds: spent in passes, compilation apart.
    """

    budget: int
    peak: int
    at_peak: dict[str, int]
    allocator_peak: int | None
    resident_experts: int
    num_experts: int
    counts: Counts
    seconds: float

    @property
    def stretch(self) -> float:
        """Time taken over what is left of it without the waits for copies.

        A resident model is faster still: it starts one program per pass, not one per expert.
        """
        busy = self.seconds - self.counts.waited
        return self.seconds / busy if busy > 0 else 1.0

    def since(self, before: OffloadReport) -> OffloadReport:
        """What was done since an earlier report; peaks are those of all.

        Of a generation: what others did meanwhile is in it.
        """
        counts, seconds = self.counts.since(before.counts), self.seconds - before.seconds
        return dataclasses.replace(self, counts=counts, seconds=seconds)

    def line(self) -> str:
        """In words."""
        counts, kinds = (
            self.counts,
            ", ".join(f"{kind} {size / 1e6:,.1f}" for kind, size in self.at_peak.items()),
        )
        line = (
            f"offload: {counts.hit_rate:.1%} of {counts.visits:,} expert visits found theirs on "
            f"the device ({counts.kept:,} kept, {counts.guessed:,} of {counts.prefetched:,} "
            "prefetched); "
            f"{counts.copied_bytes / 1e6:,.1f} MB copied, {counts.waited:.2f} of "
            f"{self.seconds:.2f} s waiting for it ({self.stretch:.2f}x the time without); "
            f"{self.resident_experts} of {self.num_experts} experts on the device; at most "
            f"{self.peak / 1e6:,.1f} of {self.budget / 1e6:,.1f} MB ({kinds})"
        )
        if self.allocator_peak is not None:
            line += f"; the backend's allocator: {self.allocator_peak / 1e6:,.1f} MB"
        return line


@dataclasses.dataclass
class _Open:
    """A generation that is not over, and whose state nobody has dropped.

    Attributes:
        shapes: of its state.
        passes: compiled for them.
        token: of the state that was given out last.
    """

    shapes: DecodeState
    passes: Mapping[str, Pass]
    token: weakref.ref[jax.Array]


class OffloadExecutor:
    """Runs a model whose experts lie in host memory; see ``decode/executor.py``.

    Several generations may be open, in turns; each holds room until its last state is dropped.

    Args:
        parts: the model; what stays on the device is there already.
        budget: bytes of the device that may be used.
        placement: the kernels.
        device: where it runs.
        prefetch: copy ahead what the next layer's router says of this layer's residual stream.
        compiler: of another executor of such a model on this device, to share its programs.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        budget: int,
        placement: LocalPlacement,
        device: Any,
        prefetch: bool = True,
        compiler: Compiler | None = None,
    ):
        self.parts, self._placement, self.device = parts, placement, device
        self.compiler = compiler or Compiler(parts, placement, device)
        self.ledger = Ledger(budget)
        self.ledger.hold("weights", parts.device_bytes)
        self._experts = DeviceExperts(parts.experts, self.ledger, device, prefetch=prefetch)
        self._open: list[_Open] = []
        self._seconds = 0.0

    def report(self) -> OffloadReport:
        """What was done so far."""
        stats = self.device.memory_stats() or {}
        return OffloadReport(
            budget=self.ledger.budget,
            peak=self.ledger.peak,
            at_peak=self.ledger.at_peak,
            allocator_peak=stats.get("peak_bytes_in_use"),
            resident_experts=len(self._experts),
            num_experts=self.parts.num_experts,
            counts=dataclasses.replace(self._experts.counts),
            seconds=self._seconds,
        )

    def clear(self) -> None:
        """Counts from zero; experts on the device stay."""
        self._experts.counts, self._seconds = Counts(), 0.0

    def start(
        self,
        last_tokens: Int[np.ndarray, " B"],
        is_padding: Bool[np.ndarray, " B"],
        *,
        slots: int,
        chunk: int,
        dtype: Any,
    ) -> DecodeState:
        """See Executor. Experts that are on the device stay there as far as there is room.

        Raises:
            MixtralError: exit code 78 if the budget is too small, with the least that would do.
        """
        rows = len(last_tokens)
        shapes = self.compiler.state(rows, slots, dtype)
        passes = {
            "prefill": self.compiler.get("prefill", rows, chunk, shapes),
            "step": self.compiler.get("step", rows, 1, shapes),
        }
        self._reserve(shapes, passes, f"{rows} rows of {slots} cache slots")
        last_tokens, is_padding = jax.device_put((last_tokens, is_padding), self.device)
        state = steps.empty_state(
            self.parts.config,
            last_tokens,
            is_padding,
            slots=slots,
            dtype=dtype,
            placement=self._placement,
        )
        self._open.append(_Open(shapes, passes, weakref.ref(state.token)))
        return state

    def _reserve(self, shapes: DecodeState | None, passes: Mapping[str, Pass], what: str) -> None:
        """Makes room for a state and passes, beside the generations that are open."""
        self._open = [each for each in self._open if each.token() is not None]
        states = [shapes, *(each.shapes for each in self._open)]
        used = [*passes.values()]
        for each in self._open:
            used += each.passes.values()
        least, ledger = self.compiler.least(states, *used), self.ledger
        if least.total > ledger.budget:
            self.compiler.keep(used)
            least = self.compiler.least(states, *used)
        if self._open:
            what += f" (other generations open: {len(self._open)})"
        check_budget(ledger.budget, least, what)
        ledger.replace("state", 0)  # of generations that are over
        ledger.replace("working", 0)
        self._experts.make_room(least.state + least.working)
        ledger.replace("state", least.state)
        ledger.replace("working", least.working)

    def _opened(self, state: DecodeState) -> _Open:
        """The generation of a state that was given out."""
        (found,) = [each for each in self._open if each.token() is state.token]
        return found

    def prefill(
        self, state: DecodeState, tokens: Int[np.ndarray, "B T"], counts: Int[np.ndarray, " B"]
    ) -> DecodeState:
        """See Executor."""
        began, opened, rest = time.perf_counter(), self._opened(state), without_kv(state)
        passed = opened.passes["prefill"]
        begun = passed.begin.call(self.parts.ends, rest, tokens, counts)
        cache = [*map(LayerKV, state.cache.keys, state.cache.values)]
        # Nothing reads what the last layer's experts would add.
        _, _, routing = self._layers(passed, begun, cache, skip_last=True)
        rest = passed.end.call(rest, begun.start._replace(x=None), routing, tokens)
        opened.token = weakref.ref(rest.token)
        self._seconds += time.perf_counter() - began
        return _with_kv(rest, cache)

    def decode_step(
        self, state: DecodeState, rows: RowSampling, limits: Limits, num_steps: int
    ) -> tuple[DecodeState, Emitted]:
        """See Executor."""
        began, opened = time.perf_counter(), self._opened(state)
        passed = opened.passes["step"]
        emitted = steps.no_tokens(len(limits.budget), steps.STEPS_PER_CALL)
        emitted = jax.device_put(emitted, self.device)
        cache, rest = [*map(LayerKV, state.cache.keys, state.cache.values)], without_kv(state)
        is_done = bool(np.all(np.asarray(state.is_done) | limits.stopped))
        for _ in range(min(num_steps, steps.STEPS_PER_CALL)):
            if is_done:
                break
            begun = passed.begin.call(self.parts.ends, rest, limits.stopped)
            x, shares, routing = self._layers(passed, begun, cache)
            start = begun.start._replace(x=None)
            rest, emitted, done = passed.end.call(
                self.parts.ends, rest, start, x, shares, routing, rows, limits, emitted
            )
            is_done = bool(done)
        opened.token = weakref.ref(rest.token)
        self._seconds += time.perf_counter() - began
        return _with_kv(rest, cache), emitted

    def score(
        self, tokens: Int[np.ndarray, "B T"], valid: Bool[np.ndarray, "B T"]
    ) -> Float[Array, "B T V"]:
        """See Executor.

        Raises:
            MixtralError: as ``start``.
        """
        rows, length = tokens.shape
        passed = self.compiler.get("score", rows, length)
        self._reserve(None, {"score": passed}, f"{rows} rows of {length} tokens")
        began = time.perf_counter()
        begun = passed.begin.call(self.parts.ends, tokens, valid)
        x, shares, _ = self._layers(passed, begun, [None] * len(self.parts.blocks))
        logits = passed.end.call(self.parts.ends, x, shares)
        self._seconds += time.perf_counter() - began
        return logits

    def _layers(
        self, passed: Pass, begun: Begun, cache: list[Any], *, skip_last: bool = False
    ) -> tuple[jax.Array, jax.Array, tuple[Routing, ...]]:
        """All layers; replaces each entry of ``cache`` by its successor."""
        x, shares = begun.start.x, begun.shares
        shared = begun.start._replace(x=None, cache=None)
        blocks, found = self.parts.blocks, []
        for layer, attend, visit in layers_of(passed):
            out = attend.call(
                blocks[layer], ahead_of(blocks, layer), x, shares, cache[layer], shared
            )
            x, shares, cache[layer] = out.x, out.shares, out.cache
            found.append(out.routing)
            needed, guess = np.asarray(out.counts)  # waits for the device
            is_last = layer + 1 == len(blocks)
            if is_last and skip_last:
                break
            guess = np.zeros_like(guess) if is_last else guess
            for expert, weights in self._experts.visits(layer, needed, guess):
                expert_id = np.int32(expert)
                shares, sign = visit.call(shares, out.rows, out.routing, weights, expert_id)
                self._experts.read(layer, expert, sign)
        return x, shares, tuple(found)


def check_budget(budget: int, least: Least, what: str) -> None:
    """Refuses a budget below the least.

    Raises:
        MixtralError: exit code 78, with the least that would do.
    """
    if budget >= least.total:
        return
    kinds = ", ".join(f"{kind} {size / 1e6:,.1f}" for kind, size in vars(least).items())
    raise MixtralError(
        f"--device-memory for {what}",
        expected=f"at least {size_for(least.total)} ({kinds} MB)",
        got=size_for(budget) if budget % 10**6 == 0 else f"{budget:,} bytes",
        fix=f"--device-memory {size_for(least.total)}, fewer or shorter rows, or a smaller dtype",
        code=BAD_CONFIG,
    )


def _with_kv(state: DecodeState, cache: list[LayerKV]) -> DecodeState:
    keys, values = (tuple(side) for side in zip(*cache, strict=True))
    return state._replace(cache=state.cache._replace(keys=keys, values=values))
