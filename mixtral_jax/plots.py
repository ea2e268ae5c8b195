"""Pictures as files: what every ``--plot`` shares."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mixtral_jax.errors import INPUT_NOT_FOUND, USAGE, MixtralError


def check_plot(path: Path) -> None:
    """Refuses a picture that could not be drawn, before anything is computed.

    Raises:
        MixtralError: exit code 64 without matplotlib or for another kind of file, 66 for a folder
            that is not there.
    """
    check_file("--plot", path, (".svg", ".png"))
    if importlib.util.find_spec("matplotlib") is None:
        fix = "pip install 'mixtral-jax[plots]'"
        raise MixtralError("--plot needs matplotlib", fix=fix, code=USAGE)


def check_file(flag: str, path: Path, suffixes: Sequence[str]) -> None:
    """Refuses a name that a file could not be written under, before anything is computed.

    Raises:
        MixtralError: exit code 64 for another kind of file, 66 for a folder that is not there.
    """
    if path.suffix not in suffixes:
        expected, fix = f"a name that ends in {' or '.join(suffixes)}", f"{flag} file{suffixes[0]}"
        raise MixtralError(flag, expected=expected, got=str(path), fix=fix, code=USAGE)
    if not path.parent.is_dir():
        what = f"{flag} {path}: no folder {path.parent}"
        raise MixtralError(what, fix="make it first", code=INPUT_NOT_FOUND)


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
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
