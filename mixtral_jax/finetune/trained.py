"""What trains, where it lies on a mesh, and the state of a run as shapes.

The trainer fills these shapes, and ``python -m mixtral_jax.plan --train`` bills them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from mixtral_jax.config import CONFIG_NAME, PRESETS, ModelConfig
from mixtral_jax.finetune.lora import Pair, pair_shapes, pair_shardings, scale_of, target_paths
from mixtral_jax.finetune.optimizer import state_shardings
from mixtral_jax.finetune.options import TrainOptions
from mixtral_jax.finetune.step import Objective, TrainState
from mixtral_jax.json_file import read_json
from mixtral_jax.model.transformer import leaf_specs, with_window
from mixtral_jax.sharding.placement import MeshPlacement
from mixtral_jax.sharding.rules import partition_spec

_ROUTER = "moe.router.weight"
# Of the load-balancing loss: in the config of 8x7B as published; of 8x22B and of MixtralConfig.
_AUX_COEF_8X7B, _AUX_COEF = 0.02, 0.001


class Targets(NamedTuple):
    """Paths of leaves that train whole, and of those that train by factors."""

    whole: tuple[str, ...]
    paired: tuple[str, ...]


def targets_of(config: ModelConfig, options: TrainOptions) -> Targets:
    """What the options train."""
    if options.use_peft:
        return Targets((), target_paths(config, options.lora_target_modules))
    paths = leaf_specs(config)
    return Targets(
        tuple(p for p in paths if not (options.freeze_router and p.endswith(_ROUTER))), ()
    )


def trained_shardings(
    config: ModelConfig, targets: Targets, placement: MeshPlacement
) -> dict[str, Any]:
    """Where trained arrays and Pairs lie, by path."""
    mesh, rules, specs = placement.mesh, placement.strategy.rest_rules(), leaf_specs(config)
    spec_of = {path: partition_spec(specs[path].axes, rules) for paths in targets for path in paths}
    shardings: dict[str, Any] = {p: NamedSharding(mesh, spec_of[p]) for p in targets.whole}
    return shardings | {p: pair_shardings(spec_of[p], mesh) for p in targets.paired}


def abstract_state(
    config: ModelConfig,
    options: TrainOptions,
    optimizer: optax.GradientTransformation,
    placement: MeshPlacement,
) -> TrainState:
    """The state of a run: ShapeDtypeStructs with shardings."""
    targets, specs = targets_of(config, options), leaf_specs(config)
    shardings = trained_shardings(config, targets, placement)
    shapes: dict[str, Any] = {path: specs[path].shape for path in targets.whole}
    shapes |= {path: pair_shapes(specs[path], options.lora_r) for path in targets.paired}

    def placed(shape: Any, sharding: Any) -> Any:
        if isinstance(shape, Pair):
            return Pair(*map(placed, shape, sharding))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    trained = {path: placed(shape, shardings[path]) for path, shape in shapes.items()}
    everywhere = NamedSharding(placement.mesh, PartitionSpec())
    moments = jax.eval_shape(optimizer.init, trained)
    lie = state_shardings(moments, trained, everywhere)
    return TrainState(
        trained,
        jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            moments,
            lie,
        ),
        jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
    )


def objective_of(
    config: ModelConfig,
    options: TrainOptions,
    placement: MeshPlacement,
    *,
    dtype: Any,
    aux_coef: float,
) -> Objective:
    """What is static in the updates that the options ask for.

    Args:
        config: sizes.
        options: of the run.
        placement: of training.
        dtype: that whole trained weights are used in.
        aux_coef: of the load-balancing loss.
    """
    return Objective(
        config=with_window(config, options.max_length),
        placement=placement,
        is_dpo=options.method == "dpo",
        scale=scale_of(options.lora_r, options.lora_alpha, is_stabilized=options.use_rslora),
        dropout=options.dropout,
        dtype=dtype,
        remat=options.gradient_checkpointing,
        aux_coef=aux_coef,
        aux_loss=options.aux_loss,
        z_coef=options.router_z_loss_coef,
        beta=options.dpo_beta,
        label_smoothing=options.label_smoothing,
    )


def published_coef(config: ModelConfig, folder: Path | None) -> float:
    """The coefficient of the load-balancing loss that a checkpoint was published with.

    Where its config.json tells none, or it has only Mistral's params.json, that of the model of its
    sizes.
    """
    file = None if folder is None else folder / CONFIG_NAME
    told = read_json(file).get("router_aux_loss_coef") if file and file.exists() else None
    if told is not None:
        return float(told)
    sizes = ("hidden_size", "num_hidden_layers", "intermediate_size")
    one = PRESETS["mixtral-8x7b"]
    is_8x7b = all(getattr(config, name) == getattr(one, name) for name in sizes)
    return _AUX_COEF_8X7B if is_8x7b else _AUX_COEF


def shardings_of(tree: Any) -> Any:
    """Of a tree of ShapeDtypeStructs."""
    return jax.tree.map(lambda x: x.sharding, tree)
