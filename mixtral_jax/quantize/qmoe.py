"""QMoE with calibration text: ternary codes of experts by GPTQ (arXiv 2310.16795, section 3)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mixtral_jax.convert.parts import PartPath, part_spec
from mixtral_jax.errors import USAGE, MixtralError
from mixtral_jax.model.transformer import LeafSpec
from mixtral_jax.qtensor import QTensor, pack, packed_size
from mixtral_jax.quantize.gptq import Rounded, block_size, prepared, sweep
from mixtral_jax.quantize.makers import Recipe
from mixtral_jax.quantize.ternary import Ternary, kept, rank, round_rows
from mixtral_jax.ternary_code import coded_lengths

SCHEME = "qmoe"
SCALES = "bfloat16"  # as without calibration


@dataclasses.dataclass(frozen=True, kw_only=True)
class QmoeRecipe:
    """How experts are quantized.

    Attributes:
        act_order: the inputs that move outputs most are quantized first; columns are put back.
        damp: this share of the mean of the Hessian's diagonal is added to the diagonal.
        all_token_hessians: every expert's Hessian is of all tokens, not of those routed to it.
    """

    act_order: bool = False
    damp: float = 0.1
    all_token_hessians: bool = False

    def __post_init__(self):
        if not 0 < self.damp <= 10:
            raise MixtralError("--damp", expected="above 0, at most 10", got=self.damp, code=USAGE)

    @property
    def scheme(self) -> str:
        """The key of ``SCHEMES``."""
        return SCHEME

    def part_specs(self, leaf: str, spec: LeafSpec) -> dict[str, LeafSpec]:
        """The parts of a weight, by path.

        Raises:
            MixtralError: exit code 78 for rows that do not fill their codewords.
        """
        Recipe(scheme=SCHEME).check_fits(leaf, spec.shape[-1])
        return {
            str(PartPath(leaf, SCHEME, name)): part_spec(spec, SCHEME, name, 1, SCALES)
            for name in ("codes", "scales")
        }


_prepared = jax.jit(prepared, static_argnames="act_order")


@jax.jit
def round_columns(
    w: Float[Array, "O I"],
    factor: Float[Array, "I I"],
    thresholds: Float[Array, " O"],
    scales: Float[Array, " O"],
) -> Int[Array, "O I"]:
    """GPTQ's codes where a value becomes zero up to its row's threshold; int8."""

    def rounded(grid: tuple[jax.Array, jax.Array], column: jax.Array) -> Rounded:
        thresholds, scales = grid
        codes = jnp.where(jnp.abs(column) > thresholds, jnp.sign(column), 0)
        return Rounded(codes, codes * scales)

    grid = thresholds, scales
    codes, _ = sweep(w.T, factor, block_size(w.shape[1]), lambda block: grid, rounded)
    return codes.T.astype(jnp.int8)


@jax.jit
def fitted_scales(
    w: Float[Array, "O I"], codes: Int[Array, "O I"], hessian: Float[Array, "I I"]
) -> Float[Array, " O"]:
    """The scale of each row with the least output error for its codes; 0 where all are zero."""
    codes = codes.astype(hessian.dtype)
    moved = jnp.matmul(codes, hessian, precision=jax.lax.Precision.HIGHEST)
    squares = (moved * codes).sum(axis=1)
    return jnp.where(squares > 0, (moved * w).sum(axis=1) / jnp.where(squares > 0, squares, 1), 0)


def solve_rows(
    w: Float[Array, "O I"], hessian: Float[Array, "I I"], size: int, recipe: QmoeRecipe
) -> Ternary:
    """``ternary.round_rows`` by GPTQ: what rounding did is made up for in columns to come.

    Made-up weights are larger, so more of them are not zero than a threshold of the row as it was
    would keep: the row's threshold is searched for, each try a pass over the columns.

    Args:
        w: float32.
        hessian: of the inputs, as ``gptq.add_hessian`` sums it.
        size: codewords of a row.
        recipe: how.

    Returns:
        Ternary; its scales are NaN if the damped Hessian is not positive definite.
    """
    ready = _prepared(w, hessian, act_order=recipe.act_order, damp=jnp.float32(recipe.damp))
    ranked = rank(np.asarray(w))
    places = np.argsort(np.asarray(ready.order))
    found = np.zeros(w.shape, np.int8)
    low, high = np.zeros(len(found), np.int64), ranked.best + 1
    while (high - low > 1).any():
        middle = (low + high) // 2
        thresholds, scales = kept(ranked, middle)
        codes = round_columns(ready.w, ready.factor, thresholds, scales)
        codes = np.asarray(codes)[:, places]
        fits = (coded_lengths(codes) <= size) & (high - low > 1)
        found = np.where(fits[:, None], codes, found)
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    scales = fitted_scales(w, found, hessian)
    is_bad = ~jnp.isfinite(ready.factor).all()
    return Ternary(found, np.asarray(jnp.where(is_bad, jnp.nan, scales)))


def room(num_inputs: int) -> int:
    """Codewords of a row."""
    return packed_size(SCHEME, num_inputs)


def tensor_of(made: Ternary) -> QTensor:
    """Ternary rows as numpy parts; they stand for f32."""
    scales = made.scales[:, None].astype(jnp.dtype(SCALES))
    return QTensor(pack(SCHEME, made.codes), scales, SCHEME, jnp.dtype("float32"))


def rounded_to_nearest(w: Float[Array, "O I"]) -> Float[Array, "O I"]:
    """What the same room makes of a matrix without calibration."""
    made = round_rows(np.asarray(w), room(w.shape[1]))
    return jnp.asarray(made.codes * made.scales[:, None])
