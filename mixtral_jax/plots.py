"""Pictures as files: what every ``--plot`` shares."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mixtral_jax.errors import INPUT_NOT_FOUND, IO_ERROR, OUTPUT_EXISTS, USAGE, MixtralError


def check_plot(path: Path) -> None:
    """Refuses a picture that could not be drawn, before anything is computed.

    Raises:
        MixtralError: exit code 64 without matplotlib; as ``check_file``.
    """
    check_file("--plot", path, (".svg", ".png"))
    if importlib.util.find_spec("matplotlib") is None:
        fix = "pip install 'mixtral-jax[plots]'"
        raise MixtralError("--plot needs matplotlib", fix=fix, code=USAGE)


def check_file(flag: str, path: Path, suffixes: Sequence[str]) -> None:
    """Refuses a name that a file could not be written under, before anything is computed.

    Raises:
        MixtralError: exit code 64 for another kind of file, 66 for a folder that is not there, 73
            for what is there and no file, 74 for what may not be written.
    """
    if path.suffix.lower() not in suffixes:
        expected, fix = f"a name that ends in {' or '.join(suffixes)}", f"{flag} file{suffixes[0]}"
        raise MixtralError(flag, expected=expected, got=str(path), fix=fix, code=USAGE)
    if not path.parent.is_dir():
        what = f"{flag} {path}: no folder {path.parent}"
        raise MixtralError(what, fix="make it first", code=INPUT_NOT_FOUND)
    if path.exists() and not path.is_file():
        what = f"{flag} {path} is {'a folder' if path.is_dir() else 'no regular file'}"
        raise MixtralError(what, fix=f"{flag} another{suffixes[0]}", code=OUTPUT_EXISTS)
    folder = path.resolve().parent  # a file is written beside, and takes the place of the old one
    if not os.access(folder, os.W_OK | os.X_OK):
        what = f"{flag} {path}: {folder} may not be written to"
        raise MixtralError(what, fix="choose another folder, or change its rights", code=IO_ERROR)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, beside a file whose place it takes when all is written.

    Args:
        path: of the file, which stays what it was if writing fails.
    """
    path = path.resolve()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def figure_file(path: Path, *, size: tuple[float, float]) -> Iterator[Any]:
    """A figure to draw on, which is written when all is drawn; SVG is the same for the same data.

    Args:
        path: ends in .svg or .png.
        size: width and height in inches.

    Raises:
        MixtralError: as ``check_plot``.
    """
    check_plot(path)
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "mixtral_jax", "svg.fonttype": "none"}):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        kind = path.suffix.lower().removeprefix(".")
        with replacing(path) as partial:
            metadata = {"Date": None} if kind == "svg" else None
            figure.savefig(partial, format=kind, metadata=metadata)
