"""Steps: what a program does and sends on one device, and the limit of its time."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping
from typing import Literal

import numpy as np

from mixtral_jax.plan.devices import Device
from mixtral_jax.plan.programs import Program, Workload
from mixtral_jax.plan.roofline import Sent, Work, may_overflow, must_overflow, sent, step_work
from mixtral_jax.plan.schemes import Weights
from mixtral_jax.plan.traffic import Traffic, decode_traffic, prefill_traffic
from mixtral_jax.sharding.collectives import Collective
from mixtral_jax.sharding.dispatch import DispatchOptions
from mixtral_jax.sharding.traffic import Pass

Branch = Literal["only", "capacity", "overflow"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a program on one device; seconds are limits, see ``plan/roofline.py``.

    Attributes:
        tokens: that all devices read or write in it.
        collectives: what a device sends.
        branch: that the layers take: the ``only`` one; ``capacity``, as no layer overflows; or
            ``overflow``, as the capacity cannot hold the rows, however they are routed.
        overflow: what a device sends in place of all-to-alls where every layer overflows, and ...
        overflow_step_seconds: ... the time of that step; not of training.
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
    branch: Branch = "only"
    overflow: list[Sent] = dataclasses.field(default_factory=list)
    overflow_step_seconds: float | None = None


def _step(device: Device, tokens: int, done: Work, collectives: list[Collective]) -> Step:
    compute, memory = done.flops / device.flops, done.bytes_read / device.memory_bandwidth
    always = sent(collectives, device)
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
    )


def branch_of(work: Workload, length: int) -> Branch:
    """Which branch the layers take in a pass over ``length`` tokens of every row."""
    if not may_overflow(work, work.rows * length):
        return "only"
    return "overflow" if must_overflow(work, length) else "capacity"


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
    work: Workload,
    device: Device,
    weights: Weights,
    cache_bytes: int,
    compiled: Mapping[str, list[Collective]] | None = None,
) -> dict[str, Step]:
    """A call of prefill and a step of decode_step; traffic by formula, in the workload's dtype.

    Of the programs in ``compiled`` it is what stands there instead, and overflow is not told.
    """
    steps = {}
    # Of the input embedding a few rows are read, and prefill makes no logits.
    table = 0 if work.config.tie_word_embeddings else weights.embedding
    gathered = dataclasses.replace(work, dispatch=DispatchOptions(method="gathered"))
    for name, traffic in traffic_of(work, np.dtype(work.dtype).itemsize).items():
        decodes = name == "decode"
        length = 1 if decodes else work.chunk
        head = 0 if decodes else weights.embedding
        work_of = functools.partial(
            step_work,
            length=length,
            weight_bytes=weights.total - weights.experts - table - head,
            expert_bytes=weights.experts,
            cache_bytes=cache_bytes,
            heads=decodes,
        )
        tokens = work.batch * length
        step = _step(device, tokens, work_of(work), traffic.common + traffic.payload)
        branch = branch_of(work, length)
        if compiled and name in compiled:
            here = gathered if branch == "overflow" else work
            step = _step(device, tokens, work_of(here), compiled[name])
            step = dataclasses.replace(step, branch=branch)
        elif branch == "capacity":
            other = _step(device, tokens, work_of(gathered), traffic.common + traffic.overflow)
            step = dataclasses.replace(
                step,
                branch=branch,
                overflow=sent(traffic.overflow, device),
                overflow_step_seconds=other.step_seconds,
            )
        elif branch == "overflow":
            step = _step(device, tokens, work_of(gathered), traffic.common + traffic.overflow)
            step = dataclasses.replace(step, branch=branch)
        steps[name] = step
    return steps


def differences(work: Workload, programs: Mapping[str, Program]) -> dict[str, list[str]]:
    """Programs that, in float32, do not send what the formulas say, by name; in words.

    Those of ``ragged`` are left out: what the CPU sends in its place says nothing.
    """
    found: dict[str, list[str]] = {}
    if work.dispatch.method == "ragged":
        return found
    for name, traffic in traffic_of(work, 4).items():
        got = Counter(between_devices(programs[name]))
        want = Counter(each for part in traffic for each in part)
        unlike = [each for each in sorted(got.keys() | want.keys()) if got[each] != want[each]]
        if unlike:
            found[name] = [
                f"{name}: the compiled program has {got[each]} x {each.kind} of {each.bytes} bytes "
                f"over {each.group_size} devices (of {each.span}), the formula {want[each]}"
                for each in unlike
            ]
    return found


def between_devices(program: Program) -> list[Collective]:
    """What a program sends from device to device."""
    return [each for each in program.collectives if each.group_size > 1]


def one_branch(work: Workload, length: int) -> Workload:
    """A workload whose program has only the branch of ``overflow="exact"`` that runs."""
    branch = branch_of(work, length)
    if branch == "only":
        return work
    dispatch = DispatchOptions(method="gathered")
    if branch == "capacity":
        dispatch = dataclasses.replace(work.dispatch, overflow="drop")
    return dataclasses.replace(work, dispatch=dispatch)


def train_step(
    work: Workload,
    device: Device,
    weights: Weights,
    state_bytes: int,
    collectives: list[Collective],
) -> Step:
    """Forward, layers again and backward; frozen weights get no gradients of their own.

    Traffic is that of the compiled program, whose floats are all f32: an upper bound.

    Args:
        work: with ``train``.
        device: to run on.
        weights: on it.
        state_bytes: of what trains, its gradients and its optimizer on it, read and written once.
        collectives: of the compiled program of ``one_branch``.
    """
    one_pass = step_work(
        one_branch(work, work.context),
        length=work.context,
        weight_bytes=weights.total - weights.experts,
        expert_bytes=weights.experts,
        cache_bytes=0,
        heads=True,
    )
    useful_passes = 3 if work.train == "full" else 2
    done = Work(
        flops=(useful_passes + 1) * one_pass.flops,  # layers are computed again
        useful_flops=useful_passes * one_pass.useful_flops,
        bytes_read=3 * weights.total + 2 * state_bytes,
    )
    step = _step(device, work.batch * work.context, done, collectives)
    return dataclasses.replace(step, branch=branch_of(work, work.context))
