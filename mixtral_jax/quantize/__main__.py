"""``python -m mixtral_jax.quantize SRC DST --scheme S``: a checkpoint in few bits."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mixtral_jax import cli
from mixtral_jax.convert.terminal import Stop
from mixtral_jax.errors import OK, USAGE, MixtralError
from mixtral_jax.quantize import coverage, errors, gptq_report
from mixtral_jax.quantize.driver import (
    Calibration,
    QuantizeReport,
    quantize_checkpoint,
    quantize_gptq,
)
from mixtral_jax.quantize.gptq_matrices import Calibrated
from mixtral_jax.quantize.gptq_recipe import GptqRecipe
from mixtral_jax.quantize.makers import DataFree, Recipe
from mixtral_jax.quantize.published import SCHEMES, published
from mixtral_jax.quantize.qmoe import QmoeRecipe
from mixtral_jax.sharding import hosts
from mixtral_jax.sharding.cluster import ProcessOptions

# Options of GPTQ.
_GPTQ = ("bits", "act_order", "damp", "calibration", "samples", "length", "all_token_hessians")
_QMOE = tuple(name for name in _GPTQ if name != "bits")  # with --calibration


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Quantizes the matrices of attention and experts; everything else stays as it is.

    Run the same command again after any interruption: it resumes.
    """

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """A Hugging Face or native Mistral folder, one of ours, tiny, or org/name[@revision]."""
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """The folder to make; work goes on in DST.partial until all is done."""
    scheme: DataFree | Literal["gptq"]
    """int8 and fp8: one scale per output row. int4: groups of inputs. nf4 and fp4: as
    bitsandbytes, blocks of 64. gptq: fitted to calibration text, layer by layer. qmoe
    (experimental): experts below one bit, fitted likewise if --calibration is given."""
    group_size: int | None = None
    """Inputs that share a scale. Of int4: 32, 64 (unless given) or 128. Of gptq: these, 128 unless
    given, or -1 for a whole row."""
    symmetric: bool = False
    """Of int4 and gptq: no zero points (so it is unless --asymmetric is given)."""
    asymmetric: bool = False
    """Of int4 and gptq: a zero point for each group."""
    bits: Literal[2, 3, 4, 8] | None = None
    """Of gptq: of a code; 4 unless given."""
    act_order: bool = False
    """Of gptq (and of qmoe, where calibrated): quantize the inputs first that move the outputs
    most; gptq keeps columns in that order."""
    damp: float | None = None
    """Of gptq and qmoe: the share of its mean that is added to a Hessian's diagonal; 0.1 unless
    given."""
    calibration: Path | None = None
    """Of gptq and qmoe: a .txt file, or a .jsonl file with {"text": ...} or {"messages": [...]} in
    each line."""
    samples: int | None = None
    """Of gptq and qmoe: windows of the text, from its beginning; 128 unless given."""
    length: int | None = None
    """Of gptq and qmoe: tokens of a window; 2048 unless given."""
    all_token_hessians: bool = False
    """Of gptq and qmoe: fit every expert to all tokens, not to those routed to it."""
    double_quant: bool = False
    """Of nf4 and fp4: the scales are quantized as well."""
    format: Literal["orbax", "gptq"] = "orbax"
    """gptq: the published GPTQ layout, for other tools, of gptq and int4; DST.quantized holds the
    work until DST is written."""
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
        if self.format == "gptq" and self.scheme not in SCHEMES:
            fix = f"leave it out, or choose {' or '.join(SCHEMES)}"
            raise MixtralError(f"--format gptq is not for {self.scheme}", fix=fix, code=USAGE)
        if self.scheme == "gptq":
            if self.double_quant:
                fix = "leave it out, or choose nf4 or fp4"
                raise MixtralError("--double-quant is not for gptq", fix=fix, code=USAGE)
        else:
            self._check_uncalibrated()
            self.recipe()
        if self.is_calibrated:
            self.calibrated_recipe()
            self.text()

    def _check_uncalibrated(self) -> None:
        """Refuses options of GPTQ where it is not what quantizes."""
        for name in _GPTQ:
            value = getattr(self, name)
            if value is None or value is False:  # 0 is asked for, too
                continue
            if self.is_calibrated and name in _QMOE:
                continue
            option, fix = name.replace("_", "-"), "leave it out, or choose gptq"
            if self.scheme == "qmoe" and name in _QMOE:
                fix = "give --calibration as well"
            raise MixtralError(f"--{option} is not for {self.scheme}", fix=fix, code=USAGE)

    @property
    def is_calibrated(self) -> bool:
        """Whether codes are fitted to calibration text."""
        return self.scheme == "gptq" or (self.scheme == "qmoe" and self.calibration is not None)

    def recipe(self) -> Recipe:
        """How to quantize without data."""
        return Recipe(
            scheme=self.scheme,
            group_size=self.group_size,
            symmetric=not self.asymmetric,
            double_quant=self.double_quant,
        )

    def calibrated_recipe(self) -> Calibrated:
        """How to quantize with calibration text."""
        given = {"bits": self.bits, "damp": self.damp, "group": self.group_size}
        asked: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        asked |= {"act_order": self.act_order, "all_token_hessians": self.all_token_hessians}
        if self.scheme == "qmoe":
            return QmoeRecipe(**asked)
        if self.group_size == -1:
            asked["group"] = None
        return GptqRecipe(symmetric=not self.asymmetric, **asked)

    def text(self) -> Calibration:
        """The calibration text."""
        given = {"samples": self.samples, "length": self.length}
        asked = {name: value for name, value in given.items() if value is not None}
        return Calibration(path=self.calibration, **asked)


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
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar, Stop(console) as stop:
        task = bar.add_task("quantizing", total=None)
        how: dict[str, Any] = {
            "verify": options.verify,
            "note": lambda line: console.print(f"note: {line}", markup=False, highlight=False),
            "progress": lambda done, total: bar.update(task, completed=done, total=total),
            "stop": stop,
        }

        def quantize(dst: Path) -> QuantizeReport:
            if not options.is_calibrated:
                return quantize_checkpoint(options.src, dst, options.recipe(), **how)
            how["say"] = lambda doing: bar.update(task, description=doing)
            recipe, text = options.calibrated_recipe(), options.text()
            return quantize_gptq(options.src, dst, recipe, text, **how)

        if options.format == "gptq":
            report = published(options.dst, quantize, note=how["note"], stop=stop)
        else:
            report = quantize(options.dst)
    hosts.barrier("quantized", may_wait_for_first=True)
    print(json.dumps(_as_dict(report)) if options.json else _text(report))
    return OK


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


if __name__ == "__main__":
    import jax

    def _run(options: Options) -> int:
        if not options.is_calibrated:
            # Data-free schemes need no accelerator, and must not take one from a job that does.
            jax.config.update("jax_platforms", "cpu")
        return main(options)

    sys.exit(cli.run(_run, Options, "python -m mixtral_jax.quantize"))
