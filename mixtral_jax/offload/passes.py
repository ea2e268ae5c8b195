"""Passes over a batch: the programs of ``programs.py`` compiled for its shapes, and their memory.

Everything is compiled from shapes, before a byte is allocated, so that the budget is known to hold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from mixtral_jax.decode import steps
from mixtral_jax.decode.sampling import SamplingOptions, row_sampling
from mixtral_jax.decode.steps import DecodeState
from mixtral_jax.model.attention import LayerKV
from mixtral_jax.model.placement import LocalPlacement
from mixtral_jax.model.transformer import Block
from mixtral_jax.offload import programs
from mixtral_jax.offload.parts import Least, Parts, num_bytes
from mixtral_jax.offload.programs import Ahead

Kind = Literal["prefill", "step", "score"]
_MANY = 1 << 16  # bytes of the scalars beside the arrays: expert ids and signs of completion


class Program(NamedTuple):
    """A compiled program, and its device bytes beside its arguments.

    ``fresh`` are results that take the place of no argument, ``temporary`` are gone at its end.
    """

    call: Callable[..., Any]
    out: Any
    fresh: int
    temporary: int
    code: int


class Pass(NamedTuple):
    """What runs one pass; ``attend`` and ``visit`` by layer, equal layers having the same one.

    ``working`` are the device bytes that a pass takes beside weights, state and experts.
    """

    begin: Program
    attend: list[Program]
    visit: list[Program]
    end: Program
    working: int

    @property
    def programs(self) -> list[Program]:
        """All of them; equal layers have the same ones."""
        return [self.begin, *self.attend, *self.visit, self.end]


def ahead_of(blocks: list[Block], layer: int) -> Ahead:
    """The norm and router of the next layer; after the last, of the first: nobody reads that."""
    block = blocks[(layer + 1) % len(blocks)]
    return Ahead(block.moe_norm, block.moe.router)


def without_kv(state: DecodeState) -> DecodeState:
    """The state less keys and values, which go from layer to layer."""
    return state._replace(cache=state.cache._replace(keys=(), values=()))


class Compiler:
    """Compiles passes of a model for one device, each program once.

    Args:
        parts: the model; shapes will do.
        placement: its kernels.
        device: where the programs run.
    """

    def __init__(self, parts: Parts, placement: LocalPlacement, device: Any):
        self.parts, self.placement = parts, placement
        self._sharding = SingleDeviceSharding(device)
        self._programs: dict[Any, Program] = {}
        self._passes: dict[Any, Pass] = {}

    @property
    def code_bytes(self) -> int:
        """Of all programs so far."""
        return sum(program.code for program in self._programs.values())

    def abstract(self, tree: Any) -> Any:
        """Shapes of a tree's arrays, on the device."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._sharding), tree
        )

    def state(self, rows: int, slots: int, dtype: Any) -> DecodeState:
        """The shapes of a state."""
        make = functools.partial(
            steps.empty_state,
            self.parts.config,
            slots=slots,
            dtype=dtype,
            placement=self.placement,
        )
        return self.abstract(
            jax.eval_shape(make, np.zeros((rows,), np.int32), np.zeros((rows,), np.bool_))
        )

    def keep(self, passes: Sequence[Pass]) -> None:
        """Drops all programs but those of these passes, and the bytes of their code."""
        kept = {id(each) for each in passes}
        self._passes = {key: each for key, each in self._passes.items() if id(each) in kept}
        used = {id(program) for each in passes for program in each.programs}
        dropped = [key for key, program in self._programs.items() if id(program) not in used]
        for key in dropped:
            del self._programs[key]
            key[0].clear_cache()  # JAX keeps what it compiled of a function, too

    def least(self, states: Any, *passes: Pass) -> Least:
        """What generation with these states, or scoring without one, must have."""
        working = max(each.working for each in passes) + self.code_bytes
        parts = self.parts
        return Least(parts.device_bytes, num_bytes(states), working, parts.expert_bytes)

    def get(self, kind: Kind, rows: int, length: int, state: DecodeState | None = None) -> Pass:
        """The pass over ``length`` tokens of so many rows.

        Args:
            kind: a chunk of prompts, a decode step (``length`` 1), or scores without a cache.
            rows: of the batch.
            length: tokens of each.
            state: shapes of the state; None to score.
        """
        key = (kind, rows, length, None if state is None else _shapes(state))
        if key not in self._passes:
            self._passes[key] = self._make(kind, rows, length, state)
        return self._passes[key]

    def _make(self, kind: Kind, rows: int, length: int, state: DecodeState | None) -> Pass:
        parts, config = self.parts, self.parts.config
        ends, blocks = self.abstract((parts.ends, parts.blocks))
        tokens = np.zeros((rows, length), np.int32)
        uploads: tuple[Any, ...]
        if kind == "score":
            uploads = (tokens, np.zeros(tokens.shape, np.bool_))
            begin = self._program(programs.begin_score, ends, *uploads)
        elif kind == "prefill":
            uploads = (tokens, np.zeros((rows,), np.int32))
            begin = self._program(programs.begin_prefill, ends, without_kv(_some(state)), *uploads)
        else:
            sampling = row_sampling([SamplingOptions()] * rows, [0] * rows, config.vocab_size)
            eos_ids = np.asarray(config.eos_token_ids, np.int32)
            limits = steps.Limits(np.zeros((rows,), np.int32), np.zeros((rows,), np.bool_), eos_ids)
            emitted = steps.no_tokens(rows, steps.STEPS_PER_CALL)
            uploads = (sampling, limits, emitted)
            rest = without_kv(_some(state))
            begin = self._program(programs.begin_step, ends, rest, limits.stopped)
        begun = begin.out
        shared = begun.start._replace(x=None, cache=None)
        attend, visit, routing = [], [], []
        for i, block in enumerate(blocks):
            cache = None
            if state is not None:
                cache = LayerKV(state.cache.keys[i], state.cache.values[i])
            attended = self._program(
                programs.attend,
                block,
                ahead_of(blocks, i),
                begun.start.x,
                begun.shares,
                cache,
                shared,
            )
            attend.append(attended)
            out = attended.out
            routing.append(out.routing)
            visit.append(
                self._program(
                    programs.visit,
                    out.shares,
                    out.rows,
                    out.routing,
                    parts.experts[i][0],
                    np.int32(0),
                    num_experts=config.num_local_experts,
                )
            )
        x, shares, start = begun.start.x, begun.shares, begun.start._replace(x=None)
        if kind == "score":
            end = self._program(programs.end_score, ends, x, shares)
        elif kind == "prefill":
            rest = without_kv(_some(state))
            end = self._program(programs.end_prefill, rest, start, tuple(routing), tokens)
        else:
            end = self._program(
                programs.end_step, ends, rest, start, x, shares, tuple(routing), *uploads
            )
        layers = [*attend, *visit]
        working = (
            num_bytes(uploads)
            + begin.fresh
            # What a layer made is still there, or in use, while the next one runs.
            + 2 * max(each.fresh for each in attend)
            + num_bytes(routing)
            + end.fresh
            + max(each.temporary for each in (begin, *layers, end))
            + _MANY
        )
        return Pass(begin, attend, visit, end, working)

    def _program(self, function: Any, *arguments: Any, **static: Any) -> Program:
        static["placement"] = self.placement
        arguments = self.abstract(arguments)
        key = (function, _shapes(arguments), tuple(sorted(static.items(), key=lambda x: x[0])))
        if key not in self._programs:
            lowered = function.lower(*arguments, **static)
            compiled = lowered.compile()
            used = compiled.memory_analysis()
            assert used is not None
            self._programs[key] = Program(
                compiled,
                self.abstract(lowered.out_info),
                used.output_size_in_bytes - used.alias_size_in_bytes,
                used.temp_size_in_bytes,
                used.generated_code_size_in_bytes,
            )
        return self._programs[key]


def _some(state: DecodeState | None) -> DecodeState:
    assert state is not None
    return state


def _shapes(tree: Any) -> Any:
    leaves, form = jax.tree.flatten(tree)
    return form, tuple((tuple(leaf.shape), jnp.dtype(leaf.dtype).name) for leaf in leaves)


def layers_of(passed: Pass) -> Iterator[tuple[int, Program, Program]]:
    """The programs of each layer, in order."""
    for layer, (attend, visit) in enumerate(zip(passed.attend, passed.visit, strict=True)):
        yield layer, attend, visit
