"""Mesh after mesh: which fit, how fast they could be, and the smallest that will do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from mixtral_jax.errors import USAGE, MixtralError
from mixtral_jax.plan.bill import Bill, make_bill, memory_of, scheme_of
from mixtral_jax.plan.devices import find_device
from mixtral_jax.plan.programs import Workload
from mixtral_jax.plan.schemes import weight_bytes
from mixtral_jax.sharding.mesh import MeshSpec

MAX_DEVICES = 256


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


def sweep(
    work: Workload,
    device: str,
    *,
    counts: tuple[int, ...],
    note: Callable[[str], None],
    quantize: str | None = None,
    memory_fraction: float = 0.9,
) -> Iterator[Bill]:
    """Bills of all meshes of each number of devices.

    Meshes that do not hold weights, cache and training state, temporaries apart, are left out.
    Programs are compiled with a few layers.
    """
    usable = find_device(device).memory_bytes * memory_fraction
    scheme = scheme_of(work, quantize)
    for count in counts:
        for spec in meshes(work, count):
            weights = weight_bytes(
                work.config, spec, work.strategy, dtype=work.dtype, scheme=scheme
            )
            here = dataclasses.replace(work, mesh=spec)
            if weights.total > usable or memory_of(here, weights, 0).total_bytes > usable:
                continue
            note(f"compiling for {spec}")
            yield make_bill(
                here, device, quantize=quantize, memory_fraction=memory_fraction, whole=False
            )
            jax.clear_caches()  # a thousand programs in memory exceed a process's mappings


def cheapest(
    work: Workload, device: str, *, note: Callable[[str], None], **options: object
) -> Bill | None:
    """The fastest of the meshes with the fewest devices that hold the workload; None if none does.

    Devices are counted in powers of two up to ``MAX_DEVICES``; keyword options are ``sweep``'s.
    """
    count = 1
    while count <= MAX_DEVICES:
        bills = sweep(work, device, counts=(count,), note=note, **options)  # type: ignore[arg-type]
        fitting = [bill for bill in bills if bill.fits]
        if fitting:
            return max(fitting, key=lambda bill: bill.tokens_per_second)
        count *= 2
    return None


def draw(bills: list[Bill], title: str, path: Path) -> None:
    """Tokens per second, and bytes per device, over the number of devices, as SVG or PNG.

    Raises:
        MixtralError: exit code 64 without matplotlib or for another kind of file.
    """
    if path.suffix not in (".svg", ".png"):
        raise MixtralError(
            "--plot", expected="a name that ends in .svg or .png", got=str(path), code=USAGE
        )
    try:
        import matplotlib as mpl
    except ImportError:
        raise MixtralError(
            "--plot needs matplotlib", fix="pip install 'mixtral-jax[plots]'", code=USAGE
        ) from None
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "mixtral_jax", "svg.fonttype": "none"}):
        figure = Figure(figsize=(11, 4.4), layout="constrained")
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
        figure.suptitle(title, fontsize=10)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
