"""``python -m mixtral_jax.quantize SRC DST --scheme S``: a checkpoint in few bits."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence

from mixtral_jax import cli
from mixtral_jax.convert.terminal import shown
from mixtral_jax.errors import OK
from mixtral_jax.quantize import coverage, errors, gptq_report
from mixtral_jax.quantize.driver import QuantizeReport
from mixtral_jax.quantize.options import Options, quantize
from mixtral_jax.sharding import hosts


def main(options: Options) -> int:
    """Quantizes, with a progress bar on stderr, and prints the reports on stdout."""
    report = hosts.by_first(options.processes, options, "quantized", lambda: _quantize(options))
    if report is not None:
        print(json.dumps(_as_dict(report)) if options.json else _text(report))
    return OK


def _quantize(options: Options) -> QuantizeReport:
    with shown("quantizing") as at:
        return quantize(options, **at._asdict())


def _as_dict(report: QuantizeReport) -> dict:
    rows = [{**row._asdict(), "bits": row.bits} for row in report.coverage]
    found = {
        leaf: {"relative": error.relative, "worst_group": error.worst}
        for leaf, error in report.errors.items()
    }
    made = {**dataclasses.asdict(report.converted), "coverage": rows, "errors": found}
    if report.coded is not None:
        made["coded"] = dataclasses.asdict(report.coded)
    if report.layers:
        made["layers"] = [gptq_report.as_dict(layer) for layer in report.layers]
    return made


def _text(report: QuantizeReport) -> str:
    made = report.converted
    parts = [*errors.lines(report.errors), ""] if report.errors else []
    parts += [*gptq_report.lines(report.layers), ""] if report.layers else []
    parts += coverage.lines(report.coverage)
    parts += [] if report.coded is None else ["", str(report.coded)]
    peak = f"{made.peak_rss_bytes / 1e6:,.0f} MB anonymous"
    parts += ["", f"seconds      {made.seconds:.1f}", f"peak memory  {peak}"]
    return "\n".join([*parts, f"digest       {made.digest}"])


def run(argv: Sequence[str]) -> int:
    """The command with these arguments; gives its exit code."""
    import jax

    def run_main(options: Options) -> int:
        if not options.is_calibrated:
            # Data-free schemes need no accelerator, and must not take one from a job that does.
            jax.config.update("jax_platforms", "cpu")
        return main(options)

    return cli.run_verb("quantize", run_main, Options, argv)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
