"""What a weight can be: a plain array, packed codes (QTensor), or a base with an adapter (Adapted).

Every kind is a pytree with ``shape`` and ``dtype`` of the weight it stands for, answers ``[...]``
(so that it may be the value of an ``nnx.Param``), and is multiplied by ``kernels/contract.py``.
Makers of the kinds (quantization, adapters) live in later rooms; this plumbing is all they need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from mixtral_jax.qtensor import QTensor

AxisNames: TypeAlias = tuple[str, ...]

# An array; or what stands for one where a tree of shapes, specs or shardings has the same form.
Leaf: TypeAlias = Any


class _OnBase:
    """What looks like the base that it updates."""

    base: Leaf | QTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the base."""
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the base."""
        return self.base.dtype

    @property
    def ndim(self) -> int:
        """Number of dims of the base."""
        return len(self.shape)

    def __getitem__(self, index: object) -> Any:
        _only_ellipsis(index)
        return self


@dataclasses.dataclass(frozen=True)
class Adapted(_OnBase):
    """A frozen base ``[O, I]`` with a low-rank update: base + scale * b @ a (LoRA, Hu et al. 2021).

    Attributes:
        base: an array or a QTensor ``[..., O, I]``.
        a: ``[..., R, I]``.
        b: ``[..., O, R]``.
        scale: alpha / rank (or alpha / sqrt(rank) for rank-stabilised adapters).
        key: in training, a random key for what ``a`` does not see; of a single matrix.
        dropout: how much of its input ``a`` does not see, where there is a key; the rest is scaled
            up to make up for it.
    """

    base: Leaf | QTensor
    a: Leaf
    b: Leaf
    scale: float
    key: Leaf = None
    dropout: float = 0.0


jax.tree_util.register_dataclass(
    Adapted, data_fields=("base", "a", "b", "key"), meta_fields=("scale", "dropout")
)


@dataclasses.dataclass(frozen=True)
class RowAdapted(_OnBase):
    """A frozen base ``[O, I]`` with several low-rank updates, of which each row uses one or none.

    Attributes:
        base: an array or a QTensor.
        a: ``[M, R, I]``; smaller ranks are filled with zeros. The first of the M is zero: none.
        b: ``[M, O, R]``.
        scales: ``[M]``, f32, as ``scale`` of Adapted.
        ids: which of the M each row of the batch uses, int ``[B]``; None: no row uses any.
    """

    base: Leaf | QTensor
    a: Leaf
    b: Leaf
    scales: Leaf
    ids: Leaf = None


jax.tree_util.register_dataclass(
    RowAdapted, data_fields=("base", "a", "b", "scales", "ids"), meta_fields=()
)


def choose_adapters(tree: Any, ids: Any) -> Any:
    """A tree whose ``RowAdapted`` weights use ``ids``, int ``[B]``; others stay as they are."""

    def choose(w: Any) -> Any:
        return dataclasses.replace(w, ids=ids) if isinstance(w, RowAdapted) else w

    return jax.tree.map(choose, tree, is_leaf=lambda w: isinstance(w, RowAdapted))


@dataclasses.dataclass(frozen=True)
class ExpertSlots:
    """The experts of one layer laid out for kernels that visit whole experts.

    Slot ``i`` holds the i-th expert of every expert shard, ``[shards, O, I]``, so that inside
    ``shard_map`` each device holds whole experts as arrays of their own (a static slice of a stack
    would be a copy per step). Expert ``e`` of the canonical ``[E, O, I]`` leaf is row ``e // n`` of
    slot ``e % n``, with n slots.
    """

    # Matrices; while JAX takes trees apart also what it puts in their place (specs, shardings).
    slots: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The canonical shape ``[E, O, I]``."""
        shards, *rest = self.slots[0].shape
        return (shards * len(self.slots), *rest)

    @property
    def dtype(self) -> Any:
        """The dtype of the experts."""
        return self.slots[0].dtype

    @property
    def ndim(self) -> int:
        """Number of dims of the canonical leaf."""
        return len(self.shape)

    def __getitem__(self, index: object) -> ExpertSlots:
        _only_ellipsis(index)
        return self


jax.tree_util.register_dataclass(ExpertSlots, data_fields=("slots",), meta_fields=())

Weight: TypeAlias = jax.Array | QTensor | Adapted | RowAdapted | ExpertSlots
Matrix: TypeAlias = jax.Array | QTensor | Adapted | RowAdapted
# Of experts: `ExpertSlots`, or one `[E, O, I]` array. Quantized experts are stacked in both: what
# widens their codes finds an expert by its index, and its program is one expert's. With "apart"
# they are slots too.
Layout: TypeAlias = Literal["slots", "stacked", "apart"]


def _only_ellipsis(index: object) -> None:
    if index is not Ellipsis:
        raise TypeError(f"a weight kind answers [...] only, not [{index!r}]")


def _select(w: Any, index: int) -> Any:
    """The matrix at ``index`` of a stack of any kind: every leaf has the stack as its first dim."""
    return jax.tree.map(lambda leaf: leaf[index], w)


def expert_matrix(w: Weight | None, e: int) -> Any:
    """Expert e of a leaf, or of one device's part of it: a Matrix ``[O, I]``.

    None may stand for what is left out of a leaf, and is left out of the matrix.
    """
    if isinstance(w, ExpertSlots):
        row, slot = divmod(e, len(w.slots))
        return _select(w.slots[slot], row)
    return _select(w, e)


def expert_matrices(w: Weight) -> list[Matrix]:
    """The experts of a leaf, or of one device's part of it, as a list of ``[O, I]`` matrices."""
    return [expert_matrix(w, e) for e in range(w.shape[0])]


def from_expert_matrices(like: Any, matrices: Sequence[Any]) -> Any:
    """The leaf that ``expert_matrices`` takes apart, laid out as ``like``."""

    def stack(parts: Sequence[Any]) -> Any:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)

    if isinstance(like, ExpertSlots):
        count = len(like.slots)
        return ExpertSlots(tuple(stack(matrices[slot::count]) for slot in range(count)))
    return stack(matrices)


def takes_slots(w: Weight) -> bool:
    """Whether experts of this kind are laid out as slots where slots are asked for."""
    return len(w.shape) == 3 and not isinstance(w.base if isinstance(w, Adapted) else w, QTensor)


def slots_of(stack: Weight, shards: int) -> ExpertSlots:
    """Lays a canonical ``[E, O, I]`` weight of any kind out as slots for that many shards."""
    num_slots = stack.shape[0] // shards
    return ExpertSlots(
        tuple(jax.tree.map(lambda leaf, i=i: leaf[i::num_slots], stack) for i in range(num_slots))
    )


def stack_of(w: ExpertSlots) -> jax.Array:
    """The canonical ``[E, O, I]`` of plain experts in slots: what ``slots_of`` took apart."""
    return jnp.stack(w.slots, axis=1).reshape(w.shape)


AXES_KEY = "axes"


def weight(
    key: jax.Array | None,
    shape: Sequence[int],
    axes: AxisNames,
    *,
    dtype: Any,
    std: float | None,
) -> nnx.Param:
    """States one weight: its shape, logical axis names and initialiser.

    Args:
        key: a random key; None where the initialiser is constant.
        shape: sizes, in the canonical layout (``[out, in]`` per matrix).
        axes: one logical axis name per dim (see ``sharding/rules.py``).
        dtype: of the weight.
        std: standard deviation of a normal initialiser in f32, or None for ones.

    Returns:
        An ``nnx.Param`` whose metadata carries the axis names.
    """
    if len(shape) != len(axes):
        raise ValueError(f"axes: expected {len(shape)} names for shape {shape}, got {axes}")
    if std is None:
        value = jnp.ones(shape, dtype)
    else:
        assert key is not None, "a random initialiser needs a key"
        value = (jax.random.normal(key, shape, jnp.float32) * std).astype(dtype)
    metadata: dict[str, Any] = {AXES_KEY: axes}
    return nnx.Param(value, **metadata)
