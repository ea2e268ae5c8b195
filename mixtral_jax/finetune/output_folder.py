"""OUTPUT_DIR: ours, and of one run at a time."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtral_jax.convert.manifest import write_durably
from mixtral_jax.errors import OUTPUT_EXISTS, MixtralError

MARK = "finetune.json"


class OutputFolder:
    """Makes OUTPUT_DIR where it is missing, and holds it until the block ends.

    Args:
        path: OUTPUT_DIR.
        options: what was asked.

    Raises:
        MixtralError: exit code 73 for a folder that another run holds, or that holds files and was
            not made by this command.
    """

    def __init__(self, path: Path, options: Any):
        self.path, self._options = path, options

    def __enter__(self) -> OutputFolder:
        if self.path.exists() and not self.path.is_dir():
            self._refuse("is a file")
        self.path.mkdir(parents=True, exist_ok=True)
        is_ours = (self.path / MARK).is_file()
        if not is_ours and any(self.path.iterdir()):
            self._refuse(f"holds files, and no {MARK} of a run")
        self._lock = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._refuse("is in use by another run")
        return self

    def mark(self) -> None:
        """Makes the folder ours: what was asked goes to finetune.json. Call it before anything else
        is written there, and when nothing is left that may refuse the run."""
        asked = json.dumps(_plain(dataclasses.asdict(self._options)), indent=1)
        write_durably(self.path / MARK, f"{asked}\n".encode())

    def __exit__(self, *error: object) -> None:
        os.close(self._lock)

    def _refuse(self, what: str) -> None:
        fix = "choose another --output-dir"
        raise MixtralError(f"--output-dir {self.path} {what}", fix=fix, code=OUTPUT_EXISTS)


def _plain(value: Any) -> Any:
    """For JSON."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value
