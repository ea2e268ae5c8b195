"""``python -m mixtral_jax.convert SRC DST``: converts a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from mixtral_jax import cli
from mixtral_jax.convert.driver import convert
from mixtral_jax.convert.options import ConvertOptions, ConvertReport
from mixtral_jax.convert.terminal import shown
from mixtral_jax.errors import OK
from mixtral_jax.sharding import hosts
from mixtral_jax.sharding.cluster import ProcessOptions


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
    processes: tyro.conf.OmitArgPrefixes[ProcessOptions] = dataclasses.field(
        default_factory=ProcessOptions
    )


def main(options: Options) -> int:
    """Converts, with a progress bar on stderr, and prints the report on stdout."""
    report = hosts.by_first(options.processes, options, "converted", lambda: _convert(options))
    if report is not None:
        print(json.dumps(dataclasses.asdict(report)) if options.json else _table(report))
    return OK


def _convert(options: Options) -> ConvertReport:
    from rich.progress import DownloadColumn, TransferSpeedColumn

    fields = [field.name for field in dataclasses.fields(ConvertOptions)]
    with shown("converting", DownloadColumn(), TransferSpeedColumn()) as at:
        return convert(
            options.src,
            options.dst,
            ConvertOptions(**{name: getattr(options, name) for name in fields}),
            note=at.note,
            progress=at.progress,
            stop=at.stop,
        )


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


def run(argv: Sequence[str]) -> int:
    """The command with these arguments; gives its exit code."""
    import jax

    # Conversion needs no accelerator, and must not take one from a job that does.
    jax.config.update("jax_platforms", "cpu")
    return cli.run_verb("convert", main, Options, argv)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
