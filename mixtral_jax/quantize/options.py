"""What the quantize command is asked, and the scheme names that it and ``evaluate`` know."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mixtral_jax.errors import USAGE, MixtralError
from mixtral_jax.quantize.driver import (
    Calibration,
    QuantizeReport,
    quantize_checkpoint,
    quantize_gptq,
)
from mixtral_jax.quantize.gptq_matrices import Calibrated
from mixtral_jax.quantize.gptq_recipe import GptqRecipe
from mixtral_jax.quantize.makers import DataFree, Recipe
from mixtral_jax.quantize.published import SCHEMES as PUBLISHED
from mixtral_jax.quantize.published import published
from mixtral_jax.quantize.qmoe import QmoeRecipe
from mixtral_jax.sharding.cluster import ProcessOptions

Scheme = DataFree | Literal["rtn", "gptq"]
BITS = (2, 3, 4, 8)
WITH_BITS = ("rtn", "gptq")  # schemes that come in so many bits
CALIBRATED = ("gptq",)  # schemes that must be fitted to text
MAY_BE_CALIBRATED = ("gptq", "qmoe")  # schemes that are fitted to text where some is given

# Options of schemes that are fitted to text.
_GPTQ = ("act_order", "damp", "calibration", "samples", "length", "all_token_hessians")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Quantizes the matrices of attention and experts; everything else stays as it is.

    Run the same command again after any interruption: it resumes.
    """

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """A Hugging Face or native Mistral folder, one of ours, tiny, or org/name[@revision]."""
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """The folder to make; work goes on in DST.partial until all is done."""
    scheme: Scheme
    """int8 and fp8: one scale per output row. int4: groups of inputs. nf4 and fp4: as
    bitsandbytes, blocks of 64. gptq: fitted to calibration text, layer by layer. rtn: rounded to
    nearest in the codes and on the grid of gptq. qmoe (experimental): experts below one bit, fitted
    to text if --calibration is given."""
    group_size: int | None = None
    """Inputs that share a scale. Of int4: 32, 64 (unless given) or 128. Of rtn: these, 128 unless
    given. Of gptq: these, 128 unless given, or -1 for a whole row."""
    symmetric: bool = False
    """Of int4, rtn and gptq: no zero points (so it is unless --asymmetric is given)."""
    asymmetric: bool = False
    """Of int4, rtn and gptq: a zero point for each group."""
    bits: Literal[2, 3, 4, 8] | None = None
    """Of rtn and gptq: of a code; 4 unless given."""
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
    """gptq: the published GPTQ layout, for other tools, of gptq, rtn and int4; .DST.quantizing
    holds the work until DST is written."""
    verify: bool = False
    """Read every leaf back, of a finished output too."""
    json: bool = False
    """Print one JSON line on stdout and nothing else there."""
    debug: bool = False
    """Show tracebacks."""
    processes: tyro.conf.OmitArgPrefixes[ProcessOptions] = dataclasses.field(
        default_factory=ProcessOptions
    )

    def __post_init__(self):
        if self.symmetric and self.asymmetric:
            raise MixtralError("--symmetric with --asymmetric", fix="choose one", code=USAGE)
        if self.format == "gptq" and self.scheme not in PUBLISHED:
            fix = f"leave it out, or choose {' or '.join(PUBLISHED)}"
            raise MixtralError(f"--format gptq is not for {self.scheme}", fix=fix, code=USAGE)
        if self.scheme == "gptq":
            if self.double_quant:
                fix = "leave it out, or choose nf4 or fp4"
                raise MixtralError("--double-quant is not for gptq", fix=fix, code=USAGE)
        else:
            self._check_uncalibrated()
            if self.bits is not None and self.scheme not in WITH_BITS:
                fix = f"leave it out, or choose {' or '.join(WITH_BITS)}"
                raise MixtralError(f"--bits is not for {self.scheme}", fix=fix, code=USAGE)
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
            if self.is_calibrated:
                continue
            option, fix = name.replace("_", "-"), "leave it out, or choose gptq"
            if self.scheme == "qmoe":
                fix = "give --calibration as well"
            raise MixtralError(f"--{option} is not for {self.scheme}", fix=fix, code=USAGE)

    @property
    def is_calibrated(self) -> bool:
        """Whether codes are fitted to calibration text."""
        is_asked = self.scheme in MAY_BE_CALIBRATED and self.calibration is not None
        return self.scheme in CALIBRATED or is_asked

    def recipe(self) -> Recipe:
        """How to quantize without data."""
        return Recipe(
            scheme=f"rtn{self.bits or 4}" if self.scheme == "rtn" else self.scheme,
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


def quantize(options: Options, **how: Any) -> QuantizeReport:
    """Runs what was asked.

    Args:
        options: which source, folder and scheme.
        **how: ``note``, ``progress``, ``stop`` and, called with what is being done, ``say``, as
            for ``quantize_gptq``.

    Raises:
        MixtralError: as ``quantize_checkpoint`` and ``quantize_gptq``.
    """
    how["verify"] = options.verify
    say = how.pop("say", lambda line: None)

    def make(dst: Path) -> QuantizeReport:
        if not options.is_calibrated:
            return quantize_checkpoint(options.src, dst, options.recipe(), **how)
        recipe, text = options.calibrated_recipe(), options.text()
        return quantize_gptq(options.src, dst, recipe, text, say=say, **how)

    if options.format == "orbax":
        return make(options.dst)
    told = {name: how[name] for name in ("note", "stop") if name in how}
    return published(options.dst, make, **told)
