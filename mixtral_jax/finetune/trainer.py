"""A model in training: what is frozen, what trains, and its updates on a mesh."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from mixtral_jax.convert.save import save_model
from mixtral_jax.errors import BAD_CONFIG, MixtralError
from mixtral_jax.finetune import step as steps
from mixtral_jax.finetune.data.batches import Batch
from mixtral_jax.finetune.lora import (
    first_pair,
    pair_shardings,
    refuse_dropout,
    scale_of,
    target_paths,
    with_trained,
)
from mixtral_jax.finetune.optimizer import make_optimizer, make_schedule
from mixtral_jax.finetune.options import TrainOptions
from mixtral_jax.finetune.peft_folder import write_adapter
from mixtral_jax.finetune.step import REFERENCE, Measures, Objective, Rows, TrainState
from mixtral_jax.json_file import read_json
from mixtral_jax.language_model import LanguageModel
from mixtral_jax.model.transformer import Mixtral, leaf_specs, leaves_of, with_window
from mixtral_jax.sharding.placement import MeshPlacement
from mixtral_jax.sharding.rules import partition_spec
from mixtral_jax.weights import Adapted, ExpertSlots, QTensor, Weight, stack_of

_AUX_COEF = 0.001  # of MixtralConfig in transformers


def num_rows(lm: LanguageModel, per_device: int) -> int:
    """Rows of one forward pass over all devices."""
    return per_device * lm.spec.data * lm.spec.expert


class Trainer:
    """Makes updates; see ``finetune/step.py`` for what they are.

    Args:
        lm: a loaded model on its mesh, quantized or not.
        options: method, what trains, losses, optimizer.
        total_steps: of the schedule.

    Attributes:
        state: trained weights, optimizer, step; may be set to one of the same shapes (a restored
            one).

    Raises:
        MixtralError: exit codes 64 and 78 for options that do not fit the model or the mesh.
    """

    def __init__(self, lm: LanguageModel, options: TrainOptions, *, total_steps: int):
        assert isinstance(lm.placement, MeshPlacement)
        strategy = dataclasses.replace(lm.placement.strategy, fsdp=options.fsdp)
        strategy.check(lm.config, lm.spec)
        self.lm, self.options = lm, options
        self._placement = dataclasses.replace(lm.placement, strategy=strategy, min_rows=1)
        self._specs = leaf_specs(lm.config)
        self._check_rows()
        leaves = leaves_of(lm.model)
        self._scale = scale_of(options.lora_r, options.lora_alpha, is_stabilized=options.use_rslora)
        whole, paired = self._targets()
        refuse_dropout(paired, options.lora_dropout)
        for path in whole:
            _refuse_unless_plain(path, leaves[path])
        self.frozen: dict[str, Weight] = {p: w for p, w in leaves.items() if p not in whole}
        self.optimizer = make_optimizer(options, total_steps)
        self.schedule = make_schedule(options, total_steps)
        self._shardings = self._trained_shardings(whole, paired)
        dtype = leaves["embed_tokens"].dtype
        if options.method == "dpo":
            self.frozen |= {REFERENCE + p: _stacked(leaves[p]) for p in whole}
        self.objective = Objective(
            config=with_window(lm.config, options.max_length),
            placement=self._placement,
            is_dpo=options.method == "dpo",
            scale=self._scale,
            dropout=options.lora_dropout if paired else 0.0,
            dtype=dtype,
            remat=options.gradient_checkpointing,
            aux_coef=self._aux_coef(),
            aux_loss=options.aux_loss,
            z_coef=options.router_z_loss_coef,
            beta=options.dpo_beta,
            label_smoothing=options.label_smoothing,
        )
        self._key = jax.random.key(options.seed)
        self.state = self._first_state({p: leaves[p] for p in whole}, paired)

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
            scale=self._scale,
            dtype=self.objective.dtype,
        )

    def frozen_digest(self) -> str:
        """Of all frozen weights of this process, to prove that training left them alone."""
        digest = hashlib.sha256()
        for path in sorted(self.frozen):
            for leaf in jax.tree.leaves(self.frozen[path]):
                for shard in leaf.addressable_shards:
                    digest.update(np.ascontiguousarray(shard.data).tobytes())
        return digest.hexdigest()

    def save_adapter(self, folder: Path) -> None:
        """Writes the factors as a PEFT folder.

        Raises:
            MixtralError: exit code 78 where nothing trains by factors.
        """
        write_adapter(folder, self.lm, self.options, self.state.trained)

    def save_model(self, folder: Path, note: Callable[[str], None] = lambda line: None) -> None:
        """Writes all weights as a folder of ours (full training), as ``LanguageModel.save``."""
        save_model(self.model(), folder, companions=self.lm.folder, note=note)

    def _check_rows(self) -> None:
        rows = num_rows(self.lm, self.options.per_device_train_batch_size)
        if self.options.method == "dpo" and rows % 2:
            raise MixtralError(
                "--per-device-train-batch-size",
                expected="an even number of rows over all devices, for pairs",
                got=rows,
                code=BAD_CONFIG,
            )

    def _aux_coef(self) -> float:
        """As asked, or as the checkpoint's config has it (0.02 in the published ones)."""
        asked = self.options.router_aux_loss_coef
        if asked is not None:
            return asked
        file = None if self.lm.folder is None else self.lm.folder / "config.json"
        fields = {} if file is None or not file.exists() else read_json(file)
        return float(fields.get("router_aux_loss_coef", _AUX_COEF))

    def _targets(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Leaves that train whole, and those that train by factors."""
        if self.options.use_peft:
            return (), target_paths(self.lm.config, self.options.lora_target_modules)
        is_router = "moe.router.weight"
        trains_router = not self.options.freeze_router
        return tuple(p for p in self._specs if trains_router or not p.endswith(is_router)), ()

    def _spec_of(self, path: str) -> PartitionSpec:
        return partition_spec(self._specs[path].axes, self._placement.strategy.rest_rules())

    def _trained_shardings(self, whole: tuple[str, ...], paired: tuple[str, ...]) -> dict[str, Any]:
        mesh = self._placement.mesh
        shardings: dict[str, Any] = {p: NamedSharding(mesh, self._spec_of(p)) for p in whole}
        return shardings | {p: pair_shardings(self._spec_of(p), mesh) for p in paired}

    def _first_state(self, whole: dict[str, Any], paired: tuple[str, ...]) -> TrainState:
        rank, seed = self.options.lora_r, self.options.seed
        specs = {path: self._specs[path] for path in paired}

        def make(whole: dict[str, Any]) -> TrainState:
            trained: dict[str, Any] = {
                path: _stacked(leaf).astype(jnp.float32) for path, leaf in whole.items()
            }
            trained |= {p: first_pair(spec, p, rank, seed) for p, spec in specs.items()}
            return TrainState(trained, self.optimizer.init(trained), jnp.int32(0))

        shapes = jax.eval_shape(make, whole)
        everywhere = NamedSharding(self._placement.mesh, PartitionSpec())
        shardings = TrainState(
            self._shardings,
            _like_trained(self.optimizer, shapes.optimizer, self._shardings, everywhere),
            everywhere,
        )
        return jax.jit(make, out_shardings=shardings)(whole)

    def _placed(self, batch: Batch) -> Rows:
        """Every device brings its own rows, whatever shares them later."""
        order = np.arange(batch.tokens.shape[1])
        if self.objective.is_dpo:  # chosen and rejected by turns, whatever process has them
            order = order.reshape(2, -1).T.ravel()
        rows = PartitionSpec(None, ("data", "expert"))
        sharding = NamedSharding(self._placement.mesh, rows)
        return Rows(
            *(
                jax.make_array_from_process_local_data(sharding, np.asarray(x)[:, order])
                for x in batch
            )
        )


def _like_trained(
    optimizer: optax.GradientTransformation, state: Any, shardings: Any, otherwise: Any
) -> Any:
    """Shardings of an optimizer's state: moments lie with their weights."""
    return optax.tree.map_params(
        optimizer,
        lambda leaf, sharding: sharding if leaf.ndim == len(sharding.spec) else otherwise,
        state,
        shardings,
        transform_non_params=lambda leaf: otherwise,
    )


def _stacked(w: Any) -> jax.Array:
    return stack_of(w) if isinstance(w, ExpertSlots) else w


def _refuse_unless_plain(path: str, leaf: Any) -> None:
    parts = leaf.slots if isinstance(leaf, ExpertSlots) else (leaf,)
    if any(isinstance(part, QTensor | Adapted) for part in parts):
        raise MixtralError(
            f"{path} is quantized or adapted",
            expected="a plain weight, as it trains whole",
            fix="--use-peft, or load the checkpoint without --quantize",
            code=BAD_CONFIG,
        )
