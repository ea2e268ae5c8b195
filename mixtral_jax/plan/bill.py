"""The bill: per device what a workload takes of memory, links and time, and whether it fits."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import INTERNAL, MixtralError
from mixtral_jax.model.transformer import leaf_specs, num_parameters
from mixtral_jax.plan.devices import find_device
from mixtral_jax.plan.programs import (
    Program,
    Workload,
    bytes_on_device,
    compile_programs,
    state_shapes,
    train_state,
)
from mixtral_jax.plan.schemes import Scheme, Weights, weight_bytes
from mixtral_jax.plan.step import (
    Step,
    between_devices,
    differences,
    generation_steps,
    one_branch,
    train_step,
)
from mixtral_jax.sharding.collectives import Collective

_LAYERS = (2, 3)  # compiled in place of all where many meshes are compared


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device.

    Attributes:
        weight_bytes: of the weights at rest, and of those that train, in f32, exact.
        cache_bytes: keys, values and their positions, exact.
        state_bytes: what else generation carries from step to step, exact.
        gradient_bytes: of trained weights, in f32, exact.
        optimizer_bytes: of the optimizer's state, exact.
        temporary_bytes: of the program that takes most, compiled for the CPU in float32: for 16
            bits an estimate on the high side (see docs/plan.md).
    """

    weight_bytes: int
    cache_bytes: int
    state_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    temporary_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of them."""
        return sum(dataclasses.astuple(self))

    @property
    def update_bytes(self) -> int:
        """Of what an update reads and writes: what trains, its gradients (as many bytes) and the
        optimizer's state."""
        return 2 * self.gradient_bytes + self.optimizer_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bill:
    """What ``make_bill`` found.

    ``usable_bytes`` is what may be filled of a device's memory. ``differences`` says where a
    compiled program does not send what the formula has: its steps are billed as compiled, in f32.
    ``not_compared`` says why there was nothing to compare.
    """

    work: Workload
    quantize: str | None
    parameters: int
    active_parameters: int
    memory: Memory
    usable_bytes: int
    steps: dict[str, Step]
    differences: list[str]
    not_compared: str | None

    @property
    def fits(self) -> bool:
        """Whether a device holds it."""
        return self.memory.total_bytes <= self.usable_bytes

    @property
    def tokens_per_second(self) -> float:
        """Of decoding, or of training."""
        return self.steps["train" if self.work.train else "decode"].tokens_per_second

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and names."""
        collectives, steps = [], {}
        for name, step in self.steps.items():
            fields = dataclasses.asdict(step)
            for key, when in (("collectives", "billed"), ("overflow", "overflow")):
                collectives += [{"step": name, "when": when, **each} for each in fields.pop(key)]
            steps[name] = fields
        work = self.work
        return {
            "mesh": str(work.mesh),
            "devices": work.mesh.num_devices,
            "attention": work.strategy.attention,
            "fsdp": work.strategy.fsdp,
            "dtype": work.dtype,
            "kv_dtype": work.kv_dtype,
            "quantize": self.quantize,
            "train": work.train,
            "optim": work.optim if work.train else None,
            "batch": work.batch,
            "context": work.context,
            "parameters": self.parameters,
            "active_parameters": self.active_parameters,
            "per_device": {
                **dataclasses.asdict(self.memory),
                "total_bytes": self.memory.total_bytes,
            },
            "usable_bytes": self.usable_bytes,
            "fits": self.fits,
            "steps": steps,
            "collectives": collectives,
            "differences": self.differences,
            "not_compared": self.not_compared,
            "tokens_per_second": self.tokens_per_second,
        }


def active_parameters(config: ModelConfig) -> int:
    """Parameters that a token meets: the chosen experts only, and no input embedding."""
    E, A = config.num_local_experts, config.num_experts_per_tok
    total = 0
    for path, spec in leaf_specs(config).items():
        size = math.prod(spec.shape)
        if "expert" in spec.axes:
            total += size // E * A
        elif path != "embed_tokens" or config.tie_word_embeddings:
            total += size
    return total


def scheme_of(work: Workload, quantize: Scheme | None) -> Scheme | None:
    """The scheme asked for; qlora means nf4 where none is."""
    return quantize or ("nf4" if work.train == "qlora" else None)


def holds(
    work: Workload,
    device: str,
    *,
    quantize: Scheme | None = None,
    memory_fraction: float = 0.9,
) -> bool:
    """Whether a device holds the workload, by programs of a few layers; ``make_bill`` reuses them.

    Half of what a bill of training compiles.
    """
    scheme = scheme_of(work, quantize)
    weights = weight_bytes(work.config, work.mesh, work.strategy, dtype=work.dtype, scheme=scheme)
    programs = _extrapolated(dataclasses.replace(work, dtype="float32")).values()
    memory = memory_of(work, weights, max(program.temporary_bytes for program in programs))
    return memory.total_bytes <= int(find_device(device).memory_bytes * memory_fraction)


def make_bill(
    work: Workload,
    device: str,
    *,
    quantize: Scheme | None = None,
    memory_fraction: float = 0.9,
    whole: bool = True,
) -> Bill:
    """Compiles the workload's programs from shapes and adds up what they take.

    Args:
        work: what runs where.
        device: a key of ``DEVICES``.
        quantize: a scheme of ``plan/schemes.py``, or what a folder holds, for the weights; of the
            frozen ones in training.
        memory_fraction: of a device's memory that may be filled.
        whole: compile all layers; else a few (see ``_extrapolated``).

    Raises:
        MixtralError: exit code 64 or 78 where something is unknown or does not divide.
    """
    found = find_device(device)
    work.strategy.check(work.config, work.mesh)
    scheme = scheme_of(work, quantize)
    weights = weight_bytes(work.config, work.mesh, work.strategy, dtype=work.dtype, scheme=scheme)
    compiled = _whole if whole else _extrapolated
    in_f32 = dataclasses.replace(work, dtype="float32")
    programs = compiled(in_f32)
    most = max(program.temporary_bytes for program in programs.values())
    memory = memory_of(work, weights, most)
    unlike: dict[str, list[str]] = {}
    if work.train:
        # "exact" has both branches of every layer in its text.
        common = compiled(one_branch(in_f32, work.context))["train"]
        traffic = between_devices(common)
        steps = {"train": train_step(work, found, weights, memory.update_bytes, traffic)}
    else:
        unlike = differences(work, programs) if whole else {}
        lengths = {"prefill": work.chunk, "decode": 1}
        as_compiled = {
            name: between_devices(compiled(one_branch(in_f32, lengths[name]))[name])
            for name in unlike
        }
        steps = generation_steps(work, found, weights, memory.cache_bytes, as_compiled)
    return Bill(
        work=work,
        quantize=None if scheme is None else str(scheme),
        parameters=num_parameters(work.config),
        active_parameters=active_parameters(work.config),
        memory=memory,
        usable_bytes=int(found.memory_bytes * memory_fraction),
        steps=steps,
        differences=[line for lines in unlike.values() for line in lines],
        not_compared=_not_compared(work, whole=whole),
    )


def _not_compared(work: Workload, *, whole: bool) -> str | None:
    if work.train:
        return "traffic of training is the compiled program's: there is no formula beside it"
    if work.dispatch.method == "ragged":
        return "ragged: the CPU has no such operation, so the formulas are compared with no program"
    return None if whole else "of a few layers: the formulas are compared with no program"


_whole = functools.lru_cache(maxsize=None)(compile_programs)


def _extrapolated(work: Workload) -> dict[str, Program]:
    """Of fewer layers; what training keeps of each layer lies on a straight line."""
    layers = work.config.num_hidden_layers
    if layers <= max(_LAYERS):
        return _whole(work)
    if not work.train:  # one data shard is compiled as every other, and layers share temporaries
        mesh = dataclasses.replace(work.mesh, data=1)
        work = dataclasses.replace(work, mesh=mesh, batch=work.rows // work.mesh.data)
        return _whole(work.with_layers(_LAYERS[0]))
    few, more = (_whole(work.with_layers(count)) for count in _LAYERS)
    ahead, apart = layers - _LAYERS[1], _LAYERS[1] - _LAYERS[0]
    found = {}
    for name, big in more.items():
        small = few[name]

        def line(a: int, b: int) -> int:
            return b + (b - a) * ahead // apart

        temporary = line(small.temporary_bytes, big.temporary_bytes)
        if work.train != "full":
            temporary = min(temporary, small.temporary_bytes + _kept(work))
        found[name] = Program(
            line(small.argument_bytes, big.argument_bytes),
            temporary,
            _more(small.collectives, big.collectives, line),
        )
    return found


def _kept(work: Workload) -> int:
    """Bytes that further layers add where factors train: their inputs, to compute them again, and
    gradients. The CPU's schedule may hold buffers of several layers at once."""
    few, rows = _LAYERS[0], work.batch // (work.mesh.data * work.mesh.expert)
    inputs = 4 * rows * work.context * work.config.hidden_size
    gradients = [
        bytes_on_device(train_state(each).trained) for each in (work, work.with_layers(few))
    ]
    return (work.config.num_hidden_layers - few) * inputs + gradients[0] - gradients[1]


def _more(
    few: list[Collective], more: list[Collective], line: Callable[[int, int], int]
) -> list[Collective]:
    """Collectives further along the line, all of one size: the compiler may merge layers'."""
    found: list[Collective] = []
    for kind, *over in sorted({(each.kind, each.group_size, each.span) for each in more}):
        small, big = (
            [c.bytes for c in one if [c.kind, c.group_size, c.span] == [kind, *over]]
            for one in (few, more)
        )
        count = line(len(small), len(big))
        if count <= 0:
            raise MixtralError(
                f"{kind} over {over[0]} devices: {len(small)} with {_LAYERS[0]} layers, "
                f"{len(big)} with {_LAYERS[1]}: no number of them follows for all layers",
                fix="report it with the command line",
                code=INTERNAL,
            )
        found += [Collective(kind, line(sum(small), sum(big)) // count, *over)] * count
    return found


def memory_of(work: Workload, weights: Weights, temporary_bytes: int) -> Memory:
    """Bytes of a device.

    Args:
        work: what runs.
        weights: all of them; in full training nothing of them stays but f32 copies, which train.
        temporary_bytes: of the compiled program; of training gradients are a part of them.
    """
    cache = state = gradients = optimizer = 0
    at_rest = weights.total
    if work.train:
        found = train_state(work)
        trained = bytes_on_device(found.trained)
        gradients, optimizer = trained, bytes_on_device(found.optimizer)
        temporary_bytes = max(temporary_bytes - gradients, 0)
        if work.train == "full":
            at_rest = 0
            if work.dtype != "float32":  # the step uses them rounded; compiled in f32 it need not
                temporary_bytes += trained // 2
        at_rest += trained
    else:
        shapes = state_shapes(work)
        cache = bytes_on_device((shapes.cache.keys, shapes.cache.values, shapes.cache.positions))
        state = bytes_on_device(shapes) - cache
    return Memory(
        weight_bytes=at_rest,
        cache_bytes=cache,
        state_bytes=state,
        gradient_bytes=gradients,
        optimizer_bytes=optimizer,
        temporary_bytes=temporary_bytes,
    )
