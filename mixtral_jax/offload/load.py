"""From a checkpoint to an executor; the budget is looked at before a weight is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from mixtral_jax.config import ModelConfig
from mixtral_jax.convert.leaves import Leaves
from mixtral_jax.convert.names import EXPERT_LEAF
from mixtral_jax.convert.parts import quantized_weights
from mixtral_jax.decode.generate import LENGTH_BUCKET, chunk_bucket, row_bucket, slot_bucket
from mixtral_jax.errors import USAGE, MixtralError
from mixtral_jax.kernels.scaled_kv import KVDtype
from mixtral_jax.kernels.table import KERNELS, cache_dtype
from mixtral_jax.model.placement import LocalPlacement
from mixtral_jax.model.transformer import Mixtral, assemble, leaf_specs
from mixtral_jax.offload.executor import OffloadExecutor, check_budget
from mixtral_jax.offload.ledger import parse_size
from mixtral_jax.offload.parts import Least, Parts, host_experts, on_device, take_apart
from mixtral_jax.offload.passes import Compiler
from mixtral_jax.qtensor import QTensor
from mixtral_jax.sharding import hosts
from mixtral_jax.weights import ExpertSlots, Layout

DEFAULT_SHARE = 0.9  # of what the backend says it has


def budget_of(asked: str | int | None, device: Any) -> int:
    """Bytes that may be used of a device.

    Raises:
        MixtralError: exit code 64 for no size, where there is none to be had from the device, and
            among several processes.
    """
    if hosts.num_processes() > 1:
        what, fix = "--offload experts is for one process", "leave it out"
        raise MixtralError(what, fix=fix, code=USAGE)
    if asked is not None:
        return parse_size(asked)
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None:
        raise MixtralError(
            f"--offload experts: {device.platform} does not say how much memory it has",
            fix="--device-memory SIZE",
            code=USAGE,
        )
    return int(limit * DEFAULT_SHARE)


def abstract_parts(config: ModelConfig, quantized: Mapping[str, QTensor], dtype: Any) -> Parts:
    """A model in parts, with shapes in place of arrays.

    Args:
        config: sizes.
        quantized: weights that are, whole, by path.
        dtype: of the other weights, and of activations.
    """
    leaves: dict[str, Any] = {}
    for path, spec in leaf_specs(config).items():
        whole = quantized.get(path, jax.ShapeDtypeStruct(spec.shape, jnp.dtype(dtype)))
        if EXPERT_LEAF.fullmatch(path):
            slot = jax.tree.map(
                lambda part: jax.ShapeDtypeStruct((1, *part.shape[1:]), part.dtype), whole
            )
            whole = ExpertSlots((slot,) * spec.shape[0])
        leaves[path] = whole
    return take_apart(config, leaves)


class Generating(NamedTuple):
    """How many rows of how many tokens; of keys and values in which dtype."""

    rows: int = 1
    context: int = LENGTH_BUCKET
    prompt: int = 1
    kv_dtype: KVDtype | None = None


def least_of(compiler: Compiler, what: Generating) -> Least:
    """The device bytes that a generation cannot do without."""
    parts = compiler.parts
    rows = row_bucket(what.rows)
    activations = parts.ends.embed_tokens.get_value().dtype
    dtype = cache_dtype(compiler.placement.kernels, what.kv_dtype, activations)
    state = compiler.state(rows, slot_bucket(parts.config, what.context), dtype)
    passes = [
        compiler.get("prefill", rows, chunk_bucket(what.prompt), state),
        compiler.get("step", rows, 1, state),
    ]
    return compiler.least(state, *passes)


class Way(NamedTuple):
    """How a checkpoint becomes a model: what ``load_weights`` is asked, and what is made of it.

    Attributes:
        config: sizes.
        sharding_of, source, layout: see ``load_weights``.
        kernels: a row of the kernels table.
        assemble: of loaded leaves, the model, and what runs it if that is no ``Resident``.
    """

    config: ModelConfig
    sharding_of: Callable[[str], NamedSharding]
    source: Callable[[Leaves], Leaves]
    layout: Layout
    kernels: str
    assemble: Callable[[Mapping[str, Any]], tuple[Mixtral, OffloadExecutor | None]]


def resident(
    config: ModelConfig,
    *,
    sharding_of: Callable[[str], NamedSharding],
    source: Callable[[Leaves], Leaves],
    kernels: str,
) -> Way:
    """All weights on the devices."""

    def whole(leaves: Mapping[str, Any]) -> tuple[Mixtral, None]:
        return assemble(config, leaves), None

    return Way(config, sharding_of, source, KERNELS[kernels].layout, kernels, whole)


def offloading(way: Way, memory: str | None, *, device: Any, dtype: str | None) -> Way:
    """The same with experts in host memory.

    Args:
        way: of the resident model, on one device.
        memory: of the device, to be used; see ``budget_of``.
        device: that one.
        dtype: to load in; what is stored, if None.

    Raises:
        MixtralError: as ``budget_of``. While the checkpoint opens: exit code 78 if weights and an
            expert alone exceed the budget, with the least that a short text would take.
    """
    budget, placement = budget_of(memory, device), LocalPlacement(way.kernels)

    def checked(leaves: Leaves) -> Leaves:
        found = way.source(leaves)
        kept = dtype or str(found.dtype("embed_tokens"))
        quantized = quantized_weights(found.specs, jnp.dtype(kept))
        parts = abstract_parts(way.config, quantized, kept)
        if parts.device_bytes + parts.expert_bytes > budget:
            least = least_of(Compiler(parts, placement, device), Generating())
            check_budget(budget, least, "a short text")
        return found

    def split(leaves: Mapping[str, Any]) -> tuple[Mixtral, OffloadExecutor]:
        return offloaded(way.config, leaves, budget=budget, placement=placement, device=device)

    return way._replace(
        sharding_of=host_experts(way.sharding_of), source=checked, layout="apart", assemble=split
    )


def offloaded(
    config: ModelConfig,
    leaves: Mapping[str, Any],
    *,
    budget: int,
    placement: LocalPlacement,
    device: Any,
) -> tuple[Mixtral, OffloadExecutor]:
    """The model without its experts, and what runs it.

    Args:
        config: sizes.
        leaves: as ``load_weights`` gives them for ``host_experts``.
        budget: bytes of the device.
        placement: the kernels.
        device: where it runs.
    """
    parts = on_device(take_apart(config, leaves), device)
    executor = OffloadExecutor(parts, budget=budget, placement=placement, device=device)
    model = nnx.merge(*nnx.split(parts.ends))
    model.layers = nnx.List(parts.blocks)
    return model, executor
