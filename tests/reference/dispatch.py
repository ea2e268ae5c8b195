"""Which assignments a capacity dispatch keeps, counted one by one in numpy."""

from __future__ import annotations

import math

import numpy as np


def capacity(num_rows: int, top_k: int, num_experts: int, capacity_factor: float) -> int:
    """Rows that one source shard of ``num_rows`` tokens may offer to each expert."""
    return math.ceil(capacity_factor * num_rows * top_k / num_experts)


def kept(
    expert_ids: np.ndarray,
    valid: np.ndarray,
    *,
    shards: int,
    num_experts: int,
    capacity_factor: float,
) -> np.ndarray:
    """True where the assignment ``[N, A]`` finds room.

    The N rows lie in ``shards`` contiguous groups. In each group the first choices of all tokens
    take their places in token order, then the second choices, and so on. Rows that are not valid
    (padding) take no place and are not kept.
    """
    num_rows, top_k = expert_ids.shape
    assert num_rows % shards == 0, "rows must divide"
    local = num_rows // shards
    room = capacity(local, top_k, num_experts, capacity_factor)
    result = np.zeros((num_rows, top_k), bool)
    for shard in range(shards):
        taken = [0] * num_experts
        for choice in range(top_k):
            for row in range(shard * local, (shard + 1) * local):
                e = int(expert_ids[row, choice])
                if valid[row] and taken[e] < room:
                    taken[e] += 1
                    result[row, choice] = True
    return result


def dropped(
    expert_ids: np.ndarray,
    valid: np.ndarray,
    *,
    shards: int,
    num_experts: int,
    capacity_factor: float,
) -> np.ndarray:
    """Assignments of valid rows that find no room, per source shard: int ``[shards]``."""
    stays = kept(
        expert_ids, valid, shards=shards, num_experts=num_experts, capacity_factor=capacity_factor
    )
    return (valid[:, None] & ~stays).reshape(shards, -1).sum(axis=1)
