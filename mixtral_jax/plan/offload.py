"""The bill of ``--offload experts``: what a device holds, and what its link to the host allows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from mixtral_jax.decode.generate import chunk_bucket
from mixtral_jax.errors import BAD_CONFIG, OK, USAGE, MixtralError
from mixtral_jax.model.placement import LOCAL
from mixtral_jax.model.transformer import LeafSpec, leaf_specs
from mixtral_jax.offload.ledger import parse_size, size_for
from mixtral_jax.offload.load import Generating, abstract_parts, least_of
from mixtral_jax.offload.parts import Least, Parts, num_bytes
from mixtral_jax.offload.passes import Compiler
from mixtral_jax.plan.devices import Device, find_device
from mixtral_jax.plan.programs import Workload, state_shapes
from mixtral_jax.plan.roofline import experts_visited
from mixtral_jax.plan.schemes import Scheme, Stored, quantized_parts
from mixtral_jax.quantize.source import is_quantized

_ALONE = ("mesh", "sweep", "plot", "train", "price")  # options of other bills


@dataclasses.dataclass(frozen=True, kw_only=True)
class OffloadBill:
    """What a device holds of a model whose experts lie with the host, and the limits of its speed.

    Attributes:
        budget: bytes that may be used of the device.
        least: that the workload cannot do without, with room for one expert.
        expert_bytes: of one expert.
        num_experts: of all layers.
        resident_experts: that there is room for.
        host_bytes: of pinned memory of the host: all experts.
        hit_rate: share of the visits of decode steps whose expert is on the device; as given, or
            ``resident_experts / num_experts``.
        is_assumed: that it was not given.
        host_bandwidth: bytes per second from host to device.
        copied_bytes: of a decode step.
        copy_seconds: of a decode step.
        device_seconds: of a decode step: what it reads of the device's memory.
        prefill_copied_bytes: of a chunk of ``prefill_tokens``, whose tokens choose all experts.
        prefill_tokens: of a chunk, all rows.
    """

    budget: int
    least: Least
    expert_bytes: int
    num_experts: int
    resident_experts: int
    host_bytes: int
    hit_rate: float
    is_assumed: bool
    host_bandwidth: float
    copied_bytes: float
    copy_seconds: float
    device_seconds: float
    prefill_copied_bytes: float
    prefill_tokens: int
    batch: int

    @property
    def fits(self) -> bool:
        """Whether there is room for one expert beside all else."""
        return self.budget >= self.least.total

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """Of decoding at the limit: no copy hidden behind other work, and all that can be."""
        in_turn = self.copy_seconds + self.device_seconds
        return self.batch / in_turn, self.batch / max(self.copy_seconds, self.device_seconds)


def offload_bill(
    work: Workload,
    device: Device,
    *,
    quantize: Scheme | None = None,
    budget: int,
    hit_rate: float | None = None,
    host_bandwidth: float,
) -> OffloadBill:
    """Adds up what ``sample --offload experts`` takes, from shapes.

    Weights, state and experts are exact. Working memory is that of the programs it would run,
    compiled for the CPU in float32 (see docs/plan.md: an estimate on the high side for 16 bits).

    Args:
        work: sizes, batch and context; its mesh is 1x1.
        device: for the bandwidth of its memory.
        quantize: a scheme of ``plan/schemes.py``, or what a folder holds.
        budget: bytes of the device.
        hit_rate: None for that of uniform routing.
        host_bandwidth: bytes per second from host to device.
    """
    config = work.config
    parts = _parts(work, quantize, work.dtype)
    what = Generating(work.batch, work.context, work.context, work.kv_dtype)
    compiler = Compiler(_parts(work, quantize, "float32"), LOCAL, jax.devices()[0])
    state = num_bytes(state_shapes(work))
    least = dataclasses.replace(
        least_of(compiler, what),
        weights=parts.device_bytes,
        state=state,
        expert=parts.expert_bytes,
    )
    room = budget - least.total + parts.expert_bytes
    resident = max(0, min(parts.num_experts, room // parts.expert_bytes))
    rate = resident / parts.num_experts if hit_rate is None else hit_rate
    visits = config.num_hidden_layers * experts_visited(work, work.batch)
    copied = visits * (1 - rate) * parts.expert_bytes
    embedding = 0 if config.tie_word_embeddings else num_bytes(parts.ends.embed_tokens)
    cache = num_bytes(state_shapes(work).cache)
    read = parts.device_bytes - embedding + visits * parts.expert_bytes + cache
    every = parts.num_experts * parts.expert_bytes
    return OffloadBill(
        budget=budget,
        least=least,
        expert_bytes=parts.expert_bytes,
        num_experts=parts.num_experts,
        resident_experts=resident,
        host_bytes=num_bytes(parts.experts),
        hit_rate=rate,
        is_assumed=hit_rate is None,
        host_bandwidth=host_bandwidth,
        copied_bytes=copied,
        copy_seconds=copied / host_bandwidth,
        device_seconds=read / device.memory_bandwidth,
        prefill_copied_bytes=every * (1 - resident / parts.num_experts),
        prefill_tokens=work.batch * min(work.context, chunk_bucket(work.context)),
        batch=work.batch,
    )


def _parts(work: Workload, quantize: Scheme | None, dtype: str) -> Parts:
    quantized, kept = {}, jnp.dtype(dtype)
    if isinstance(quantize, Stored):
        for path, q in quantize.weights.items():
            quantized[path] = dataclasses.replace(q, dtype=kept)
    elif quantize is not None:
        for path, spec in leaf_specs(work.config, dtype).items():
            leaf = LeafSpec(spec.shape, spec.axes, kept)
            if is_quantized(leaf, quantize):
                quantized[path] = quantized_parts(path, leaf, quantize)
    return abstract_parts(work.config, quantized, dtype)


def check_offload(options: Any) -> None:
    """Refuses options that mean nothing together (exit code 64)."""
    given = ("device_memory", "hit_rate", "host_bandwidth")
    if options.offload is None:
        for name in given:
            if getattr(options, name) is not None:
                what = f"--{name.replace('_', '-')} needs --offload"
                raise MixtralError(what, fix="--offload experts", code=USAGE)
        return
    for name in _ALONE:
        if getattr(options, name):
            what = f"--{name} with --offload: the bill is of one device that generates"
            raise MixtralError(what, fix="leave one out", code=USAGE)
    rate, bandwidth = options.hit_rate, options.host_bandwidth
    if rate is not None and not 0 <= rate <= 1:
        raise MixtralError("--hit-rate", expected="from 0 to 1", got=rate, code=USAGE)
    if bandwidth is not None and not 0 < bandwidth < float("inf"):
        expected = "a positive number"
        raise MixtralError("--host-bandwidth", expected=expected, got=bandwidth, code=USAGE)


def print_offload(options: Any, work: Workload, quantize: Scheme | None) -> int:
    """Makes and prints the bill.

    Raises:
        MixtralError: exit code 78 if there is no room for one expert; 64 without a bandwidth.
    """
    device = find_device(options.device)
    bandwidth = options.host_bandwidth and options.host_bandwidth * 1e9
    bandwidth = bandwidth or device.host_bandwidth
    if bandwidth is None:
        what = f"--offload: the data sheet of {options.device} has no bandwidth to its host"
        raise MixtralError(what, fix="--host-bandwidth GB/s", code=USAGE)
    budget = int(device.memory_bytes * options.memory_fraction)
    if options.device_memory is not None:
        budget = parse_size(options.device_memory)
    bill = offload_bill(
        work,
        device,
        quantize=quantize,
        budget=budget,
        hit_rate=options.hit_rate,
        host_bandwidth=bandwidth,
    )
    if options.json:
        slow, fast = bill.tokens_per_second
        found = {"model": options.model, "device": options.device, "offload": "experts"}
        scheme = None if quantize is None else str(quantize)
        found |= {"quantize": scheme, "dtype": work.dtype, "context": work.context}
        found |= dataclasses.asdict(bill) | {"fits": bill.fits}
        found |= {"tokens_per_second": slow, "tokens_per_second_overlapped": fast}
        print(json.dumps(found))
    else:
        print("\n".join(_lines(options, work, quantize, bill)))
    if bill.fits:
        return OK
    raise MixtralError(
        "--device-memory",
        expected=f"at least {size_for(bill.least.total)}",
        got=f"{budget:,} bytes",
        fix=f"--device-memory {size_for(bill.least.total)}, or a smaller --batch or --context",
        code=BAD_CONFIG,
    )


def _lines(
    options: Any, work: Workload, quantize: Scheme | None, bill: OffloadBill
) -> Iterator[str]:
    def gb(size: float) -> str:
        return f"{size / 1e9:,.3f} GB" if size < 1e10 else f"{size / 1e9:,.1f} GB"

    kinds = work.dtype if quantize is None else f"{work.dtype}, {quantize}"
    yield (
        f"{options.model}, {kinds}: generation on 1 x {options.device}, experts in host memory; "
        f"batch {work.batch} (compiled for {work.rows} rows), context {work.context}"
    )
    yield ""
    yield f"of the device, {gb(bill.budget)}"
    for kind, size in vars(bill.least).items():
        if kind != "expert":
            yield f"  {kind:<12}{gb(size):>14}"
    held = bill.resident_experts * bill.expert_bytes
    share = f"{bill.resident_experts} of {bill.num_experts}, {gb(bill.expert_bytes)} each"
    yield f"  {'experts':<12}{gb(held):>14}   {share}"
    yield f"of the host, pinned: {gb(bill.host_bytes)}"
    if not bill.fits:
        return
    slow, fast = bill.tokens_per_second
    why = "uniform routing: the share of experts there" if bill.is_assumed else "as given"
    yield ""
    yield (
        f"decode: hit rate {bill.hit_rate:.1%} ({why}); a step copies {gb(bill.copied_bytes)} at "
        f"{bill.host_bandwidth / 1e9:,.0f} GB/s: {bill.copy_seconds * 1e3:,.1f} ms"
    )
    yield f"  reading the device's memory: {bill.device_seconds * 1e3:,.1f} ms"
    yield (
        f"  {slow:,.1f} tokens/s at the limit, {fast:,.1f} if prefetching hides all that it can; "
        f"{bill.batch / bill.device_seconds:,.1f} with every expert on the device"
    )
    yield (
        f"prefill: {bill.prefill_tokens:,} tokens copy {gb(bill.prefill_copied_bytes)}: "
        f"{bill.prefill_copied_bytes / bill.host_bandwidth * 1e3:,.0f} ms"
    )
    yield "working memory: of the programs in float32, on the high side; times: the data sheet's"
