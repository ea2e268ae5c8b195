"""``python -m mixtral_jax.plan``: the bill before you rent."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from rich.console import Console
from rich.table import Table

from mixtral_jax import cli
from mixtral_jax.errors import BAD_CONFIG, OK, USAGE, MixtralError
from mixtral_jax.finetune.options import Optimizer
from mixtral_jax.kernels.scaled_kv import KVDtype
from mixtral_jax.language_model import EMBEDDED
from mixtral_jax.plan.bill import Bill, make_bill
from mixtral_jax.plan.devices import find_device
from mixtral_jax.plan.offload import check_offload, print_offload
from mixtral_jax.plan.programs import Train, Workload, simulate
from mixtral_jax.plan.schemes import check_scheme, stored_in
from mixtral_jax.plan.sweep import (
    MAX_DEVICES,
    MOST_COMPILED,
    Cheapest,
    cheapest,
    draw,
    powers_of_two,
    sweep,
)
from mixtral_jax.plots import check_plot
from mixtral_jax.sharding.dispatch import DispatchOptions, Method, Overflow
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.report import find_config
from mixtral_jax.sharding.strategy import Attention, Strategy

MOST_DEVICES = 1024  # 47 s on two shared cores for `tiny`; 2048 work too, 8192 did not
NOT_SPLIT = "sequence and pipeline parallelism are not built: neither splits memory or time here"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Memory, traffic and the limit of speed of a model on a mesh, compiled from shapes alone.

    No weights, no accelerator. Seconds are what the device's data sheet allows, not a forecast.
    """

    model: str = "mixtral-8x7b"
    """mixtral-8x7b, mixtral-8x22b, ..., tiny, or a folder with a config.json."""
    mesh: str | None = None
    """1x8 (data x expert), 2x4x2 (and tensor) or data=2,expert=4. Unless given: the cheapest."""
    device: str = "h100"
    """h100, h200, a100-80g, a100-40g, l40s, rtx-4090, v5e, v5p or v6e."""
    batch: int = 1
    """Rows over all devices: conversations at once, or examples per training step."""
    context: int | None = None
    """Tokens per row, prompt and answer together; 4096, or what the model can hold."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of weights, activations and cache; the model's unless given."""
    kv_dtype: KVDtype | None = None
    """Of the cache instead: int8 or fp8 codes, and a scale for each head of each position."""
    quantize: str | None = None
    """Size of the weights as int8, fp8, int4, nf4, fp4, nf4-double-quant, or gptq in 2, 3, 4 or 8
    bits (gptq3; gptq is gptq4). A folder that is quantized is planned as it is."""
    train: Train | None = None
    """A training step, not generation: full, lora or qlora (rank 16 on attention), as
    python -m mixtral_jax.finetune makes it."""
    optim: Optimizer | None = None
    """With --train: adamw unless given, adamw_8bit, adafactor or muon."""
    attention: Attention = "data"
    """Attention weights whole on every device of the expert axis, or split over it (tensor)."""
    fsdp: bool = False
    """Weights at rest are split over the data axis too (with --train full)."""
    dispatch: Method = "auto"
    """How rows travel to their experts."""
    capacity_factor: float = DispatchOptions.capacity_factor
    """Rows offered per expert by all_to_all, as a multiple of a balanced load."""
    overflow: Overflow = DispatchOptions.overflow
    """Beyond the capacity: exact (a dropless path) or drop."""
    memory_fraction: float = 0.9
    """Of a device's memory that may be filled."""
    offload: Literal["experts"] | None = None
    """One device, with experts in its host's memory and copied when needed (docs/offload.md)."""
    device_memory: str | None = None
    """With --offload, of the device: 20GB. Unless given: what --memory-fraction leaves of it."""
    hit_rate: float | None = None
    """With --offload: share of expert visits that need no copy, ahead or not. Unless given: the
    share of the experts that are there, which is what uniform routing makes of it."""
    host_bandwidth: float | None = None
    """With --offload: GB/s from host to device; the data sheet's unless given."""
    price: float | None = None
    """Of one device for one hour, in any currency: adds the price of a million tokens."""
    sweep: bool = False
    """All meshes of 1, 2, 4, ... devices that hold the weights and the cache."""
    max_devices: int = MAX_DEVICES
    """Where the sweep, and the search for the cheapest mesh, end."""
    plot: Path | None = None
    """With --sweep: draw it as FILE.svg or FILE.png (needs matplotlib)."""
    json: bool = False
    """Print one JSON line (with --sweep one per mesh) on stdout and nothing else there."""
    debug: bool = False
    """Show tracebacks."""

    def __post_init__(self):
        for name, least in (("batch", 1), ("context", 2), ("max_devices", 1)):
            given = getattr(self, name)
            if given is not None and given < least:
                flag = f"--{name.replace('_', '-')}"
                _refuse(flag, expected=f"at least {least}", got=given, fix=f"{flag} {least}")
        if self.max_devices > MAX_DEVICES:
            most, fix = f"at most {MAX_DEVICES}", f"--max-devices {MAX_DEVICES}"
            _refuse("--max-devices", expected=most, got=self.max_devices, fix=fix)
        if not 0 < self.memory_fraction <= 1:
            expected, got = "above 0, at most 1", self.memory_fraction
            _refuse("--memory-fraction", expected=expected, got=got, fix="--memory-fraction 0.9")
        if self.price is not None and not 0 < self.price < float("inf"):
            _refuse("--price", expected="a positive number", got=self.price, fix="--price 3")
        if self.plot is not None and not self.sweep:
            _refuse("--plot", fix="give --sweep too")
        if self.sweep and self.mesh is not None:
            _refuse("--sweep compares all meshes", fix="leave out --mesh")
        if self.train is not None and self.kv_dtype is not None:
            _refuse("--kv-dtype: training has no cache", fix="leave it out")
        if self.train is None and self.optim is not None:
            _refuse("--optim is of training", fix="give --train too, or leave it out")
        if self.fsdp and self.train != "full":
            _refuse("--fsdp", fix="give --train full too")
        check_offload(self)
        check_scheme(self.quantize)
        if self.quantize is not None and self.train == "full":
            what = "--quantize with --train full: quantized weights cannot be trained"
            _refuse(what, fix="--train qlora, or leave out --quantize")


def _refuse(what: str, *, expected: object = None, got: object = None, fix: str) -> NoReturn:
    raise MixtralError(what, expected=expected, got=got, fix=fix, code=USAGE)


def main(options: Options) -> int:
    """Prints the bill, or the sweep."""
    if options.plot is not None:
        check_plot(options.plot)
    work = workload(options)
    quantize = stored_in(options.model, options.quantize) or options.quantize
    if quantize is not None and options.train == "full":
        what = f"--train full: {options.model} is quantized, and cannot be trained"
        _refuse(what, fix="--train lora, or the checkpoint that it was made from")
    simulate(max(work.mesh.num_devices, options.max_devices))
    if options.offload:
        return print_offload(options, work, quantize)
    shared: dict[str, Any] = {
        "quantize": quantize,
        "memory_fraction": options.memory_fraction,
    }
    with Console(stderr=True).status("compiling") as status:

        def tell(line: str) -> None:
            status.update(line)

        if options.sweep:
            counts = powers_of_two(options.max_devices)
            bills = list(sweep(work, options.device, counts=counts, note=tell, **shared))
        else:
            tell("looking for the cheapest mesh that fits")
            most = options.max_devices
            best = cheapest(work, options.device, most=most, note=tell, **shared)
            if options.mesh is None:
                if best.bill is None:
                    fix = what_would_fit(options, is_quantized=quantize is not None)
                    raise MixtralError(no_mesh(options, best), fix=fix, code=BAD_CONFIG)
                work = best.bill.work
            # The backward pass of all layers takes minutes to compile.
            bills = [make_bill(work, options.device, whole=work.train is None, **shared)]
    for line in notes(bills[0]) if bills else ():
        print(f"note: {line}", file=sys.stderr)
    if options.sweep:
        return _print_sweep(options, bills)
    if options.json:
        print(json.dumps(as_json(options, bills[0], best.bill)))
    else:
        print("\n".join(lines(options, bills[0], best)))
    return OK


def no_mesh(options: Options, found: Cheapest) -> str:
    """That none was found, in words."""
    where = f"{options.max_devices} or fewer {options.device}"
    if found.is_complete:
        return f"no mesh of {where} holds this"
    return f"none of the {MOST_COMPILED} meshes of {where} that were compiled holds this"


def what_would_fit(options: Options, *, is_quantized: bool) -> str:
    """What to change where no mesh holds the workload."""
    if options.train is None:
        quantize = "" if is_quantized else " or --quantize int4"
        return f"choose a larger device, a smaller batch or context{quantize}"
    ways = ["choose a larger device"]
    if options.batch % 64:  # fewer devices may share it than there could be
        ways.append("a batch that is a multiple of more devices (--batch 64)")
    if options.train == "full" and not options.fsdp:
        ways.append("--fsdp")
    if options.train != "qlora":
        ways.append("--train qlora")
    return ", ".join([*ways, "a smaller context"])


def notes(bill: Bill) -> Iterator[str]:
    """Where the formulas of traffic were not confirmed."""
    yield from bill.differences
    for name in sorted({line.split(":")[0] for line in bill.differences}):
        yield f"{name}: billed as compiled, in float32"
    if bill.work.dispatch.method == "ragged" and bill.not_compared is not None:
        yield bill.not_compared


def workload(options: Options) -> Workload:
    """What the options ask for; one device where they name no mesh."""
    find_device(options.device)
    config = find_config(options.model)
    longest = config.max_position_embeddings
    context = options.context or min(4096, longest)
    if context > longest:
        raise MixtralError(
            "--context",
            expected=f"at most {longest} (max_position_embeddings)",
            got=context,
            fix=f"--context {longest}",
            code=USAGE,
        )
    spec = MeshSpec() if options.mesh is None else MeshSpec.parse(options.mesh).fit(config)
    if spec.num_devices > MOST_DEVICES:
        expected, got = f"at most {MOST_DEVICES} devices", f"{spec.num_devices} ({options.mesh})"
        _refuse("--mesh", expected=expected, got=got, fix="choose a smaller mesh")
    strategy = Strategy(attention=options.attention, fsdp=options.fsdp)
    strategy.check(config, spec)
    if options.train and options.batch % (spec.data * spec.expert):
        raise MixtralError(
            "--batch",
            expected=f"a multiple of data x expert ({spec.data * spec.expert}) in training",
            got=options.batch,
            fix=f"--batch {spec.data * spec.expert}",
            code=BAD_CONFIG,
        )
    # As mj.load does: the embedded model runs in the dtype that it was trained in.
    dtype = options.dtype or ("float32" if options.model == EMBEDDED else config.dtype)
    return Workload(
        config=config,
        mesh=spec,
        batch=options.batch,
        context=context,
        dtype=dtype,
        kv_dtype=options.kv_dtype,
        strategy=strategy,
        dispatch=DispatchOptions(
            method=options.dispatch,
            capacity_factor=options.capacity_factor,
            overflow=options.overflow,
        ),
        train=options.train,
        optim=options.optim or "adamw",
    )


def price_per_million(options: Options, bill: Bill) -> float | None:
    """What a million tokens cost at the limit of speed."""
    if options.price is None:
        return None
    hours = 1e6 / bill.tokens_per_second / 3600
    return options.price * bill.work.mesh.num_devices * hours


def as_json(options: Options, bill: Bill, best: Bill | None) -> dict[str, Any]:
    """One line of ``--json``."""
    found = {"model": options.model, "device": options.device, **bill.to_json()}
    found["price_per_million_tokens"] = price_per_million(options, bill)
    found["not_split"] = ["sequence", "pipeline"]
    if not options.sweep:
        found["cheapest_mesh"] = None if best is None else str(best.work.mesh)
    return found


def _bytes(size: float) -> str:
    if size < 1e8:
        return f"{size / 1e6:,.3f} MB"
    return f"{size / 1e9:,.3f} GB" if size < 1e10 else f"{size / 1e9:,.1f} GB"


def lines(options: Options, bill: Bill, best: Cheapest) -> Iterator[str]:
    """The bill as text."""
    work, memory = bill.work, bill.memory
    what = f"{work.train} training ({work.optim})" if work.train else "generation"
    dtypes = [work.dtype, *([bill.quantize] if bill.quantize else [])]
    dtypes += [f"{work.kv_dtype} cache"] if work.kv_dtype else []
    yield (
        f"{options.model}, {', '.join(dtypes)}: {what} on "
        f"{work.mesh.num_devices} x {options.device}, mesh {work.mesh}, {work.strategy}; "
        f"batch {work.batch} (compiled for {work.rows} rows), context {work.context}"
    )
    yield (f"parameters {bill.parameters:,}, of which a token meets {bill.active_parameters:,}")
    yield ""
    yield "per device"
    for field in dataclasses.fields(memory):
        size = getattr(memory, field.name)
        if size:
            yield f"  {field.name.removesuffix('_bytes'):<12}{_bytes(size):>14}"
    verdict = f"{'fits' if bill.fits else 'DOES NOT FIT'} in {_bytes(bill.usable_bytes)}"
    yield f"  {'total':<12}{_bytes(memory.total_bytes):>14}   {verdict}"
    for name, step in bill.steps.items():
        yield ""
        yield from _step_lines(name, step)
    price = price_per_million(options, bill)
    yield ""
    if price is not None:
        yield f"a million tokens: {price:,.3f} at {options.price} per device and hour"
    if best.bill is None:
        yield no_mesh(options, best)
    else:
        speed = f"{best.bill.tokens_per_second:,.0f} tokens/s"
        yield f"cheapest mesh that fits: {best.bill.work.mesh} ({speed})"
    yield "temporaries: of the program in float32, on the high side; times: the data sheet's limits"
    yield NOT_SPLIT


def _step_lines(name: str, step: Any) -> Iterator[str]:
    yield (
        f"{name}: {step.tokens:,} tokens per step, {step.step_seconds * 1e3:,.3f} ms, "
        f"{step.tokens_per_second:,.0f} tokens/s at the limit"
    )
    work = f"{step.flops / 1e12:,.4f} TFLOP ({step.useful_flops / step.flops:.0%} useful)"
    yield f"  products   {step.compute_seconds * 1e3:>10,.3f} ms  {work}"
    yield f"  reading    {step.memory_seconds * 1e3:>10,.3f} ms  {_bytes(step.bytes_read)}"
    total = sum(each.wire_bytes for each in step.collectives)
    yield f"  sending    {step.link_seconds * 1e3:>10,.3f} ms  {_bytes(total)}"
    for when, collectives in (("", step.collectives), ("on overflow ", step.overflow)):
        for each in collectives:
            yield (
                f"    {when}{each.count} x {each.kind} of {each.bytes:,} bytes over "
                f"{each.group_size}: {each.seconds * 1e3:,.3f} ms"
            )
    if step.branch == "overflow":
        yield "  the capacity cannot hold the rows: every layer takes the gathered path, as billed"
    elif step.branch == "capacity":
        seconds = step.overflow_step_seconds
        beside = "" if seconds is None else f"; where every layer does: {seconds * 1e3:,.3f} ms"
        yield f"  billed as no layer overflows its capacity{beside}"


def _print_sweep(options: Options, bills: list[Bill]) -> int:
    if options.plot is not None:
        rows = f"batch {bills[0].work.batch}, context {bills[0].work.context}" if bills else ""
        title = f"{options.model} on {options.device}: {rows}"
        draw(bills, title, options.plot)
    if options.json:
        for bill in bills:
            print(json.dumps(as_json(options, bill, None)))
        return OK
    columns = [
        "mesh",
        "devices",
        "GB/device",
        "fits",
        "ms/step",
        "sending",
        "tokens/s",
        "per device",
    ]
    columns += ["price/1M"] if options.price is not None else []
    table = Table(*columns)
    for bill in bills:
        step = bill.steps["train" if options.train else "decode"]
        row = [
            str(bill.work.mesh),
            str(bill.work.mesh.num_devices),
            f"{bill.memory.total_bytes / 1e9:.2f}",
            "yes" if bill.fits else "no",
            f"{step.step_seconds * 1e3:.3f}",
            f"{step.link_seconds / step.step_seconds:.0%}",
            f"{step.tokens_per_second:,.0f}",
            f"{step.tokens_per_second / bill.work.mesh.num_devices:,.0f}",
        ]
        price = price_per_million(options, bill)
        table.add_row(*row, *([] if price is None else [f"{price:,.3f}"]))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    print(NOT_SPLIT)
    return OK


def run(argv: Sequence[str]) -> int:
    """The command with these arguments; gives its exit code."""
    return cli.run_verb("plan", main, Options, argv)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
