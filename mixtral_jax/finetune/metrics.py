"""The log of a run: OUTPUT_DIR/metrics.jsonl, and event files for TensorBoard made of it.

A checkpoint knows where the log ended when it was saved. A run that resumes cuts the log there and
makes the event files anew, so that both are those of a run that was never interrupted, but for the
fields of ``TIMES``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mixtral_jax.errors import BAD_CONFIG, MixtralError
from mixtral_jax.finetune.options import ReportTo

NAME = "metrics.jsonl"
EVENTS = "runs"
TIMES = ("time", "seconds", "tokens_per_second", "mfu")


def check_report_to(report_to: ReportTo) -> None:
    """Refuses event files where nothing can write them (exit code 78)."""
    if report_to == "tensorboard" and importlib.util.find_spec("tensorboardX") is None:
        fix = 'pip install "mixtral-jax[finetune]", or --report-to jsonl'
        raise MixtralError("--report-to tensorboard needs tensorboardX", fix=fix, code=BAD_CONFIG)


class MetricsLog:
    """An open log.

    Args:
        folder: OUTPUT_DIR.
        report_to: where lines go; ``none`` touches no file.
        position: bytes of metrics.jsonl that count; what follows is cut off.
        note: called with one line where the file is shorter than that.
    """

    def __init__(
        self,
        folder: Path,
        report_to: ReportTo,
        *,
        position: int = 0,
        note: Callable[[str], None] = print,
    ):
        self._file = self._events = None
        self._untouched = position  # of a file that is left as it is
        if report_to == "none":
            return
        path = folder / NAME
        self._file = open(path, "ab")  # noqa: SIM115 (closed by close)
        size = self._file.tell()
        if size < position:
            note(f"{path} is shorter than the checkpoint says: lines of the log are lost")
        self._file.truncate(min(size, position))
        self._file.seek(0, os.SEEK_END)
        if report_to == "tensorboard":
            self._events = EventFiles(folder / EVENTS)
            for line in read_lines(path):
                self._events.write(line)

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line, which has a ``step``, with the time of day."""
        if self._file is None:
            return
        line = {**line, "time": round(time.time(), 3)}
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.flush()
        if self._events is not None:
            self._events.write(line)

    def position(self) -> int:
        """Where the log ends; that much is on the disk now. With ``none`` it stays where it was."""
        if self._file is None:
            return self._untouched
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log; a torn last one, and what is no JSON object, is passed over."""
    with open(path, "rb") as file:
        for line in file:
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict) and "step" in found:
                yield found


class EventFiles:
    """Event files for TensorBoard, in place of those that are there.

    Args:
        folder: made where it is missing.
    """

    def __init__(self, folder: Path):
        from tensorboardX import SummaryWriter

        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = SummaryWriter(logdir=str(folder))

    def write(self, line: Mapping[str, Any]) -> None:
        """Writes a line of metrics.jsonl: numbers as scalars, answers as text."""
        step, when = line["step"], line.get("time")
        for tag, value in scalars(line).items():
            self._writer.add_scalar(tag, value, step, walltime=when)
        for i, sample in enumerate(line.get("samples", ())):
            text = f"**{sample['prompt']}**\n\n{sample['text']}"
            self._writer.add_text(f"samples/{i}", text, step, walltime=when)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line by tag, as transformers names them; of a layer's experts the largest
    load."""
    found: dict[str, float] = {}
    for name, value in line.items():
        if name in ("step", "time", "samples") or value is None:
            continue
        if isinstance(value, list):
            for layer, each in enumerate(value):
                tag, number = f"router/{name}/layer_{layer}", each
                if isinstance(each, list):
                    tag, number = f"router/max_{name}/layer_{layer}", max(each, default=0.0)
                if number is not None:
                    found[tag] = number
        elif name.startswith("eval_"):
            found[f"eval/{name.removeprefix('eval_')}"] = value
        else:
            found[f"train/{name}"] = value
    return found
