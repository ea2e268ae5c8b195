"""Data-free makers: a matrix of numbers to codes and scales, each row by itself, in numpy.

numpy and not JAX, so that a checkpoint quantized while it loads and one quantized on disk hold the
same bytes whatever the device. Scales are computed in float32.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple, get_args

import ml_dtypes
import numpy as np

from mixtral_jax.errors import BAD_CONFIG, BAD_DATA, USAGE, MixtralError
from mixtral_jax.qtensor import (
    NESTED_BLOCK,
    SCHEMES,
    Nested,
    QTensor,
    dynamic_map,
    pack,
    packed_size,
)
from mixtral_jax.quantize.ternary import round_rows

DataFree = Literal["int8", "int4", "fp8", "nf4", "fp4", "qmoe"]
# Round to nearest on the grid of GPTQ, in its codes of as many bits: what GPTQ is measured against.
NEAREST = {f"rtn{bits}": f"gptq{bits}" for bits in (2, 3, 4, 8)}
GROUPS = (32, 64, 128)
BLOCK = 64  # of nf4 and fp4
_LARGEST_FP8 = 448.0
_SMALLEST = np.finfo(np.float32).tiny
_TINY = np.float32(1e-38)  # what bitsandbytes divides by where a block is all zeros
# The scales of int4 and qmoe; codes are chosen for the rounded scale, so rounding costs nothing.
_SHORT_SCALES = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How weights are quantized.

    Attributes:
        scheme: a name of ``DataFree`` or ``NEAREST``.
        group_size: consecutive inputs that share a scale, of int4 (64 unless given) and of rtn
            (128 unless given).
        symmetric: int4 or rtn without zero points.
        double_quant: the scales of nf4 and fp4 are quantized as well.
    """

    scheme: str
    group_size: int | None = None
    symmetric: bool = True
    double_quant: bool = False

    def __post_init__(self):
        known = (*get_args(DataFree), *NEAREST)
        if self.scheme not in known:
            expected = ", ".join(known)
            raise MixtralError("--scheme", expected=expected, got=repr(self.scheme), code=USAGE)
        if self.group_size is not None:
            if not self.has_groups:
                fix = "leave it out, or choose int4"
                raise MixtralError(f"--group-size is not for {self.scheme}", fix=fix, code=USAGE)
            if self.group_size not in GROUPS:
                expected = ", ".join(map(str, GROUPS))
                got = self.group_size
                raise MixtralError("--group-size", expected=expected, got=got, code=USAGE)
        if not self.symmetric and not self.has_groups:
            fix = "leave it out, or choose int4"
            raise MixtralError(f"--asymmetric is not for {self.scheme}", fix=fix, code=USAGE)
        if self.double_quant and self.scheme not in ("nf4", "fp4"):
            fix = "leave it out, or choose nf4 or fp4"
            raise MixtralError(f"--double-quant is not for {self.scheme}", fix=fix, code=USAGE)

    @property
    def has_groups(self) -> bool:
        """Whether the size of groups can be chosen."""
        return self.scheme == "int4" or self.scheme in NEAREST

    @property
    def codes(self) -> str:
        """The key of ``SCHEMES``."""
        return NEAREST.get(self.scheme, self.scheme)

    @property
    def group(self) -> int | None:
        """Consecutive inputs that share a scale; None where a whole row does."""
        if self.scheme in NEAREST:
            return self.group_size or 128
        if self.scheme == "int4":
            return self.group_size or 64
        return BLOCK if self.scheme in ("nf4", "fp4") else None

    def check_fits(self, name: str, num_inputs: int) -> None:
        """Refuses a matrix whose rows are no whole number of groups (exit code 78)."""
        multiple = self.group or SCHEMES[self.codes].unit[0]
        if num_inputs % multiple:
            smaller = [size for size in GROUPS if num_inputs % size == 0]
            fix = "choose int8 or fp8"
            if self.has_groups and smaller:
                scheme = "int4" if self.scheme == "int4" else "rtn"
                fix = f"quantize SRC DST --scheme {scheme} --group-size {smaller[-1]}"
            raise MixtralError(
                f"{name}: {self.scheme} needs rows of whole groups",
                expected=f"a multiple of {multiple} inputs",
                got=num_inputs,
                fix=fix,
                code=BAD_CONFIG,
            )


class Rows(NamedTuple):
    """Rows of one matrix: packed codes ``[O, ...]``, scales ``[O, G]``, zeros alike or None."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None = None


def quantize_rows(w: np.ndarray, recipe: Recipe) -> Rows:
    """Codes and scales of float rows ``[O, I]``; the scales are not nested.

    Raises:
        MixtralError: exit code 65 for NaN or infinite values, 78 for rows of no whole groups.
    """
    num_rows, num_inputs = w.shape
    recipe.check_fits("a matrix", num_inputs)
    w = w.astype(np.float32)
    grouped = w.reshape(num_rows, -1, recipe.group or num_inputs)
    absmax = np.abs(grouped).max(axis=-1)
    if not np.isfinite(absmax).all():
        raise MixtralError(
            "NaN or infinite values cannot be quantized",
            fix="download the checkpoint again",
            code=BAD_DATA,
        )
    nearest = functools.partial(_nearest, symmetric=recipe.symmetric)
    maker = {
        "int8": _int8,
        "fp8": _fp8,
        "int4": _int4_symmetric if recipe.symmetric else _int4_asymmetric,
        "nf4": _by_table,
        "fp4": _by_table,
        "qmoe": _qmoe,
        **dict.fromkeys(NEAREST.values(), nearest),
    }[recipe.codes]
    codes, scales, zeros = maker(grouped, absmax, recipe.codes)
    return Rows(pack(recipe.codes, codes.reshape(w.shape)), scales, zeros)


def _normal(scales: np.ndarray) -> np.ndarray:
    """Scales, those 0 that are below the normal numbers of float32: 1 / scale would be infinite.

    What such a scale stands for is below 5e-36, and devices flush it to zero as well.
    """
    return np.where(np.abs(scales) < _SMALLEST, scales.dtype.type(0), scales)


def _inverse(scales: np.ndarray) -> np.ndarray:
    """1 / scale; 0 where a group is all zeros."""
    safe = np.where(scales == 0, np.float32(1), scales)
    return np.where(scales == 0, np.float32(0), np.float32(1) / safe)[..., None]


def _int8(w: np.ndarray, absmax: np.ndarray, scheme: str) -> Rows:
    del scheme
    scales = _normal(absmax / np.float32(127))
    return Rows(np.rint(w * _inverse(scales)).clip(-127, 127).astype(np.int8), scales)


def _fp8(w: np.ndarray, absmax: np.ndarray, scheme: str) -> Rows:
    del scheme
    scales = _normal(absmax / np.float32(_LARGEST_FP8))
    codes = (w * _inverse(scales)).clip(-_LARGEST_FP8, _LARGEST_FP8)
    return Rows(codes.astype(ml_dtypes.float8_e4m3fn), scales)


def _int4_symmetric(w: np.ndarray, absmax: np.ndarray, scheme: str) -> Rows:
    """The value of largest magnitude is code 0, minus eight steps; so a step may be negative.

    On Gaussian groups of 64 a relative error of 0.095, against 0.108 with codes of -7 to 7 steps.
    """
    del scheme
    is_negative = w.min(axis=-1) == -absmax
    extreme = np.where(is_negative, -absmax, absmax)
    scales = _normal((extreme / np.float32(-8)).astype(_SHORT_SCALES))
    codes = np.rint(w * _inverse(scales.astype(np.float32))).clip(-8, 7) + 8
    return Rows(codes.astype(np.uint8), scales)


def _int4_asymmetric(w: np.ndarray, absmax: np.ndarray, scheme: str) -> Rows:
    """Fifteen steps from the smallest value to the largest, zero among them."""
    del absmax, scheme
    low, high = w.min(axis=-1).clip(max=0), w.max(axis=-1).clip(min=0)
    scales = _normal(((high - low) / np.float32(15)).astype(_SHORT_SCALES))
    inverse = _inverse(scales.astype(np.float32))
    zeros = np.rint(-low[..., None] * inverse).clip(0, 15)
    codes = (np.rint(w * inverse) + zeros).clip(0, 15)
    return Rows(codes.astype(np.uint8), scales, zeros[..., 0].astype(np.uint8))


def _nearest(w: np.ndarray, absmax: np.ndarray, scheme: str, *, symmetric: bool) -> Rows:
    """What ``gptq.round_to_nearest`` makes, its grid that of ``gptq.find_grid``."""
    bits = SCHEMES[scheme].bits
    most = np.float32(2**bits - 1)
    low, high = w.min(axis=-1).clip(max=0), w.max(axis=-1).clip(min=0)
    spread = 2 * absmax if symmetric else high - low
    spread = np.where(spread == 0, np.float32(2), spread)  # a group of zeros: any step will do
    scales = _normal((spread / most).astype(_SHORT_SCALES))
    # A step that is next to nothing stands for values that are nothing.
    scales = np.where(scales == 0, _SHORT_SCALES.type(1), scales)
    steps = scales.astype(np.float32)
    zeros = None if symmetric else np.rint(-low / steps).clip(0, most)
    middle = np.float32(2 ** (bits - 1)) if zeros is None else zeros[..., None]
    codes = (np.rint(w / steps[..., None]) + middle).clip(0, most)
    return Rows(codes.astype(np.uint8), scales, None if zeros is None else zeros.astype(np.uint8))


def _by_table(w: np.ndarray, absmax: np.ndarray, scheme: str) -> Rows:
    """The nearest value of the table, between two the lower, as bitsandbytes rounds.

    FP4 has two zeros; as there, what rounds to zero is code 0 if it is not positive, else 8.
    """
    table = np.asarray(SCHEMES[scheme].table, np.float32)
    order = np.argsort(table, kind="stable")
    edges = (table[order][:-1] + table[order][1:]) / np.float32(2)
    inverse = np.float32(1) / np.maximum(absmax, _TINY)
    scaled = (w * inverse[..., None]).clip(-1, 1)
    return Rows(order[np.searchsorted(edges, scaled)].astype(np.uint8), absmax)


def _qmoe(w: np.ndarray, absmax: np.ndarray, scheme: str) -> Rows:
    del absmax
    made = round_rows(w[:, 0], packed_size(scheme, w.shape[-1]))
    return Rows(made.codes, made.scales[:, None].astype(_SHORT_SCALES))


def nest(scales: np.ndarray) -> Nested:
    """Quantizes the scales ``[O, G]`` of one matrix in blocks of 256, around their mean."""
    return nest_around(scales, np.float32(scales.mean(dtype=np.float64)))


def nest_around(scales: np.ndarray, offset: np.float32) -> Nested:
    """``nest`` with a given offset."""
    flat = (scales - offset).reshape(-1)
    blocks = np.pad(flat, (0, -len(flat) % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    absmax = np.abs(blocks).max(axis=-1)
    scaled = blocks * (np.float32(1) / np.maximum(absmax, _TINY))[:, None]
    if len(flat) % NESTED_BLOCK:  # a short block is divided by its largest, as in bitsandbytes
        absmax[-1] = np.maximum(absmax[-1], _TINY)
        scaled[-1] = blocks[-1] / absmax[-1]
    table = dynamic_map()
    edges = (table[:-1] + table[1:]) / np.float32(2)
    codes = np.searchsorted(edges, scaled.clip(-1, 1)).astype(np.uint8)
    return Nested(codes.reshape(-1)[: len(flat)].reshape(scales.shape), absmax, offset)


def quantize(w: np.ndarray, recipe: Recipe, *, dtype: Any = None) -> QTensor:
    """Quantizes a matrix or a stack of matrices ``[..., O, I]``.

    Args:
        w: float numbers.
        recipe: how.
        dtype: what the result stands for; that of ``w`` unless given.

    Returns:
        A QTensor of numpy arrays.

    Raises:
        MixtralError: as ``quantize_rows``.
    """
    *stack, outputs, inputs = w.shape
    rows = quantize_rows(w.reshape(-1, inputs), recipe)
    parts = [
        None if part is None else part.reshape(*stack, outputs, part.shape[-1]) for part in rows
    ]
    codes, scales, zeros = parts
    assert codes is not None
    assert scales is not None
    made: Any = scales
    if recipe.double_quant:
        found = [nest(one) for one in scales.reshape(-1, *scales.shape[-2:])]
        made = Nested(
            np.stack([one.codes for one in found]).reshape(scales.shape),
            np.stack([one.absmax for one in found]).reshape(*stack, -1),
            np.stack([one.offset for one in found]).reshape(stack),
        )
    return QTensor(codes, made, recipe.codes, dtype or w.dtype, zeros=zeros)
