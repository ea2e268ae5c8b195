"""Mesh after mesh: which fit, how fast they could be, and the smallest that will do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from mixtral_jax.errors import MixtralError
from mixtral_jax.plan.bill import Bill, holds, make_bill, memory_of, scheme_of
from mixtral_jax.plan.devices import find_device
from mixtral_jax.plan.programs import Workload
from mixtral_jax.plan.schemes import Scheme, weight_bytes
from mixtral_jax.plan.step import generation_steps, train_step
from mixtral_jax.plots import check_plot, figure_file
from mixtral_jax.sharding.mesh import MeshSpec

MAX_DEVICES = 256
MOST_COMPILED = 8  # meshes in the search for the cheapest: it ends in minutes


def meshes(work: Workload, devices: int) -> Iterator[MeshSpec]:
    """Meshes of so many devices that the model and the strategy allow, by powers of two."""
    sizes = [1 << k for k in range(devices.bit_length())]
    for tensor in sizes:
        for expert in sizes:
            if devices % (expert * tensor):
                continue
            spec = MeshSpec(data=devices // (expert * tensor), expert=expert, tensor=tensor)
            try:
                fitted = spec.fit(work.config)
                work.strategy.check(work.config, fitted)
            except MixtralError:
                continue
            if fitted == spec and (not work.train or work.batch % (spec.data * spec.expert) == 0):
                yield spec


def powers_of_two(most: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to ``most``."""
    return tuple(1 << k for k in range(most.bit_length()))


def sweep(
    work: Workload,
    device: str,
    *,
    counts: tuple[int, ...],
    note: Callable[[str], None],
    quantize: Scheme | None = None,
    memory_fraction: float = 0.9,
) -> Iterator[Bill]:
    """Bills of all meshes of each number of devices.

    Meshes that do not hold weights, cache and training state, temporaries apart, are left out.
    Programs are compiled with a few layers.
    """
    for count in counts:
        for here, _ in _candidates(work, device, count, quantize, memory_fraction):
            yield _bill(here, device, note, quantize, memory_fraction)


def _bill(
    work: Workload,
    device: str,
    note: Callable[[str], None],
    quantize: Scheme | None,
    fraction: float,
) -> Bill:
    note(f"compiling for {work.mesh}")
    found = make_bill(work, device, quantize=quantize, memory_fraction=fraction, whole=False)
    jax.clear_caches()  # a thousand programs in memory exceed a process's mappings
    return found


def _candidates(
    work: Workload, device: str, count: int, quantize: Scheme | None, fraction: float
) -> Iterator[tuple[Workload, float]]:
    """On meshes that hold weights, cache and training state, and tokens per second at most.

    Arithmetic, no program is compiled: of training, links are left out of the time.
    """
    found = find_device(device)
    usable, scheme = found.memory_bytes * fraction, scheme_of(work, quantize)
    for spec in meshes(work, count):
        try:
            weights = weight_bytes(
                work.config, spec, work.strategy, dtype=work.dtype, scheme=scheme
            )
        except MixtralError:  # it would cut groups of quantized weights
            continue
        here = dataclasses.replace(work, mesh=spec)
        if weights.total > usable:
            continue
        memory = memory_of(here, weights, 0)
        if memory.total_bytes > usable:
            continue
        if work.train:
            step = train_step(here, found, weights, memory.update_bytes, [])
        else:
            step = generation_steps(here, found, weights, memory.cache_bytes)["decode"]
        yield here, step.tokens_per_second


class Cheapest(NamedTuple):
    """The mesh found; not ``is_complete`` where the search ended before all were looked at."""

    bill: Bill | None
    is_complete: bool


def cheapest(
    work: Workload,
    device: str,
    *,
    note: Callable[[str], None],
    most: int = MAX_DEVICES,
    quantize: Scheme | None = None,
    memory_fraction: float = 0.9,
) -> Cheapest:
    """The fastest of the meshes with the fewest devices that hold the workload.

    Devices are counted in powers of two up to ``most``. Weights, cache and the limit of speed are
    arithmetic; the meshes that these leave are compiled, the fastest first, until one fits that no
    other can beat, and at most ``MOST_COMPILED`` of them.
    """
    compiled = 0
    for count in powers_of_two(most):
        best: Bill | None = None
        candidates = list(_candidates(work, device, count, quantize, memory_fraction))
        for here, at_most in sorted(candidates, key=lambda one: -one[1]):
            if best is not None and best.tokens_per_second >= at_most:
                break
            if compiled == MOST_COMPILED:
                return Cheapest(best, is_complete=False)
            compiled += 1
            note(f"compiling for {here.mesh}")
            if not holds(here, device, quantize=quantize, memory_fraction=memory_fraction):
                continue
            bill = _bill(here, device, note, quantize, memory_fraction)
            if bill.fits and (best is None or bill.tokens_per_second > best.tokens_per_second):
                best = bill
        if best is not None:
            return Cheapest(best, is_complete=True)
    return Cheapest(None, is_complete=True)


def draw(bills: list[Bill], title: str, path: Path) -> None:
    """Tokens per second, and bytes per device, over the number of devices, as SVG or PNG.

    Raises:
        MixtralError: as ``check_plot``.
    """
    check_plot(path)
    with figure_file(path, size=(11, 4.4)) as figure:
        speed, memory = figure.subplots(1, 2)
        for fits, marker, color in ((True, "o", "tab:blue"), (False, "x", "tab:red")):
            chosen = [bill for bill in bills if bill.fits == fits]
            devices = [bill.work.mesh.num_devices for bill in chosen]
            label = "fits" if fits else "does not fit"
            speeds = [bill.tokens_per_second for bill in chosen]
            speed.scatter(devices, speeds, marker=marker, color=color, label=label)
            gigabytes = [bill.memory.total_bytes / 1e9 for bill in chosen]
            memory.scatter(devices, gigabytes, marker=marker, color=color)
        best: dict[int, Bill] = {}
        for bill in bills:
            known = best.get(bill.work.mesh.num_devices)
            if bill.fits and (known is None or bill.tokens_per_second > known.tokens_per_second):
                best[bill.work.mesh.num_devices] = bill
        for count, bill in best.items():
            where = (count, bill.tokens_per_second)
            speed.annotate(
                str(bill.work.mesh), where, textcoords="offset points", xytext=(0, 6), ha="center",
                fontsize=8,
            )  # fmt: skip
        if bills:
            memory.axhline(bills[0].usable_bytes / 1e9, color="gray", linestyle="--")
        for axes, what in ((speed, "tokens/s at the limit"), (memory, "GB per device")):
            axes.set(xscale="log", yscale="log", xlabel="devices", title=what)
            axes.set_xscale("log", base=2)
            axes.grid(alpha=0.3)
        speed.legend()
        figure.suptitle(title, fontsize=10, parse_math=False)
