"""Where converted leaves go: one interface for the formats that can be written.

An output is filled leaf by leaf in any order, survives kill -9 between any two writes, and can
prove a leaf that an earlier run wrote.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from mixtral_jax.convert import orbax
from mixtral_jax.convert.manifest import LeafRecord, file_sha256, sync_folder
from mixtral_jax.convert.names import Chunk, chunks_of
from mixtral_jax.convert.orbax_leaves import WEIGHTS, OrbaxLeaves, check_leaf, chunk_path
from mixtral_jax.convert.preflight import check_disk
from mixtral_jax.convert.transfer import digest_leaf
from mixtral_jax.model.transformer import LeafSpec


@runtime_checkable
class Output(Protocol):
    """Weights of one format in ``folder``, in the making or finished."""

    folder: Path

    def prepare(self) -> None:
        """Makes what must be there before the first leaf; harmless when repeated."""
        ...

    def write(self, leaf: str, value: np.ndarray) -> None:
        """Writes a leaf durably; raises exit code 74 if the disk is full."""
        ...

    def is_intact(self, leaf: str, record: LeafRecord, pool: Executor) -> bool:
        """True if the disk holds the bytes that were recorded."""
        ...

    def reads_back(self, leaf: str, record: LeafRecord, pool: Executor) -> bool:
        """True if the format's own library reads what was recorded."""
        ...

    def finish(self, records: Mapping[str, LeafRecord]) -> None:
        """Writes what describes the whole."""
        ...

    def check(self) -> None:
        """Proves a finished output without reading its data; raises exit code 65."""
        ...

    def num_tensors(self) -> int:
        """Number of arrays in the files."""
        ...


class OrbaxOutput:
    """One Orbax checkpoint per leaf."""

    def __init__(self, folder: Path, specs: Mapping[str, LeafSpec]):
        self.folder, self._specs = folder, specs

    def prepare(self) -> None:
        """Makes the folder of the weights."""
        (self.folder / WEIGHTS).mkdir(parents=True, exist_ok=True)

    def write(self, leaf: str, value: np.ndarray) -> None:
        """Writes ``weights/<leaf>``."""
        orbax.write_leaf(self.folder, leaf, value)

    def is_intact(self, leaf: str, record: LeafRecord, pool: Executor) -> bool:
        """Compares the chunk files with their digests."""
        if check_leaf(self.folder, leaf, self._specs[leaf].shape, record):
            return False

        def digest(chunk: Chunk) -> str:
            return file_sha256(chunk_path(self.folder, chunk, len(record.shape)))

        return tuple(pool.map(digest, chunks_of(leaf, record.shape))) == tuple(record.chunks)

    def reads_back(self, leaf: str, record: LeafRecord, pool: Executor) -> bool:
        """Reads the leaf with Orbax."""
        try:
            value = orbax.read_leaf(self.folder, leaf)
        except (OSError, ValueError, KeyError):  # damaged metadata, in the words of Orbax
            return False
        return digest_leaf(leaf, value, pool) == record

    def finish(self, records: Mapping[str, LeafRecord]) -> None:
        """Nothing: the manifest says it all."""
        assert records.keys() == self._specs.keys()

    def check(self) -> None:
        """Finds every chunk file in its size."""
        OrbaxLeaves(self.folder, self._specs)

    def num_tensors(self) -> int:
        """One per leaf."""
        return len(self._specs)


_SAVING = ".saving"


@contextlib.contextmanager
def new_folder(dst: Path, num_bytes: int) -> Iterator[Path]:
    """An empty folder beside ``dst`` that becomes ``dst`` when the block ends without an error.

    ``dst`` is absent until all is written. After an error nothing is left; what a killed process
    left behind is removed by the next one that makes the same ``dst``.

    Args:
        dst: an absolute path, absent or an empty folder (``check_absent``).
        num_bytes: that will be written.

    Raises:
        MixtralError: exit code 74 if the disk has no room for so many, or fills up.
    """
    _remove_abandoned(dst)
    check_disk(dst.parent, num_bytes, dst)
    work, lock = _locked_folder(dst)
    try:
        os.chmod(work, 0o755)  # of mkdtemp: for nobody else
        yield work
        sync_folder(work)
        with contextlib.suppress(FileNotFoundError):
            dst.rmdir()
        os.rename(work, dst)
        sync_folder(dst.parent)
    except OSError as error:
        if orbax.is_disk_full(error):
            raise orbax.disk_full(dst.parent) from error
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def _locked_folder(dst: Path) -> tuple[Path, int]:
    """A folder that is ours until this process ends, however it does; and the lock on it.

    Before it is locked, another process that makes the same ``dst`` may take it for abandoned.
    """
    while True:
        work = Path(tempfile.mkdtemp(prefix=f"{dst.name}.", suffix=_SAVING, dir=dst.parent))
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(work, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if work.exists():
                return work, lock
            os.close(lock)


def _remove_abandoned(dst: Path) -> None:
    """Removes folders of ``new_folder`` that no living process holds."""
    name = re.compile(re.escape(dst.name) + r"\.\w{8}" + re.escape(_SAVING))
    for path in dst.parent.iterdir():
        if not name.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
            continue
        with contextlib.suppress(FileNotFoundError):  # it was finished, or removed, just now
            _remove_unless_locked(path)


def _remove_unless_locked(path: Path) -> None:
    lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(lock)
