"""Writes a model that lies on a mesh as a folder of ours, as ``convert`` would have."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_jax.convert.companions import copy_companions, find_companions, write_config
from mixtral_jax.convert.manifest import LeafRecord, Manifest
from mixtral_jax.convert.output import OrbaxOutput, new_folder
from mixtral_jax.convert.preflight import check_absent
from mixtral_jax.convert.transfer import digest_leaf
from mixtral_jax.errors import USAGE, MixtralError
from mixtral_jax.model.transformer import Mixtral, leaf_specs, leaves_of
from mixtral_jax.sharding import hosts
from mixtral_jax.weights import Adapted, ExpertSlots, QTensor

THREADS = min(8, os.cpu_count() or 1)


def save_model(
    model: Mixtral,
    dst: str | Path,
    *,
    companions: Path | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Saves the weights leaf by leaf; at most one leaf is on the host at a time.

    Where there are many processes all must call it, and the first writes.

    Args:
        model: plain weights, on any mesh.
        dst: the folder to make; it is absent until all is written.
        companions: a checkpoint folder whose tokenizer and other small files go along.
        note: called with one line for each small file that is left behind.

    Returns:
        The manifest; its digest is that of ``convert`` for the same weights.

    Raises:
        MixtralError: exit codes 64 (weights that are adapted or quantized), 73 (``dst`` exists), 74
            (disk).
    """
    dst, is_first = Path(os.path.abspath(dst)), hosts.is_first()
    if is_first:
        check_absent(dst)
    leaves = leaves_of(model)
    for leaf, weight in leaves.items():
        _check(leaf, weight)
    num_bytes = sum(math.prod(w.shape) * np.dtype(w.dtype).itemsize for w in leaves.values())
    names = () if companions is None else find_companions(companions, note)
    with new_folder(dst, num_bytes) if is_first else contextlib.nullcontext() as own:
        work = Path(hosts.text_of_first("" if own is None else str(own)))
        return _write(model, leaves, work, companions, names)


def _write(
    model: Mixtral,
    leaves: dict[str, Any],
    work: Path,
    source: Path | None,
    names: tuple[str, ...],
) -> Manifest:
    """Every process hands every leaf to Orbax, which lets the first write; that does the rest."""
    output, is_first = OrbaxOutput(work, leaf_specs(model.config)), hosts.is_first()
    if is_first:
        output.prepare()
    records: dict[str, LeafRecord] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for leaf, weight in leaves.items():
            value = _canonical(weight)
            records[leaf] = digest_leaf(leaf, value, pool)
            output.write(leaf, value)
    output.finish(records)
    dtype = records["embed_tokens"].dtype
    config, digests = model.config, {}
    if not is_first:
        pass
    elif source is None:
        digests = write_config(work, config, dtype=dtype)
    else:
        digests = copy_companions(source, work, names, config=config, dtype=dtype)
    manifest = Manifest(
        fingerprint={"saved": True},
        leaves=records,
        parameters=sum(math.prod(record.shape) for record in records.values()),
        bytes=sum(math.prod(w.shape) * np.dtype(w.dtype).itemsize for w in leaves.values()),
        companions=digests,
        source={"name": "save_model", "layout": "orbax"},
    )
    if is_first:
        manifest.write(work)
    return manifest


def _check(leaf: str, weight: Any) -> None:
    parts = weight.slots if isinstance(weight, ExpertSlots) else (weight,)
    for part in parts:
        if isinstance(part, (Adapted, QTensor)):
            kind = "adapted" if isinstance(part, Adapted) else "quantized"
            raise MixtralError(
                f"{leaf} is {kind}, and only plain weights are saved",
                fix="merge an adapter with convert --adapter",
                code=USAGE,
            )


def _canonical(weight: Any) -> np.ndarray:
    """A leaf on the host in the published layout."""
    if isinstance(weight, ExpertSlots):
        return np.stack(hosts.fetch(list(weight.slots)), axis=1).reshape(weight.shape)
    return np.ascontiguousarray(hosts.fetch(weight))
