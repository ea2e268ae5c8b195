"""A quantized checkpoint read as plain weights, matrix by matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mixtral_jax.convert.leaves import Leaves, LeavesOf
from mixtral_jax.convert.names import Chunk
from mixtral_jax.convert.parts import PartPath, check_codes, join, parts_of
from mixtral_jax.convert.quantized.dense import dequantize
from mixtral_jax.convert.transfer import altered, sha256
from mixtral_jax.errors import BAD_DATA, MixtralError
from mixtral_jax.model.transformer import LeafSpec
from mixtral_jax.qtensor import QTensor


class DequantizedLeaves(LeavesOf):
    """The leaves of ``source``, every quantized one as the plain weight that it stands for.

    Args:
        source: a checkpoint with quantized weights, whose parts are proved where it has digests.
        specs: what the model needs.
        dtype: of the plain weights, computed in float32 and rounded once.

    Raises:
        MixtralError: exit code 65 if nothing in ``source`` is quantized.
    """

    def __init__(self, source: Leaves, specs: Mapping[str, LeafSpec], dtype: np.dtype):
        super().__init__(source)
        self.specs, self._dtype = specs, dtype
        self._parts = {
            leaf: parts
            for leaf in specs
            if leaf not in source.specs and (parts := parts_of(leaf, source.specs))
        }
        if not self._parts:
            raise MixtralError(
                "--dequantize: the checkpoint is not quantized",
                fix="leave it out",
                code=BAD_DATA,
            )

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Of the source, and what was done."""
        return {"source": self.source.fingerprint, "dequantized": True}

    def unit(self, chunk: Chunk) -> int:
        """Quantized matrices are read whole."""
        if chunk.leaf not in self._parts:
            return self.source.unit(chunk)
        return self.specs[chunk.leaf].shape[0 if chunk.expert is None else 1]

    def source_name(self, chunk: Chunk) -> str:
        """See Leaves."""
        return self.source.source_name(next(iter(self._chunks(chunk).values())))

    def _chunks(self, chunk: Chunk) -> dict[str, Chunk]:
        """The chunks of the source that a chunk is made of, by part; itself if it is plain."""
        parts: dict[str, PartPath] = self._parts.get(chunk.leaf, {})
        found = {name: Chunk(str(path), chunk.expert) for name, path in parts.items()}
        return found or {"": chunk}

    def dtype(self, leaf: str) -> np.dtype:
        """See Leaves."""
        return self._dtype if leaf in self._parts else self.source.dtype(leaf)

    def read_rows(self, chunk: Chunk, start: int, stop: int, out: np.ndarray) -> None:
        """See Leaves; of a quantized matrix, all rows."""
        if chunk.leaf not in self._parts:
            self.source.read_rows(chunk, start, stop, out)
            return
        dequantize(read_matrix(self.source, chunk, self._parts[chunk.leaf], out.dtype), out)

    def prefetch(self, leaf: str) -> None:
        """See Leaves."""
        for part in self._chunks(Chunk(leaf, None)).values():
            self.source.prefetch(part.leaf)

    def digest(self, chunk: Chunk) -> str | None:
        """None for what was quantized: its parts are proved while it is read."""
        return None if chunk.leaf in self._parts else self.source.digest(chunk)


def read_matrix(
    leaves: Leaves, chunk: Chunk, parts: Mapping[str, PartPath], dtype: np.dtype
) -> QTensor:
    """One quantized matrix of a checkpoint, of numpy arrays.

    Args:
        leaves: the checkpoint.
        chunk: of the weight.
        parts: of the weight in ``leaves``, by name.
        dtype: of the weight.
    """
    scheme = next(iter(parts.values())).scheme
    found = {
        name: read_chunk(leaves, Chunk(str(path), chunk.expert)) for name, path in parts.items()
    }
    return join(scheme, found, dtype)


def read_chunk(leaves: Leaves, chunk: Chunk) -> np.ndarray:
    """A whole chunk of what is stored, proved if a digest was recorded (exit code 65)."""
    shape = leaves.specs[chunk.leaf].shape[0 if chunk.expert is None else 1 :]
    out = np.empty(shape, leaves.dtype(chunk.leaf))
    leaves.read_rows(chunk, 0, shape[0], out)
    recorded = leaves.digest(chunk)
    if recorded is not None and recorded != sha256(out):
        raise altered(leaves, chunk)
    check_codes(chunk.leaf, leaves.source_name(chunk), out)
    return out
