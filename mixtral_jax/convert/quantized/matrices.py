"""The quantized matrices of an open checkpoint, decoded one at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from mixtral_jax.convert.names import Chunk, Plan
from mixtral_jax.convert.parts import PartPath, join, part_spec, split_path
from mixtral_jax.convert.quantized.dense import dequantize
from mixtral_jax.convert.quantized.form import DTYPES, Form, Method, Note
from mixtral_jax.convert.quantized.modules import Module, common_form
from mixtral_jax.convert.reader import Checkpoint
from mixtral_jax.convert.safetensors_file import Tensor
from mixtral_jax.errors import BAD_DATA, MixtralError, listing
from mixtral_jax.model.transformer import LeafSpec

# What no product takes packed: rows are looked up in the embedding, and the router is small.
_NEVER_PACKED = re.compile(r"embed_tokens|layers\.\d+\.moe\.router\.weight")
# What a quantized checkpoint should have quantized: nearly all of the weights.
_LARGE = re.compile(r"layers\.\d+\.(attention\.[qkvo]_proj|moe\.experts\.(gate|up|down))")


class QuantizedMatrices:
    """The quantized matrices that a plan of names has found.

    Args:
        checkpoint: open.
        method: how they are quantized.
        plan: of ``checkpoint``.
        specs: what the model needs.
        note: called with one line if large matrices are not quantized.

    Attributes:
        leaves: every quantized leaf.
        packed: those of them that stay so.
        specs: what ``specs`` become where these are replaced by their parts.

    Raises:
        MixtralError: exit code 65 listing every matrix whose content is impossible, every stack of
            different ones; or if nothing is quantized at all.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        method: Method,
        plan: Plan,
        specs: Mapping[str, LeafSpec],
        *,
        note: Note,
    ):
        self._checkpoint, self._method, self._plan = checkpoint, method, plan
        self._specs = specs
        if not plan.modules:
            raise MixtralError(
                f"{checkpoint.folder}: config.json says {method.name}, but no tensor is quantized",
                fix="use the config.json that was published with the weights",
                code=BAD_DATA,
            )
        self.leaves = self._read_forms()
        self.packed = {leaf for leaf in self.leaves if not _NEVER_PACKED.fullmatch(leaf)}
        self.specs: dict[str, LeafSpec] = {}
        for leaf, spec in specs.items():
            self.specs |= self._part_specs(leaf, spec) if leaf in self.packed else {leaf: spec}
        plain = [leaf for leaf in specs if _LARGE.fullmatch(leaf) and leaf not in self.leaves]
        if plain:
            large = sum(_LARGE.fullmatch(leaf) is not None for leaf in specs)
            note(
                f"{checkpoint.folder}: {len(plain)} of {large} leaves of attention and experts are "
                f"not quantized: {', '.join(plain[:4])}{', ...' if len(plain) > 4 else ''}"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """What the configuration says of them."""
        return {"method": self._method.name, **vars(self._method)}

    def _read_forms(self) -> dict[str, Form]:
        problems, found = [], {}
        for chunk, module in self._modules():
            try:
                form = self._method.form(
                    module.parts,
                    self._shape(chunk),
                    lambda part, parts=module.parts: self._read(parts[part]),
                )
            except ValueError as error:
                problems.append(f"{module.name} ({self._method.name}): {error}")
                continue
            found.setdefault(chunk.leaf, []).append(form)
        forms = {leaf: common_form(several) for leaf, several in found.items()}
        problems += [
            f"{leaf}: its experts are quantized in different ways"
            for leaf, form in forms.items()
            if form is None
        ]
        if problems:
            raise MixtralError(
                f"{self._checkpoint.folder}: {len(problems)} problem(s) with its quantized "
                f"matrices: {listing(problems)}",
                fix="download the checkpoint again, all of its files",
                code=BAD_DATA,
            )
        return {leaf: form for leaf, form in forms.items() if form is not None}

    def _part_specs(self, leaf: str, spec: LeafSpec) -> dict[str, LeafSpec]:
        form = self.leaves[leaf]
        return {
            str(PartPath(leaf, form.scheme, part)): part_spec(
                spec, form.scheme, part, form.num_groups, form.scales
            )
            for part in form.parts
        }

    def _modules(self) -> list[tuple[Chunk, Module]]:
        modules = self._plan.modules
        return [
            (chunk, modules[piece.rows.tensor])
            for chunk, piece in self._plan.sources.items()
            if piece.rows.tensor in modules
        ]

    def _shape(self, chunk: Chunk) -> tuple[int, int]:
        rows, inputs = self._plan.sources[chunk].tensor_shape
        return rows, inputs

    def dtype(self, leaf: str) -> np.dtype:
        """The dtype of the weight that a leaf stands for."""
        return np.dtype(self._specs[leaf].dtype)

    def read(self, chunk: Chunk, out: np.ndarray) -> None:
        """Decodes a part of a matrix, or the weight it stands for, rounded once.

        Args:
            chunk: of a leaf of ``specs`` that is, or is part of, one of ``leaves``.
            out: the whole chunk, in the dtype and shape of its leaf.

        Raises:
            MixtralError: exit code 65 naming the matrix that cannot be.
        """
        weight, part = origin(chunk), split_path(chunk.leaf)
        form = self.leaves[weight.leaf]
        if part is not None:
            out[...] = self._decode(weight, part.part).reshape(out.shape)
            return
        parts = {name: self._decode(weight, name) for name in form.parts}
        dequantize(join(form.scheme, parts, out.dtype), out)

    def _decode(self, chunk: Chunk, part: str) -> np.ndarray:
        module = self._plan.modules[self._plan.sources[chunk].rows.tensor]
        parts = _Lazy(module.parts, self._read)
        try:
            return self._method.decode(part, parts, self._shape(chunk), self.leaves[chunk.leaf])
        except ValueError as error:
            raise MixtralError(
                f"{module.name} ({self._method.name}): {error}",
                fix="download the checkpoint again",
                code=BAD_DATA,
            ) from None

    def _read(self, tensor: Tensor) -> np.ndarray:
        flat = np.empty(math.prod(tensor.shape), DTYPES[tensor.dtype])
        self._checkpoint.read_rows(tensor.name, 0, num_rows(tensor), flat)
        return flat.reshape(tensor.shape)


class _Lazy(Mapping[str, np.ndarray]):
    """Parts that are read when they are asked for."""

    def __init__(self, parts: Mapping[str, Tensor], read: Callable[[Tensor], np.ndarray]):
        self._parts, self._read = parts, read

    def __getitem__(self, part: str) -> np.ndarray:
        return self._read(self._parts[part])

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def origin(chunk: Chunk) -> Chunk:
    """The matrix that a part belongs to; of any other chunk, itself."""
    part = split_path(chunk.leaf)
    return chunk if part is None else Chunk(part.weight, chunk.expert)


def num_rows(tensor: Tensor) -> int:
    """Rows of a tensor as ``Checkpoint.read_rows`` counts them."""
    return math.prod(tensor.shape[:-1] or tensor.shape)
