"""prefill and decode_step as programs over plain arrays, serialized for one platform.

No type of this package crosses: weights are a list, state and options are dictionaries of arrays,
which export.json describes. No weight is needed: programs are lowered from shapes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from mixtral_jax.config import ModelConfig
from mixtral_jax.convert.load import part_shardings
from mixtral_jax.convert.names import EXPERT_LEAF
from mixtral_jax.convert.parts import join, parts_of, quantized_weights
from mixtral_jax.decode import steps
from mixtral_jax.decode.sampling import RowSampling, SamplingOptions, row_sampling
from mixtral_jax.decode.state_shapes import shapes_of_state
from mixtral_jax.errors import BAD_CONFIG, MixtralError
from mixtral_jax.export.options import Sizes
from mixtral_jax.kernels.attention import EMPTY
from mixtral_jax.kernels.table import KERNELS
from mixtral_jax.model.transformer import LeafSpec, Mixtral, assemble, leaf_specs
from mixtral_jax.qtensor import QTensor
from mixtral_jax.sharding.place import weight_shardings
from mixtral_jax.sharding.placement import MeshPlacement
from mixtral_jax.weights import ExpertSlots

# What programs of a row of the kernels table may call although JAX does not promise to keep it.
UNSTABLE = {"gpu": ("__gpu$xla.gpu.triton",)}
_NAMES = {"budget": "max_new_tokens"}  # options that people know by another name
_RENAMED = {name: field for field, name in _NAMES.items()}
_NOT_ZERO = {"cache.positions": EMPTY}  # arrays of the state that do not begin as zeros


class WeightArgument(NamedTuple):
    """One array of weights that the programs take.

    Attributes:
        leaf: the stored leaf that it is.
        rows: of its first dim, ``[start, stop)`` one after another.
        shape: with dtype and sharding.
        is_slot: it is a slot of ``ExpertSlots``, not the whole leaf.
    """

    leaf: str
    rows: tuple[tuple[int, int], ...]
    shape: jax.ShapeDtypeStruct
    is_slot: bool


class Argument(NamedTuple):
    """Another array that the programs take, and what fills it unless the caller says otherwise."""

    shape: jax.ShapeDtypeStruct
    value: Any


class Program(NamedTuple):
    """A serialized program, the unstable custom calls that it makes, and its calling convention."""

    content: bytes
    custom_calls: tuple[str, ...]
    calling_convention: int


@dataclasses.dataclass(frozen=True)
class Programs:
    """What programs are made of, and their arguments.

    Attributes:
        config: sizes of the model.
        sizes: of the programs.
        specs: what is stored of each leaf, quantized ones in parts.
        dtype: of weights that are no parts, and of activations.
        cache_dtype: of keys and values.
        placement: mesh and kernels.

    Raises:
        MixtralError: exit code 78 for quantized matrices that the mesh would split.
    """

    config: ModelConfig
    sizes: Sizes
    specs: Mapping[str, LeafSpec]
    dtype: Any
    cache_dtype: Any
    placement: MeshPlacement

    def __post_init__(self):
        if self.quantized and self.placement.mesh.shape["tensor"] > 1:
            raise MixtralError(
                "export of quantized weights",
                expected="a mesh that splits no matrix",
                got=f"a tensor axis of {self.placement.mesh.shape['tensor']}",
                fix="no more expert shards than experts",
                code=BAD_CONFIG,
            )

    @functools.cached_property
    def quantized(self) -> dict[str, QTensor]:
        """The quantized weights by path, with shapes in place of arrays."""
        return quantized_weights(self.specs, jnp.dtype(self.dtype))

    @functools.cached_property
    def weights(self) -> list[WeightArgument]:
        """Weights in the order of the arguments, laid out as ``mj.load`` lays them."""
        specs, mesh = leaf_specs(self.config), self.placement.mesh
        at_rest = weight_shardings(specs, mesh, self.placement.strategy)
        shardings = part_shardings(specs, self.quantized, at_rest.__getitem__)
        in_slots = KERNELS[self.placement.kernels].layout == "slots"
        found: list[WeightArgument] = []
        for leaf, spec in self.specs.items():
            dtype = jnp.dtype(self.dtype) if leaf in specs else spec.dtype
            each = functools.partial(jax.ShapeDtypeStruct, dtype=dtype, sharding=shardings[leaf])
            if in_slots and leaf in specs and EXPERT_LEAF.fullmatch(leaf):
                num_experts, *matrix = spec.shape
                shards = mesh.shape["expert"]
                count = num_experts // shards
                shape = each((shards, *matrix))
                for i in range(count):
                    rows = tuple((e, e + 1) for e in range(i, num_experts, count))
                    found.append(WeightArgument(leaf, rows, shape, is_slot=True))
            else:
                whole = ((0, spec.shape[0]),)
                found.append(WeightArgument(leaf, whole, each(spec.shape), is_slot=False))
        return found

    @functools.cached_property
    def _state(self) -> steps.DecodeState:
        """Shapes of the state, on their devices."""
        return shapes_of_state(
            self.config,
            rows=self.sizes.rows,
            slots=self.sizes.slots,
            dtype=self.cache_dtype,
            placement=self.placement,
        )

    @functools.cached_property
    def state(self) -> dict[str, Argument]:
        """The state before any token was read, but for ``token`` and ``is_done``."""
        flat, _ = jax.tree.flatten_with_path(self._state)
        named = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in flat}
        return {name: Argument(x, _NOT_ZERO.get(name, 0)) for name, x in named.items()}

    @functools.cached_property
    def options(self) -> dict[str, Argument]:
        """What decode_step is told beside the state: sampling, limits and the number of steps."""
        rows, options = self.sizes.rows, SamplingOptions()
        sampling = row_sampling([options] * rows, [0] * rows, self.config.vocab_size)
        limits = steps.Limits(
            budget=np.full((rows,), options.max_new_tokens, np.int32),
            stopped=np.zeros((rows,), np.bool_),
            eos_ids=np.asarray(self.config.eos_token_ids, np.int32),
        )
        num_steps = np.asarray(steps.STEPS_PER_CALL, np.int32)
        arrays = sampling._asdict() | limits._asdict() | {"num_steps": num_steps}
        found = {}
        for field, array in arrays.items():
            value = array.tolist() if field == "eos_ids" else array.flat[0].item()
            shape = jax.ShapeDtypeStruct(array.shape, array.dtype)
            found[_NAMES.get(field, field)] = Argument(shape, value)
        return found

    def _model(self, arrays: Sequence[jax.Array]) -> Mixtral:
        found: dict[str, Any] = {}
        for argument, array in zip(self.weights, arrays, strict=True):
            if not argument.is_slot:
                found[argument.leaf] = array
            else:
                slots = found.get(argument.leaf, ExpertSlots(())).slots
                found[argument.leaf] = ExpertSlots((*slots, array))
        for leaf, shapes in self.quantized.items():
            parts = {name: found.pop(str(path)) for name, path in parts_of(leaf, found).items()}
            if "scale_offset" in parts:
                parts["scale_offset"] = parts["scale_offset"][..., 0]  # [..., 1] as it is stored
            found[leaf] = join(shapes.scheme, parts, shapes.dtype)
        return assemble(self.config, found)

    def _state_of(self, arrays: Mapping[str, jax.Array]) -> steps.DecodeState:
        return jax.tree.structure(self._state).unflatten([arrays[name] for name in self.state])

    def _named(self, state: steps.DecodeState) -> dict[str, jax.Array]:
        return dict(zip(self.state, jax.tree.leaves(state), strict=True))

    def prefill(
        self,
        weights: list[jax.Array],
        state: dict[str, jax.Array],
        tokens: Int[Array, "B T"],
        counts: Int[Array, " B"],
    ) -> dict[str, jax.Array]:
        """``steps.prefill`` of arrays: gives the state."""
        made = steps.prefill(
            self._model(weights), self._state_of(state), tokens, counts, placement=self.placement
        )
        return self._named(made)

    def decode_step(
        self,
        weights: list[jax.Array],
        state: dict[str, jax.Array],
        options: dict[str, jax.Array],
    ) -> tuple[dict[str, jax.Array], tuple[jax.Array, ...]]:
        """``steps.decode_step`` of arrays: gives the state, and tokens, logprobs and counts."""
        options = {_RENAMED.get(name, name): option for name, option in options.items()}
        num_steps = options.pop("num_steps")
        limits = steps.Limits(**{name: options.pop(name) for name in steps.Limits._fields})
        made, emitted = steps.decode_step(
            self._model(weights),
            self._state_of(state),
            RowSampling(**options),
            limits,
            num_steps,
            placement=self.placement,
        )
        return self._named(made), tuple(emitted)

    def serialize(self, platform: str) -> dict[str, Program]:
        """Both programs by name, for ``cpu``, ``cuda`` or ``tpu``, whatever this machine is."""
        rows, chunk = self.sizes.rows, self.sizes.prefill_chunk
        tokens = jax.ShapeDtypeStruct((rows, chunk), jnp.int32)
        counts = jax.ShapeDtypeStruct((rows,), jnp.int32)
        options = {name: argument.shape for name, argument in self.options.items()}
        state = {name: argument.shape.sharding for name, argument in self.state.items()}
        # What is written goes to every device, for the host to read.
        whole = NamedSharding(self.placement.mesh, PartitionSpec())
        return {
            "prefill": self._serialize(platform, self.prefill, (tokens, counts), state),
            "decode_step": self._serialize(
                platform, self.decode_step, (options,), (state, (whole,) * 3)
            ),
        }

    def _serialize(
        self, platform: str, function: Callable[..., Any], inputs: tuple[Any, ...], where: Any
    ) -> Program:
        # Without out_shardings the second call would meet a state that lies elsewhere, and compile
        # again.
        jitted = jax.jit(function, donate_argnums=1, out_shardings=where)
        calls = UNSTABLE.get(self.placement.kernels, ())
        exported = jax.export.export(
            jitted,
            platforms=[platform],
            disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(call) for call in calls],
        )(
            [argument.shape for argument in self.weights],
            {name: argument.shape for name, argument in self.state.items()},
            *inputs,
        )
        text = exported.mlir_module()
        used = tuple(call for call in calls if call in text)
        return Program(bytes(exported.serialize()), used, exported.calling_convention_version)
