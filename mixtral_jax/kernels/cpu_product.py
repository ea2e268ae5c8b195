"""Products on a CPU: the order of operands that its matrix library runs fastest.

``benchmarks/products.py`` measures them; docs/log.md says why each is as it is.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from mixtral_jax.kernels.contract import precision_of, rows_first
from mixtral_jax.kernels.cpu_rows import rows_product
from mixtral_jax.kernels.widen import is_widened
from mixtral_jax.qtensor import Nested
from mixtral_jax.weights import QTensor

FEW_BF16_ROWS = 3  # up to here, bf16 rows as the left operand are the faster
MANY_ROWS = 112  # and from here on rows of any dtype
FEW_WIDENED_ROWS = 4  # up to here, codes are widened for each row rather than once for all
MAX_DIGIT_ROWS = 16  # above, widening the weight once costs less than a product for each digit
_LARGEST = 127  # digits are whole numbers from -127 to 127


def digits_of(dtype: jnp.dtype) -> int:
    """Digits that keep what rows of a dtype hold: 2 for bf16, 3 for f32 and f16.

    Two leave an error of at most 1.6e-5 of the row's largest element, three of 6.1e-8.
    """
    return 2 if dtype == jnp.bfloat16 else 3


def cpu_product(x: Float[Array, "N I"], w: jax.Array | QTensor) -> Float[Array, "N O"]:
    """The weight as the left operand where that is the faster; f32."""
    return _of_codes(x, w) if isinstance(w, QTensor) else _of_arrays(x, w)


def _of_codes(x: jax.Array, w: QTensor) -> jax.Array:
    is_per_row = w.scheme == "int8" and w.zeros is None and not isinstance(w.scales, Nested)
    is_per_row = is_per_row and w.scales.shape[-1] == 1
    if is_per_row and x.shape[0] * digits_of(x.dtype) <= MAX_DIGIT_ROWS:
        return int8_product(x, w)
    # With the barrier nothing that is made of the codes leaves a loop that this stands in.
    x, w = jax.lax.optimization_barrier((x, w))
    if is_per_row and x.dtype != jnp.float32:  # codes are exact in 16 bits, weights are not
        return _of_arrays(x, w.codes.astype(x.dtype)) * w.scales.astype(jnp.float32).T
    if x.shape[0] <= FEW_WIDENED_ROWS and is_widened(w):
        return rows_product(x, w)
    return _of_arrays(x, w.dequantize())


def _of_arrays(x: jax.Array, w: jax.Array) -> jax.Array:
    if x.dtype == jnp.bfloat16 and x.shape[0] <= FEW_BF16_ROWS:
        # For one row alone the compiler would widen the whole weight.
        return rows_first(jnp.pad(x, ((0, 1), (0, 0))), w)[:1] if len(x) == 1 else rows_first(x, w)
    return rows_first(x, w) if len(x) >= MANY_ROWS else weight_first(w, x, jnp.float32)


def weight_first(w: jax.Array, x: jax.Array, dtype: Any) -> jax.Array:
    """The product ``[N, O]`` of rows ``[N, I]`` and a weight ``[O, I]``, as the weight times rows.

    The compiler would fold the transposition into the product, and turn it around again.
    """
    out = jnp.einsum("OI,NI->ON", w, x, precision=precision_of(x), preferred_element_type=dtype)
    return jax.lax.optimization_barrier(out).T


def split_digits(
    x: Float[Array, "N I"], num_digits: int
) -> tuple[Int8[Array, "digits N I"], Float[Array, "N 1"]]:
    """Rows as sums of int8 digits: x = unit * sum over k of digit_k / 254**k.

    The error of an element is at most unit / (2 * 254**(num_digits - 1)), where 127 units are the
    row's largest element.

    Returns:
        The digits, and each row's unit.
    """
    rows = x.astype(jnp.float32)
    unit = jnp.abs(rows).max(axis=-1, keepdims=True) / _LARGEST
    left = rows / jnp.where(unit == 0, 1.0, unit)
    digits = []
    for _ in range(num_digits):
        digit = jnp.round(left)
        digits.append(digit.astype(jnp.int8))
        left = (left - digit) * (2 * _LARGEST)
    return jnp.stack(digits), unit


@jax.custom_vjp
def int8_product(x: Float[Array, "N I"], w: QTensor) -> Float[Array, "N O"]:
    """Rows in digits times int8 codes with one scale per output: sums in int32 are exact; f32.

    The weight is read as it lies, a byte each; only the rows are rounded, as ``digits_of`` says.
    NaN or infinity in a row makes all of its result NaN.
    """
    digits, unit = split_digits(x, digits_of(x.dtype))
    flat = digits.reshape(-1, x.shape[-1])
    flat = jnp.pad(flat, ((0, -len(flat) % 4), (0, 0)))  # fours are fast
    sums = weight_first(w.codes, flat, jnp.int32)
    parts = sums[: digits.shape[0] * x.shape[0]].reshape(digits.shape[0], x.shape[0], -1)
    powers = (2.0 * _LARGEST) ** -jnp.arange(digits.shape[0], dtype=jnp.float32)
    total = (parts.astype(jnp.float32) * powers[:, None, None]).sum(axis=0)
    is_finite = jnp.isfinite(x).all(axis=-1, keepdims=True)
    factors = unit * w.scales.astype(jnp.float32).T  # first: the sums are large
    return jnp.where(is_finite, total * factors, jnp.nan)


def _forward(x: jax.Array, w: QTensor) -> tuple[jax.Array, tuple[jax.Array, QTensor]]:
    return int8_product(x, w), (x, w)


def _backward(operands: tuple[jax.Array, QTensor], g: jax.Array) -> tuple[jax.Array, QTensor]:
    """As if the rows had not been rounded."""
    return jax.vjp(rows_first, *operands)[1](g)


int8_product.defvjp(_forward, _backward)
