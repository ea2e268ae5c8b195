"""``python -m mixtral_jax.quantize SRC DST --scheme S``: a checkpoint in few bits."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import tyro

from mixtral_jax import cli
from mixtral_jax.convert.terminal import Stop
from mixtral_jax.errors import OK, USAGE, MixtralError
from mixtral_jax.quantize import coverage, errors
from mixtral_jax.quantize.driver import QuantizeReport, quantize_checkpoint
from mixtral_jax.quantize.makers import DataFree, Recipe
from mixtral_jax.sharding import hosts
from mixtral_jax.sharding.cluster import ProcessOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Quantizes the matrices of attention and experts; everything else stays as it is.

    Run the same command again after any interruption: it resumes.
    """

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """A Hugging Face or native Mistral folder, one of ours, tiny, or org/name[@revision]."""
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """The folder to make; work goes on in DST.partial until all is done."""
    scheme: DataFree
    """int8 and fp8: one scale per output row. int4: groups of inputs. nf4 and fp4: as
    bitsandbytes, blocks of 64."""
    group_size: int | None = None
    """Inputs that share a scale, of int4: 32, 64 (unless given) or 128."""
    symmetric: bool = False
    """Of int4: no zero points (so it is unless --asymmetric is given)."""
    asymmetric: bool = False
    """Of int4: a zero point for each group."""
    double_quant: bool = False
    """Of nf4 and fp4: the scales are quantized as well."""
    verify: bool = False
    """Read every leaf back, of a finished output too."""
    json: bool = False
    """Print one JSON line on stdout and nothing else there."""
    debug: bool = False
    """Show tracebacks."""
    processes: Annotated[ProcessOptions, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=ProcessOptions
    )

    def __post_init__(self):
        if self.symmetric and self.asymmetric:
            raise MixtralError("--symmetric with --asymmetric", fix="choose one", code=USAGE)
        self.recipe()

    def recipe(self) -> Recipe:
        """How to quantize."""
        return Recipe(
            scheme=self.scheme,
            group_size=self.group_size,
            symmetric=not self.asymmetric,
            double_quant=self.double_quant,
        )


def main(options: Options) -> int:
    """Quantizes, with a progress bar on stderr, and prints the reports on stdout."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    if hosts.join(options.processes, options, with_jax=False) and not hosts.is_first():
        # One process quantizes; the others must not run ahead of it.
        hosts.barrier("quantized", may_wait_for_first=True)
        return OK
    console = Console(stderr=True, soft_wrap=True)
    bar = Progress(
        TextColumn("quantizing"),
        BarColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar, Stop(console) as stop:
        task = bar.add_task("quantize", total=None)
        report = quantize_checkpoint(
            options.src,
            options.dst,
            options.recipe(),
            verify=options.verify,
            note=lambda line: console.print(f"note: {line}", markup=False, highlight=False),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            stop=stop,
        )
    hosts.barrier("quantized", may_wait_for_first=True)
    print(json.dumps(_as_dict(report)) if options.json else _text(report))
    return OK


def _as_dict(report: QuantizeReport) -> dict:
    rows = [{**row._asdict(), "bits": row.bits} for row in report.coverage]
    found = {
        leaf: {"relative": error.relative, "worst_group": error.worst}
        for leaf, error in report.errors.items()
    }
    return {**dataclasses.asdict(report.converted), "coverage": rows, "errors": found}


def _text(report: QuantizeReport) -> str:
    made = report.converted
    parts = [*errors.lines(report.errors), ""] if report.errors else []
    parts += coverage.lines(report.coverage)
    peak = f"{made.peak_rss_bytes / 1e6:,.0f} MB anonymous"
    parts += ["", f"seconds      {made.seconds:.1f}", f"peak memory  {peak}"]
    return "\n".join([*parts, f"digest       {made.digest}"])


if __name__ == "__main__":
    import jax

    # Quantization needs no accelerator, and must not take one from a job that does.
    jax.config.update("jax_platforms", "cpu")
    sys.exit(cli.run(main, Options, "python -m mixtral_jax.quantize"))
