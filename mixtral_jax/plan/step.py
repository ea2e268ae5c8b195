"""Steps: what a program does and sends on one device, and the limit of its time."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np

from mixtral_jax.plan.devices import Device
from mixtral_jax.plan.programs import Program, Workload
from mixtral_jax.plan.roofline import Sent, Work, sent, step_work
from mixtral_jax.plan.schemes import Weights
from mixtral_jax.plan.traffic import Traffic, decode_traffic, prefill_traffic
from mixtral_jax.sharding.traffic import Pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a program on one device; seconds are limits, see ``plan/roofline.py``.

    Attributes:
        tokens: that all devices read or write in it.
        collectives: what a device sends.
        overflow: what it sends besides where every layer overflows its capacity.
    """

    tokens: int
    flops: float
    useful_flops: float
    bytes_read: float
    compute_seconds: float
    memory_seconds: float
    link_seconds: float
    step_seconds: float
    tokens_per_second: float
    collectives: list[Sent]
    overflow: list[Sent]


def _step(device: Device, tokens: int, done: Work, traffic: Traffic) -> Step:
    compute, memory = done.flops / device.flops, done.bytes_read / device.memory_bandwidth
    always = sent(traffic.common, device)
    links = sum(each.seconds for each in always)
    seconds = max(compute, memory) + links
    return Step(
        tokens=tokens,
        flops=done.flops,
        useful_flops=done.useful_flops,
        bytes_read=done.bytes_read,
        compute_seconds=compute,
        memory_seconds=memory,
        link_seconds=links,
        step_seconds=seconds,
        tokens_per_second=tokens / seconds,
        collectives=always,
        overflow=sent(traffic.overflow, device),
    )


def traffic_of(work: Workload, itemsize: int) -> dict[str, Traffic]:
    """The formulas of both programs of generation."""
    prompts = Pass(
        config=work.config,
        mesh=work.mesh,
        strategy=work.strategy,
        options=work.dispatch,
        batch=work.rows,
        length=work.chunk,
        itemsize=itemsize,
    )
    return {
        "prefill": prefill_traffic(prompts),
        "decode": decode_traffic(dataclasses.replace(prompts, length=1)),
    }


def generation_steps(
    work: Workload, device: Device, weights: Weights, cache_bytes: int
) -> dict[str, Step]:
    """A call of prefill and a step of decode_step; traffic by formula, in the workload's dtype."""
    steps = {}
    # Of the input embedding a few rows are read, and prefill makes no logits.
    table = 0 if work.config.tie_word_embeddings else weights.embedding
    for name, traffic in traffic_of(work, np.dtype(work.dtype).itemsize).items():
        decodes = name == "decode"
        head = 0 if decodes else weights.embedding
        done = step_work(
            work,
            length=1 if decodes else work.chunk,
            weight_bytes=weights.total - weights.experts - table - head,
            expert_bytes=weights.experts,
            cache_bytes=cache_bytes,
            heads=decodes,
        )
        tokens = work.batch * (1 if decodes else work.chunk)
        steps[name] = _step(device, tokens, done, traffic)
    return steps


def differences(work: Workload, programs: dict[str, Program]) -> list[str]:
    """Where the compiled programs, in float32, do not send what the formulas say; in words."""
    found = []
    for name, traffic in traffic_of(work, 4).items():
        got = Counter(each for each in programs[name].collectives if each.group_size > 1)
        want = Counter(each for part in traffic for each in part)
        found += [
            f"{name}: the compiled program has {got[each]} x {each.kind} of {each.bytes} bytes "
            f"over {each.group_size} devices (of {each.span}), the formula {want[each]}"
            for each in sorted(got.keys() | want.keys())
            if got[each] != want[each]
        ]
    return found


def train_step(
    work: Workload, device: Device, weights: Weights, state_bytes: int, program: Program
) -> Step:
    """Forward and backward; the weight gradients of frozen weights are not computed.

    Traffic is that of the compiled program, whose floats are all f32: an upper bound.

    Args:
        work: with ``train``.
        device: to run on.
        weights: on it.
        state_bytes: of gradients and optimizer on it, read and written once.
        program: compiled with ``overflow="drop"``, so without the branch for an overflow.
    """
    one_pass = step_work(
        work,
        length=work.context,
        weight_bytes=weights.total - weights.experts,
        expert_bytes=weights.experts,
        cache_bytes=0,
        heads=True,
    )
    passes = 3 if work.train == "full" else 2
    done = Work(
        flops=passes * one_pass.flops,
        useful_flops=passes * one_pass.useful_flops,
        bytes_read=2 * (weights.total + state_bytes),  # weights: forward and backward
    )
    between = [each for each in program.collectives if each.group_size > 1]
    return _step(device, work.batch * work.context, done, Traffic(between, [], []))
