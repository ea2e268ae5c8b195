"""A small model twice: whole on its device, and with its experts in host memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from mixtral_jax.config import ModelConfig
from mixtral_jax.convert.load import HOST
from mixtral_jax.decode.executor import Executor, Resident
from mixtral_jax.decode.generate import Generation, Request
from mixtral_jax.decode.sampling import SamplingOptions
from mixtral_jax.kernels.table import KERNELS
from mixtral_jax.model.placement import LOCAL, LocalPlacement
from mixtral_jax.model.transformer import assemble
from mixtral_jax.offload.executor import OffloadExecutor
from mixtral_jax.offload.load import offloaded
from mixtral_jax.quantize.makers import Recipe, quantize
from mixtral_jax.weights import ExpertSlots
from tests.models import random_leaves

HIDDEN = ("gate", "up", "down")


def with_quantized(
    leaves: Mapping[str, Any], recipes: Mapping[int, Recipe | None], *, ordered: bool = False
) -> dict[str, Any]:
    """The experts of some layers in a scheme; ``ordered`` makes int4 codes those of GPTQ."""
    found = dict(leaves)
    for layer, recipe in recipes.items():
        for name in HIDDEN:
            path = f"layers.{layer}.moe.experts.{name}"
            if recipe is None:
                continue
            q = quantize(np.asarray(leaves[path]), recipe, dtype=np.dtype("float32"))
            if ordered:
                draw = np.random.default_rng(layer)
                orders = [draw.permutation(q.shape[-1]) for _ in range(q.shape[0])]
                order = np.stack(orders).astype(np.int32)
                q = dataclasses.replace(q, scheme="gptq4", order=order)
            found[path] = q
    return found


def _slots(stack: Any) -> ExpertSlots:
    """Each expert by itself, ``[1, O, I]``."""
    each = range(stack.shape[0])
    return ExpertSlots(tuple(jax.tree.map(lambda x, e=e: x[e : e + 1], stack) for e in each))


def on_host(device: Any) -> SingleDeviceSharding:
    """Pinned memory beside a device."""
    return SingleDeviceSharding(device, memory_kind=HOST)


def both(
    config: ModelConfig, leaves: Mapping[str, Any], kernels: str = LOCAL.kernels
) -> tuple[Resident, OffloadExecutor]:
    """Two executors of one model; the offloaded one has a device of its own, and plenty of it."""
    device, placement = jax.devices()[3], LocalPlacement(kernels)
    whole, split = {}, {}
    for path, leaf in leaves.items():
        if leaf.ndim == 3:
            split[path] = jax.device_put(_slots(jax.tree.map(np.asarray, leaf)), on_host(device))
            stacked = KERNELS[kernels].layout == "stacked"
            whole[path] = jax.tree.map(jnp.asarray, leaf if stacked else _slots(leaf))
        else:
            whole[path] = leaf
            split[path] = jax.device_put(leaf, device)
    model, executor = offloaded(config, split, budget=10**9, placement=placement, device=device)
    del model
    return Resident(assemble(config, whole), placement), executor


def within(executor: OffloadExecutor, budget: int, **fields: Any) -> OffloadExecutor:
    """Another executor of the same model, with its programs."""
    return OffloadExecutor(
        executor.parts,
        budget=budget,
        placement=executor.compiler.placement,
        device=executor.device,
        **{"compiler": executor.compiler, **fields},
    )


def plain(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Leaves whose router has opinions."""
    return random_leaves(config, seed)


def write(
    executor: Executor,
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    model: Any = None,
    **fields: Any,
) -> tuple[list[list[int]], np.ndarray]:
    """Tokens and log-probabilities of a batch; rows end at the budget."""
    requests = [
        Request(prompt_ids=tuple(ids), options=options, prompt_index=i)
        for i, ids in enumerate(prompts)
    ]
    if model is None:
        model = executor.model if isinstance(executor, Resident) else _model(executor)
    fields = {"prefill_chunk": 16, **fields}
    generation = Generation(model, requests, placement=LOCAL, executor=executor, **fields)
    rows: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    for chunk in generation.chunks(5):
        for row, (ids, scores) in enumerate(zip(chunk.token_ids, chunk.logprobs, strict=True)):
            rows[row] += ids
            logprobs[row] += scores
    counts = generation.progress.expert_counts
    assert counts is not None
    return rows, np.concatenate([np.concatenate(logprobs), counts.ravel().astype(np.float32)])


def _model(executor: Executor) -> Any:
    assert isinstance(executor, OffloadExecutor)
    model = executor.parts.ends
    assert model.config == executor.parts.config
    return model
