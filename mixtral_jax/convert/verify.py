"""Proves leaves that were written earlier: against the journal, the manifest and the source."""

from __future__ import annotations

import hashlib
from concurrent.futures import Executor
from pathlib import Path

import numpy as np

from mixtral_jax.convert.companions import check_companions
from mixtral_jax.convert.leaves import HuggingFaceLeaves, OrbaxLeaves, check_leaf, chunk_path
from mixtral_jax.convert.manifest import LeafRecord
from mixtral_jax.convert.names import Chunk, chunks_of
from mixtral_jax.convert.orbax import read_leaf
from mixtral_jax.convert.transfer import digest_leaf, fetch_leaf
from mixtral_jax.errors import BAD_DATA, OUTPUT_EXISTS, MixtralError


def is_intact(folder: Path, leaf: str, record: LeafRecord, pool: Executor) -> bool:
    """True if the chunk files of a leaf hold the bytes that were recorded."""
    if check_leaf(folder, leaf, record.shape, record):
        return False

    def digest(chunk: Chunk) -> str:
        with open(chunk_path(folder, chunk, len(record.shape)), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return tuple(pool.map(digest, chunks_of(leaf, record.shape))) == tuple(record.chunks)


def reads_back(folder: Path, leaf: str, record: LeafRecord, pool: Executor) -> bool:
    """True if Orbax itself reads what was recorded."""
    try:
        value = read_leaf(folder, leaf)
    except (OSError, ValueError, KeyError):  # damaged metadata, in the words of Orbax
        return False
    return digest_leaf(leaf, value, pool) == record


def verify_output(
    output: OrbaxLeaves, source: HuggingFaceLeaves, *, allow_nonfinite: bool, pool: Executor
) -> None:
    """Reads a finished output and its source again, whole, one leaf at a time.

    Raises:
        MixtralError: exit code 65 naming the tensor or file that was altered in the output; 73
            naming the tensor that the source now has otherwise.
    """
    check_companions(output.folder, output.manifest.companions)
    for leaf, record in output.manifest.leaves.items():
        if not is_intact(output.folder, leaf, record, pool) or not reads_back(
            output.folder, leaf, record, pool
        ):
            raise MixtralError(
                f"{leaf}: its bytes in {output.folder} are not those that were written",
                fix="delete that folder and convert again; the disk may be failing",
                code=BAD_DATA,
            )
        value = np.empty(record.shape, output.dtype(leaf))
        found = fetch_leaf(source, leaf, value, allow_nonfinite=allow_nonfinite, pool=pool)
        if found != record:
            raise MixtralError(
                f"{output.folder} was not made from this source: {leaf} differs",
                fix="choose another destination, or delete it",
                code=OUTPUT_EXISTS,
            )
