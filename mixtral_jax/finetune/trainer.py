"""A model in training: what is frozen, what trains, and its updates on a mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from mixtral_jax.convert.save import save_model
from mixtral_jax.errors import BAD_CONFIG, MixtralError
from mixtral_jax.finetune import step as steps
from mixtral_jax.finetune.data.batches import Batch
from mixtral_jax.finetune.lora import Pair, first_pair, with_trained
from mixtral_jax.finetune.optimizer import make_optimizer, make_schedule
from mixtral_jax.finetune.options import TrainOptions
from mixtral_jax.finetune.peft_folder import write_adapter
from mixtral_jax.finetune.rows import row_sharding
from mixtral_jax.finetune.step import REFERENCE, Measures, Rows, TrainState
from mixtral_jax.finetune.trained import (
    abstract_state,
    objective_of,
    published_coef,
    shardings_of,
    targets_of,
)
from mixtral_jax.language_model import LanguageModel
from mixtral_jax.model.transformer import Mixtral, leaf_specs, leaves_of
from mixtral_jax.sharding.placement import MeshPlacement
from mixtral_jax.weights import Adapted, ExpertSlots, QTensor, Weight, stack_of


class Trainer:
    """Makes updates; see ``finetune/step.py`` for what they are.

    Args:
        lm: a loaded model on its mesh, quantized or not. Weights that train whole are taken out of
            it: their arrays are deleted when a copy in f32 is in their place, so that it cannot run
            any more.
        options: method, what trains, losses, optimizer.
        total_steps: of the schedule.
        start: factors to begin with, by path, of another run (continued.py); new ones otherwise.

    Attributes:
        state: trained weights, optimizer, step; may be set to one of the same shapes (a restored
            one).

    Raises:
        MixtralError: exit code 78 for options that do not fit the model or the mesh.
    """

    def __init__(
        self,
        lm: LanguageModel,
        options: TrainOptions,
        *,
        total_steps: int,
        start: Mapping[str, Pair] | None = None,
    ):
        assert isinstance(lm.placement, MeshPlacement)
        strategy = dataclasses.replace(lm.placement.strategy, fsdp=options.fsdp)
        strategy.check(lm.config, lm.spec)
        self.lm, self.options = lm, options
        self._placement = dataclasses.replace(lm.placement, strategy=strategy, min_rows=1)
        self._specs = leaf_specs(lm.config)
        leaves = leaves_of(lm.model)
        whole, paired = targets_of(lm.config, options)
        for path, leaf in leaves.items():
            _check_leaf(path, leaf, trains_whole=path in whole)
        self.frozen: dict[str, Weight] = {p: w for p, w in leaves.items() if p not in whole}
        self.optimizer = make_optimizer(options, total_steps)
        self.schedule = make_schedule(options, total_steps)
        self.objective = objective_of(
            lm.config,
            options,
            self._placement,
            dtype=leaves["embed_tokens"].dtype,
            aux_coef=self._aux_coef(),
        )
        self._key = jax.random.key(options.seed)
        self.state = self._first_state({p: leaves.pop(p) for p in whole}, paired, start)

    @property
    def abstract(self) -> TrainState:
        """Shapes, dtypes and shardings of ``state``, to restore one into."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.state
        )

    @property
    def num_trained(self) -> int:
        """Numbers that train."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.state.trained))

    def step(self, batch: Batch) -> Measures:
        """One update; returns at once with arrays that are still being computed."""
        self.state, measures = steps.update(
            self.state,
            self.frozen,
            self._placed(batch),
            self._key,
            objective=self.objective,
            optimizer=self.optimizer,
            schedule=self.schedule,
        )
        return measures

    def evaluate(self, batch: Batch) -> Measures:
        """What a batch gives under the weights of now."""
        return steps.evaluate(
            self.state.trained, self.frozen, self._placed(batch), objective=self.objective
        )

    def model(self) -> Mixtral:
        """The model as it is now, to sample from; trained leaves in the model's dtype."""
        frozen = {p: w for p, w in self.frozen.items() if not p.startswith(REFERENCE)}
        return with_trained(
            self.lm.config,
            frozen,
            self.state.trained,
            scale=self.objective.scale,
            dtype=self.objective.dtype,
        )

    def save_adapter(self, folder: Path, base: str | None = None) -> None:
        """Writes the factors as a PEFT folder; ``base`` is what its readers may load the base by.

        Raises:
            MixtralError: exit code 78 where nothing trains by factors.
        """
        write_adapter(folder, self.lm, self.options, self.state.trained, base=base)

    def save_model(self, folder: Path, note: Callable[[str], None] = lambda line: None) -> None:
        """Writes all weights as a folder of ours (full training), as ``LanguageModel.save``."""
        save_model(self.model(), folder, companions=self.lm.folder, note=note)

    def _aux_coef(self) -> float:
        """As asked, or as the checkpoint's config has it."""
        asked = self.options.router_aux_loss_coef
        return asked if asked is not None else published_coef(self.lm.config, self.lm.folder)

    def _first_state(
        self, whole: dict[str, Weight], paired: tuple[str, ...], start: Mapping[str, Pair] | None
    ) -> TrainState:
        config, rank, seed = self.lm.config, self.options.lora_r, self.options.seed
        lie = shardings_of(abstract_state(config, self.options, self.optimizer, self._placement))
        make_pairs = jax.jit(
            lambda: {path: first_pair(self._specs[path], path, rank, seed) for path in paired},
            out_shardings={path: lie.trained[path] for path in paired},
        )
        trained: dict[str, Any] = {p: self._taken(p, w, lie.trained[p]) for p, w in whole.items()}
        trained |= make_pairs() if start is None else _placed_pairs(start, lie.trained)
        if start is not None and self.options.method == "dpo":
            copies = _placed_pairs(start, lie.trained)
            self.frozen |= {REFERENCE + path: cast(Any, pair) for path, pair in copies.items()}
        begin = jax.jit(
            lambda trained: (self.optimizer.init(trained), jnp.int32(0)),
            out_shardings=(lie.optimizer, lie.step),
        )
        return TrainState(trained, *begin(trained))

    def _taken(self, path: str, loaded: Any, own: NamedSharding) -> jax.Array:
        """What trains in place of a loaded weight, whose memory is free after this.

        DPO keeps the loaded numbers in their dtype, placed as what trains is.
        """
        trained = jax.jit(_in_f32, out_shardings=own)(loaded)
        if self.options.method == "dpo":
            self.frozen[REFERENCE + path] = jax.jit(_stacked, out_shardings=own)(loaded)
        jax.block_until_ready(trained)  # of another dtype, a weight cannot be donated
        for part in jax.tree.leaves(loaded):
            part.delete()
        return trained

    def _placed(self, batch: Batch) -> Rows:
        """Every process brings the rows of its devices (rows.py), whatever shares them later."""
        order = np.arange(batch.tokens.shape[1])
        if self.objective.is_dpo:  # chosen and rejected by turns, whatever process has them
            order = order.reshape(2, -1).T.ravel()
        sharding = row_sharding(self._placement.mesh)
        return Rows(
            *(
                jax.make_array_from_process_local_data(sharding, np.asarray(x)[:, order])
                for x in batch
            )
        )


def _placed_pairs(pairs: Mapping[str, Pair], lie: Mapping[str, Any]) -> dict[str, Pair]:
    def place(value: Any, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return {path: Pair(*map(place, pair, lie[path])) for path, pair in pairs.items()}


def _stacked(w: Any) -> jax.Array:
    return stack_of(w) if isinstance(w, ExpertSlots) else w


def _in_f32(w: Any) -> jax.Array:
    return _stacked(w).astype(jnp.float32)


def _has(kind: type, leaf: Any) -> bool:
    """Whether a leaf, or a slot of it, is of this kind of weight."""
    parts = leaf.slots if isinstance(leaf, ExpertSlots) else (leaf,)
    return any(isinstance(part, kind) for part in parts)


def _check_leaf(path: str, leaf: Any, *, trains_whole: bool) -> None:
    if _has(Adapted, leaf):
        raise MixtralError(
            f"{path} has an adapter, which no result would hold",
            fix="load the model without it, and begin with its factors (Trainer(start=...))",
            code=BAD_CONFIG,
        )
    if trains_whole and _has(QTensor, leaf):
        raise MixtralError(
            f"{path} is quantized",
            expected="a plain weight, as it trains whole",
            fix="--use-peft, or load the checkpoint without --quantize",
            code=BAD_CONFIG,
        )
