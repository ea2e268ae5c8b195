"""convert(): a published checkpoint to a folder of ours, atomically and in bounded memory."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from mixtral_jax.config import read_config
from mixtral_jax.convert.companions import copy_companions, find_companions
from mixtral_jax.convert.journal import Journal, is_journal
from mixtral_jax.convert.leaves import (
    WEIGHTS,
    HuggingFaceLeaves,
    OrbaxLeaves,
    common_dtype,
    is_checkpoint,
)
from mixtral_jax.convert.manifest import (
    NAME,
    LeafRecord,
    Manifest,
    read_manifest,
    sync_folder,
)
from mixtral_jax.convert.memory import PeakMemory
from mixtral_jax.convert.orbax import disk_full, is_disk_full, write_leaf
from mixtral_jax.convert.preflight import check_destination, check_disk, check_work_folder
from mixtral_jax.convert.reader import FLOATS
from mixtral_jax.convert.transfer import fetch_leaf
from mixtral_jax.convert.verify import is_intact, reads_back, verify_output
from mixtral_jax.errors import (
    BAD_DATA,
    INPUT_NOT_FOUND,
    INTERRUPTED,
    IO_ERROR,
    OUTPUT_EXISTS,
    MixtralError,
)
from mixtral_jax.model.transformer import LeafSpec, leaf_specs

Dtype: TypeAlias = Literal["keep", "float32", "bfloat16", "float16"]
Note: TypeAlias = Callable[[str], None]
Progress: TypeAlias = Callable[[int, int], None]

WORK_SUFFIX = ".partial"
JOURNAL_NAME, OUTPUT_NAME = "journal.jsonl", "output"
THREADS = min(8, os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """How to convert."""

    format: Literal["orbax"] = "orbax"
    """Format of the weights in the output folder."""
    dtype: Dtype = "keep"
    """Store the weights in this dtype."""
    verify: bool = False
    """Read every leaf back through Orbax and compare digests, of a finished output too."""
    allow_nonfinite: bool = False
    """Accept NaN and infinite weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertReport:
    """What was converted. ``peak_rss_bytes`` is anonymous memory of the process."""

    parameters: int
    tensors: int
    bytes: int
    seconds: float
    peak_rss_bytes: int
    digest: str


def convert(
    src: str | Path,
    dst: str | Path,
    options: ConvertOptions | None = None,
    *,
    note: Note = lambda line: None,
    progress: Progress = lambda done, total: None,
    stop: Callable[[], bool] = lambda: False,
) -> ConvertReport:
    """Converts a Hugging Face folder.

    Works in ``<dst>.partial`` and renames when all is done, so ``dst`` is absent or complete. After
    any interruption the same call resumes and redoes at most one leaf. Memory stays below twice
    the largest leaf plus 512 MB.

    Args:
        src: a Hugging Face folder, in the original or the fused layout.
        dst: the folder to make.
        options: how; the defaults keep the dtype.
        note: called with one line for each thing a person should know.
        progress: called with bytes done and bytes in all.
        stop: asked before each leaf; True ends the work there, to be resumed by another call.

    Raises:
        MixtralError: exit codes 65 (bad source), 66 (no source), 73 (``dst`` is something else, or
            the work folder is of another conversion), 74 (disk), 75 (stopped), 78 (config.json).
    """
    src, dst = Path(src), Path(os.path.abspath(dst))
    started = time.monotonic()
    with PeakMemory() as memory:
        manifest = _Conversion(src, dst, options or ConvertOptions(), note, progress).run(stop)
    return ConvertReport(
        parameters=manifest.parameters,
        tensors=len(manifest.leaves),
        bytes=manifest.bytes,
        seconds=time.monotonic() - started,
        peak_rss_bytes=memory.bytes,
        digest=manifest.digest,
    )


class _Conversion:
    def __init__(
        self, src: Path, dst: Path, options: ConvertOptions, note: Note, progress: Progress
    ):
        if is_checkpoint(src) == "orbax":
            raise MixtralError(
                f"{src} is converted already",
                fix="name the Hugging Face folder that it was made from",
                code=BAD_DATA,
            )
        if not src.is_dir():
            raise MixtralError(f"no such folder: {src}", code=INPUT_NOT_FOUND)
        self.src, self.dst, self.options, self.note = src, dst, options, note
        self.work = Path(f"{dst}{WORK_SUFFIX}")
        self.output, self.journal = self.work / OUTPUT_NAME, self.work / JOURNAL_NAME
        check_destination(dst)
        self.companions = find_companions(src, note)
        self.config = read_config(src, note=note)
        self.specs: Mapping[str, LeafSpec] = leaf_specs(self.config)
        self._progress = progress
        self._done = self._total = 0
        self._counting = threading.Lock()

    def run(self, stop: Callable[[], bool]) -> Manifest:
        leaves = HuggingFaceLeaves(self.src, self.specs, note=self.note)
        try:
            self.fingerprint = self._fingerprint(leaves)
            finished = self._finished_already(leaves)
            if finished is not None:
                return finished
            check_work_folder(self.work, self.journal)
            num_bytes = sum(self._num_bytes(leaves, leaf) for leaf in self.specs)
            check_disk(self.dst.parent, num_bytes, self.output / WEIGHTS)
            self.work.mkdir(exist_ok=True)
            # Resuming trusts more than content that was sampled: these must be the same files.
            resumable = self.fingerprint | {"whereabouts": leaves.checkpoint.whereabouts}
            journal = Journal(self.journal, resumable)
            try:
                return self._convert(leaves, journal, stop)
            finally:
                journal.close()
        except OSError as error:
            if is_disk_full(error):
                raise disk_full(self.work) from error
            raise
        finally:
            leaves.close()

    def _fingerprint(self, leaves: HuggingFaceLeaves) -> dict[str, Any]:
        return {
            "files": leaves.checkpoint.fingerprint,
            "config": json.loads(json.dumps(dataclasses.asdict(self.config))),
            "format": self.options.format,
            "dtype": self.options.dtype,
        }

    def _finished_already(self, leaves: HuggingFaceLeaves) -> Manifest | None:
        """The manifest of ``dst`` if an earlier run of the same conversion completed it."""
        if not self.dst.exists() or not any(self.dst.iterdir()):
            return None
        if (self.dst / NAME).is_file():
            manifest = read_manifest(self.dst)
            if manifest.fingerprint == self.fingerprint:
                output = OrbaxLeaves(self.dst, self.specs)
                if self.options.verify:
                    with ThreadPoolExecutor(THREADS) as pool:
                        allowed = self.options.allow_nonfinite
                        verify_output(output, leaves, allow_nonfinite=allowed, pool=pool)
                self._remove_work_folder()
                self.note(f"{self.dst} is complete already; nothing to do")
                return manifest
        raise MixtralError(
            f"{self.dst} exists and is not this conversion",
            fix="choose another destination, or delete it",
            code=OUTPUT_EXISTS,
        )

    def _remove_work_folder(self) -> None:
        """Removes what a run leaves behind once its output has moved, and nothing else."""
        if not self.output.exists() and is_journal(self.journal):
            self.journal.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something is in it, or it is no folder of ours
            self.work.rmdir()

    def _dtype(self, leaves: HuggingFaceLeaves, leaf: str) -> np.dtype:
        if self.options.dtype == "keep":
            return leaves.dtype(leaf)
        return next(dtype for dtype in FLOATS.values() if dtype.name == self.options.dtype)

    def _num_bytes(self, leaves: HuggingFaceLeaves, leaf: str) -> int:
        return math.prod(self.specs[leaf].shape) * self._dtype(leaves, leaf).itemsize

    def _convert(
        self, leaves: HuggingFaceLeaves, journal: Journal, stop: Callable[[], bool]
    ) -> Manifest:
        (self.output / WEIGHTS).mkdir(parents=True, exist_ok=True)
        self._total = sum(
            math.prod(self.specs[leaf].shape) * leaves.dtype(leaf).itemsize for leaf in self.specs
        )
        records: dict[str, LeafRecord] = {}
        if journal.finished:
            self.note(f"resuming: {len(journal.finished)} of {len(self.specs)} leaves are finished")
        with ThreadPoolExecutor(THREADS) as pool:
            for leaf, spec in self.specs.items():
                if self._is_finished(leaf, journal.finished.get(leaf), pool):
                    records[leaf] = journal.finished[leaf]
                    self._advance(math.prod(spec.shape) * leaves.dtype(leaf).itemsize)
                    continue
                if stop():
                    raise MixtralError(
                        "interrupted",
                        fix="run the same command again to resume",
                        code=INTERRUPTED,
                    )
                records[leaf] = self._convert_leaf(leaves, leaf, pool)
                journal.record(leaf, records[leaf])
        manifest = Manifest(
            fingerprint=self.fingerprint,
            leaves=records,
            parameters=sum(math.prod(spec.shape) for spec in self.specs.values()),
            bytes=sum(self._num_bytes(leaves, leaf) for leaf in self.specs),
        )
        return self._finish(manifest, leaves)

    def _is_finished(self, leaf: str, record: LeafRecord | None, pool: Executor) -> bool:
        """True if an earlier run finished a leaf and the disk still holds it."""
        if record is None:
            return False
        intact = record.shape == self.specs[leaf].shape and is_intact(
            self.output, leaf, record, pool
        )
        if intact and self.options.verify:
            intact = reads_back(self.output, leaf, record, pool)
        if not intact:
            self.note(f"{leaf} is no longer as it was written, and is converted again")
        return intact

    def _convert_leaf(
        self, leaves: HuggingFaceLeaves, leaf: str, pool: ThreadPoolExecutor
    ) -> LeafRecord:
        value = np.empty(self.specs[leaf].shape, self._dtype(leaves, leaf))
        record = fetch_leaf(
            leaves,
            leaf,
            value,
            allow_nonfinite=self.options.allow_nonfinite,
            pool=pool,
            progress=self._advance,
        )
        write_leaf(self.output, leaf, value)
        if self.options.verify:
            del value
            if not reads_back(self.output, leaf, record, pool):
                raise MixtralError(
                    f"{self.output / WEIGHTS / leaf} does not read back as it was written",
                    fix="check the disk and the memory of this machine",
                    code=IO_ERROR,
                )
        return record

    def _advance(self, num_bytes: int) -> None:
        with self._counting:
            self._done += num_bytes
            self._progress(self._done, self._total)

    def _finish(self, manifest: Manifest, leaves: HuggingFaceLeaves) -> Manifest:
        dtype = common_dtype(self.specs, self._stored(leaves), preferred=self.config.dtype)
        digests = copy_companions(self.src, self.output, self.companions, dtype=dtype.name)
        manifest = dataclasses.replace(manifest, companions=digests)
        manifest.write(self.output)
        sync_folder(self.output)
        with contextlib.suppress(FileNotFoundError):
            self.dst.rmdir()
        os.rename(self.output, self.dst)
        sync_folder(self.dst.parent)
        self._remove_work_folder()
        return manifest

    def _stored(self, leaves: HuggingFaceLeaves) -> dict[str, np.dtype]:
        return {leaf: self._dtype(leaves, leaf) for leaf in self.specs}
