"""What does speculation bring where text repeats, and what does it cost where it does not?

The same requests with and without drafts, in turn, and their tokens compared. A random model's
greedy text soon runs in a circle ("repetitive"); sampled at temperature 1 it repeats by accident
only ("ordinary"). The embedded model ends a line and writes another: drafts of it are rarely
accepted.

    python benchmarks/speculation.py --batches 1 8 --drafts 4 8 --rounds 5
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import tyro
from _common import report, spread

import mixtral_jax as mj
from mixtral_jax.config import ModelConfig
from mixtral_jax.decode.generate import Generation, Progress, Request
from mixtral_jax.decode.sampling import SamplingOptions
from mixtral_jax.model.placement import LOCAL, Placement
from mixtral_jax.model.transformer import Mixtral, assemble, leaf_specs

TEXTS = (
    "monday tuesday monday tuesday monday tuesday",
    "1, 2, 3, 4, 1, 2, 3, 4, 1, 2,",
    "the house the house the house",
    "for i in range(10): print(i)\nfor i in range(10):",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Times generation with and without speculation."""

    hidden_size: int = 512
    """Of the random model."""
    intermediate_size: int = 1792
    """Of each of its 8 experts, 2 chosen."""
    layers: int = 4
    """Of the random model."""
    vocab_size: int = 4096
    """Of the random model."""
    batches: tuple[int, ...] = (1,)
    """Rows."""
    drafts: tuple[int, ...] = (4,)
    """Tokens drafted per step at most."""
    max_new_tokens: int = 128
    """Tokens written per row."""
    rounds: int = 3
    """Repeats of each, in turn."""
    quick: bool = False
    """Small sizes and one round: does it still run?"""
    json: bool = False
    """Print one JSON line instead of a table."""


class Case(NamedTuple):
    """A model and what it is asked."""

    model: Mixtral
    placement: Placement
    prompts: list[tuple[int, ...]]
    sampling: SamplingOptions


def random_model(options: Options) -> Mixtral:
    """Gaussian weights, f32, of the published spread."""
    D = options.hidden_size
    config = ModelConfig(
        vocab_size=options.vocab_size,
        hidden_size=D,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=D // 8,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
        rope_theta=1e6,
        dtype="float32",
    )
    draw = np.random.default_rng(0)
    leaves = {
        path: np.ones(spec.shape, np.float32)
        if len(spec.shape) == 1
        else draw.standard_normal(spec.shape, np.float32) * np.float32(config.initializer_range)
        for path, spec in leaf_specs(config).items()
    }
    return assemble(config, {path: jnp.asarray(leaf) for path, leaf in leaves.items()})


def cases(options: Options) -> dict[tuple[str, str], Case]:
    """By model and kind of text."""
    asked = SamplingOptions(max_new_tokens=options.max_new_tokens, ignore_eos=True)
    varied = dataclasses.replace(asked, temperature=1.0)
    draw, wide = np.random.default_rng(1), random_model(options)
    words = draw.integers(3, options.vocab_size, (max(options.batches), 64))
    prompts = [tuple(map(int, row)) for row in words]
    lm = mj.load("tiny")
    texts = [tuple(lm.encode(text)) for text in TEXTS]
    return {
        ("random", "repetitive"): Case(wide, LOCAL, prompts, asked),
        ("random", "ordinary"): Case(wide, LOCAL, prompts, varied),
        ("embedded", "repetitive"): Case(lm.model, lm.placement, texts, asked),
        ("embedded", "ordinary"): Case(lm.model, lm.placement, texts, varied),
    }


def generate(case: Case, batch: int, speculate: int | None) -> tuple[list[list[int]], Progress]:
    """What ``sample`` runs, reading by the host included."""
    requests = [
        Request(prompt_ids=case.prompts[i % len(case.prompts)], options=case.sampling, sample_id=i)
        for i in range(batch)
    ]
    generation = Generation(case.model, requests, placement=case.placement, speculate=speculate)
    tokens: list[list[int]] = [[] for _ in requests]
    for chunk in generation.chunks():
        for row, ids in zip(tokens, chunk.token_ids, strict=True):
            row.extend(ids)
    return tokens, generation.progress


def compare(
    name: tuple[str, str], case: Case, batch: int, options: Options
) -> list[dict[str, Any]]:
    """A row per number of drafts; plain decoding takes its turn among them."""
    asked = [None, *options.drafts]
    want = [generate(case, batch, speculate)[0] for speculate in asked]  # compiles
    if any(tokens != want[0] for tokens in want):
        raise SystemExit(f"error: {name}: speculation wrote other tokens")
    seconds: list[list[float]] = [[] for _ in asked]
    reports = [Progress() for _ in asked]
    for k in range(options.rounds):
        for i in range(len(asked))[:: 1 if k % 2 else -1]:
            reports[i] = generate(case, batch, asked[i])[1]
            seconds[i].append(reports[i].decode_seconds)
    tokens, plain = batch * options.max_new_tokens, statistics.median(seconds[0])
    rows = []
    for speculate, times, progress in list(zip(asked, seconds, reports, strict=True))[1:]:
        done, median = progress.speculated, statistics.median(times)
        assert done is not None
        rows.append(
            {
                "model": name[0],
                "text": name[1],
                "batch": batch,
                "drafts": speculate,
                "plain tok/s": round(tokens / plain, 1),
                "tok/s": round(tokens / median, 1),
                "speed-up": round(plain / median, 3),
                "accepted": round(done.accepted / max(1, done.drafted), 3),
                "tokens per step": round(tokens / done.row_steps, 2),
                "switched off": done.switched_off,
                "spread": spread(times),
            }
        )
    return rows


def small(options: Options) -> Options:
    """What ``--quick`` runs."""
    return dataclasses.replace(
        options,
        hidden_size=64,
        intermediate_size=96,
        layers=2,
        vocab_size=256,
        batches=(1,),
        drafts=(4,),
        max_new_tokens=48,
        rounds=1,
    )


def main(options: Options) -> int:
    """Runs and prints."""
    options = small(options) if options.quick else options
    rows = [
        row
        for name, case in cases(options).items()
        for batch in options.batches
        for row in compare(name, case, batch, options)
    ]
    asked = {k: v for k, v in dataclasses.asdict(options).items() if k != "json"}
    report(rows, is_json=options.json, dtype="float32", texts_equal=True, **asked)
    return 0 if all(row["tok/s"] > 0 for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
