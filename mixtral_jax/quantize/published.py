"""Quantizes straight to the published GPTQ layout, for every other tool.

The work goes on in a hidden folder of ours beside the destination, so that it is resumed like any
other; what it made is then written out, moved to the destination, and the folder is removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from mixtral_jax.convert.driver import convert
from mixtral_jax.convert.manifest import sync_folder
from mixtral_jax.convert.options import ConvertOptions
from mixtral_jax.convert.preflight import check_absent, check_destination
from mixtral_jax.errors import OUTPUT_EXISTS, MixtralError
from mixtral_jax.quantize.driver import QuantizeReport

# Schemes whose codes the layout has.
SCHEMES = ("gptq", "rtn", "int4")


def published(
    dst: str | Path,
    quantize: Callable[[Path], QuantizeReport],
    *,
    note: Callable[[str], None] = lambda line: None,
    stop: Callable[[], bool] = lambda: False,
) -> QuantizeReport:
    """Quantizes to a folder in ``.DST.quantizing`` and writes that as ``dst``.

    After any interruption before ``dst`` is written and told of, the same call resumes.

    Args:
        dst: the folder to make; it is absent until all is written.
        quantize: makes a folder of ours.
        note: as for ``convert``.
        stop: as for ``convert``.

    Returns:
        The report of ``quantize``; its bytes are those of the folder of ours.

    Raises:
        MixtralError: as ``quantize`` and ``export_gptq``; exit code 73 before any work if ``dst``
            exists, or if the work folder holds what no such call made.
    """
    dst = Path(os.path.abspath(dst))
    work = _Work(dst)
    shutil.rmtree(work.removed, ignore_errors=True)  # of a run that was killed as it ended
    check_destination(dst)
    work.check()
    has_moved = work.has_moved()
    if not has_moved:
        check_absent(dst)
    work.folder.mkdir(exist_ok=True)
    try:
        report = quantize(work.codes)
        seconds = report.converted.seconds
        if not has_moved:
            if not work.files.exists():
                options = ConvertOptions(format="gptq")
                seconds += convert(work.codes, work.files, options, note=note, stop=stop).seconds
            work.move()
    finally:
        with contextlib.suppress(OSError):  # something is in it
            work.folder.rmdir()
    work.remove()
    converted = dataclasses.replace(report.converted, seconds=seconds)
    return dataclasses.replace(report, converted=converted)


class _Work:
    """The work folder of a destination.

    Attributes:
        codes: the folder of ours in it.
        files: the published one, whole, until it moves to the destination.
        is_whole: a file that is there before it moves: then a destination is what moved.
        removed: the name of the work folder while it is removed.
    """

    def __init__(self, dst: Path):
        self.dst, self.folder = dst, dst.with_name(f".{dst.name}.quantizing")
        self.removed = dst.with_name(f"{self.folder.name}.removed")
        self.codes, self.files, self.is_whole = (
            self.folder / name for name in ("codes", "files", "whole")
        )

    def check(self) -> None:
        """Refuses a folder that this did not make: it would be removed at the end."""
        ours = {"codes", "files", "whole"}  # and codes.partial, and what a killed export left
        folder = self.folder
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            found = [folder]
        else:
            found = [p for p in folder.glob("*") if p.name.split(".")[0] not in ours]
        if found:
            what, fix = f"{folder} is in the way: no run of this command made it so", "move it away"
            raise MixtralError(what, fix=fix, code=OUTPUT_EXISTS)

    def has_moved(self) -> bool:
        """Whether an earlier run wrote the destination and was killed after that."""
        is_there = self.dst.exists() and any(self.dst.iterdir())
        return is_there and self.is_whole.exists() and not self.files.exists()

    def move(self) -> None:
        """Makes the published folder the destination."""
        self.is_whole.touch()
        sync_folder(self.folder)
        with contextlib.suppress(FileNotFoundError):
            self.dst.rmdir()  # it is empty
        os.rename(self.files, self.dst)
        sync_folder(self.dst.parent)

    def remove(self) -> None:
        """Removes all of it; at once, as far as another run can see."""
        os.rename(self.folder, self.removed)
        shutil.rmtree(self.removed)
