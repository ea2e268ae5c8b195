"""Results as lines for people, and as JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from mixtral_jax.evaluate.quantized import Made
from mixtral_jax.evaluate.table import NO_SCHEME, Row
from mixtral_jax.evaluate.text import Dataset
from mixtral_jax.tokenizer import Tokenizer


def tokenizer_line(tokenizer: Tokenizer) -> str:
    """Which tokenizer: its version, size and a digest of its pieces."""
    digest = hashlib.sha256("\0".join(tokenizer.pieces).encode()).hexdigest()
    return f"SentencePiece {tokenizer.version}, {tokenizer.vocab_size} pieces, {digest[:12]}"


def bits_per_byte(row: Row, dataset: Dataset) -> float:
    """Negative log-likelihood of the whole text in bits, per byte: no tokenizer matters."""
    return row.found.nll * row.found.scored / math.log(2) / dataset.bytes


def row_json(row: Row, dataset: Dataset, tokenizer: Tokenizer, mesh: str) -> dict[str, Any]:
    """One row, with all that its numbers depend on."""
    found = dataclasses.asdict(row.found)
    divergence = row.divergence
    exact = row.exact
    return {
        "checkpoint": row.entry.checkpoint,
        "scheme": row.entry.scheme or NO_SCHEME,
        **found,
        "bits_per_byte": bits_per_byte(row, dataset),
        "difference": row.difference,
        "kl": None if divergence is None else divergence.kl,
        "top1_agreement": None if divergence is None else divergence.top1_agreement,
        "routing_agreement": None if divergence is None else divergence.routing_agreement,
        "weight_bytes": row.weight_bytes,
        "experts": dataclasses.asdict(row.experts),
        "exact": None
        if exact is None
        else {**dataclasses.asdict(exact), "accuracy": exact.accuracy},
        "made": None if row.made is None else made_json(row.made),
        "dtype": row.dtype,
        "mesh": mesh,
        "text": dataclasses.asdict(dataset),
        "tokenizer": tokenizer_line(tokenizer),
    }


def made_json(made: Made) -> dict[str, Any]:
    """How a row was quantized: the options asked for, the text, and of GPTQ the outputs."""
    text = made.calibration
    return {
        "options": made.options,
        "calibration": None if text is None else dataclasses.asdict(text),
        "layers": [
            {
                "layer": layer.layer,
                "output_error": layer.total.relative,
                "rounded_to_nearest": layer.total.relative_nearest,
                "tokens": layer.tokens,
                "few_tokens": layer.few_tokens,
            }
            for layer in made.layers
        ],
    }


def told(row: Row) -> str:
    """One line about a row that is finished."""
    line = f"{row.entry.name}: perplexity {row.found.perplexity:.4f}"
    if row.divergence is not None:
        line += f", KL {row.divergence.kl:.2e}"
    return f"{line}, experts in {row.experts.bits:.3f} bits"


def calibration(rows: Sequence[Row]) -> dict[str, str]:
    """One more fact, where some row was fitted to text: which."""
    texts = [row.made.calibration for row in rows if row.made is not None]
    lines = dict.fromkeys(
        f"{text.file}, {text.bytes:,} bytes, sha256 {text.sha256}: {text.windows} windows of at "
        f"most {text.length} tokens, {text.tokens:,} tokens"
        for text in texts
        if text is not None
    )
    return {"calibrated": "; ".join(lines)} if lines else {}


def notes(rows: Sequence[Row]) -> Iterator[str]:
    """What stands under the table: how rows were quantized, and what GPTQ did to the outputs."""
    for row in rows:
        if row.made is None:
            continue
        yield f"{row.entry.name}: python -m mixtral_jax.quantize {row.made.command}"
        if row.made.layers:
            pairs = [
                f"{layer.total.relative:.4f} ({layer.total.relative_nearest:.4f})"
                for layer in row.made.layers
            ]
            yield f"  output error by layer (rounded to nearest): {', '.join(pairs)}"
        few = {layer.layer: layer.few_tokens for layer in row.made.layers if layer.few_tokens}
        if few:
            where = "; ".join(f"layer {i}: {', '.join(map(str, e))}" for i, e in few.items())
            yield f"  too few tokens, fitted to all of them: experts of {where}"


def facts(
    dataset: Dataset, tokenizer: Tokenizer, *, context: int, stride: int, tokens: int, mesh: str
) -> dict[str, str]:
    """What every number of the report depends on."""
    return {
        "text": f"{dataset.file}, {dataset.bytes:,} bytes, sha256 {dataset.sha256}",
        "tokenizer": tokenizer_line(tokenizer),
        "tokens": f"{tokens:,}",
        "windows": f"context {context}, stride {stride}",
        "mesh": mesh,
    }


def one_row(row: Row, dataset: Dataset) -> dict[str, str]:
    """What was found of a checkpoint alone."""
    found = row.found
    lines = {
        "dtype": row.dtype,
        "weights": f"{row.weight_bytes:,} bytes",
        "experts": f"{row.experts.scheme}, {row.experts.bits:.3f} bits per weight",
        "perplexity": f"{found.perplexity:.4f} ({found.nll:.5f} nats per token)",
        "bits/byte": f"{bits_per_byte(row, dataset):.4f}",
    }
    if row.exact is not None:
        lines["right"] = f"{row.exact.right} of {row.exact.asked} ({row.exact.accuracy:.1%})"
    return lines


def comparison(rows: Sequence[Row]) -> Table:
    """Rows for people; the first is what the others are compared with."""
    columns = ["checkpoint", "scheme", "dtype", "bits", "bytes", "perplexity", "difference", "KL"]
    columns += ["top-1", "routing"]
    with_exact = rows[0].exact is not None
    table = Table(*columns, *(["right"] if with_exact else []))
    for row in rows:
        cells = [
            escape(row.entry.checkpoint),
            escape(row.entry.scheme or NO_SCHEME),
            row.dtype,
            f"{row.experts.bits:.3f}",
            f"{row.weight_bytes:,}",
            f"{row.found.perplexity:.4f}",
        ]
        far = row.divergence
        if far is None:
            cells += ["", "", "", ""]
        else:
            routed = far.routing_agreement
            share = row.difference / rows[0].found.perplexity
            cells += [f"{row.difference:+.4f} ({share:+.2%})", f"{far.kl:.2e}"]
            cells += [f"{far.top1_agreement:.2%}", "-" if routed is None else f"{routed:.2%}"]
        if with_exact and row.exact is not None:
            cells.append(f"{row.exact.right}/{row.exact.asked}")
        table.add_row(*cells)
    return table


def aligned(lines: dict[str, str]) -> str:
    """Names and values in two columns."""
    return "\n".join(f"{name:<10} {value}" for name, value in lines.items())
