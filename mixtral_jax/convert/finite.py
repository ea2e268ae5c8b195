"""Whether an array is free of NaN and infinity, in little memory."""

from __future__ import annotations

import ml_dtypes
import numpy as np

# dtype -> (unsigned view, all bits but the sign, exponent all ones): NaN and Inf have the exponent
# full, so the largest magnitude tells. (float8 e4m3fn has one NaN, all bits one, and no infinity.)
_EXPONENTS: dict[np.dtype, tuple[type, int, int]] = {
    np.dtype(np.float32): (np.uint32, 0x7FFFFFFF, 0x7F800000),
    np.dtype(np.float16): (np.uint16, 0x7FFF, 0x7C00),
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7FFF, 0x7F80),
    np.dtype(ml_dtypes.float8_e4m3fn): (np.uint8, 0x7F, 0x7F),
}
_CHECK_ELEMENTS = 1 << 20


def all_finite(values: np.ndarray) -> bool:
    """True if no element is NaN or infinite; uses little memory beyond ``values``."""
    if values.dtype.kind in "iu":
        return True
    unsigned, magnitude, full = _EXPONENTS[values.dtype]
    bits = values.view(unsigned).reshape(-1)
    scratch = np.empty(min(len(bits), _CHECK_ELEMENTS), unsigned)
    for start in range(0, len(bits), _CHECK_ELEMENTS):
        part = bits[start : start + _CHECK_ELEMENTS]
        masked = np.bitwise_and(part, unsigned(magnitude), out=scratch[: len(part)])
        if masked.max() >= full:
            return False
    return True
