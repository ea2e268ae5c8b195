"""What does a cache in 8 bits cost in quality, on held-out text of the embedded model?

Perplexity is teacher-forced through the cache in chunks, so that every key and value attended to is
a quantized one; exact answers are written greedily by the code that users run. ``turns`` is the
number of questions with their answers in one conversation: the cache of 8 is some 8 times as long.

    python benchmarks/kv_quality.py --json > benchmarks/results/kv_quality.json
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, get_args

import numpy as np
import tyro
from _common import report

import mixtral_jax as mj
from examples.tiny.perplexity import score_through_cache
from examples.tiny.score import score
from examples.tiny.text import Conversation, held_out
from mixtral_jax.kernels.scaled_kv import KVDtype

ALLOWED = 0.01  # of perplexity, for int8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Perplexity and exact answers of the embedded model by dtype of its cache."""

    dtype: str = "float32"
    """Of weights and activations."""
    per_family: int = 22
    """Held-out prompts of each family, where there are so many."""
    turns: tuple[int, ...] = (1, 8)
    """Questions per conversation."""
    seed: int = 0
    """Chooses the prompts."""
    quick: bool = False
    """A few prompts: does it still run?"""
    json: bool = False
    """Print one JSON line instead of a table."""


def measure(options: Options) -> list[dict[str, Any]]:
    """One row per dtype of the cache and number of turns.

    Perplexity of the answers' tokens and of all, each with its change from the plain cache, and by
    how much a token's log-probability moved in the mean. ``exact`` is about single questions.
    """
    examples = held_out(2 if options.quick else options.per_family, seed=options.seed)
    # Families mixed, and the same conversations for every dtype.
    order = np.random.default_rng(options.seed).permutation(len(examples)).tolist()
    rows, plain = [], {}
    for kv_dtype in (None, *get_args(KVDtype)):
        lm = mj.load("tiny", mesh="1x1", dtype=options.dtype, kv_dtype=kv_dtype)
        asked = score(lm, examples)
        exact = f"{sum(asked.right.values())}/{sum(asked.asked.values())}"
        for turns in options.turns:
            conversations = [
                Conversation(tuple(examples[i] for i in order[first : first + turns]))
                for first in range(0, len(order), turns)
            ]
            scored = score_through_cache(lm, conversations)
            answers, whole = (scored.perplexity(of_answers=only) for only in (True, False))
            plain.setdefault(turns, (scored.logprobs, answers, whole))
            logprobs, plain_answers, plain_whole = plain[turns]
            rows.append(
                {
                    "cache": kv_dtype or options.dtype,
                    "turns": turns,
                    "tokens": len(logprobs),
                    "answers": round(answers, 6),
                    "change": round(answers / plain_answers - 1, 6),
                    "all": round(whole, 5),
                    "change of all": round(whole / plain_whole - 1, 6),
                    "moved": round(float(np.abs(scored.logprobs - logprobs).mean()), 6),
                    "exact": exact,
                }
            )
    return rows


def main(options: Options) -> int:
    """Runs and prints; 1 where int8 costs more than it may."""
    rows = measure(options)
    report(rows, is_json=options.json, **dataclasses.asdict(options))
    int8 = [row for row in rows if row["cache"] == "int8"]
    return int(any(row["change"] > ALLOWED or row["change of all"] > ALLOWED for row in int8))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
