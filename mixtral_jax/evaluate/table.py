"""Many checkpoints, or schemes of one, on the same text: a table whose first row is the measure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import get_args

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
from mixtral_jax.evaluate.windows import Windowing
from mixtral_jax.language_model import LanguageModel
from mixtral_jax.quantize.makers import DataFree

NO_SCHEME = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A checkpoint as it is to be loaded.

    ``scheme`` is a dtype or a scheme of quantization; None leaves the weights as they are.
    """

    checkpoint: str
    scheme: str | None = None

    @property
    def name(self) -> str:
        """For people."""
        return self.checkpoint if self.scheme is None else f"{self.checkpoint} {self.scheme}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What was found of one entry.

    Attributes:
        entry: which.
        found: its perplexity.
        difference: of its perplexity to the first row's; 0 in the first.
        divergence: from the first row's model; None in the first.
        weight_bytes: of all its weights, as they lie on the devices, counted once.
        dtype: of activations.
        exact: right answers, where questions were asked.
    """

    entry: Entry
    found: Perplexity
    difference: float
    divergence: Divergence | None
    weight_bytes: int
    dtype: str
    exact: ExactScore | None = None


def entries(checkpoints: Sequence[str], schemes: Sequence[str | None] = (None,)) -> list[Entry]:
    """Every checkpoint in every scheme, checkpoints first."""
    return [Entry(checkpoint=c, scheme=scheme) for c in checkpoints for scheme in schemes]


def parse_schemes(text: str | None) -> tuple[str | None, ...]:
    """``none,bfloat16,int8`` as (None, "bfloat16", "int8").

    Raises:
        MixtralError: exit code 64 for any other name.
    """
    if text is None:
        return (None,)
    known = (NO_SCHEME, *DTYPES, *get_args(DataFree))
    names = [name.strip() for name in text.split(",")]
    wrong = next((name for name in names if name not in known), None)
    if wrong is not None:
        expected, fix = ", ".join(known), "--schemes none,int8"
        raise MixtralError("--schemes", expected=expected, got=repr(wrong), fix=fix, code=USAGE)
    return tuple(None if name == NO_SCHEME else name for name in names)


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


def tabulate(
    wanted: Sequence[Entry],
    load: Callable[[Entry], LanguageModel],
    token_ids: Callable[[LanguageModel], Iterable[int]],
    *,
    windowing: Windowing | None = None,
    batch: int = DEFAULT_BATCH,
    ask: Callable[[LanguageModel], ExactScore] | None = None,
) -> list[Row]:
    """Measures every entry, and its distance to the first.

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
        return [_row(wanted[0], first, found, ask)]
    rows: list[Row] = []
    for entry in wanted[1:]:
        other = load(entry)
        compared = compare(first, other, token_ids(first), windowing=windowing, batch=batch)
        if not rows:
            rows.append(_row(wanted[0], first, compared.first, ask))
        difference = compared.other.perplexity - compared.first.perplexity
        row = _row(entry, other, compared.other, ask)
        rows.append(dataclasses.replace(row, difference=difference, divergence=compared.divergence))
        del other  # before the next is loaded
    return rows


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
        dtype=str(lm.model.embed_tokens.get_value().dtype),
        exact=None if ask is None else ask(lm),
    )
