"""From a checkpoint to an executor; the budget is looked at before a weight is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mixtral_jax.config import ModelConfig
from mixtral_jax.convert.leaves import Leaves
from mixtral_jax.convert.names import EXPERT_LEAF
from mixtral_jax.convert.parts import quantized_weights
from mixtral_jax.decode.generate import LENGTH_BUCKET, chunk_bucket, row_bucket, slot_bucket
from mixtral_jax.errors import USAGE, MixtralError
from mixtral_jax.kernels.scaled_kv import KVDtype, storage_dtype
from mixtral_jax.model.placement import LocalPlacement
from mixtral_jax.model.transformer import Mixtral, leaf_specs
from mixtral_jax.offload.executor import OffloadExecutor, check_budget
from mixtral_jax.offload.ledger import parse_size
from mixtral_jax.offload.parts import Least, Parts, on_device, take_apart
from mixtral_jax.offload.passes import Compiler
from mixtral_jax.qtensor import QTensor
from mixtral_jax.sharding import hosts
from mixtral_jax.weights import ExpertSlots

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
    dtype = storage_dtype(what.kv_dtype, parts.ends.embed_tokens.get_value().dtype)
    state = compiler.state(rows, slot_bucket(parts.config, what.context), dtype)
    passes = [
        compiler.get("prefill", rows, chunk_bucket(what.prompt), state),
        compiler.get("step", rows, 1, state),
    ]
    return compiler.least(state, *passes)


def checked(
    source: Callable[[Leaves], Leaves],
    config: ModelConfig,
    *,
    budget: int,
    dtype: str | None,
    placement: LocalPlacement,
    device: Any,
) -> Callable[[Leaves], Leaves]:
    """A ``source`` of ``load_weights`` that refuses a budget which weights and an expert exceed.

    Raises:
        MixtralError: exit code 78, with the least that a short text would take.
    """

    def opened(leaves: Leaves) -> Leaves:
        found = source(leaves)
        kept = dtype or str(found.dtype("embed_tokens"))
        parts = abstract_parts(config, quantized_weights(found.specs, jnp.dtype(kept)), kept)
        if parts.device_bytes + parts.expert_bytes > budget:
            least = least_of(Compiler(parts, placement, device), Generating())
            check_budget(budget, least, "a short text")
        return found

    return opened


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
