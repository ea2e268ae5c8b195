"""``python -m mixtral_jax.convert SRC DST``: converts a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from mixtral_jax import cli
from mixtral_jax.convert.driver import convert
from mixtral_jax.convert.options import ConvertOptions, ConvertReport
from mixtral_jax.errors import INTERRUPTED, OK
from mixtral_jax.sharding import hosts
from mixtral_jax.sharding.cluster import ProcessOptions

_STDERR = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ConvertOptions):
    """Converts Mixtral weights, in any published layout, to Orbax or to Hugging Face safetensors.

    Run the same command again after any interruption: it resumes.
    """

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """A Hugging Face or native Mistral folder, one of ours, tiny, or org/name[@revision]."""
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """The folder to make; work goes on in DST.partial until all is done."""
    json: bool = False
    """Print one JSON line on stdout and nothing else there."""
    debug: bool = False
    """Show tracebacks."""
    processes: Annotated[ProcessOptions, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=ProcessOptions
    )


def main(options: Options) -> int:
    """Converts, with a progress bar on stderr, and prints the report on stdout."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    if hosts.join(options.processes, options, with_jax=False) and not hosts.is_first():
        # One process converts; the others must not run ahead of it.
        hosts.barrier("converted", may_wait_for_first=True)
        return OK
    fields = [field.name for field in dataclasses.fields(ConvertOptions)]
    console = Console(stderr=True, soft_wrap=True)
    bar = Progress(
        TextColumn("converting"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar, _Stop(console) as stop:
        task = bar.add_task("convert", total=None)
        report = convert(
            options.src,
            options.dst,
            ConvertOptions(**{name: getattr(options, name) for name in fields}),
            note=lambda line: console.print(f"note: {line}", markup=False, highlight=False),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            stop=stop,
        )
    hosts.barrier("converted", may_wait_for_first=True)
    print(json.dumps(dataclasses.asdict(report)) if options.json else _table(report))
    return OK


class _Stop:
    """SIGINT and SIGTERM. Between leaves the work can end in order; elsewhere it ends at once.

    Ending at once is safe as well, and more so than an exception: one that a signal raises inside
    Orbax, or while files are fetched, leaves threads waiting for ever.
    """

    def __init__(self, console: Any):
        self.console = console
        self.is_listening = self.asked = False  # listening: somebody asks before each leaf

    def __call__(self) -> bool:
        self.is_listening = True
        return self.asked

    def __enter__(self) -> _Stop:
        signals = (signal.SIGINT, signal.SIGTERM)
        self.before = {signum: signal.signal(signum, self._handle) for signum in signals}
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: Any) -> None:
        if self.is_listening and not self.asked:
            self.asked = True
            self._say("note: stopping after this leaf; press again to stop now")
            return
        self._say("error: interrupted; fix: run the same command again to resume")
        os._exit(INTERRUPTED)

    def _say(self, line: str) -> None:
        # Not through the console, whose locks other threads hold; below its bar, with a cursor.
        below = "\n\x1b[?25h" if self.console.is_terminal else ""
        os.write(_STDERR, f"{below}{line}\n".encode())


def _table(report: ConvertReport) -> str:
    rate = report.bytes / max(report.seconds, 1e-9)
    rows = {
        "parameters": f"{report.parameters:,}",
        "tensors": f"{report.tensors:,}",
        "bytes": f"{report.bytes:,}",
        "seconds": f"{report.seconds:.1f} ({rate / 1e6:,.0f} MB/s)",
        "peak memory": f"{report.peak_rss_bytes / 1e6:,.0f} MB anonymous",
        "digest": report.digest,
    }
    return "\n".join(f"{name:<12} {value}" for name, value in rows.items())


if __name__ == "__main__":
    import jax

    # Conversion needs no accelerator, and must not take one from a job that does.
    jax.config.update("jax_platforms", "cpu")
    sys.exit(cli.run(main, Options, "python -m mixtral_jax.convert"))
