"""Writes one leaf as one Orbax checkpoint.

A leaf is the unit because a save is then atomic (Orbax renames a finished folder into place) and
needs no later merge; docs/adr/0004 tells why ``ocp.partial`` was not used. Arrays are zarr v2
without OCDBT and compression: each chunk is a file of raw bytes, and a save holds at most one copy.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from orbax.checkpoint import v1 as ocp

from mixtral_jax.convert.names import EXPERT_LEAF
from mixtral_jax.convert.orbax_leaves import WEIGHTS
from mixtral_jax.errors import IO_ERROR, MixtralError


def write_leaf(folder: Path, leaf: str, value: np.ndarray) -> None:
    """Writes ``weights/<leaf>``, replacing whatever an interrupted run left there.

    Args:
        folder: where ``weights`` lies.
        leaf: its canonical path.
        value: C-ordered, in the dtype to store; not changed while this runs.

    Raises:
        MixtralError: exit code 74 if the disk is full or its quota is spent.
    """
    parent = folder / WEIGHTS
    for stale in parent.glob(f"{leaf}.orbax-checkpoint-tmp*"):
        shutil.rmtree(stale)
    path = parent / leaf
    if path.exists():
        shutil.rmtree(path)
    context = ocp.Context()
    saving = context.array.saving
    saving.use_ocdbt = False
    saving.use_zarr3 = False
    saving.use_compression = False
    saving.enable_write_sharding_file = False
    context.memory.deepcopy_host_arrays = False
    if EXPERT_LEAF.fullmatch(leaf):
        saving.storage_options.chunk_byte_size = value.nbytes // value.shape[0]
        saving.storage_options.shard_axes = (0,)
    try:
        with context, _quiet():
            ocp.save(str(path), {leaf: value})
    except Exception as error:
        if is_disk_full(error):
            raise disk_full(folder) from error
        raise


def read_leaf(folder: Path, leaf: str) -> np.ndarray:
    """Reads a leaf back through Orbax itself."""
    with _quiet():
        return ocp.load(str(folder / WEIGHTS / leaf))[leaf]


def disk_full(folder: Path) -> MixtralError:
    """The error of a disk that filled up during the work."""
    return MixtralError(
        f"the disk of {folder} is full; finished leaves are kept",
        fix="free space and run the same command again to resume, or delete that folder",
        code=IO_ERROR,
    )


def is_disk_full(error: BaseException) -> bool:
    """True for the errors of Python and TensorStore that mean a full disk or quota."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError) and error.errno in full:
        return True
    words = ("No space left on device", "Disk quota exceeded", "File too large")
    return any(word in str(error) for word in words)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences Orbax's log: hints about unused options, tracebacks of errors it also raises."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
