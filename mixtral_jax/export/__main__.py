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
from mixtral_jax.convert.terminal import shown
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
    report = hosts.by_first(options.processes, options, "exported", lambda: _export(options))
    if report is not None:
        print(json.dumps(dataclasses.asdict(report)) if options.json else _table(report))
    return OK


def _export(options: Options) -> ExportReport:
    from rich.progress import DownloadColumn

    fields = [field.name for field in dataclasses.fields(ExportOptions)]
    with shown("exporting", DownloadColumn()) as at:
        return export(
            options.checkpoint,
            options.dir,
            ExportOptions(**{name: getattr(options, name) for name in fields}),
            note=at.note,
            progress=at.progress,
            stop=at.stop,
        )


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
