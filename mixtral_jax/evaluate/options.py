"""What the commands of evaluate are asked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from mixtral_jax.config import DTYPES
from mixtral_jax.convert.hub import EMBEDDED
from mixtral_jax.errors import USAGE, MixtralError
from mixtral_jax.evaluate import exact, perplexity
from mixtral_jax.evaluate.quantized import Workplace
from mixtral_jax.evaluate.routing_page import DEFAULT_TOKENS
from mixtral_jax.evaluate.table import NO_SCHEME, Entry, is_made, parse_schemes
from mixtral_jax.evaluate.windows import Windowing
from mixtral_jax.load_options import LoadOptions
from mixtral_jax.quantize import spelling
from mixtral_jax.quantize.driver import Calibration
from mixtral_jax.quantize.spelling import is_calibrated
from mixtral_jax.sharding.cluster import ProcessOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared:
    """Options of every command."""

    json: bool = False
    """Print JSON lines on stdout and nothing else there."""
    debug: bool = False
    """Show tracebacks."""
    load: tyro.conf.OmitArgPrefixes[LoadOptions] = dataclasses.field(default_factory=LoadOptions)
    processes: tyro.conf.OmitArgPrefixes[ProcessOptions] = dataclasses.field(
        default_factory=ProcessOptions
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnText(Shared):
    """Options of what reads text."""

    windowing: tyro.conf.OmitArgPrefixes[Windowing] = dataclasses.field(default_factory=Windowing)
    batch: int = perplexity.DEFAULT_BATCH
    """Windows read at a time: speed and memory."""
    plot: Path | None = None
    """Draw the result as FILE.svg or FILE.png (needs matplotlib)."""

    def __post_init__(self):
        _check_batch(self.batch)
        if self.load.kv_dtype is not None:
            what, fix = "--kv-dtype: text is read without a cache", "leave it out"
            raise MixtralError(what, fix=fix, code=USAGE)


_ONE_TEXT = "measure them one after another: perplexities of two texts are not one number"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerplexityOptions(OnText):
    """Exact windowed perplexity of a text; several checkpoints or schemes are compared.

    Every token but the first is scored once. Further rows are compared with the first, which stays
    loaded beside one other at a time.
    """

    text: tuple[Path, ...]
    """A UTF-8 text file, one."""
    checkpoints: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[CKPT ...]")
    ] = (EMBEDDED,)
    """Checkpoint folders, 'tiny', or org/name[@revision] on the Hugging Face Hub."""
    schemes: str | None = None
    """Every checkpoint in each of these, as none,bfloat16,int8,int4:group-size=32,gptq3:act-order:
    a dtype, a scheme of quantization with the options of the quantize command, or none, which
    leaves the weights as they are. rtn3 is rounded to nearest on the grid of gptq3."""
    calibration: Path | None = None
    """What gptq is fitted to: a .txt or .jsonl file, not the text that is evaluated."""
    calibration_samples: int = Calibration.samples
    """Windows of the calibration text."""
    calibration_length: int = Calibration.length
    """Tokens of such a window."""
    keep: Path | None = None
    """Keep in this folder what must be quantized on the disk, and use what is there."""
    data: Path | None = None
    """Ask these questions too, as exact does, for a column of right answers."""
    chat: bool = False
    """Ask them in the model's own chat format."""

    def __post_init__(self):
        super().__post_init__()
        if not self.text:
            raise MixtralError("--text: expected a file", fix="--text FILE.txt", code=USAGE)
        if len(self.text) > 1:
            got = ", ".join(map(str, self.text))
            raise MixtralError("--text", expected="one file", got=got, fix=_ONE_TEXT, code=USAGE)
        if self.schemes is not None and self.load.quantize is not None:
            fix = f"--schemes {self.schemes},{self.load.quantize}"
            raise MixtralError("--schemes and --quantize", fix=fix, code=USAGE)
        words = [word for word in self.entry_schemes if self.is_made(word)]
        has_text = self.calibration is not None
        calibrated = [w for w in words if w is not None and is_calibrated(w, has_text=has_text)]
        if calibrated and self.calibration is None:
            what, fix = f"{calibrated[0]} needs calibration text", "--calibration FILE.txt"
            raise MixtralError(what, fix=fix, code=USAGE)
        if self.calibration is not None and not calibrated:
            fix = "leave it out, or ask for gptq in --schemes"
            raise MixtralError("--calibration: no scheme reads it", fix=fix, code=USAGE)
        if self.keep is not None and not words:
            fix = "leave it out: the schemes are made while a checkpoint loads"
            raise MixtralError("--keep: there is nothing to keep", fix=fix, code=USAGE)
        self.workplace()
        if self.chat and self.data is None:
            raise MixtralError("--chat needs --data: text is read as it is", code=USAGE)

    def is_made(self, scheme: str | None) -> bool:
        """Whether a scheme is made as a folder before it is loaded."""
        return is_made(scheme, has_text=self.calibration is not None)

    def workplace(self) -> Workplace:
        """Where folders are made, and from which text."""
        samples, length = self.calibration_samples, self.calibration_length
        for name, got, least in (("samples", samples, 1), ("length", length, 2)):
            if got < least:
                what = f"--calibration-{name}"
                raise MixtralError(what, expected=f"at least {least}", got=got, code=USAGE)
        text = Calibration(path=self.calibration, samples=samples, length=length)
        return Workplace(calibration=text, keep=self.keep)

    @property
    def entry_schemes(self) -> tuple[str | None, ...]:
        """That every checkpoint is loaded in."""
        if self.schemes is None:
            return (self.load.quantize,)
        return parse_schemes(self.schemes, self.calibration)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactOptions(Shared):
    """How many questions are answered letter for letter, greedily.

    An answer is right if the generated text begins with it. With --json one line per question comes
    before the line of counts.
    """

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[CHECKPOINT]")] = (
        EMBEDDED
    )
    """A checkpoint folder, 'tiny', or org/name[@revision] on the Hugging Face Hub."""
    data: Path
    """JSON lines: {"prompt": "2+2=", "answer": "4"}."""
    chat: bool = False
    """Ask in the model's own chat format."""
    max_new_tokens: int | None = None
    """Of an answer; unless given those of the longest right answer and 16 more."""
    batch: int = exact.DEFAULT_BATCH
    """Questions asked at a time."""

    def __post_init__(self):
        _check_batch(self.batch)
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            got, fix = self.max_new_tokens, "--max-new-tokens 16"
            raise MixtralError(
                "--max-new-tokens", expected="at least 1", got=got, fix=fix, code=USAGE
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingOptions(OnText):
    """How texts are spread over the experts of every layer, and what the experts are for.

    Loads, their evenness, first choices, repetition between consecutive tokens, where each class of
    tokens goes, how far apart several texts are, and how often another checkpoint chooses alike.
    """

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[CHECKPOINT]")] = (
        EMBEDDED
    )
    """A checkpoint folder, 'tiny', or org/name[@revision] on the Hugging Face Hub."""
    text: tuple[Path, ...]
    """A UTF-8 text file, or a .jsonl file with {"text": ...} or {"messages": [...]} in each line,
    read apart from each other; repeat it to compare texts."""
    other: str | None = None
    """Compare the choices with those of this checkpoint, loaded beside the first."""
    other_scheme: str | None = None
    """Load the other (the same one, unless --other names it) in this dtype or scheme, as int8."""
    html: Path | None = None
    """Write FILE.html: the texts' first tokens in the colours of their experts."""
    html_tokens: int = DEFAULT_TOKENS
    """On that page at most, over all texts."""

    def __post_init__(self):
        super().__post_init__()
        if not self.text:
            raise MixtralError("--text: expected a file", fix="--text FILE.txt", code=USAGE)
        if self.html_tokens < len(self.text):
            raise MixtralError(
                "--html-tokens",
                expected=f"at least {len(self.text)}, one of each text",
                got=self.html_tokens,
                fix=f"--html-tokens {DEFAULT_TOKENS}",
                code=USAGE,
            )
        if self.other_scheme is None:
            return
        if self.load.quantize is not None:
            what, fix = "--other-scheme and --quantize", "leave --quantize out"
            raise MixtralError(what, fix=fix, code=USAGE)
        at_load = [name for name in spelling.names() if not is_made(name, has_text=False)]
        if self.other_scheme not in (NO_SCHEME, *DTYPES, *at_load):
            raise MixtralError(
                "--other-scheme",
                expected=f"one of {', '.join((NO_SCHEME, *DTYPES, *at_load))}",
                got=repr(self.other_scheme),
                fix="--other-scheme int8, or quantize to a folder and name it with --other",
                code=USAGE,
            )

    @property
    def entry(self) -> Entry:
        """The checkpoint."""
        return Entry(checkpoint=self.checkpoint, scheme=self.load.quantize)

    @property
    def other_entry(self) -> Entry | None:
        """What it is compared with, if anything."""
        if self.other is None and self.other_scheme is None:
            return None
        scheme = None if self.other_scheme == NO_SCHEME else self.other_scheme
        return Entry(checkpoint=self.other or self.checkpoint, scheme=scheme or self.load.quantize)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarnessOptions:
    """lm-eval's own command line, with models of this package: --model_args
    pretrained=FOLDER,mesh=1x8,dtype=float32 --tasks arc_easy --batch_size 8.

    lm-eval must be installed; 'lm-eval run --help' lists its options.
    """

    arguments: tyro.conf.Positional[tuple[str, ...]] = ()
    """Of lm-eval, passed on as they are."""


def _check_batch(batch: int) -> None:
    if batch < 1:
        raise MixtralError("--batch", expected="at least 1", got=batch, fix="--batch 8", code=USAGE)
