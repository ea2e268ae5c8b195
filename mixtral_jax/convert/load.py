"""Reads a checkpoint folder onto a mesh: each process reads what its devices hold, once.

Both kinds of folder are read with positioned reads into host memory, proved, cast and handed to the
devices piece by piece. A replicated leaf is read once per process, not once per device.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.config import ModelConfig
from mixtral_jax.convert.companions import check_companions
from mixtral_jax.convert.finite import all_finite
from mixtral_jax.convert.leaves import Leaves, common_dtype, open_leaves
from mixtral_jax.convert.names import EXPERT_LEAF, Chunk
from mixtral_jax.convert.orbax_leaves import OrbaxLeaves
from mixtral_jax.convert.parts import (
    PartPath,
    check_codes,
    join,
    parts_of,
    quantized_weights,
    split_path,
    take_apart,
)
from mixtral_jax.convert.transfer import altered, sha256
from mixtral_jax.errors import BAD_DATA, MixtralError
from mixtral_jax.model.transformer import LeafSpec, leaf_specs
from mixtral_jax.qtensor import QTensor
from mixtral_jax.sharding.quantized import check_split, make_ready
from mixtral_jax.sharding.rules import kind_specs
from mixtral_jax.weights import ExpertSlots, Layout, Weight

ShardingOf: TypeAlias = Callable[[str], jax.sharding.Sharding]
Device: TypeAlias = Any  # a jax.Device, which type checkers take for a variable
# (leaf, ids of the devices that hold what was read) -> bytes read from the checkpoint.
Reads: TypeAlias = Counter[tuple[str, tuple[int, ...]]]
# Leaves in flight at a time; each costs its local bytes of host memory.
THREADS = min(4, os.cpu_count() or 1)
HOST = "pinned_host"  # the memory kind of what stays at the host
_ALIGNMENT = 64  # bytes: JAX adopts host memory so aligned on the CPU instead of copying it


def load_weights(
    folder: str | Path,
    config: ModelConfig,
    *,
    sharding_of: ShardingOf,
    source: Callable[[Leaves], Leaves] = lambda leaves: leaves,
    adapt: Callable[[dict[str, Weight]], dict[str, Weight]] = lambda weights: weights,
    dtype: str | None = None,
    expert_shards: int = 1,
    layout: Layout = "slots",
    verify: bool = True,
    progress: Callable[[int], None] | None = None,
    note: Callable[[str], None] = lambda line: None,
    reads: Reads | None = None,
) -> dict[str, Weight]:
    """Loads every leaf of the model.

    Args:
        folder: a folder that ``convert`` wrote, or one of published files in any layout.
        config: the model's configuration.
        sharding_of: leaf path -> sharding; for an expert leaf, of a ``[*, O, I]`` array whose first
            dim is on the expert axis, which fits the stack and each slot. Of a quantized weight, a
            NamedSharding. Its memory kind says where at the device the leaf lies.
        source: given the opened folder, what to read instead: weights quantized on the way.
        adapt: given the weights on the mesh, what to load instead: with an adapter's factors,
            whose channels are still in the checkpoint's order then.
        dtype: cast to this on the host, piece by piece. None: what is stored; where tensors
            differ, the dtype of the configuration if some have it, else that of most bytes.
        expert_shards: size of the expert axis; must divide the number of experts.
        layout: ``slots`` gives expert leaves as ``ExpertSlots``, ``stacked`` as ``[E, O, I]``,
            which quantized ones are too, unless it is ``apart``.
        verify: prove what ``convert`` wrote against its manifest, weights chunk by chunk (and the
            small files, beside Orbax weights). Where devices hold parts of a chunk, the whole chunk
            is read for it, once per process.
        progress: called with bytes read, from several threads.
        note: called with one line for each thing a person should know.
        reads: counts bytes read by leaf and devices.

    Returns:
        The leaves by path.

    Raises:
        MixtralError: exit code 66 without a checkpoint; 65 if it does not fit the configuration
            or its bytes are not those that were written or do not fit ``dtype``, naming the
            tensor.
    """
    if config.num_local_experts % expert_shards:
        raise ValueError(f"{expert_shards} expert shards do not divide {config.num_local_experts}")
    specs = leaf_specs(config)
    leaves = open_leaves(folder, specs, head_dim=config.head_dim, note=note)
    if verify and isinstance(leaves, OrbaxLeaves):
        check_companions(leaves.folder, leaves.manifest.companions)
    leaves = source(leaves)
    dtype = dtype or one_dtype(leaves, specs, config.dtype, note)
    loader = _Loader(leaves, dtype=dtype, verify=verify, progress=progress, reads=reads)

    def load(path: str) -> Weight:
        laid: Layout = layout if path in specs or layout == "apart" else "stacked"
        how: dict[str, Any] = {"expert_shards": expert_shards, "layout": laid}
        shape = leaves.specs[path].shape
        return loader.leaf(path, shape, shardings_of_parts[path], **how)

    try:
        quantized = quantized_weights(leaves.specs, jnp.dtype(dtype))
        shardings_of_parts = part_shardings(specs, quantized, sharding_of)
        order = _in_order(leaves.specs)
        with ThreadPoolExecutor(THREADS) as pool:
            loaded = pool.map(lambda paths: [load(path) for path in paths], order)
            found = dict(zip(itertools.chain(*order), itertools.chain(*loaded), strict=True))
    finally:
        leaves.close()
    for path, shapes in quantized.items():
        parts = {name: found[str(part)] for name, part in parts_of(path, found).items()}
        found[path] = _joined(shapes.scheme, parts, shapes.dtype)
    weights = adapt({path: found[path] for path in specs})
    if not quantized:
        return weights
    shardings = {path: sharding_of(path) for path in specs}
    return make_ready(weights, cast(Mapping[str, jax.sharding.NamedSharding], shardings))


def _in_order(specs: Mapping[str, LeafSpec]) -> list[list[str]]:
    """Weights by their leaves, codes first: what is quantized on the way has small parts, which
    wait in memory from when the codes are read until they are read themselves.

    Large weights first, so that no thread is left alone with one at the end.
    """
    found: dict[str, list[str]] = {}
    for path in specs:
        part = split_path(path)
        found.setdefault(path if part is None else part.weight, []).append(path)
    return sorted(found.values(), key=lambda paths: -max(math.prod(specs[p].shape) for p in paths))


def part_shardings(
    specs: Mapping[str, LeafSpec], quantized: Mapping[str, QTensor], sharding_of: ShardingOf
) -> dict[str, jax.sharding.Sharding]:
    """The sharding of every stored leaf; refuses parts that the mesh cannot split."""
    found: dict[str, jax.sharding.Sharding] = {}
    for path in specs:
        sharding = sharding_of(path)
        if path not in quantized:
            found[path] = sharding
            continue
        assert isinstance(sharding, jax.sharding.NamedSharding), path
        check_split(path, quantized[path], sharding)
        laid = take_apart(kind_specs(quantized[path], sharding.spec))
        for name, spec in laid.items():
            stored = (*spec, None) if name == "scale_offset" else spec  # [..., 1] on disk
            part = str(PartPath(path, quantized[path].scheme, name))
            found[part] = jax.sharding.NamedSharding(
                sharding.mesh,
                jax.sharding.PartitionSpec(*stored),
                memory_kind=sharding.memory_kind,
            )
    return found


def _joined(scheme: str, parts: dict[str, Any], dtype: Any) -> Weight:
    """A QTensor of placed parts, or slots of them."""
    if isinstance(parts["codes"], ExpertSlots):
        columns = zip(*(part.slots for part in parts.values()), strict=True)
        slots = [
            _joined(scheme, dict(zip(parts, column, strict=True)), dtype) for column in columns
        ]
        return ExpertSlots(tuple(slots))
    if "scale_offset" in parts:
        parts = parts | {"scale_offset": _without_last(parts["scale_offset"])}
    return join(scheme, parts, dtype)


def _without_last(offset: jax.Array) -> jax.Array:
    """Its last dim, of one, taken off, where it lies."""
    sharding = offset.sharding
    if sharding.memory_kind != HOST:
        return _last_of_one(offset)
    assert isinstance(sharding, jax.sharding.NamedSharding)  # programs do not compute there
    spec = jax.sharding.PartitionSpec(*sharding.spec[: offset.ndim - 1])
    placed = jax.sharding.NamedSharding(sharding.mesh, spec, memory_kind=HOST)
    return jax.device_put(np.asarray(offset)[..., 0], placed)


@jax.jit
def _last_of_one(offset: jax.Array) -> jax.Array:
    return offset[..., 0]


def one_dtype(
    leaves: Leaves, specs: Mapping[str, LeafSpec], preferred: str, note: Callable[[str], None]
) -> str:
    """The dtype to load in where none is asked for, with a note if tensors must be cast."""
    stored = {leaf: leaves.dtype(leaf) for leaf in specs if leaf in leaves.specs}
    dtype = common_dtype(specs, stored, preferred=preferred)
    cast = sum(found != dtype for found in stored.values())
    if cast:
        count = f"{cast} of {len(stored)}"
        note(f"the checkpoint mixes dtypes: {count} tensors are cast to {dtype.name}")
    return dtype.name


Bounds: TypeAlias = tuple[tuple[int, int], ...]


class _Loader:
    def __init__(
        self,
        leaves: Leaves,
        *,
        dtype: str,
        verify: bool,
        progress: Callable[[int], None] | None,
        reads: Reads | None,
    ):
        self.leaves = leaves
        self.dtype = dtype
        self.verify = verify
        self.progress = progress
        self.reads = reads
        self._counting = threading.Lock()

    def leaf(
        self,
        path: str,
        shape: tuple[int, ...],
        sharding: jax.sharding.Sharding,
        *,
        expert_shards: int,
        layout: Layout,
    ) -> Weight:
        if not EXPERT_LEAF.fullmatch(path):
            return _Array(self, shape, [Chunk(path, None)]).place(sharding)
        experts = [Chunk(path, e) for e in range(shape[0])]
        if layout == "stacked":
            return _Array(self, shape, experts).place(sharding)
        num_slots = shape[0] // expert_shards
        shape = (expert_shards, *shape[1:])
        slots = (_Array(self, shape, experts[i::num_slots]) for i in range(num_slots))
        return ExpertSlots(tuple(slot.place(sharding) for slot in slots))

    def recorded(self, chunk: Chunk) -> str | None:
        """The digest to prove a chunk by; None where none was recorded, or none is asked for."""
        return self.leaves.digest(chunk) if self.verify else None

    def read(
        self, chunk: Chunk, start: int, stop: int, out: np.ndarray, devices: list[Device]
    ) -> None:
        """Reads rows of a chunk for ``devices``: all rows, where there is a digest."""
        self.leaves.read_rows(chunk, start, stop, out)
        with self._counting:
            if self.reads is not None:
                self.reads[chunk.leaf, tuple(sorted(d.id for d in devices))] += out.nbytes
            if self.progress is not None:
                self.progress(out.nbytes)
        recorded = self.recorded(chunk)
        if recorded is not None and recorded != sha256(out):
            raise altered(self.leaves, chunk)
        check_codes(chunk.leaf, self.leaves.source_name(chunk), out)


class _Array:
    """One array to be placed; with experts, row r of dim 0 is ``chunks[r]``."""

    def __init__(self, loader: _Loader, shape: tuple[int, ...], chunks: list[Chunk]):
        self.loader, self.shape, self.chunks = loader, shape, chunks
        self.stacked = chunks[0].expert is not None
        self.chunk_shape = shape[1:] if self.stacked else shape
        self.stored = loader.leaves.dtype(chunks[0].leaf)
        is_part = split_path(chunks[0].leaf) is not None  # stays as it is
        self.dtype = self.stored if is_part else np.dtype(jnp.dtype(loader.dtype))
        # Chunks that devices share parts of, read once for all of them.
        self.shared: dict[Chunk, np.ndarray] = {}

    def place(self, sharding: jax.sharding.Sharding) -> jax.Array:
        holders: dict[Bounds, list[Device]] = {}
        for device, index in sharding.addressable_devices_indices_map(self.shape).items():
            assert index is not None
            bounds = tuple(s.indices(size)[:2] for s, size in zip(index, self.shape, strict=True))
            holders.setdefault(bounds, []).append(device)
        shards = []
        for bounds, devices in holders.items():
            piece = self._piece(bounds, devices)
            kind = sharding.memory_kind
            shards += [
                jax.device_put(piece, jax.sharding.SingleDeviceSharding(device, memory_kind=kind))
                for device in devices
            ]
        return jax.make_array_from_single_device_arrays(
            self.shape, sharding, shards, dtype=self.dtype
        )

    def _piece(self, bounds: Bounds, devices: list[Device]) -> np.ndarray:
        piece = _aligned_empty(tuple(stop - start for start, stop in bounds), self.dtype)
        if not self.stacked:
            self._fill(piece, self.chunks[0], bounds, devices)
        else:
            for row, chunk in zip(piece, self.chunks[slice(*bounds[0])], strict=True):
                self._fill(row, chunk, bounds[1:], devices)
        return piece

    def _fill(self, out: np.ndarray, chunk: Chunk, bounds: Bounds, devices: list[Device]) -> None:
        (start, stop), *columns = bounds
        whole_rows = all(
            part == (0, size) for part, size in zip(columns, self.chunk_shape[1:], strict=True)
        )
        end, unit = self.chunk_shape[0], self.loader.leaves.unit(chunk)
        whole = whole_rows and (start, stop) == (0, end)
        aligned = whole_rows and start % unit == 0 and (stop % unit == 0 or stop == end)
        if whole or (aligned and self.loader.recorded(chunk) is None):
            rows = out if self.stored == self.dtype else np.empty(out.shape, self.stored)
            self.loader.read(chunk, start, stop, rows, devices)
        else:
            if chunk not in self.shared:
                self.shared[chunk] = np.empty(self.chunk_shape, self.stored)
                self.loader.read(chunk, 0, self.chunk_shape[0], self.shared[chunk], devices)
            rows = self.shared[chunk][start:stop][(slice(None), *(slice(*c) for c in columns))]
        if rows is not out:
            with np.errstate(over="ignore", invalid="ignore"):
                out[...] = rows
            self._check_cast(chunk, rows, out)

    def _check_cast(self, chunk: Chunk, rows: np.ndarray, out: np.ndarray) -> None:
        """Refuses a cast that makes infinities out of numbers."""
        if all_finite(out) or not np.any(np.isfinite(rows) & ~np.isfinite(out)):
            return
        raise MixtralError(
            f"{self.loader.leaves.source_name(chunk)} has values too large for {self.dtype.name}",
            fix="choose dtype bfloat16 or float32",
            code=BAD_DATA,
        )


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    buffer = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    offset = -buffer.ctypes.data % _ALIGNMENT
    return buffer[offset : offset + num_bytes].view(dtype).reshape(shape)
