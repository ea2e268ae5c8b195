"""FLOPs, bytes read and bytes sent of a step, and the time that no step of a device can undercut.

step = max(FLOPs / peak, bytes read / bandwidth) + bytes sent / link bandwidth. Kernels that reach
neither limit, latencies, and transfers hidden behind products are left out: it is a limit, not a
forecast. Bytes read are the weights that some row needs and the whole static cache.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable

import numpy as np

from mixtral_jax.kernels.experts import ladder
from mixtral_jax.plan.devices import Device, send_bandwidth
from mixtral_jax.plan.programs import Workload
from mixtral_jax.sharding.collectives import Collective
from mixtral_jax.sharding.dispatch import PLANS, choose_for
from mixtral_jax.sharding.per_device import device_capacity, shared_buffer
from mixtral_jax.sharding.per_expert import capacity
from mixtral_jax.sharding.traffic import heads_axes, rows_spread

_DRAWS = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one device does in a step.

    Attributes:
        flops: as the program runs them, padding of capacities and of branches included.
        useful_flops: those that a single device would need, divided by the devices; of what is
            dropped none.
        bytes_read: of weights and cache.
    """

    flops: float
    useful_flops: float
    bytes_read: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sent:
    """Equal collectives of a step together; ``bytes`` is of one, ``seconds`` of all."""

    kind: str
    count: int
    bytes: int
    group_size: int
    span: int
    wire_bytes: float
    seconds: float


def sent(collectives: Iterable[Collective], device: Device) -> list[Sent]:
    """Collectives with the time that they take the links, most expensive first."""
    found = []
    for each, count in Counter(collectives).items():
        wire = each.wire_bytes * count
        seconds = wire / send_bandwidth(device, each.span)
        found.append(Sent(count=count, wire_bytes=wire, seconds=seconds, **each._asdict()))
    return sorted(found, key=lambda one: -one.seconds)


def expert_counts(work: Workload, tokens: int) -> np.ndarray:
    """Rows of every expert when so many tokens are routed uniformly, ``[draws, S, E / S]``.

    Drawn, the same ones each time.
    """
    E, A, S = work.config.num_local_experts, work.config.num_experts_per_tok, work.mesh.expert
    draw = np.random.default_rng(0)
    if tokens * A >= 16 * E:  # many: that an expert's rows are not another's hardly shows
        return draw.binomial(tokens, A / E, (_DRAWS, S, E // S))
    chosen = draw.random((_DRAWS, tokens, E)).argpartition(A - 1, axis=-1)[..., :A]
    of_draw = chosen + E * np.arange(_DRAWS)[:, None, None]
    return np.bincount(of_draw.reshape(-1), minlength=_DRAWS * E).reshape(_DRAWS, S, E // S)


def experts_visited(work: Workload, tokens: int) -> float:
    """Experts of a layer that the busiest device reads, of uniformly routed tokens; the mean.

    E (1 - (1 - A/E)^tokens) where one device has all experts; of several the busiest counts.
    """
    E, A, S = work.config.num_local_experts, work.config.num_experts_per_tok, work.mesh.expert
    if S == 1:
        return E * (1 - (1 - A / E) ** tokens)
    return float((expert_counts(work, tokens) > 0).sum(-1).max(-1).mean())


def expert_rows(work: Workload, rows: int, valid: int) -> tuple[float, str]:
    """Rows that the experts of the busiest device compute in a layer, and the method.

    Args:
        work: sizes, mesh and dispatch.
        rows: over all devices, as the program is compiled.
        valid: of a data shard, padding apart.
    """
    config, mesh, options = work.config, work.mesh, work.dispatch
    E, A, S = config.num_local_experts, config.num_experts_per_tok, mesh.expert
    method = choose_for(options, mesh.data, S, rows)
    n = -(-rows // (mesh.data * S))  # rows that travel from one device
    chunks = options.chunks if method in PLANS else 1
    part = -(-n // chunks)
    sizes = {"num_experts": E, "shards": S, "factor": options.capacity_factor}
    if method == "all_to_all":
        return E * capacity(part, A, E, options.capacity_factor) * chunks, method
    # Rows routed to the experts of a data shard, and those that a device has of them.
    routed = given = -(-rows // mesh.data) if method == "replicated" else part * S
    if method == "all_to_all_once":
        given = S * device_capacity(part, A, **sizes)
    elif method == "ragged":
        given = shared_buffer(part, A, **sizes)
    rungs = np.array([0, *ladder(given, routed * A / E)])
    counts = np.minimum(expert_counts(work, -(-valid // chunks)), given)
    computed = rungs[np.searchsorted(rungs, counts)].sum(-1)  # the least that holds its rows
    return float(computed.max(-1).mean()) * chunks, method


def may_overflow(work: Workload, rows: int) -> bool:
    """Whether a layer can overflow its capacity and then take the gathered path."""
    dispatch = work.dispatch
    method = choose_for(dispatch, work.mesh.data, work.mesh.expert, rows)
    return method in PLANS and dispatch.overflow == "exact"


def must_overflow(work: Workload, length: int) -> bool:
    """Whether every layer overflows however rows are routed: there is less room than rows.

    Of the parts (of a device, of a chunk) that rows travel in, one has at least the mean of them.
    """
    config, mesh, options = work.config, work.mesh, work.dispatch
    E, A, S = config.num_local_experts, config.num_experts_per_tok, mesh.expert
    method = choose_for(options, mesh.data, S, work.rows * length)
    n = -(-work.rows * length // (mesh.data * S))
    part, factor = -(-n // options.chunks), options.capacity_factor
    sizes = {"num_experts": E, "shards": S, "factor": factor}
    parts = mesh.data * options.chunks * (1 if method == "ragged" else S)
    valid = -(-work.batch * length // parts)
    if method == "all_to_all":
        return valid * A > E * capacity(part, A, E, factor)
    visits = -(-A // (E // S))  # devices that a row goes to, at least
    if method == "ragged":
        return valid * visits > S * shared_buffer(part, A, **sizes)
    return valid * visits > S * device_capacity(part, A, **sizes)


def step_work(
    work: Workload,
    *,
    length: int,
    weight_bytes: int,
    expert_bytes: int,
    cache_bytes: int,
    heads: bool,
) -> Work:
    """What one device does in a pass over ``length`` tokens of every row.

    Args:
        work: sizes, mesh and batch.
        length: tokens per row: 1 to decode, the chunk in prefill, the context in training.
        weight_bytes: on the device, of all that a pass reads but the experts.
        expert_bytes: on the device, of all its experts.
        cache_bytes: on the device.
        heads: whether logits are made (of every position in training, else of one).
    """
    config, mesh = work.config, work.mesh
    D, L, E, A = (
        config.hidden_size,
        config.num_hidden_layers,
        config.num_local_experts,
        config.num_experts_per_tok,
    )
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    rows = work.rows * length
    shards = mesh.data * (mesh.expert if rows_spread(mesh, work.strategy, work.rows) else 1)
    local, (ways, _) = rows / shards, mesh.group(*heads_axes(work.strategy))
    slots = length if work.train else work.slots
    per_token = 2 * D * (2 * queries + 2 * keys) + 4 * slots * queries
    logits = 2 * D * config.vocab_size * (local if work.train else work.rows / shards) * heads
    other = L * local * (per_token / ways + 2 * D * E) + logits / ways
    product = 6 * D * config.intermediate_size
    valid = -(-work.batch // mesh.data) * length  # rows of a data shard, padding apart
    visited = experts_visited(work, valid)
    executed, method = expert_rows(work, rows, valid)
    layers = L if heads else L - 1  # prefill: nothing reads the last layer's experts
    share = 1.0 if method == "all_to_all" else visited * mesh.expert / E
    ideal_rows = work.batch * length
    ideal = ideal_rows * L * (per_token + 2 * D * E)
    ideal += 2 * D * config.vocab_size * (ideal_rows if work.train else work.batch) * heads
    # What is dropped is no use: at most what the experts compute.
    chosen = min(ideal_rows * A / mesh.num_devices, executed / mesh.tensor)
    return Work(
        flops=other + layers * product * executed / mesh.tensor,
        useful_flops=ideal / mesh.num_devices + layers * product * chosen,
        bytes_read=weight_bytes + expert_bytes * share * layers / L + cache_bytes,
    )
