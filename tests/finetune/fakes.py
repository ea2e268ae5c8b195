"""A trainer and batches in small: least squares by Adam, on numbers that follow from a count."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mixtral_jax.errors import BAD_DATA, MixtralError
from mixtral_jax.finetune.checkpoints import Checkpoints
from mixtral_jax.finetune.data.batches import Batches
from mixtral_jax.finetune.loop import Loop
from mixtral_jax.finetune.metrics import NAME, TIMES, read_lines
from mixtral_jax.finetune.options import RunOptions
from mixtral_jax.finetune.stop import Stop

SIZE, LAYERS, EXPERTS = 8, 2, 4
STEPS = 40
ADAM = optax.scale_by_adam()


class Batch(NamedTuple):
    tokens: np.ndarray
    segments: np.ndarray


class State(NamedTuple):
    trained: Any
    optimizer: Any
    step: Any


class Measures(NamedTuple):
    loss: Any
    tokens: Any
    accuracy: Any
    aux_loss: Any
    z_loss: Any
    grad_norm: Any
    learning_rate: Any
    dropped: Any
    load: Any
    entropy: Any
    pairs: Any
    margin: Any
    reward_accuracy: Any


class FakeBatches:
    """Random numbers by count; ``watch`` is called with how many were taken before each."""

    def __init__(self, data: str = "these", watch: Callable[[int], None] = lambda taken: None):
        self.taken, self.data, self.watch, self.num_tokens = 0, data, watch, 0

    @property
    def epoch(self) -> float:
        return self.taken / 16

    def __next__(self) -> Batch:
        self.watch(self.taken)
        batch = make_batch(self.taken)
        self.num_tokens = int(np.count_nonzero(batch.segments))
        self.taken += 1
        return batch

    def state(self) -> dict[str, Any]:
        return {"taken": self.taken, "data": self.data}

    def restore(self, state: Mapping[str, Any]) -> None:
        if state["data"] != self.data:
            raise MixtralError("other data", code=BAD_DATA)
        self.taken = state["taken"]

    def once(self) -> Iterator[Batch]:
        yield from map(make_batch, (1000, 1001))

    def describe(self, state: Mapping[str, Any]) -> str:
        return f"batch {state['taken']}"


def make_batch(n: int) -> Batch:
    draw = np.random.default_rng(n)
    tokens = draw.integers(1, 100, (1, 4, SIZE)).astype(np.int32)
    return Batch(tokens, (tokens > n % 7).astype(np.int32))


def _loss(trained: Any, tokens: jax.Array, noise: Any) -> jax.Array:
    x = tokens[0] / 100 + noise
    return jnp.mean((x @ trained["w"] + trained["b"] - x[:, ::-1]) ** 2)


def _measures(loss: Any, tokens: jax.Array, norm: Any, rate: Any) -> Measures:
    x = jnp.float32(tokens).mean() / 100
    layers = jnp.arange(LAYERS, dtype=jnp.float32) * x
    return Measures(
        loss=loss,
        tokens=jnp.float32((tokens > 50).sum()),
        accuracy=x,
        aux_loss=1 + x,
        z_loss=x * x,
        grad_norm=norm,
        learning_rate=rate,
        dropped=jnp.int32(layers * 10),
        load=jnp.ones((LAYERS, EXPERTS)) / EXPERTS * x,
        entropy=layers,
        pairs=x,
        margin=x,
        reward_accuracy=x,
    )


@functools.partial(jax.jit, donate_argnums=0)
def update(state: State, tokens: jax.Array, total: jax.Array) -> tuple[State, Measures]:
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(3), state.step), (SIZE,)) / 100
    loss, gradient = jax.value_and_grad(_loss)(state.trained, tokens, noise)
    rate = 0.05 * (1 - state.step / total)
    updates, optimizer = ADAM.update(gradient, state.optimizer)
    trained = jax.tree.map(lambda p, u: p - rate * u, state.trained, updates)
    measures = _measures(loss, tokens, optax.tree.norm(gradient), rate)
    return State(trained, optimizer, state.step + 1), measures


@jax.jit
def evaluate(trained: Any, tokens: jax.Array) -> Measures:
    zero = jnp.float32(0)
    return _measures(_loss(trained, tokens, zero), tokens, zero, zero)


class FakeTrainer:
    """Least squares; ``nan_at`` is a step whose gradient is lost."""

    def __init__(
        self, total_steps: int = STEPS, *, nan_at: int | None = None, sharding: Any = None
    ):
        self.total = np.float32(total_steps)
        self.num_steps, self.nan_at = 0, nan_at
        self.state = first_state(sharding)

    @property
    def abstract(self) -> State:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.state
        )

    def step(self, batch: Batch) -> Measures:
        self.state, measures = update(self.state, batch.tokens, self.total)
        self.num_steps += 1
        if self.num_steps == self.nan_at:
            measures = measures._replace(grad_norm=jnp.float32(np.nan))
        return measures

    def evaluate(self, batch: Batch) -> Measures:
        return evaluate(self.state.trained, batch.tokens)


def first_state(sharding: Any = None) -> State:
    draw = np.random.default_rng(7)
    trained = {
        "w": jnp.asarray(draw.standard_normal((SIZE, SIZE)), jnp.float32),
        "b": jnp.zeros((SIZE,), jnp.float32),
    }
    state = State(trained, ADAM.init(trained), jnp.int32(0))
    if sharding is None:
        return state
    return jax.tree.map(lambda x: jax.device_put(x, sharding(x)), state)


RUN = RunOptions(save_steps=10, logging_steps=3, eval_steps=10, report_to="jsonl")


def loop(folder: Path, **given: Any) -> Loop:
    """A loop in small, with any of its parts given."""
    folder.mkdir(exist_ok=True)
    batches = given.setdefault("batches", FakeBatches())
    total = given.setdefault("total_steps", STEPS)
    run = given.setdefault("run", RUN)
    note = given.setdefault("note", lambda line: None)
    given.setdefault("trainer", FakeTrainer(total))
    given.setdefault("evaluation", batches.once)
    limit = run.save_total_limit
    checkpoints = Checkpoints(folder, limit=limit, note=note)
    parts = {"checkpoints": checkpoints, "stop": Stop(), "bound": {"--learning-rate": "0.05"}}
    return Loop(**{**parts, **given})


def stopping(after: int, stop: Stop) -> FakeBatches:
    """Batches that ask a loop to stop when so many steps are done."""

    def watch(taken: int) -> None:
        stop.asked = stop.asked or taken >= after

    return FakeBatches(watch=watch)


def arrays(state: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def assert_same(one: Any, other: Any) -> None:
    """Bit for bit."""
    for a, b in zip(arrays(one), arrays(other), strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


@contextlib.contextmanager
def signalled_at_step_three() -> Iterator[None]:
    """While the third step is made, this process gets a SIGTERM."""
    take, taken = Batches.__next__, []

    def watched(self):
        taken.append(1)
        if len(taken) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "__next__", watched)
        yield


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of the log, but for times."""
    lines = read_lines(folder / NAME)
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def num_steps(one: Loop) -> int:
    """Steps that a loop made itself."""
    assert isinstance(one.trainer, FakeTrainer)
    return one.trainer.num_steps
