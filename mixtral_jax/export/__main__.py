"""``python -m mixtral_jax.export CHECKPOINT DIR --platform P``: programs to deploy."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from mixtral_jax import cli
from mixtral_jax.convert.terminal import Stop
from mixtral_jax.errors import OK
from mixtral_jax.export.driver import export
from mixtral_jax.export.options import ExportOptions, ExportReport
from mixtral_jax.sharding import hosts
from mixtral_jax.sharding.cluster import ProcessOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ExportOptions):
    """Writes prefill and decode_step as serialized programs, with the weights beside them.

    DIR/run.py runs them with jax, flatbuffers and safetensors alone. Run it again with another
    --platform to add that platform's programs to DIR.
    """

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A checkpoint folder, 'tiny', or org/name[@revision] on the Hugging Face Hub."""
    dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """The folder to make, or one that this command made."""
    json: bool = False
    """Print one JSON line on stdout and nothing else there."""
    debug: bool = False
    """Show tracebacks."""
    processes: tyro.conf.OmitArgPrefixes[ProcessOptions] = dataclasses.field(
        default_factory=ProcessOptions
    )


def main(options: Options) -> int:
    """Exports, with a progress bar on stderr, and prints the report on stdout."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    if hosts.join(options.processes, options, with_jax=False) and not hosts.is_first():
        # One process exports; the others must not run ahead of it.
        hosts.barrier("exported", may_wait_for_first=True)
        return OK
    fields = [field.name for field in dataclasses.fields(ExportOptions)]
    console = Console(stderr=True, soft_wrap=True)
    bar = Progress(
        TextColumn("exporting"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar, Stop(console) as stop:
        task = bar.add_task("export", total=None)
        report = export(
            options.checkpoint,
            options.dir,
            ExportOptions(**{name: getattr(options, name) for name in fields}),
            note=lambda line: console.print(f"note: {line}", markup=False, highlight=False),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            stop=stop,
        )
    hosts.barrier("exported", may_wait_for_first=True)
    print(json.dumps(dataclasses.asdict(report)) if options.json else _table(report))
    return OK


def _table(report: ExportReport) -> str:
    rows = {
        "platform": f"{report.platform}, kernels {report.kernels}, mesh {report.mesh}",
        **{name: f"{size:,} bytes" for name, size in report.program_bytes.items()},
        "weights": f"{report.weight_bytes:,} bytes",
        "seconds": f"{report.seconds:.1f}",
        "peak memory": f"{report.peak_rss_bytes / 1e6:,.0f} MB anonymous",
        "digest": report.digest,
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}} {value}" for name, value in rows.items())


def run(argv: Sequence[str]) -> int:
    """The command with these arguments; gives its exit code."""
    import jax

    # Programs are lowered, not run: no accelerator is needed, nor taken from a job that does.
    jax.config.update("jax_platforms", "cpu")
    return cli.run_verb("export", main, Options, argv)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
