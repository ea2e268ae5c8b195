"""convert(): a published checkpoint to a folder of ours, atomically and in bounded memory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from mixtral_jax.config import read_config
from mixtral_jax.convert.adapter import Adapter
from mixtral_jax.convert.companions import (
    check_companions,
    copy_companions,
    digests_of,
    find_companions,
)
from mixtral_jax.convert.dequantized import DequantizedLeaves
from mixtral_jax.convert.export import SafetensorsOutput
from mixtral_jax.convert.hub import Source, resolve
from mixtral_jax.convert.journal import Journal, is_journal
from mixtral_jax.convert.leaves import Leaves, common_dtype, is_checkpoint, open_leaves
from mixtral_jax.convert.manifest import (
    LeafRecord,
    Manifest,
    read_manifest,
    read_ours,
    sync_folder,
)
from mixtral_jax.convert.memory import PeakMemory
from mixtral_jax.convert.merge import Merge
from mixtral_jax.convert.options import ConvertOptions, ConvertReport
from mixtral_jax.convert.orbax import disk_full, is_disk_full
from mixtral_jax.convert.output import OrbaxOutput, Output
from mixtral_jax.convert.preflight import (
    check_destination,
    check_disk,
    check_work_folder,
    refuse_existing,
)
from mixtral_jax.convert.quantized.export import export_gptq
from mixtral_jax.convert.resume import resume
from mixtral_jax.convert.safetensors_file import np_dtype
from mixtral_jax.convert.transfer import fetch_leaf
from mixtral_jax.convert.verify import verify_output
from mixtral_jax.errors import (
    BAD_DATA,
    IO_ERROR,
    OUTPUT_EXISTS,
    MixtralError,
    interrupted,
)
from mixtral_jax.model.transformer import LeafSpec, leaf_specs

Note: TypeAlias = Callable[[str], None]
Progress: TypeAlias = Callable[[int, int], None]
Change: TypeAlias = Callable[[Leaves], Leaves]

WORK_SUFFIX = ".partial"
JOURNAL_NAME, OUTPUT_NAME = "journal.jsonl", "output"
THREADS = min(8, os.cpu_count() or 1)


def convert(
    src: str | Path,
    dst: str | Path,
    options: ConvertOptions | None = None,
    *,
    note: Note = lambda line: None,
    progress: Progress = lambda done, total: None,
    stop: Callable[[], bool] = lambda: False,
    change: Change | None = None,
) -> ConvertReport:
    """Converts a checkpoint in any layout to Orbax, or to the safetensors of Hugging Face.

    Works in ``<dst>.partial`` and renames when all is done, so ``dst`` is absent or complete. After
    any interruption the same call resumes and redoes at most one leaf, or what is made in one go
    with it. Memory stays below twice the largest leaf plus 512 MB.

    Args:
        src: a Hugging Face folder (original or fused names), a native Mistral folder, a folder
            that ``convert`` wrote, or the name of a repository on the Hub, ``org/name[@revision]``.
        dst: the folder to make.
        options: how; the defaults keep the dtype. The format gptq: see ``export_gptq``.
        note: called with one line for each thing a person should know.
        progress: called with bytes done and bytes in all.
        stop: asked before each leaf is converted or proved; True ends the work there, to be
            resumed by another call.
        change: given the opened source, what to read instead: weights quantized on the way.

    Raises:
        MixtralError: exit codes 65 (bad source or adapter, or options that do not fit them; the
            work folder is removed), 66 (no source), 73 (``dst`` is something else, or the work
            folder is of another conversion), 74 (disk), 75 (stopped), 78 (config.json).
    """
    source, dst = resolve(src, note), Path(os.path.abspath(dst))
    if options is not None and options.format == "gptq":
        size, how = options.max_shard_bytes, {"note": note, "progress": progress, "stop": stop}
        return export_gptq(source.folder, dst, max_shard_bytes=size, **how)
    started = time.monotonic()
    with PeakMemory() as memory:
        work = _Conversion(source, dst, options or ConvertOptions(), note, progress, stop, change)
        manifest = work.run()
    return ConvertReport(
        parameters=manifest.parameters,
        tensors=work.num_tensors,
        bytes=manifest.bytes,
        seconds=time.monotonic() - started,
        peak_rss_bytes=memory.bytes,
        digest=manifest.digest,
    )


class _Conversion:
    def __init__(
        self,
        source: Source,
        dst: Path,
        options: ConvertOptions,
        note: Note,
        progress: Progress,
        stop: Callable[[], bool],
        change: Change | None,
    ):
        self.source, self.src, self.dst = source, source.folder, dst
        self.options, self.note, self._stop, self._change = options, note, stop, change
        asked = (options.format, options.dtype, options.adapter, options.dequantize, change)
        if is_checkpoint(self.src) == "orbax" and asked == ("orbax", "keep", None, False, None):
            raise MixtralError(
                f"{self.src} is converted already",
                fix="ask for --format safetensors, another --dtype or an --adapter",
                code=BAD_DATA,
            )
        self.work = Path(f"{dst}{WORK_SUFFIX}")
        self.output_folder, self.journal = self.work / OUTPUT_NAME, self.work / JOURNAL_NAME
        check_destination(dst, self.src)
        if is_checkpoint(self.src) == "orbax":  # before a word of its config.json is believed
            check_companions(self.src, read_manifest(self.src).companions)
        self.companions = find_companions(self.src, note)
        self.config = read_config(self.src, note=note)
        # What the model needs, and what is written: parts in place of quantized weights.
        self.model: Mapping[str, LeafSpec] = leaf_specs(self.config)
        self.specs = self.model
        self._progress = progress
        self._done = self._total = 0
        self._counting = threading.Lock()

    def run(self) -> Manifest:
        try:
            with contextlib.ExitStack() as stack:
                head_dim = self.config.head_dim
                self.leaves = open_leaves(self.src, self.model, head_dim=head_dim, note=self.note)
                stack.callback(self.leaves.close)
                self.leaves = self._changed(self.leaves)
                self.specs = self.leaves.specs
                self._refuse_parts()
                self.dtypes = {leaf: self._dtype(leaf) for leaf in self.specs}
                self.fingerprint = self._fingerprint(self.leaves)
                self.merge = self._open_adapter(stack)
                output = self._output(self.output_folder)
                self.num_tensors = output.num_tensors()
                self.pool = stack.enter_context(ThreadPoolExecutor(THREADS))
                finished = self._finished_already()
                if finished is not None:
                    return finished
                check_work_folder(self.work, self.journal)
                num_bytes = sum(map(self._num_bytes, self.specs))
                check_disk(self.dst.parent, num_bytes, self.output_folder)
                self.work.mkdir(exist_ok=True)
                # Resuming trusts more than content that was sampled: these must be the same files.
                resumable = self.fingerprint | {"whereabouts": self.leaves.whereabouts}
                del resumable["companions"]  # copied at the end, as they are then
                journal = Journal(self.journal, resumable)
                stack.callback(journal.close)
                return self._convert(output, journal)
        except OSError as error:
            if is_disk_full(error):
                raise disk_full(self.work) from error
            raise

    def _changed(self, leaves: Leaves) -> Leaves:
        """What is read in place of the source as it is."""
        if self.options.dequantize:
            dtype = self.config.dtype if self.options.dtype == "keep" else self.options.dtype
            leaves = DequantizedLeaves(leaves, self.model, np_dtype(dtype))
        return leaves if self._change is None else self._change(leaves)

    def _refuse_parts(self) -> None:
        """Quantized weights are copied as they are, and only to where their parts have names."""
        is_copy = (self.options.format, self.options.adapter) == ("orbax", None)
        if self.specs.keys() != self.model.keys() and not is_copy:
            raise MixtralError(
                f"{self.src} is quantized: it can be neither exported nor merged with an adapter",
                fix="convert what it was made from, or add --dequantize",
                code=BAD_DATA,
            )

    def _open_adapter(self, stack: contextlib.ExitStack) -> Merge | None:
        if self.options.adapter is None:
            return None
        adapter = Adapter(self.options.adapter, self.config, base=self.src)
        self.fingerprint["adapter"] = adapter.fingerprint
        return Merge(adapter, stack.enter_context(adapter.open()), self.note)

    def _output(self, folder: Path) -> Output:
        if self.options.format == "orbax":
            return OrbaxOutput(folder, self.specs)
        size = self.options.max_shard_bytes
        return SafetensorsOutput(folder, self.specs, self.dtypes, max_shard_bytes=size)

    def _fingerprint(self, leaves: Leaves) -> dict[str, Any]:
        found = {
            "files": leaves.fingerprint,
            "config": json.loads(json.dumps(dataclasses.asdict(self.config))),
            "companions": digests_of(self.src, self.companions),
            "format": self.options.format,
            "dtype": self.options.dtype,
        }
        if self.options.format == "safetensors":
            found["max_shard_size"] = self.options.max_shard_bytes
        return found

    def _finished_already(self) -> Manifest | None:
        """The manifest of ``dst`` if an earlier run of the same conversion completed it."""
        if not self.dst.exists() or not any(self.dst.iterdir()):
            return None
        manifest = read_ours(self.dst)
        if manifest is None:
            raise refuse_existing(self.dst)
        found, asked = manifest.fingerprint, self.fingerprint
        others = sorted(key for key in found.keys() | asked if found.get(key) != asked.get(key))
        if others:
            raise MixtralError(
                f"{self.dst} holds another conversion (of other {', '.join(others)})",
                fix="choose another destination, or delete it",
                code=OUTPUT_EXISTS,
            )
        output = self._output(self.dst)
        output.check()
        check_companions(self.dst, manifest.companions)
        self._refuse_nonfinite(manifest.leaves)
        how = "compared by samples with its source; --verify proves it"
        if self.options.verify:
            verify_output(output, manifest, self._fetch, self.pool, before_leaf=self._heed)
            how = "compared with its source, every byte"
        self._remove_work_folder()
        self.note(f"{self.dst} is complete already ({how}); nothing to do")
        return manifest

    def _heed(self) -> None:
        """Ends the work here if that was asked."""
        if self._stop():
            raise interrupted()

    def _refuse_nonfinite(self, records: Mapping[str, LeafRecord]) -> None:
        """What an earlier run was asked to keep, this one must be asked as well."""
        for leaf, record in records.items():
            if record.nonfinite and not self.options.allow_nonfinite:
                raise MixtralError(
                    f"{leaf} has NaN or infinite values, which an earlier run was told to keep",
                    fix="download the checkpoint again, or pass --allow-nonfinite to keep them",
                    code=BAD_DATA,
                )

    def _remove_work_folder(self) -> None:
        """Removes what a run leaves behind once its output has moved, and nothing else."""
        if not self.output_folder.exists() and is_journal(self.journal):
            self.journal.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something is in it, or it is no folder of ours
            self.work.rmdir()

    def _dtype(self, leaf: str) -> np.dtype:
        if self.options.dtype == "keep" or leaf not in self.model:
            return self.leaves.dtype(leaf)
        return np_dtype(self.options.dtype)

    def _num_bytes(self, leaf: str) -> int:
        return math.prod(self.specs[leaf].shape) * self.dtypes[leaf].itemsize

    def _source_bytes(self, leaf: str) -> int:
        return math.prod(self.specs[leaf].shape) * self.leaves.dtype(leaf).itemsize

    def _convert(self, output: Output, journal: Journal) -> Manifest:
        output.prepare()
        self._buffer = np.empty(0, np.uint8)
        self._total = sum(map(self._source_bytes, self.specs))
        self._refuse_nonfinite(journal.finished)
        is_intact = functools.partial(self._is_intact, output)
        resume(journal, self.leaves, self.specs, is_intact, self.note)
        try:
            records = self._convert_leaves(output, journal)
        except MixtralError as error:
            if error.code == BAD_DATA:  # no run of these options resumes it, whatever is mended
                shutil.rmtree(self.output_folder, ignore_errors=True)
                self._remove_work_folder()
            raise
        output.finish(records)
        manifest = Manifest(
            fingerprint=self.fingerprint,
            leaves=records,
            parameters=sum(math.prod(spec.shape) for spec in self.model.values()),
            bytes=sum(map(self._num_bytes, self.specs)),
            source=self._source(),
        )
        return self._finish(manifest)

    def _convert_leaves(self, output: Output, journal: Journal) -> dict[str, LeafRecord]:
        records: dict[str, LeafRecord] = {}
        # While a leaf is written, the system reads the next one into its own cache.
        following = dict(itertools.pairwise([*self.specs, None]))
        for leaf in self.specs:
            self._heed()
            if leaf in journal.finished:
                records[leaf] = journal.finished[leaf]
                self._advance(self._source_bytes(leaf))
                continue
            records[leaf] = self._convert_leaf(output, leaf, following[leaf])
            self.leaves.check_unchanged()  # before the leaf counts as this source's
            journal.record(leaf, records[leaf])
        return records

    def _source(self) -> dict[str, str]:
        """What the manifest says of the source; no path of this machine."""
        found = {"name": self.source.repo or self.src.resolve().name, "layout": self.leaves.layout}
        if self.source.revision is not None:
            found["revision"] = self.source.revision
        return found

    def _is_intact(self, output: Output, leaf: str, record: LeafRecord) -> bool:
        """True if the disk still holds a leaf that an earlier run finished."""
        self._heed()
        intact = record.shape == self.specs[leaf].shape
        intact = intact and output.is_intact(leaf, record, self.pool)
        return intact and (not self.options.verify or output.reads_back(leaf, record, self.pool))

    def _fetch(self, leaf: str, value: np.ndarray, **kwargs: Any) -> LeafRecord:
        return fetch_leaf(
            self.leaves,
            leaf,
            value,
            allow_nonfinite=self.options.allow_nonfinite,
            pool=self.pool,
            merge=None if self.merge is None else self.merge.leaf(leaf),
            **kwargs,
        )

    def _convert_leaf(self, output: Output, leaf: str, following: str | None) -> LeafRecord:
        # One buffer for all leaves: fresh memory would cost the system a page fault per 4 KiB.
        if not len(self._buffer):
            self._buffer = np.empty(max(map(self._num_bytes, self.specs)), np.uint8)
        value = self._buffer[: self._num_bytes(leaf)].view(self.dtypes[leaf])
        value = value.reshape(self.specs[leaf].shape)
        record = self._fetch(leaf, value, progress=self._advance)
        if following is not None:
            self.pool.submit(self.leaves.prefetch, following)
        output.write(leaf, value)
        if self.options.verify:  # Orbax needs up to two leaves of memory for itself
            del value
            self._buffer = np.empty(0, np.uint8)
        if self.options.verify and not output.reads_back(leaf, record, self.pool):
            raise MixtralError(
                f"{leaf} in {output.folder} does not read back as it was written",
                fix="check the disk and the memory of this machine",
                code=IO_ERROR,
            )
        return record

    def _advance(self, num_bytes: int) -> None:
        with self._counting:
            self._done += num_bytes
            self._progress(self._done, self._total)

    def _finish(self, manifest: Manifest) -> Manifest:
        plain = {leaf: dtype for leaf, dtype in self.dtypes.items() if leaf in self.model}
        dtype = common_dtype(self.model, plain, preferred=self.config.dtype)
        digests = copy_companions(
            self.src, self.output_folder, self.companions, config=self.config, dtype=dtype.name
        )
        now = {**self.fingerprint, "companions": digests_of(self.src, self.companions)}
        manifest = dataclasses.replace(manifest, fingerprint=now, companions=digests)
        manifest.write(self.output_folder)
        sync_folder(self.output_folder)
        with contextlib.suppress(FileNotFoundError):
            self.dst.rmdir()
        os.rename(self.output_folder, self.dst)
        sync_folder(self.dst.parent)
        self._remove_work_folder()
        return manifest
