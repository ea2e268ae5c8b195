"""The programs that generate and train, compiled from shapes alone on simulated devices."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.config import ModelConfig
from mixtral_jax.decode import steps
from mixtral_jax.decode.generate import chunk_bucket, row_bucket, slot_bucket
from mixtral_jax.decode.sampling import SamplingOptions, row_sampling
from mixtral_jax.decode.state_shapes import shapes_of_state
from mixtral_jax.finetune.lora import is_pair
from mixtral_jax.finetune.optimizer import make_optimizer, make_schedule
from mixtral_jax.finetune.options import Optimizer, TrainOptions
from mixtral_jax.finetune.step import Rows, TrainState, update
from mixtral_jax.finetune.trained import abstract_state, objective_of, published_coef
from mixtral_jax.kernels.scaled_kv import KVDtype, storage_dtype
from mixtral_jax.kernels.table import KERNELS
from mixtral_jax.model.transformer import assemble, leaf_specs
from mixtral_jax.sharding.collectives import Collective, read_collectives
from mixtral_jax.sharding.dispatch import DispatchOptions
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.place import weight_shardings
from mixtral_jax.sharding.placement import MeshPlacement
from mixtral_jax.sharding.strategy import Strategy
from mixtral_jax.weights import ExpertSlots

Train = Literal["full", "lora", "qlora"]
# The CPU's compiler drops the barriers that make it compute layers again, and then finds that it
# need not: its programs of training keep what those of accelerators do not.
_AS_ACCELERATORS: dict[str, str | bool] = {"xla_disable_hlo_passes": "cse_barrier_expander,cse"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What is to run, and on what mesh.

    Attributes:
        config: sizes.
        mesh: already fitted to the model.
        batch: rows over all devices: conversations at once, or examples per training step.
        context: tokens per row, prompt and answer together.
        dtype: of weights, activations and, without ``kv_dtype``, cache.
        kv_dtype: of the cache.
        strategy: how weights are placed.
        dispatch: how rows travel to experts.
        train: a training step instead of generation.
        optim: of training.
    """

    config: ModelConfig
    mesh: MeshSpec
    batch: int = 1
    context: int = 4096
    dtype: str = "bfloat16"
    kv_dtype: KVDtype | None = None
    strategy: Strategy = dataclasses.field(default_factory=Strategy)
    dispatch: DispatchOptions = dataclasses.field(default_factory=DispatchOptions)
    train: Train | None = None
    optim: Optimizer = "adamw"

    @property
    def rows(self) -> int:
        """Rows that the programs are compiled for; a training batch is never padded."""
        return self.batch if self.train else row_bucket(self.batch, self.mesh.data)

    @property
    def chunk(self) -> int:
        """Prompt tokens per row that a call of prefill reads."""
        return chunk_bucket(self.context)

    @property
    def slots(self) -> int:
        """Cache slots per row."""
        return slot_bucket(self.config, self.context)

    def with_layers(self, layers: int) -> Workload:
        """The same with another number of layers."""
        return dataclasses.replace(
            self, config=dataclasses.replace(self.config, num_hidden_layers=layers)
        )


class Program(NamedTuple):
    """One compiled program, per device.

    ``argument_bytes`` and ``temporary_bytes`` are what XLA's buffer assignment says.
    """

    argument_bytes: int
    temporary_bytes: int
    collectives: list[Collective]


def simulate(num_devices: int) -> None:
    """So many CPU devices, whatever accelerators there are; before JAX starts its backend."""
    flags = os.environ.get("XLA_FLAGS", "")
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags)
    # Nothing is run: machine code need not be good. Buffers and collectives stay the same.
    os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", num_devices)


def _placement(work: Workload) -> MeshPlacement:
    placement = MeshPlacement(work.mesh.build(), work.dispatch, strategy=work.strategy)
    if work.train is None:
        return placement
    # The CPU's own experts have many branches, which hold copies of weights.
    return dataclasses.replace(placement, kernels="dense", min_rows=1)


def _leaves(work: Workload, placement: MeshPlacement) -> dict[str, Any]:
    """Shapes of the weights, where and as ``mj.load`` puts them."""
    specs, mesh = leaf_specs(work.config, work.dtype), placement.mesh
    shardings, shards = weight_shardings(specs, mesh, work.strategy), mesh.shape["expert"]
    leaves: dict[str, Any] = {}
    for path, spec in specs.items():
        shape, sharding = spec.shape, shardings[path]
        if "expert" in spec.axes and KERNELS[placement.kernels].layout == "slots":
            slot = jax.ShapeDtypeStruct((shards, *shape[1:]), spec.dtype, sharding=sharding)
            leaves[path] = ExpertSlots((slot,) * (shape[0] // shards))
        else:
            leaves[path] = jax.ShapeDtypeStruct(shape, spec.dtype, sharding=sharding)
    return leaves


@functools.lru_cache(maxsize=8)  # asked for its bytes, then to compile with
def state_shapes(work: Workload) -> steps.DecodeState:
    """The state of generation as shapes, on its devices."""
    return shapes_of_state(
        work.config,
        rows=work.rows,
        slots=work.slots,
        dtype=storage_dtype(work.kv_dtype, work.dtype),
        placement=_placement(work),
    )


def bytes_on_device(tree: Any) -> int:
    """Bytes that one device holds of a tree of arrays or shapes with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def compile_programs(work: Workload) -> dict[str, Program]:
    """Compiles what the workload runs, by name: prefill and decode, or train."""
    compiled = _train(work) if work.train else _generate(work)
    found = {}
    for name, each in compiled.items():
        memory = each.memory_analysis()
        assert memory is not None
        found[name] = Program(
            memory.argument_size_in_bytes,
            memory.temp_size_in_bytes,
            read_collectives(each.as_text() or ""),
        )
    return found


def _generate(work: Workload) -> dict[str, Any]:
    placement, B = _placement(work), work.rows
    model = assemble(work.config, _leaves(work, placement))
    state = state_shapes(work)
    tokens = jax.ShapeDtypeStruct((B, work.chunk), jnp.int32)
    counts = jax.ShapeDtypeStruct((B,), jnp.int32)
    rows = row_sampling([SamplingOptions()] * B, [0] * B, work.config.vocab_size)
    budget, stopped = np.zeros(B, np.int32), np.zeros(B, np.bool_)
    limits = steps.Limits(budget, stopped, np.asarray(work.config.eos_token_ids, np.int32))
    return {
        "prefill": steps.prefill.lower(model, state, tokens, counts, placement=placement).compile(),
        "decode": steps.decode_step.lower(
            model, state, rows, limits, np.int32(1), placement=placement
        ).compile(),
    }


def train_options(work: Workload) -> TrainOptions:
    """What the fine-tuning command would be asked for."""
    return TrainOptions(
        per_device_train_batch_size=work.batch // (work.mesh.data * work.mesh.expert),
        max_length=work.context,
        use_peft=work.train != "full",
        fsdp=work.strategy.fsdp,
        optim=work.optim,
    )


@functools.lru_cache(maxsize=8)
def train_state(work: Workload) -> TrainState:
    """The state of training as shapes, on its devices."""
    options = train_options(work)
    optimizer = make_optimizer(options, total_steps=1)
    return abstract_state(work.config, options, optimizer, _placement(work))


def _train(work: Workload) -> dict[str, Any]:
    """The update that ``python -m mixtral_jax.finetune`` makes."""
    options = train_options(work)
    placement = _placement(work)
    state = train_state(work)
    frozen = {p: w for p, w in _leaves(work, placement).items() if p not in _whole(state)}
    sharding = jax.NamedSharding(placement.mesh, jax.P(None, ("data", "expert")))
    shape = (1, work.batch, work.context)

    def rows(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    ids = rows(jnp.int32)
    step = update.lower(
        state,
        frozen,
        Rows(tokens=ids, targets=ids, weights=rows(jnp.float32), segments=ids),
        jax.random.key(0),
        objective=objective_of(
            work.config,
            options,
            placement,
            dtype=jnp.dtype(work.dtype),
            aux_coef=published_coef(work.config, None),
        ),
        optimizer=make_optimizer(options, total_steps=1),
        schedule=make_schedule(options, total_steps=1),
    )
    return {"train": step.compile(compiler_options=_AS_ACCELERATORS)}


def _whole(state: TrainState) -> set[str]:
    """Paths of leaves that train whole."""
    return {path for path, leaf in state.trained.items() if not is_pair(leaf)}
