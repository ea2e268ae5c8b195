"""What do experts in host memory cost, by how many of them the device has room for?

The same model twice: whole on the device, and under ``--offload experts`` with room for a share of
the experts. Greedy; runs take turns; the tokens must be the same. `tiny` is the embedded model on
questions that it was trained for; others have Gaussian weights, whose routing is close to uniform.

On a CPU "device" and "host" are the same memory, a copy from one to the other is a copy all the
same, and shares its two ends' bandwidth with the products.

    python benchmarks/offload.py --model bench --dtype bfloat16 --shares 1 0.5 0.25
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import _ours
import jax
from _common import report, run_script, spread
from flax import nnx
from jax.sharding import SingleDeviceSharding

from mixtral_jax.convert.load import HOST
from mixtral_jax.convert.names import EXPERT_LEAF
from mixtral_jax.decode.executor import Executor, Resident
from mixtral_jax.decode.generate import Generation, Request
from mixtral_jax.decode.sampling import SamplingOptions
from mixtral_jax.errors import INTERNAL, OK
from mixtral_jax.language_model import load
from mixtral_jax.model.transformer import Mixtral
from mixtral_jax.offload.executor import OffloadExecutor
from mixtral_jax.offload.load import Generating, least_of, offloaded
from mixtral_jax.weights import ExpertSlots, slots_of

QUESTIONS = (
    "What is the capital of France?",
    "Wie viel ist drei plus vier?",
    "¿Cuál es el plural de casa?",
    "Quel jour vient après lundi ?",
    "What is two plus five?",
    "Qual è la capitale d'Italia?",
    "What comes after Tuesday?",
    "Was ist die Hauptstadt von Spanien?",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Compares offloaded with resident experts."""

    model: str = "bench"
    """tiny (the embedded model), bench (0.79 G parameters), small, or a preset."""
    layers: int | None = None
    """Fewer than the model's, to fit."""
    dtype: str = "bfloat16"
    """Of weights and activations (tiny: always float32)."""
    quantize: str | None = None
    """Attention and experts in int8, int4, nf4, fp8 or fp4 (not tiny)."""
    shares: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    """Of the experts that the device has room for beside everything else; 0: for one."""
    batch: int = 1
    """Rows decoded at once."""
    context: int = 64
    """Prompt tokens before decoding (tiny: those of the questions)."""
    steps: int = 32
    """Tokens decoded per row and repeat."""
    rounds: int = 3
    """Repeats; the median counts."""
    no_prefetch: bool = False
    """Copy nothing ahead."""
    quick: bool = False
    """The small model and one round, plain and (unless --quantize says another) in int8."""
    json: bool = False
    """Print one JSON line instead of a table (with --quick two)."""


def models(options: Options) -> tuple[Mixtral, list[list[int]]]:
    """The resident model, and prompts."""
    if options.model == "tiny":
        lm = load("tiny", mesh="1x1")
        return lm.model, [lm.encode(text) for text in QUESTIONS[: options.batch]]
    config = _ours.config_of(options.model, options.layers)
    model = _ours.random_model(config, options.dtype, options.quantize)
    return model, _ours.random_prompts(config, options.batch, options.context).tolist()


def split(model: Mixtral, device: Any) -> dict[str, Any]:
    """The leaves of a resident model, its experts copied to the host's pinned memory."""
    host = SingleDeviceSharding(device, memory_kind=HOST)
    leaves = {}
    for path, param in nnx.to_flat_state(nnx.state(model)):
        name, leaf = ".".join(map(str, path)), param[...]
        if EXPERT_LEAF.fullmatch(name):
            slots = leaf if isinstance(leaf, ExpertSlots) else slots_of(leaf, 1)
            leaf = jax.device_put(slots, host)
        leaves[name] = leaf
    return leaves


def generate(
    executor: Executor, model: Mixtral, prompts: Sequence[Sequence[int]], steps: int
) -> tuple[float, float, list[list[int]]]:
    """Seconds of reading and of writing, and the tokens."""
    asked = SamplingOptions(max_new_tokens=steps, ignore_eos=True)
    requests = [Request(prompt_ids=tuple(ids), options=asked) for ids in prompts]
    run = Generation(model, requests, placement=_ours.here(), executor=executor)
    rows = _ours.tokens_of(run)
    return run.progress.prefill_seconds, run.progress.decode_seconds, rows


def measure(options: Options) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One row per share, and sizes in bytes."""
    model, prompts = models(options)
    device, placement = jax.devices()[0], _ours.here()
    _, first = offloaded(
        model.config, split(model, device), budget=2**60, placement=placement, device=device
    )
    parts, longest = first.parts, max(map(len, prompts))
    what = Generating(len(prompts), longest + options.steps, longest)
    least = least_of(first.compiler, what)
    resident = Resident(model, placement)
    rows = []
    for share in options.shares:
        room = max(1, round(share * parts.num_experts))
        executor = OffloadExecutor(
            parts,
            budget=least.total + (room - 1) * least.expert,
            placement=placement,
            device=device,
            prefetch=not options.no_prefetch,
            compiler=first.compiler,
        )
        sides: list[Executor] = [resident, executor]
        expected = generate(resident, model, prompts, options.steps)[2]
        is_same = generate(executor, model, prompts, options.steps)[2] == expected
        executor.clear()
        times: list[list[tuple[float, float]]] = [[], []]
        for _ in range(options.rounds):
            for side, found in zip(sides, times, strict=True):
                *seconds, tokens = generate(side, model, prompts, options.steps)
                is_same &= tokens == expected
                found.append((seconds[0], seconds[1]))
        rows.append(_row(options, executor, times, prompts) | {"same tokens": is_same})
        executor._experts.make_room(2**60)
        del executor
    total = parts.device_bytes + parts.num_experts * parts.expert_bytes
    sizes = {"model_bytes": total, "expert_bytes": parts.expert_bytes}
    return rows, sizes | {"num_experts": parts.num_experts, "least": dataclasses.asdict(least)}


def _row(
    options: Options,
    executor: OffloadExecutor,
    times: list[list[tuple[float, float]]],
    prompts: Sequence[Sequence[int]],
) -> dict[str, Any]:
    found, counts = executor.report(), executor.report().counts
    prefill, decode = (
        [statistics.median(each[part] for each in side) for side in times] for part in (0, 1)
    )
    written, read = len(prompts) * options.steps, sum(len(ids) - 1 for ids in prompts)
    return {
        "experts there": f"{found.resident_experts}/{found.num_experts}",
        "budget MB": round(found.budget / 1e6, 1),
        "peak MB": round(found.peak / 1e6, 1),
        "allocator MB": found.allocator_peak and round(found.allocator_peak / 1e6, 1),
        "hit rate": round(counts.hit_rate, 3),
        "prefetched": f"{counts.guessed}/{counts.prefetched}",
        "copied MB": round(counts.copied_bytes / 1e6, 1),
        "waiting": round(counts.waited / found.seconds, 3),
        "resident tok/s": round(written / decode[0], 2),
        "offloaded tok/s": round(written / decode[1], 2),
        "slow-down": round(decode[1] / decode[0], 2),
        "prefill slow-down": round(prefill[1] / prefill[0], 2) if read else None,
        "spread": spread([each[1] for each in times[1]]),
    }


def main(options: Options) -> int:
    """Runs and prints; fails if tokens differ or the ledger passed its budget."""
    cases = [options]
    if options.quick:
        quick = {"model": "small", "shares": (1.0, 0.3), "context": 8, "steps": 8, "rounds": 1}
        options = dataclasses.replace(options, **quick)
        schemes = (None, options.quantize or "int8")
        cases = [dataclasses.replace(options, quantize=scheme) for scheme in schemes]
    are_fine = []
    for case in cases:
        rows, sizes = measure(case)
        report(rows, is_json=case.json, **dataclasses.asdict(case), **sizes)
        are_fine += [row["same tokens"] and row["peak MB"] <= row["budget MB"] for row in rows]
    return OK if all(are_fine) else INTERNAL


if __name__ == "__main__":
    sys.exit(run_script(main, Options))
