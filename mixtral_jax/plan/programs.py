"""The programs that generate and train, compiled from shapes alone on simulated devices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.config import ModelConfig
from mixtral_jax.decode import steps
from mixtral_jax.decode.generate import chunk_bucket, row_bucket, slot_bucket
from mixtral_jax.decode.sampling import SamplingOptions, row_sampling
from mixtral_jax.kernels.scaled_kv import KVDtype, storage_dtype
from mixtral_jax.kernels.table import KERNELS
from mixtral_jax.model.transformer import Mixtral, assemble, leaf_specs
from mixtral_jax.sharding.collectives import Collective, read_collectives
from mixtral_jax.sharding.dispatch import DispatchOptions
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.place import gather_weights, weight_shardings
from mixtral_jax.sharding.placement import MeshPlacement
from mixtral_jax.sharding.strategy import Strategy
from mixtral_jax.weights import Adapted, ExpertSlots

Train = Literal["full", "lora", "qlora"]
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
LORA_RANK = 16


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


def _placement(work: Workload) -> MeshPlacement:
    return MeshPlacement(work.mesh.build(), work.dispatch, strategy=work.strategy)


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
    make = functools.partial(
        steps.empty_state,
        work.config,
        slots=work.slots,
        dtype=storage_dtype(work.kv_dtype, work.dtype),
        placement=_placement(work),
    )
    row = jax.ShapeDtypeStruct((work.rows,), jnp.int32)
    is_row = jax.ShapeDtypeStruct((work.rows,), jnp.bool_)
    where = jax.jit(make).lower(row, is_row).compile().output_shardings
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        jax.eval_shape(make, row, is_row),
        where,
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


def lora_shapes(work: Workload) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes of A ``[R, I]`` and B ``[O, R]`` of every adapted weight, by path."""
    return {
        path: ((LORA_RANK, spec.shape[-1]), (spec.shape[0], LORA_RANK))
        for path, spec in leaf_specs(work.config).items()
        if path.rsplit(".", 1)[-1] in LORA_TARGETS
    }


def _train(work: Workload) -> dict[str, Any]:
    """Loss and gradient of what is trained; the update itself only reads and writes its state."""
    placement = _placement(work)
    mesh = placement.mesh
    leaves = _leaves(work, placement)
    everywhere = jax.NamedSharding(mesh, jax.P())
    tokens = jax.ShapeDtypeStruct((work.rows, work.context), jnp.int32, sharding=everywhere)

    def loss(trained: Any, frozen: Mapping[str, Any], tokens: jax.Array) -> jax.Array:
        model = trained if work.train == "full" else _adapted(work.config, frozen, trained)
        if work.train == "full":
            model = gather_weights(model, mesh, work.strategy)
        logs = jax.nn.log_softmax(model(tokens, placement=placement)[:, :-1])
        return -jnp.take_along_axis(logs, tokens[:, 1:, None], axis=-1).mean()

    if work.train == "full":
        trained: Any = assemble(work.config, leaves)
        leaves = {}
    else:
        trained = {
            path: tuple(
                jax.ShapeDtypeStruct(shape, jnp.float32, sharding=everywhere) for shape in pair
            )
            for path, pair in lora_shapes(work).items()
        }
    step = jax.jit(jax.value_and_grad(loss))
    return {"train": step.lower(trained, leaves, tokens).compile()}


def _adapted(
    config: ModelConfig,
    frozen: Mapping[str, Any],
    trained: Mapping[str, tuple[jax.Array, jax.Array]],
) -> Mixtral:
    adapted = {path: Adapted(frozen[path], a, b, 1.0) for path, (a, b) in trained.items()}
    return assemble(config, {**frozen, **adapted})
