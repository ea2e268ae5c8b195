"""The plain weight of a QTensor of numpy arrays, block by block in little memory."""

from __future__ import annotations

import numpy as np

from mixtral_jax.qtensor import NESTED_BLOCK, SCHEMES, Nested, QTensor, dynamic_map, unpack

_BLOCK_CODES = 1 << 20  # at a time, in f32


def scale_values(q: QTensor) -> np.ndarray:
    """The scales of one matrix; float32 ``[O, G]``."""
    scales = q.scales
    if not isinstance(scales, Nested):
        return np.asarray(scales, np.float32)
    factors = np.repeat(scales.absmax, NESTED_BLOCK)[: scales.codes.size]
    flat = dynamic_map()[scales.codes.reshape(-1)] * factors + scales.offset
    return flat.reshape(scales.codes.shape)


def dequantize(q: QTensor, out: np.ndarray) -> None:
    """Computes one matrix in float32 and rounds it once, as ``QTensor.dequantize`` does.

    Args:
        q: of numpy arrays ``[O, I]``.
        out: ``[O, I]``, in any float dtype.
    """
    row, scales = SCHEMES[q.scheme], scale_values(q)
    table = None if row.table is None else np.asarray(row.table, np.float32)
    places = None if q.order is None else np.argsort(q.order)
    num_rows, num_inputs = out.shape
    step = max(1, _BLOCK_CODES // num_inputs)
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        codes = unpack(q.scheme, q.codes[rows])
        values = codes.astype(np.float32) if table is None else table[codes]
        grouped = values.reshape(len(values), scales.shape[1], -1)
        if row.zero:
            grouped -= row.zero if q.zeros is None else q.zeros[rows][:, :, None]
        grouped *= scales[rows][:, :, None]
        out[rows] = values if places is None else values[:, places]
