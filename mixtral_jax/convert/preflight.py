"""What is proved before a conversion touches the disk: the destination is free, ours and fits."""

from __future__ import annotations

import shutil
from pathlib import Path

from mixtral_jax.convert.journal import is_journal
from mixtral_jax.errors import INPUT_NOT_FOUND, IO_ERROR, OUTPUT_EXISTS, MixtralError

# For metadata, the journal and small files, beyond the weights themselves.
DISK_SLACK_BYTES = 64 << 20


def check_destination(dst: Path, src: Path | None = None) -> None:
    """Refuses a destination that is no plain folder, is the source, or has no parent."""
    if src is not None and dst.exists() and dst.samefile(src):
        fix = "choose another destination"
        raise MixtralError(f"{dst} is the source itself", fix=fix, code=OUTPUT_EXISTS)
    if dst.is_symlink() or (dst.exists() and not dst.is_dir()):
        raise _taken(dst, "is a link" if dst.is_symlink() else "is a file")
    if dst.parent.exists() and not dst.parent.is_dir():
        raise _taken(dst.parent, "is a file")
    if not dst.parent.is_dir():
        raise MixtralError(
            f"no such folder: {dst.parent}", fix=f"mkdir -p {dst.parent}", code=INPUT_NOT_FOUND
        )


def check_absent(dst: Path, src: Path | None = None) -> None:
    """``check_destination``, and refuses a folder that holds something."""
    check_destination(dst, src)
    if dst.exists() and any(dst.iterdir()):
        raise refuse_existing(dst)


def check_work_folder(work: Path, journal: Path) -> None:
    """Refuses a work folder that no conversion made: it is never written to, nor removed."""
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise _taken(work, "is a link" if work.is_symlink() else "is a file")
    if work.is_dir() and any(work.iterdir()) and not is_journal(journal):
        raise _taken(work, "was not made by a conversion (it has no journal of one)")


def refuse_existing(dst: Path) -> MixtralError:
    """The error of a destination that holds something."""
    return MixtralError(
        f"{dst} exists and is not empty", fix="choose another destination", code=OUTPUT_EXISTS
    )


def _taken(path: Path, what: str) -> MixtralError:
    return MixtralError(
        f"{path} {what}",
        fix="choose another destination, or move it away",
        code=OUTPUT_EXISTS,
    )


def check_disk(place: Path, num_bytes: int, present: Path) -> None:
    """Refuses a disk without room for so many bytes, less those that ``present`` holds.

    Raises:
        MixtralError: exit code 74 telling how many bytes to free.
    """
    needed = num_bytes + DISK_SLACK_BYTES
    if present.is_dir():
        files = (path for path in present.rglob("*") if path.is_file())
        # In blocks, not sizes: files of an unfinished export are holes where nothing is written.
        needed -= sum(path.stat().st_blocks * 512 for path in files)
    free = shutil.disk_usage(place).free
    if needed > free:
        raise MixtralError(
            f"not enough disk space in {place}: {needed} bytes needed, {free} free",
            fix=f"free {needed - free} bytes, or choose a destination on another disk",
            code=IO_ERROR,
        )
