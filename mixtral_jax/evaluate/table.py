"""Many checkpoints, or schemes of one, on the same text: a table whose first row is the measure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from mixtral_jax.config import DTYPES, ModelConfig, read_config
from mixtral_jax.convert.hub import resolve
from mixtral_jax.errors import BAD_DATA, USAGE, MixtralError
from mixtral_jax.evaluate.exact import ExactScore
from mixtral_jax.evaluate.perplexity import (
    DEFAULT_BATCH,
    Divergence,
    Perplexity,
    compare,
    perplexity,
)
from mixtral_jax.evaluate.quantized import Made
from mixtral_jax.evaluate.windows import Windowing
from mixtral_jax.language_model import LanguageModel
from mixtral_jax.model.transformer import leaf_specs, leaves_of
from mixtral_jax.quantize import spelling
from mixtral_jax.quantize.coverage import coverage
from mixtral_jax.weights import QTensor

NO_SCHEME = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A checkpoint as it is to be loaded.

    ``scheme`` is a dtype, or a scheme of quantization with its options (quantize/spelling.py); None
    leaves the weights as they are.
    """

    checkpoint: str
    scheme: str | None = None

    @property
    def name(self) -> str:
        """For people."""
        return self.checkpoint if self.scheme is None else f"{self.checkpoint} {self.scheme}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """How the experts of a loaded model lie on its devices.

    Attributes:
        scheme: of quantization, or a dtype; several where they differ.
        bytes: of all of them, scales included, counted once.
        bits: per weight.
        groups: sizes of their groups, inputs under one scale; none where nothing is quantized.
    """

    scheme: str
    bytes: int
    bits: float
    groups: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What was found of one entry.

    Attributes:
        entry: which.
        found: its perplexity.
        difference: of its perplexity to the first row's; 0 in the first.
        divergence: from the first row's model; None in the first.
        weight_bytes: of all its weights, as they lie on the devices, counted once.
        experts: what of that they are, and in which scheme.
        dtype: of activations.
        exact: right answers, where questions were asked.
        made: how its weights were quantized, where that was done on the disk.
    """

    entry: Entry
    found: Perplexity
    difference: float
    divergence: Divergence | None
    weight_bytes: int
    experts: Experts
    dtype: str
    exact: ExactScore | None = None
    made: Made | None = None


def entries(checkpoints: Sequence[str], schemes: Sequence[str | None] = (None,)) -> list[Entry]:
    """Every checkpoint in every scheme, checkpoints first."""
    return [Entry(checkpoint=c, scheme=scheme) for c in checkpoints for scheme in schemes]


def parse_schemes(text: str | None, calibration: Path | None = None) -> tuple[str | None, ...]:
    """``none,bfloat16,int4:group-size=32`` as (None, "bfloat16", "int4:group-size=32").

    Args:
        text: of the command line.
        calibration: text that schemes which can be fitted to some are fitted to.

    Raises:
        MixtralError: exit code 64 for any other name, or options that a scheme does not have.
    """
    if text is None:
        return (None,)
    plain = (NO_SCHEME, *DTYPES)
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word in plain:
            continue
        if word.split(":")[0] not in spelling.names():
            expected, fix = ", ".join((*plain, *spelling.names())), "--schemes none,int8"
            raise MixtralError("--schemes", expected=expected, got=repr(word), fix=fix, code=USAGE)
        is_fitted = calibration is not None and spelling.is_calibrated(word, has_text=True)
        try:
            run: dict[str, Any] = {"calibration": calibration} if is_fitted else {}
            spelling.options_of(word, **run)
        except MixtralError as error:
            raise MixtralError(f"--schemes {error}", code=error.code) from None
    return tuple(None if word == NO_SCHEME else word for word in words)


def is_made(scheme: str | None, *, has_text: bool) -> bool:
    """Whether a scheme is made as a folder before it is loaded.

    Args:
        scheme: of an entry.
        has_text: there is calibration text.
    """
    if scheme is None or scheme in DTYPES:
        return False
    return not spelling.is_made_at_load(scheme, has_text=has_text)


def read_configs(
    checkpoints: Iterable[str], note: Callable[[str], None], sliding_window: int | None = None
) -> list[ModelConfig]:
    """Configurations, before any weight is read.

    Raises:
        MixtralError: exit code 65 where their vocabularies differ in size.
    """
    names = list(dict.fromkeys(checkpoints))
    configs = [
        read_config(resolve(name, note).folder, sliding_window=sliding_window) for name in names
    ]
    for name, config in zip(names, configs, strict=True):
        if config.vocab_size != configs[0].vocab_size:
            expected = f"{configs[0].vocab_size} token ids, as {names[0]}"
            fix = "compare checkpoints that have one tokenizer"
            raise MixtralError(
                name, expected=expected, got=config.vocab_size, fix=fix, code=BAD_DATA
            )
    return configs


def weight_bytes(lm: LanguageModel) -> int:
    """Bytes of all weights: codes, scales and all else, each counted once on any mesh."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(lm.model)))


def experts_of(lm: LanguageModel) -> Experts:
    """Counts what lies on the devices."""
    specs = leaf_specs(lm.config)
    weights = leaves_of(lm.model)
    rows = [row for row in coverage(weights, specs) if row.group == "experts"]
    experts = [weight for path, weight in weights.items() if "expert" in specs[path].axes]
    found = jax.tree.leaves(experts, is_leaf=lambda part: isinstance(part, QTensor))
    groups = {q.shape[-1] // q.scales.shape[-1] for q in found if isinstance(q, QTensor)}
    size = sum(row.bytes for row in rows)
    return Experts(
        scheme=", ".join(row.scheme for row in rows),
        bytes=size,
        bits=8 * size / sum(row.parameters for row in rows),
        groups=tuple(sorted(groups)),
    )


def tabulate(
    wanted: Sequence[Entry],
    load: Callable[[Entry], LanguageModel],
    token_ids: Callable[[LanguageModel], Iterable[int]],
    *,
    windowing: Windowing | None = None,
    batch: int = DEFAULT_BATCH,
    ask: Callable[[LanguageModel], ExactScore] | None = None,
) -> Iterator[Row]:
    """Measures every entry, and its distance to the first; gives each row once it is known.

    Two models lie on the devices at a time: the first, and one other. The first is run once more
    for each of the others, so that no logits need to be kept.

    Args:
        wanted: one or more entries.
        load: loads one.
        token_ids: starts the text again, in the ids of the first entry's tokenizer.
        windowing: as for ``perplexity``.
        batch: as for ``perplexity``.
        ask: counts right answers, for one more column.

    Raises:
        MixtralError: as ``compare``, and what ``load`` and ``ask`` raise.
    """
    first = load(wanted[0])
    if len(wanted) == 1:
        found = perplexity(first, token_ids(first), windowing=windowing, batch=batch)
        yield _row(wanted[0], first, found, ask)
    for k, entry in enumerate(wanted[1:]):
        other = load(entry)
        compared = compare(first, other, token_ids(first), windowing=windowing, batch=batch)
        if k == 0:
            yield _row(wanted[0], first, compared.first, ask)
        difference = compared.other.perplexity - compared.first.perplexity
        row = _row(entry, other, compared.other, ask)
        del other  # before the next is loaded
        # Every scheme has programs of its own: some 4,000 mappings and 500 MB of the embedded
        # model, and a process may have 65,530. Those of the first are compiled again.
        jax.clear_caches()
        yield dataclasses.replace(row, difference=difference, divergence=compared.divergence)


def _row(
    entry: Entry,
    lm: LanguageModel,
    found: Perplexity,
    ask: Callable[[LanguageModel], ExactScore] | None,
) -> Row:
    return Row(
        entry=entry,
        found=found,
        difference=0.0,
        divergence=None,
        weight_bytes=weight_bytes(lm),
        experts=experts_of(lm),
        dtype=str(lm.model.embed_tokens.get_value().dtype),
        exact=None if ask is None else ask(lm),
    )
