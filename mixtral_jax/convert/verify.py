"""Proves leaves that were written earlier: against the journal, the manifest and the source."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor

import numpy as np

from mixtral_jax.convert.manifest import LeafRecord, Manifest
from mixtral_jax.convert.output import Output
from mixtral_jax.convert.safetensors_file import np_dtype
from mixtral_jax.errors import BAD_DATA, OUTPUT_EXISTS, MixtralError


def verify_output(
    output: Output,
    manifest: Manifest,
    fetch: Callable[[str, np.ndarray], LeafRecord],
    pool: Executor,
    *,
    before_leaf: Callable[[], None],
) -> None:
    """Reads a finished output and its source again, whole, one leaf at a time.

    Args:
        output: what was written.
        manifest: what it should hold.
        fetch: fills an array with a leaf, as the conversion did.
        pool: runs one chunk per task.
        before_leaf: called before each leaf; may raise to end the work there.

    Raises:
        MixtralError: exit code 65 naming the tensor or file that was altered in the output; 73
            naming the tensor that the source now has otherwise.
    """
    for leaf, record in manifest.leaves.items():
        before_leaf()
        if not output.is_intact(leaf, record, pool) or not output.reads_back(leaf, record, pool):
            raise MixtralError(
                f"{leaf}: its bytes in {output.folder} are not those that were written",
                fix="delete that folder and convert again; the disk may be failing",
                code=BAD_DATA,
            )
        if fetch(leaf, np.empty(record.shape, np_dtype(record.dtype))) != record:
            raise MixtralError(
                f"{output.folder} was not made from this source: {leaf} differs",
                fix="choose another destination, or delete it",
                code=OUTPUT_EXISTS,
            )
