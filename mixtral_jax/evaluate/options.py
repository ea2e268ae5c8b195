"""What the commands of evaluate are asked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from mixtral_jax.convert.hub import EMBEDDED
from mixtral_jax.errors import USAGE, MixtralError
from mixtral_jax.evaluate import exact, perplexity
from mixtral_jax.evaluate.table import parse_schemes
from mixtral_jax.evaluate.windows import Windowing
from mixtral_jax.load_options import LoadOptions
from mixtral_jax.sharding.cluster import ProcessOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared:
    """Options of every command."""

    json: bool = False
    """Print JSON lines on stdout and nothing else there."""
    debug: bool = False
    """Show tracebacks."""
    load: Annotated[LoadOptions, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=LoadOptions
    )
    processes: Annotated[ProcessOptions, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=ProcessOptions
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnText(Shared):
    """Options of what reads a text."""

    text: Path
    """A UTF-8 text file."""
    windowing: Annotated[Windowing, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=Windowing
    )
    batch: int = perplexity.DEFAULT_BATCH
    """Windows read at a time: speed and memory."""
    plot: Path | None = None
    """Draw the result as FILE.svg or FILE.png (needs matplotlib)."""

    def __post_init__(self):
        _check_batch(self.batch)
        if self.load.kv_dtype is not None:
            what, fix = "--kv-dtype: text is read without a cache", "leave it out"
            raise MixtralError(what, fix=fix, code=USAGE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerplexityOptions(OnText):
    """Exact windowed perplexity of a text; several checkpoints or schemes are compared.

    Every token but the first is scored once. Further rows are compared with the first, which stays
    loaded beside one other at a time.
    """

    checkpoints: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[CKPT ...]")
    ] = (EMBEDDED,)
    """Checkpoint folders, 'tiny', or org/name[@revision] on the Hugging Face Hub."""
    schemes: str | None = None
    """Every checkpoint in each of these, as none,bfloat16,int8: a dtype, a scheme of quantization,
    or none, which leaves the weights as they are."""
    data: Path | None = None
    """Ask these questions too, as exact does, for a column of right answers."""
    chat: bool = False
    """Ask them in the model's own chat format."""

    def __post_init__(self):
        super().__post_init__()
        if self.schemes is not None and self.load.quantize is not None:
            fix = f"--schemes {self.schemes},{self.load.quantize}"
            raise MixtralError("--schemes and --quantize", fix=fix, code=USAGE)
        parse_schemes(self.schemes)
        if self.chat and self.data is None:
            raise MixtralError("--chat needs --data: text is read as it is", code=USAGE)

    @property
    def entry_schemes(self) -> tuple[str | None, ...]:
        """That every checkpoint is loaded in."""
        return (self.load.quantize,) if self.schemes is None else parse_schemes(self.schemes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactOptions(Shared):
    """How many questions are answered letter for letter, greedily.

    An answer is right if the generated text begins with it. With --json one line per question comes
    before the line of counts.
    """

    checkpoint: tyro.conf.Positional[str] = EMBEDDED
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
    """How a text is spread over the experts of every layer."""

    checkpoint: tyro.conf.Positional[str] = EMBEDDED
    """A checkpoint folder, 'tiny', or org/name[@revision] on the Hugging Face Hub."""


def _check_batch(batch: int) -> None:
    if batch < 1:
        raise MixtralError("--batch", expected="at least 1", got=batch, fix="--batch 8", code=USAGE)
