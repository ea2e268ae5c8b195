"""A checkpoint that is quantized while it is read, matrix by matrix.

To whoever reads, it is a checkpoint of quantized parts: the loader places them on a mesh and the
converter writes them to disk, without knowing that a maker stands between.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mixtral_jax.convert.finite import all_finite
from mixtral_jax.convert.leaves import Leaves, LeavesOf
from mixtral_jax.convert.names import Chunk
from mixtral_jax.convert.parts import PartPath, part_spec, split_path, take_apart
from mixtral_jax.convert.safetensors_file import bytes_of
from mixtral_jax.convert.transfer import altered
from mixtral_jax.errors import BAD_DATA, MixtralError
from mixtral_jax.model.transformer import LeafSpec
from mixtral_jax.qtensor import SCHEMES, QTensor
from mixtral_jax.quantize.errors import MatrixError, error_of
from mixtral_jax.quantize.makers import Recipe, Rows, nest, quantize, quantize_rows
from mixtral_jax.quantize.recorded import recorded

# Bytes of the source that are quantized at a time; several arrays of that many numbers are made.
BLOCK_BYTES = 1 << 20
CODED_BLOCK_BYTES = 1 << 24  # of schemes that go through all rows of a block at once, over inputs
# A matrix with one of these axes is quantized: the projections of attention, and experts.
QUANTIZED_AXES = frozenset({"heads", "kv_heads", "mlp"})
# The same, of schemes that are for experts only.
EXPERT_AXES = {"qmoe": frozenset({"expert"})}


def is_quantized(spec: LeafSpec, scheme: str | None = None) -> bool:
    """Whether a scheme quantizes a weight: chosen by its axes, not by its name.

    Args:
        spec: of the weight.
        scheme: a key of ``SCHEMES``; None for any that is not for experts only.
    """
    axes = QUANTIZED_AXES if scheme is None else EXPERT_AXES.get(scheme, QUANTIZED_AXES)
    return bool(axes & set(spec.axes))


def made_specs(leaf: str, spec: LeafSpec, recipe: Recipe) -> dict[str, LeafSpec]:
    """The parts that a recipe makes of a weight, by path.

    Raises:
        MixtralError: exit code 78 for rows of no whole groups.
    """
    recipe.check_fits(leaf, spec.shape[-1])
    one_row = quantize(np.zeros((1, spec.shape[-1]), np.float32), recipe)
    groups = one_row.scales.shape[-1]
    return {
        str(PartPath(leaf, recipe.codes, name)): part_spec(
            spec, recipe.codes, name, groups, part.dtype
        )
        for name, part in take_apart(one_row).items()
    }


class DerivedLeaves(LeavesOf):
    """The leaves of ``source`` with parts in place of what a scheme quantizes.

    Args:
        source: a checkpoint of plain weights.
        scheme: says which weights those are.
        made: the parts of a weight that is quantized, by path.

    Raises:
        MixtralError: exit code 65 if the source is quantized already.
    """

    def __init__(
        self,
        source: Leaves,
        scheme: str,
        made: Callable[[str, LeafSpec], Mapping[str, LeafSpec]],
    ):
        super().__init__(source)
        self.specs: dict[str, LeafSpec] = {}
        for leaf, spec in source.specs.items():
            part = split_path(leaf)
            if part is not None:
                raise MixtralError(
                    f"{part.weight} is quantized already ({part.scheme})",
                    fix="quantize the checkpoint that it was made from",
                    code=BAD_DATA,
                )
            self.specs |= made(leaf, spec) if is_quantized(spec, scheme) else {leaf: spec}

    def unit(self, chunk: Chunk) -> int:
        """Parts are read whole."""
        if split_path(chunk.leaf) is None:
            return self.source.unit(chunk)
        return self.specs[chunk.leaf].shape[0 if chunk.expert is None else 1]

    def source_name(self, chunk: Chunk) -> str:
        """See Leaves."""
        return self.source.source_name(origin_of(chunk))

    def dtype(self, leaf: str) -> np.dtype:
        """See Leaves."""
        if split_path(leaf) is None:
            return self.source.dtype(leaf)
        return np.dtype(self.specs[leaf].dtype)

    def prefetch(self, leaf: str) -> None:
        """See Leaves."""
        part = split_path(leaf)
        if part is None or part.part == "codes":
            self.source.prefetch(leaf if part is None else part.weight)

    def digest(self, chunk: Chunk) -> str | None:
        """None for parts: nothing recorded them, and their source is proved while it is read."""
        return self.source.digest(chunk) if split_path(chunk.leaf) is None else None

    def _read_plain(self, chunk: Chunk, start: int, stop: int, out: np.ndarray) -> None:
        """Rows of what stays as it is."""
        self.source.read_rows(chunk, start, stop, out)
        if not all_finite(out):
            raise not_finite(self.source.source_name(chunk))


class QuantizingLeaves(DerivedLeaves):
    """The leaves of ``source`` with attention and experts in few bits.

    Args:
        source: a checkpoint of plain weights.
        recipe: how to quantize.
        verify: prove the source against its digests, where it has some.
        measure: compute the error of each matrix.

    Attributes:
        specs: as for ``Leaves``.
        errors: of each matrix that was quantized, where measured.

    Raises:
        MixtralError: exit code 65 if the source is quantized already, 78 if its rows are no whole
            groups.
    """

    def __init__(
        self, source: Leaves, recipe: Recipe, *, verify: bool = True, measure: bool = False
    ):
        super().__init__(source, recipe.codes, lambda leaf, spec: made_specs(leaf, spec, recipe))
        self.recipe = recipe
        self._verify, self._measure = verify, measure
        self.errors: dict[Chunk, MatrixError] = {}
        # Small parts of a matrix, from when its codes are read until they are read themselves.
        self._waiting: dict[Chunk, np.ndarray] = {}
        self._locks: dict[Chunk, threading.Lock] = {}
        self._guard = threading.Lock()

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Of the source, and the recipe."""
        return {"source": self.source.fingerprint, "quantize": dataclasses.asdict(self.recipe)}

    def read_rows(self, chunk: Chunk, start: int, stop: int, out: np.ndarray) -> None:
        """See Leaves; of parts, all rows."""
        part = split_path(chunk.leaf)
        if part is None:
            self._read_plain(chunk, start, stop, out)
            return
        with self._guard:
            lock = self._locks.setdefault(origin_of(chunk), threading.Lock())
        with lock:
            found = self._waiting.pop(chunk, None)
            if found is None:
                found = self._make(part, chunk)
            out[...] = found.reshape(out.shape)

    def report(self, leaf: str) -> dict[str, Any] | None:
        """See Reporting."""
        return recorded(leaf, self.errors)

    def _make(self, part: PartPath, chunk: Chunk) -> np.ndarray:
        """Quantizes a matrix and gives the part asked for; the other small ones will wait."""
        rows = self._quantize(origin_of(chunk))
        made = take_apart(self._tensor(rows, self.source.dtype(part.weight)))
        for name, value in made.items():
            if name not in ("codes", part.part):
                path = str(part._replace(part=name))
                self._waiting[Chunk(path, chunk.expert)] = np.asarray(value)
        return np.asarray(made[part.part])

    def _tensor(self, rows: Rows, dtype: np.dtype) -> QTensor:
        scales: Any = nest(rows.scales) if self.recipe.double_quant else rows.scales
        return QTensor(rows.codes, scales, self.recipe.codes, dtype, zeros=rows.zeros)

    def _quantize(self, origin: Chunk) -> Rows:
        spec = self.source.specs[origin.leaf]
        num_rows, inputs = spec.shape[-2:]
        dtype, unit = self.source.dtype(origin.leaf), self.source.unit(origin)
        is_coded = SCHEMES[self.recipe.codes].is_coded
        block_bytes = CODED_BLOCK_BYTES if is_coded else BLOCK_BYTES
        step = unit * max(1, block_bytes // (unit * inputs * dtype.itemsize))
        recorded, hashed = self.source.digest(origin), hashlib.sha256()
        found: list[Rows] = []
        blocks = [(start, min(num_rows, start + step)) for start in range(0, num_rows, step)]
        for start, stop in blocks:
            rows = np.empty((stop - start, inputs), dtype)
            self.source.read_rows(origin, start, stop, rows)
            if self._verify and recorded is not None:
                hashed.update(bytes_of(rows))
            found.append(self._one_block(origin, rows))
        if self._verify and recorded is not None and hashed.hexdigest() != recorded:
            raise altered(self.source, origin)
        parts = [
            None if parts[0] is None else np.concatenate(parts)
            for parts in zip(*found, strict=True)
        ]
        made = Rows(*parts)  # type: ignore[arg-type]
        if self._measure:
            self.errors[origin] = self._error(origin, made, blocks, dtype)
        return made

    def _error(
        self, origin: Chunk, made: Rows, blocks: list[tuple[int, int]], dtype: np.dtype
    ) -> MatrixError:
        """Compares with the source, which the system has just read."""
        tensor = self._tensor(made, np.dtype(np.float32))
        scales = np.asarray(tensor.scale_values())
        total = MatrixError()
        for start, stop in blocks:
            rows = np.empty((stop - start, self.source.specs[origin.leaf].shape[-1]), dtype)
            self.source.read_rows(origin, start, stop, rows)
            zeros = None if made.zeros is None else made.zeros[start:stop]
            part = dataclasses.replace(
                tensor, codes=made.codes[start:stop], scales=scales[start:stop], zeros=zeros
            )
            total += error_of(rows, part)
        return total

    def _one_block(self, origin: Chunk, rows: np.ndarray) -> Rows:
        try:
            return quantize_rows(rows, self.recipe)
        except MixtralError as error:
            name = self.source.source_name(origin)
            raise MixtralError(f"{name}: {error}", code=error.code) from None


def not_finite(name: str) -> MixtralError:
    """The error of a tensor that nobody should quantize, or keep beside what is quantized."""
    return MixtralError(
        f"{name} has NaN or infinite values", fix="download the checkpoint again", code=BAD_DATA
    )


def origin_of(chunk: Chunk) -> Chunk:
    """The matrix that a part is made of."""
    part = split_path(chunk.leaf)
    return chunk if part is None else Chunk(part.weight, chunk.expert)
