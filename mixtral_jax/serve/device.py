"""The device side: pools, scratch states and kept chunks, changed only by executing commands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mixtral_jax.decode import steps
from mixtral_jax.decode.controls import Controls, Mask, RowControls, num_words, row_controls
from mixtral_jax.decode.sampling import SamplingOptions
from mixtral_jax.kernels.scaled_kv import KVDtype
from mixtral_jax.kernels.table import cache_dtype
from mixtral_jax.model.cache import num_slots
from mixtral_jax.model.placement import Placement
from mixtral_jax.model.transformer import Mixtral
from mixtral_jax.serve import commands, programs
from mixtral_jax.serve.commands import Command, Scores, Stepped
from mixtral_jax.serve.slots import LengthClass
from mixtral_jax.sharding import hosts

_IDLE = Controls(options=SamplingOptions())


@dataclasses.dataclass(frozen=True, kw_only=True)
class DevicePlan:
    """The shapes of everything: equal in all processes.

    Attributes:
        classes: the pools.
        scratch_rows: prompts read at one time.
        chunk: prompt tokens read per call, at absolute multiples.
        sizes: of the calls, ascending, the last is ``chunk``: the end of a prompt takes the
            smallest that holds it.
        kv_dtype: of the caches.
        num_adapters: that rows may choose (``with_adapters``).
    """

    classes: tuple[LengthClass, ...]
    scratch_rows: int
    chunk: int
    sizes: tuple[int, ...]
    kv_dtype: KVDtype | None = None
    num_adapters: int = 0


def _held(plan: DevicePlan, model: Mixtral, placement: Placement) -> Any:
    """The dtype of keys and values."""
    activations = model.embed_tokens.get_value().dtype
    return cache_dtype(placement.kernels, plan.kv_dtype, activations)


class _Class:
    """One pool, and the options of its rows (numpy, as the host knows them)."""

    def __init__(self, spec: LengthClass, plan: DevicePlan, model: Mixtral, placement: Placement):
        config = model.config
        dtype = _held(plan, model, placement)
        slots = num_slots(config, total=spec.length, chunk=plan.chunk)
        self.pool = programs.empty_pool(
            config, rows=spec.rows, slots=slots, dtype=dtype, placement=placement
        )
        self._idle = row_controls([_IDLE], config.vocab_size)
        self.rows: RowControls = row_controls([_IDLE] * spec.rows, config.vocab_size)
        self.budget = np.zeros((spec.rows,), np.int32)
        self.adapters = np.zeros((spec.rows,), np.int32)

    def set_row(
        self, row: int, controls: Controls, budget: int, adapter: int, vocab_size: int
    ) -> None:
        """Takes the options of a row; copies, since a call may still read the old arrays."""
        one = row_controls([controls], vocab_size)

        def put(column: np.ndarray, value: np.ndarray) -> np.ndarray:
            column = column.copy()
            column[row] = value[0]
            return column

        self.rows = jax.tree.map(put, self.rows, one)
        self.budget = put(self.budget, np.asarray([budget]))
        self.adapters = put(self.adapters, np.asarray([adapter]))

    def rows_where(self, is_running: np.ndarray) -> RowControls:
        """The options of the rows that run; what others asked for would still cost every step."""

        def chosen(column: np.ndarray, idle: np.ndarray) -> np.ndarray:
            shape = (-1,) + (1,) * (column.ndim - 1)
            return np.where(is_running.reshape(shape), column, idle)

        return jax.tree.map(chosen, self.rows, self._idle)


class Device:
    """Executes commands, one at a time. Every process has one and executes the same.

    Args:
        model: weights, placed.
        placement: where they lie.
        plan: shapes.
    """

    def __init__(self, model: Mixtral, placement: Placement, plan: DevicePlan):
        self.model, self.placement, self.plan = model, placement, plan
        self.config = model.config
        self._classes = [_Class(spec, plan, model, placement) for spec in plan.classes]
        # Of the longest class: one for all costs less memory than one for each, and its programs
        # compile once.
        self.slots = num_slots(self.config, total=plan.classes[-1].length, chunk=plan.chunk)
        self._scratch = steps.empty_state(
            self.config,
            np.zeros((plan.scratch_rows,), np.int32),
            np.ones((plan.scratch_rows,), np.bool_),
            slots=self.slots,
            dtype=_held(plan, model, placement),
            placement=placement,
        )
        self._scratch_adapters = np.zeros((plan.scratch_rows,), np.int32)
        self._has_adapters = plan.num_adapters > 0
        self._blocks: dict[int, programs.Block] = {}
        self._eos_ids = np.asarray(self.config.eos_token_ids, np.int32)

    def execute(self, command: Command) -> Any:
        """Does what is asked.

        Returns:
            Stepped for a Step, Scores for a Read with targets; else None.
        """
        match command:
            case commands.Step():
                return self._step(command)
            case commands.Read():
                return self._read(command)
            case commands.Insert():
                return self._insert(command)
            case commands.Restart():
                return self._restart(command)
            case commands.Restore():
                return self._restore(command)
            case commands.Keep():
                return self._keep(command)
            case commands.Forget():
                for block_id in command.block_ids:
                    self._blocks.pop(block_id, None)
            case commands.Stop():
                pass

    def block_bytes(self) -> int:
        """Bytes of a kept chunk, over all devices."""
        cache = self._scratch.cache
        kept = jax.tree.leaves((cache.keys, cache.values))
        return sum(x.nbytes // (x.shape[0] * x.shape[2]) for x in kept) * self.plan.chunk

    def _restart(self, command: commands.Restart) -> None:
        self._scratch_adapters = self._scratch_adapters.copy()
        self._scratch_adapters[command.row] = command.adapter
        hosts.begin_step()
        self._scratch = programs.restart(
            self._scratch, np.int32(command.row), placement=self.placement
        )

    def _restore(self, command: commands.Restore) -> None:
        hosts.begin_step()
        self._scratch = programs.restore(
            self._scratch,
            self._blocks[command.block_id],
            np.int32(command.row),
            np.int32(command.start),
            np.asarray(command.tokens, np.int32),
            placement=self.placement,
        )

    def _keep(self, command: commands.Keep) -> None:
        hosts.begin_step()
        self._blocks[command.block_id] = programs.extract(
            self._scratch,
            np.int32(command.row),
            np.int32(command.start),
            size=self.plan.chunk,
            placement=self.placement,
        )

    def _read(self, command: commands.Read) -> Scores | None:
        adapters = self._scratch_adapters if self._has_adapters else None
        hosts.begin_step()
        if command.targets is None:
            self._scratch = programs.read(
                self.model,
                self._scratch,
                command.tokens,
                command.counts,
                adapters,
                placement=self.placement,
            )
            return None
        self._scratch, logprobs, best = programs.score(
            self.model,
            self._scratch,
            command.tokens,
            command.targets,
            command.counts,
            adapters,
            np.bool_(command.wants_best),
            placement=self.placement,
        )
        if not command.wants_best:
            return Scores(logprobs=hosts.fetch(logprobs))
        found, ids, values = hosts.fetch((logprobs, *best))
        return Scores(logprobs=found, best_ids=ids, best_logprobs=values)

    def _insert(self, command: commands.Insert) -> None:
        at = self._classes[command.class_id]
        fields = dict(command.controls)
        options = SamplingOptions(**fields.pop("options"))
        controls = Controls(options=options, **fields)
        vocab_size = self.config.vocab_size
        at.set_row(command.to_row, controls, command.budget, command.adapter, vocab_size)
        hosts.begin_step()
        at.pool = programs.insert(
            at.pool,
            self._scratch,
            np.int32(command.from_row),
            np.int32(command.to_row),
            np.int32(command.token),
            placement=self.placement,
        )

    def _step(self, command: commands.Step) -> Stepped:
        at = self._classes[command.class_id]
        num_rows = at.budget.shape[0]
        stopped = np.ones((num_rows,), np.bool_)
        stopped[list(command.running)] = False
        rows = at.rows_where(~stopped)
        hosts.begin_step()
        at.pool, written = programs.step(
            self.model,
            at.pool,
            rows,
            self._mask(num_rows, command.masks),
            steps.Limits(at.budget, stopped, self._eos_ids),
            np.int32(command.num_steps),
            at.adapters if self._has_adapters else None,
            placement=self.placement,
        )
        state = at.pool.decode
        wanted = {
            **written.emitted._asdict(),
            "is_done": state.is_done,
            "is_bad": state.is_bad,
            "dropped": state.dropped,
            "read_dropped": self._scratch.dropped,
            "expert_counts": state.expert_counts,
        }
        if np.asarray(rows.wants_best).any():
            wanted |= {"best_ids": written.best.ids, "best_logprobs": written.best.logprobs}
        return Stepped(**hosts.fetch(wanted))

    def _mask(self, num_rows: int, masks: dict[int, np.ndarray]) -> Mask:
        bits = np.zeros((num_rows, num_words(self.config.vocab_size)), np.uint32)
        is_on = np.zeros((num_rows,), np.bool_)
        for row, packed in masks.items():
            bits[row], is_on[row] = packed, True
        return Mask(bits, is_on)


def warm(device: Device, execute: Callable[[Command], Any]) -> None:
    """Runs every program, so that nothing compiles later."""
    plan, rows = device.plan, device.plan.scratch_rows
    vocab_size = device.config.vocab_size
    execute(commands.Restart(row=0))
    counts = np.zeros((rows,), np.int32)
    counts[0] = 1
    for size in plan.sizes:
        execute(commands.Read(tokens=np.zeros((rows, size), np.int32), counts=counts))
    tokens = np.zeros((rows, plan.chunk), np.int32)
    for wants_best in (False, True):
        read = commands.Read(tokens=tokens, counts=counts, targets=tokens, wants_best=wants_best)
        execute(read)
    if device.slots >= plan.chunk:
        execute(commands.Keep(row=0, start=0, block_id=0))
        execute(commands.Restore(row=0, start=0, block_id=0, tokens=(0,) * plan.chunk))
        execute(commands.Forget(block_ids=(0,)))
    controls = {"options": {"temperature": 1.0}, "wants_best": True}
    allowed = np.full((num_words(vocab_size),), 2**32 - 1, np.uint32)
    places: dict[str, Any] = {"from_row": 0, "to_row": 0, "token": 0, "budget": 3, "adapter": 0}
    for class_id in range(len(plan.classes)):
        execute(commands.Insert(class_id=class_id, controls=controls, **places))
        step = commands.Step(class_id=class_id, num_steps=1, running=(0,))
        # The second call meets the state that the first one made.
        execute(step)
        execute(dataclasses.replace(step, masks={0: allowed}))
        execute(commands.Insert(class_id=class_id, controls=controls, **places))
        execute(dataclasses.replace(step, running=()))
    execute(commands.Restart(row=0))
