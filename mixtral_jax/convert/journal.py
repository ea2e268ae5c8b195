"""The journal of a conversion: which leaves are finished, in a form that survives kill -9.

One JSON object per line, each made durable before the work goes on: first the fingerprint of the
source and options, then one line per finished leaf. A torn last line is an unfinished leaf. Other
lines tell of finished leaves that must be made again, and of the machine that goes on.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixtral_jax.convert.manifest import LeafRecord
from mixtral_jax.errors import OUTPUT_EXISTS, MixtralError

# How the first line begins, whole or torn.
_BEGINNING = b'{"fingerprint":'


def is_journal(path: Path) -> bool:
    """True for a journal of ours, of whatever conversion, empty and torn ones included."""
    if path.is_symlink() or not path.is_file():
        return False
    with open(path, "rb") as file:
        return _BEGINNING.startswith(file.read(len(_BEGINNING)))


class Journal:
    """An open, locked journal.

    Args:
        path: the file, created if missing.
        fingerprint: what is being converted, and how.

    Attributes:
        finished: the leaves that earlier runs finished.

    Raises:
        MixtralError: exit code 73 if it belongs to another conversion, or to one that is running.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any]):
        self._machine: dict[str, Any] = {}
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._lock(path)
            self.finished, end = self._read(path, fingerprint)
            os.ftruncate(self._fd, end)
            os.lseek(self._fd, end, os.SEEK_SET)
            if end == 0:
                self._append({"fingerprint": fingerprint})
        except BaseException:
            os.close(self._fd)
            raise

    def _lock(self, path: Path) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MixtralError(
                f"another conversion is writing to {path.parent}",
                fix="wait for it, or choose another destination",
                code=OUTPUT_EXISTS,
            ) from None

    def _read(
        self, path: Path, fingerprint: Mapping[str, Any]
    ) -> tuple[dict[str, LeafRecord], int]:
        content = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        finished: dict[str, LeafRecord] = {}
        end = 0
        for line in content.splitlines(keepends=True):
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            if not isinstance(entry, dict):
                break
            if end == 0:
                _same(entry.get("fingerprint"), fingerprint, path)
            elif isinstance(entry.get("forgotten"), list):
                for leaf in entry["forgotten"]:
                    finished.pop(str(leaf), None)
            elif isinstance(entry.get("machine"), dict):
                self._machine = entry["machine"]
            else:
                try:
                    finished[str(entry["leaf"])] = LeafRecord.of(entry)
                except (KeyError, TypeError):  # damaged: what follows is done again
                    break
            end += len(line)
        if end == 0 and not _BEGINNING.startswith(content[: len(_BEGINNING)]):
            raise MixtralError(
                f"{path} is no journal of a conversion",
                fix="choose another destination, or move it away",
                code=OUTPUT_EXISTS,
            )
        return finished, end

    def record(self, leaf: str, record: LeafRecord) -> None:
        """Notes a finished leaf, durably."""
        self._append({"leaf": leaf, **dataclasses.asdict(record)})

    def forget(self, leaves: Sequence[str]) -> None:
        """Notes that finished leaves must be made again, durably."""
        self._append({"forgotten": list(leaves)})
        for leaf in leaves:
            del self.finished[leaf]

    def work_on(self, machine: Mapping[str, Any]) -> dict[str, Any]:
        """Notes the machine that leaves are made on from here; tells which it was before."""
        before, self._machine = self._machine, dict(machine)
        if before != self._machine:
            self._append({"machine": self._machine})
        return before

    def _append(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps(entry).encode() + b"\n"
        while line:
            line = line[os.write(self._fd, line) :]
        os.fsync(self._fd)

    def close(self) -> None:
        """Closes the file and releases the lock."""
        os.close(self._fd)


def _same(found: Any, asked: Mapping[str, Any], path: Path) -> None:
    # Through JSON, so that tuples and lists compare equal.
    if found != json.loads(json.dumps(asked)):
        raise MixtralError(
            f"{path.parent} holds an unfinished conversion of another source or other options",
            fix=f"delete {path.parent}, or choose another destination",
            code=OUTPUT_EXISTS,
        )
