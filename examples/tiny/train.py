"""Trains the embedded model: ``python -m examples.tiny.train`` (two cores, under an hour).

A plain optax loop. The text is fresh for ever (text.py), so there are no epochs; the same seed
gives the same text, the same first weights and, on the same machine, the same model.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import queue
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import Progress, TextColumn

from examples.tiny import save
from examples.tiny.placement import PackedPlacement
from examples.tiny.score import MISSED, score
from examples.tiny.score import Options as ScoreOptions
from examples.tiny.text import documents, held_out
from examples.tiny.tokens import Batch, Packer, encode, make_tokenizer
from mixtral_jax import cli
from mixtral_jax.config import PRESETS, ModelConfig
from mixtral_jax.errors import BAD_CONFIG, OK, MixtralError
from mixtral_jax.language_model import EMBEDDED_FOLDER, LanguageModel, load
from mixtral_jax.model.placement import LOCAL
from mixtral_jax.model.transformer import Mixtral, assemble
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.tokenizer import Tokenizer

RESULTS = Path(__file__).parent / "results"
TOKENS = 4096  # of an update
SHAPES = tuple((TOKENS // length, length) for length in (64, 128, 256, 2048))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Trains a small Mixtral on procedural text."""

    output: Path = EMBEDDED_FOLDER
    """A folder for the model."""
    record: Path | None = None
    """A folder for the training curve and the score; beside the model, if None."""
    seed: int = 0
    """Of the text and of the first weights."""
    steps: int = 2500
    """Updates, of 4,096 tokens each."""
    learning_rate: float = 4e-3
    """After the warm-up; constant for half of the steps, then linear to zero."""
    warmup_steps: int = 50
    weight_decay: float = 0.1
    """Of the matrices that Muon updates."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    balance: float = 0.02
    """Weight of the load-balancing loss."""
    capacity_factor: float = 1.25
    """Rows of each expert while training, as a multiple of a balanced load."""
    log_every: int = 50
    """Steps between two points of the curve."""
    debug: bool = False
    """Show tracebacks."""


def initial_weights(config: ModelConfig, seed: int) -> dict[str, jax.Array]:
    """Gaussian matrices of standard deviation D^-0.5; residual outputs and routers smaller."""
    wide = dataclasses.replace(config, initializer_range=config.hidden_size**-0.5)
    state = nnx.state(Mixtral(wide, jax.random.key(seed), dtype=jnp.float32))
    leaves = {".".join(map(str, p)): x.get_value() for p, x in nnx.to_flat_state(state)}
    residual = (2 * config.num_hidden_layers) ** -0.5
    for name, leaf in leaves.items():
        if name.endswith(("o_proj", "experts.down")):
            leaves[name] = leaf * residual
        elif name.endswith("router.weight"):
            leaves[name] = leaf * (0.02 / wide.initializer_range)
    return leaves


class Measures(NamedTuple):
    """Of one batch. ``loads`` is the share of each layer's assignments that each expert got."""

    loss: jax.Array
    accuracy: jax.Array
    dropped: jax.Array
    loads: jax.Array  # [L, E]


def loss_of(
    leaves: dict[str, jax.Array], batch: Batch, *, config: ModelConfig, options: Options
) -> tuple[jax.Array, Measures]:
    """Weighted cross-entropy of the scored tokens, and the load-balancing loss of each layer."""
    model = assemble(config, leaves)
    placement = PackedPlacement(batch.segments, options.capacity_factor)
    valid = batch.segments > 0
    hidden = model.hidden(batch.tokens, valid, placement=placement)
    logits = model.unembed(hidden.x.reshape(-1, config.hidden_size)[batch.positions], placement)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    loss = (losses * batch.weights).sum() / batch.weights.sum()
    E, A = config.num_local_experts, config.num_experts_per_tok
    counted = valid.reshape(-1, 1) / valid.sum()
    loads = jnp.stack(
        [
            (jax.nn.one_hot(r.expert_ids, E).sum(axis=1) * counted).sum(axis=0) / A
            for r in hidden.routing
        ]
    )
    means = [(jax.nn.softmax(x) * counted).sum(axis=0) for x in hidden.router_logits]
    is_answer = batch.weights == 1
    right = (logits.argmax(axis=-1) == batch.targets) & is_answer
    accuracy = right.sum() / jnp.maximum(is_answer.sum(), 1)
    measures = Measures(loss, accuracy, hidden.dropped.sum(), loads)
    return loss + options.balance * unbalance(loads, jnp.stack(means)), measures


def unbalance(loads: jax.Array, means: jax.Array) -> jax.Array:
    """E * sum of load x mean probability, as Switch Transformer (arXiv 2101.03961).

    Args:
        loads: ``[L, E]``, each expert's share of the assignments of its layer.
        means: ``[L, E]``, each expert's mean probability under the router.

    Returns:
        The mean over layers: 1 where all is even, E where one expert has everything.
    """
    return loads.shape[1] * (loads * means).sum(axis=1).mean()


def is_matrix(name: str) -> bool:
    """What Muon updates: attention and experts; AdamW takes the rest."""
    return name.endswith("_proj") or ".experts." in name


def make_optimizer(options: Options) -> optax.GradientTransformation:
    """Muon (Jordan 2024; scaled as in arXiv 2502.16982) and AdamW, one schedule for both."""
    half = options.steps // 2
    warmup = min(options.warmup_steps, half)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, options.learning_rate, warmup),
            optax.constant_schedule(options.learning_rate),
            optax.linear_schedule(options.learning_rate, 0.0, options.steps - half),
        ],
        [warmup, half],
    )

    def dims(params: Any) -> Any:
        # [out, in], or [E, out, in].
        return {
            name: optax.contrib.MuonDimensionNumbers(x.ndim - 1, x.ndim - 2)
            if is_matrix(name)
            else None
            for name, x in params.items()
        }

    muon = optax.contrib.muon(
        schedule,
        weight_decay=options.weight_decay,
        adam_b2=0.95,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=dims,
    )
    return optax.chain(optax.clip_by_global_norm(options.clip), muon)


class Trainer:
    """One jitted update over all devices: rows and experts' momenta split, weights whole."""

    def __init__(self, config: ModelConfig, options: Options):
        self.mesh = jax.make_mesh(
            (jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
        )
        self.whole = NamedSharding(self.mesh, PartitionSpec())
        self.split = NamedSharding(self.mesh, PartitionSpec("data"))
        self.optimizer = make_optimizer(options)
        self.leaves = jax.device_put(initial_weights(config, options.seed), self.whole)
        self.state = self.optimizer.init(self.leaves)
        gradient = jax.grad(
            functools.partial(loss_of, config=config, options=options), has_aux=True
        )

        def of_device(leaves: Any, batch: Batch) -> Any:
            """Each device holds all weights and its own rows; gradients are averaged."""
            local = jax.tree.map(lambda x: jax.lax.pcast(x, "data", to="varying"), leaves)
            return jax.lax.pmean(gradient(local, Batch(*(x[0] for x in batch))), "data")

        self.gradients = jax.shard_map(
            of_device,
            mesh=self.mesh,
            in_specs=(PartitionSpec(), PartitionSpec("data")),
            out_specs=PartitionSpec(),
        )

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def update(leaves: Any, state: Any, batch: Batch) -> Any:
            gradients, measures = self.gradients(leaves, batch)
            # Each device orthogonalises its own experts.
            updates, state = self.optimizer.update(self._placed(gradients), state, leaves)
            leaves = optax.apply_updates(leaves, self._placed(updates))
            return jax.lax.with_sharding_constraint(leaves, self.whole), state, measures

        self._update = update

    def _placed(self, leaves: Any) -> Any:
        return {
            name: jax.lax.with_sharding_constraint(
                x, self.split if ".experts." in name else self.whole
            )
            for name, x in leaves.items()
        }

    def step(self, batches: Batch) -> Measures:
        """One update from ``[devices, ...]`` batches."""
        batches = jax.device_put(batches, self.split)
        self.leaves, self.state, measures = self._update(self.leaves, self.state, batches)
        return measures


def batches(options: Options, tokenizer: Tokenizer) -> Iterator[Batch]:
    """Stacked batches, one for each device, made by a thread of its own."""
    devices = jax.device_count()
    if any(rows % devices for rows, _ in SHAPES):
        least = min(rows for rows, _ in SHAPES)
        got = f"{devices} devices"
        raise MixtralError("training", expected=f"a divisor of {least}", got=got, code=BAD_CONFIG)
    shapes = [(rows // devices, length) for rows, length in SHAPES]
    encoded = (encode(document, tokenizer) for document in documents(options.seed))
    packer = Packer(encoded, shapes, seed=options.seed)
    made: queue.Queue[Batch | Exception] = queue.Queue(maxsize=8)

    def make() -> None:
        try:
            for _ in range(options.steps):
                columns = zip(*packer.batches(devices), strict=True)
                made.put(Batch(*(np.stack(column) for column in columns)))
        except Exception as error:
            made.put(error)

    threading.Thread(target=make, daemon=True).start()
    for _ in range(options.steps):
        batch = made.get()
        if isinstance(batch, Exception):
            raise batch
        yield batch


def main(options: Options) -> int:
    """Trains, writes the folder, and scores it; exit code 1 if a target is missed."""
    config = PRESETS["tiny"]
    model = make_tokenizer()
    tokenizer = Tokenizer(model)
    trainer = Trainer(config, options)
    curve, recent = [], []
    began = time.perf_counter()
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[said]}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("training", total=options.steps, said="")
        for step, batch in enumerate(batches(options, tokenizer), start=1):
            recent.append(trainer.step(batch))
            if step % options.log_every == 0 or step == options.steps:
                curve.append(point(step, time.perf_counter() - began, recent))
                recent = []
                said = f"loss {curve[-1]['loss']:.3f}, answers {curve[-1]['token_accuracy']:.1%}"
                progress.update(task, said=said)
                if not progress.console.is_terminal:
                    print(json.dumps(curve[-1]), file=sys.stderr, flush=True)
            progress.advance(task)
    leaves = jax.device_get(trainer.leaves)
    folder = options.record or (RESULTS if options.output == EMBEDDED_FOLDER else options.output)
    save.model(options.output, config, leaves, model)
    save.record(folder / "curve.json", {"curve": curve}, options)
    scores = score_all(assemble(config, jax.device_put(leaves)), tokenizer, options.output)
    digest = hashlib.sha256((options.output / "model.safetensors").read_bytes()).hexdigest()
    save.record(folder / "score.json", {"sha256": digest, "scores": scores}, options)
    return OK if all(found["is_enough"] for found in scores.values()) else MISSED


def score_all(model: Mixtral, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Exact answers of the weights as trained, and of the folder in two dtypes."""
    lm = LanguageModel(model, tokenizer=tokenizer, placement=LOCAL, spec=MeshSpec.parse("1x1"))
    models = {"trained, float32": lambda: lm}
    for dtype in ("float32", "bfloat16"):
        models[f"stored, {dtype}"] = functools.partial(load, folder, mesh="1x1", dtype=dtype)
    asked = held_out(ScoreOptions.per_family, seed=ScoreOptions.seed)
    return {name: score(make(), asked).record() for name, make in models.items()}


def point(step: int, seconds: float, recent: list[Measures]) -> dict[str, Any]:
    """One point of the curve: means since the one before."""
    measures = jax.device_get(recent)
    if not all(np.isfinite(m.loss) for m in measures):
        raise FloatingPointError(f"the loss is not finite before step {step}: lower learning_rate")
    mean = {name: np.mean([getattr(m, name) for m in measures]) for name in ("loss", "accuracy")}
    config = PRESETS["tiny"]
    assignments = TOKENS * config.num_hidden_layers * config.num_experts_per_tok
    dropped = np.mean([m.dropped for m in measures]) * jax.device_count() / assignments
    loads = np.mean([m.loads for m in measures], axis=0)
    return {
        "step": step,
        "seconds": round(seconds, 1),
        "loss": round(float(mean["loss"]), 4),
        "token_accuracy": round(float(mean["accuracy"]), 4),
        "dropped": round(float(dropped), 4),
        "least_expert_load": round(float(loads.min()), 4),
    }


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)  # says nothing to a GPU
    sys.exit(cli.run(main, Options, "python -m examples.tiny.train"))
