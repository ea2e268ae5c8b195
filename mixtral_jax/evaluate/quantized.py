"""Rows whose weights are quantized on the disk before they can be loaded.

The quantize command's own driver makes them, one folder after another: into a temporary folder that
is gone once its row is loaded, or into one that is kept, where an interrupted run goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixtral_jax.convert.hub import resolve
from mixtral_jax.convert.manifest import file_sha256
from mixtral_jax.errors import INPUT_NOT_FOUND, USAGE, MixtralError
from mixtral_jax.evaluate.text import no_file
from mixtral_jax.quantize import spelling
from mixtral_jax.quantize.calibration import read_windows
from mixtral_jax.quantize.driver import Calibration
from mixtral_jax.quantize.gptq_report import LayerReport
from mixtral_jax.quantize.options import quantize
from mixtral_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationText:
    """Which text a scheme was fitted to.

    Attributes:
        file: its name, without the folder.
        bytes: its size.
        sha256: of its bytes, in hex.
        windows: that were read from its beginning.
        tokens: of all of them.
        samples: windows at most.
        length: tokens of a window at most.
    """

    file: str
    bytes: int
    sha256: str
    windows: int
    tokens: int
    samples: int
    length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """How the weights of a row were quantized.

    Attributes:
        options: those of the quantize command that are not at their default.
        calibration: None where the scheme needs no text.
        layers: of GPTQ: what calibration saw, and the error of the outputs.
    """

    options: dict[str, Any]
    calibration: CalibrationText | None
    layers: list[LayerReport]

    @property
    def command(self) -> str:
        """What the quantize command would be told, without folders."""
        words = []
        for name, value in self.options.items():
            flag = f"--{name.replace('_', '-')}"
            words += [flag] if value is True else [flag, str(value)]
        return " ".join(words)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workplace:
    """Where folders are made, and from which text.

    Attributes:
        calibration: the text; only some schemes need one.
        keep: where folders are kept; None for temporary ones.
    """

    calibration: Calibration
    keep: Path | None = None

    @contextlib.contextmanager
    def make(self, checkpoint: str, word: str, **how: Any) -> Iterator[tuple[Path, Made]]:
        """Quantizes a checkpoint; its folder lasts as long as the context, unless it is kept.

        Args:
            checkpoint: as for ``load``.
            word: a scheme (see quantize/spelling.py).
            **how: as for ``quantize``.

        Raises:
            MixtralError: as ``quantize``.
        """
        with contextlib.ExitStack() as stack:
            if self.keep is None:
                prefix = "mixtral-jax-evaluate-"
                parent = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix)))
            else:
                parent = self.keep
                parent.mkdir(parents=True, exist_ok=True)
            folder = parent / re.sub(r"[^\w.=@-]+", "-", f"{checkpoint}-{word}").strip("-")
            text, run = None, {}
            if spelling.is_calibrated(word, has_text=self.calibration.path is not None):
                text = read_calibration(checkpoint, self.calibration)
                path = Path(str(self.calibration.path))
                run = {"calibration": path, "samples": text.samples, "length": text.length}
            asked = spelling.options_of(word, checkpoint, folder, **run)
            report = quantize(asked, **how)
            yield folder, Made(options=_given(asked), calibration=text, layers=report.layers)


def read_calibration(checkpoint: str, calibration: Calibration) -> CalibrationText:
    """Which text it is and how much of it is read.

    Raises:
        MixtralError: as ``read_windows``; exit code 66 without a tokenizer.
    """
    tokenizer = Tokenizer.from_folder(resolve(checkpoint).folder)
    samples, length = calibration.samples, calibration.length
    windows = read_windows(calibration.path, tokenizer, samples=samples, length=length)
    path = Path(str(calibration.path))
    return CalibrationText(
        file=path.name,
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        windows=len(windows),
        tokens=sum(map(len, windows)),
        samples=samples,
        length=length,
    )


def check_calibration(path: Path, text: Path, sha256: str) -> None:
    """Refuses calibration text that is the text to be evaluated, or is not there.

    Args:
        path: of the calibration text.
        text: of the evaluated text.
        sha256: of its bytes, in hex.

    Raises:
        MixtralError: exit code 64 for the same text, under any name; 66 without the file.
    """
    if not path.is_file():
        what, fix = f"--calibration {path}: {no_file(path)}", "name a .txt or .jsonl file"
        raise MixtralError(what, fix=fix, code=INPUT_NOT_FOUND)
    if file_sha256(path) == sha256:
        raise MixtralError(
            f"--calibration {path}",
            expected="another text than the one to be evaluated",
            got=f"the same as --text {text}",
            fix="calibrate on other text of the same kind",
            code=USAGE,
        )


def _given(options: Any) -> dict[str, Any]:
    """What the quantize command was told, folders and the run itself left out; paths by name."""
    left_out = {"src", "dst", "format", "verify", "json", "debug", "processes"}
    found = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name not in left_out and value not in (None, False):
            found[field.name] = value.name if isinstance(value, Path) else value
    return found
