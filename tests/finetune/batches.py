"""Small batches by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mixtral_jax.finetune.data.batches import Batch

Text = tuple[np.ndarray, np.ndarray]  # ids, and which of them are scored


def random_texts(rng: np.random.Generator, number: int, *, longest: int, vocab: int) -> list[Text]:
    """Texts of at least three tokens; the first half of each is a prompt."""
    found = []
    for _ in range(number):
        n = int(rng.integers(3, longest + 1))
        ids = rng.integers(3, vocab, n).astype(np.int32)
        found.append((ids, np.arange(n) >= max(1, n // 2)))
    return found


def batch_of(rows: Sequence[Sequence[Sequence[Text]]], length: int) -> Batch:
    """``rows[a][b]`` are the texts packed into row b of accumulation step a."""
    shape = (len(rows), len(rows[0]), length)
    tokens, targets, segments = (np.zeros(shape, np.int32) for _ in range(3))
    weights = np.zeros(shape, np.float32)
    for a, step in enumerate(rows):
        for b, texts in enumerate(step):
            at = 0
            for number, (ids, is_target) in enumerate(texts, start=1):
                end = at + len(ids)
                tokens[a, b, at:end], segments[a, b, at:end] = ids, number
                targets[a, b, at : end - 1] = ids[1:]
                weights[a, b, at : end - 1] = is_target[1:]
                at = end
    return Batch(tokens, targets, weights, segments)
