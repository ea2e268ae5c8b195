"""Packs matrices the way each publisher does, word by word from the formats' descriptions.

Nothing here leans on the package: codes, scales and zero points are drawn, packed in plain loops,
and the matrix that they stand for is computed beside them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

# fmt: off
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]
FP4 = [x / 12 for x in (0, .0625, 8, 12, 4, 6, 2, 3, -0., -.0625, -8, -12, -4, -6, -2, -3)]
# fmt: on


class Packed(NamedTuple):
    """The tensors of one linear by the end of their names, and the f32 matrix they stand for."""

    tensors: dict[str, np.ndarray]
    matrix: np.ndarray


# (generator, outputs, inputs) -> Packed
Packer = Callable[[np.random.Generator, int, int], Packed]


def words_of(streams: np.ndarray, bits: int) -> np.ndarray:
    """Codes ``[n, columns]`` to int32 ``[n * bits / 32, columns]``, as AutoGPTQ's loops do."""
    n, columns = streams.shape
    codes = streams.astype(np.uint64)
    words = np.zeros((n * bits // 32, columns), np.uint64)
    if bits != 3:
        per_word = 32 // bits
        for i in range(n):
            words[i // per_word] |= codes[i] << np.uint64(bits * (i % per_word))
        return words.astype(np.uint32).view(np.int32)
    word = 0
    for i in range(0, n, 32):
        for j in range(10):  # bits 0..29, then two bits of the eleventh
            words[word] |= codes[i + j] << np.uint64(3 * j)
        words[word] |= (codes[i + 10] & np.uint64(3)) << np.uint64(30)
        words[word + 1] |= codes[i + 10] >> np.uint64(2)
        for j in range(10):  # bits 1..30, then one bit of the twenty-second
            words[word + 1] |= codes[i + 11 + j] << np.uint64(3 * j + 1)
        words[word + 1] |= (codes[i + 21] & np.uint64(1)) << np.uint64(31)
        words[word + 2] |= codes[i + 21] >> np.uint64(1)
        for j in range(10):  # bits 2..31
            words[word + 2] |= codes[i + 22 + j] << np.uint64(3 * j + 2)
        word += 3
    return words.astype(np.uint32).view(np.int32)


def gptq(
    *,
    bits: int = 4,
    group_size: int = 32,
    order: bool = False,
    sym: bool = True,
    v2: bool = False,
    with_g_idx: bool = True,
) -> Packer:
    """GPTQ; ``group_size`` -1 for one group, ``order`` for a shuffled g_idx."""

    def pack(rng: np.random.Generator, outputs: int, inputs: int) -> Packed:
        size = inputs if group_size == -1 else group_size
        codes = rng.integers(0, 2**bits, (inputs, outputs))
        middle = np.full((inputs // size, outputs), 2 ** (bits - 1))
        drawn = rng.integers(0, 2**bits, middle.shape)
        zeros = middle if sym else drawn
        scales = rng.uniform(0.5, 2, middle.shape).astype(np.float16) / np.float16(2**bits)
        g_idx = np.arange(inputs, dtype=np.int32) // size
        if order:
            g_idx = rng.permutation(g_idx)
        matrix = scales[g_idx].astype(np.float32) * (codes - zeros[g_idx]).astype(np.float32)
        stored = zeros if v2 else (zeros - 1) % 2**bits
        tensors = {
            ".qweight": words_of(codes, bits),
            ".qzeros": np.ascontiguousarray(words_of(stored.T, bits).T),
            ".scales": scales,
        }
        if with_g_idx:
            tensors[".g_idx"] = g_idx
        return Packed(tensors, matrix.T.copy())

    return pack


def awq(*, group_size: int = 32) -> Packer:
    """AWQ for GEMM: eight outputs in a word, in its own order."""

    def interleave(codes: np.ndarray) -> np.ndarray:
        words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
        for column in range(words.shape[1]):
            for place, output in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                words[:, column] |= codes[:, 8 * column + output].astype(np.uint32) << (4 * place)
        return words.view(np.int32)

    def pack(rng: np.random.Generator, outputs: int, inputs: int) -> Packed:
        size = inputs if group_size == -1 else group_size
        codes = rng.integers(0, 16, (inputs, outputs))
        zeros = rng.integers(0, 16, (inputs // size, outputs))
        scales = (rng.uniform(0.5, 2, zeros.shape) / 16).astype(np.float16)
        group = np.arange(inputs) // size
        matrix = scales[group].astype(np.float32) * (codes - zeros[group]).astype(np.float32)
        tensors = {
            ".qweight": interleave(codes),
            ".qzeros": interleave(zeros),
            ".scales": scales,
        }
        return Packed(tensors, matrix.T.copy())

    return pack


def fp8(
    *, per_row: bool, scale_dtype: Any = ml_dtypes.bfloat16, input_scale: bool = False
) -> Packer:
    """float8 e4m3 with one scale per row, or one in all."""

    def pack(rng: np.random.Generator, outputs: int, inputs: int) -> Packed:
        codes = rng.normal(0, 20, (outputs, inputs)).astype(ml_dtypes.float8_e4m3fn)
        shape = (outputs, 1) if per_row else (1,)
        scale = (rng.uniform(0.5, 2, shape) / 50).astype(scale_dtype)
        matrix = codes.astype(np.float32) * scale.astype(np.float32)
        tensors = {".weight": codes, ".weight_scale": scale}
        if input_scale:
            tensors[".input_scale"] = np.ones(1, scale_dtype)
        return Packed(tensors, matrix)

    return pack


def dynamic_map() -> np.ndarray:
    """The 256 values of bitsandbytes' ``create_dynamic_map(signed=True, 7, 8)``.

    Its torch.linspace goes from both ends in float32 steps, each product rounded with its sum.
    """
    data = [0.0, 1.0]
    for i in range(7):
        step = float(np.float32(np.float32(0.9) / np.float32(2**i)))
        low, high = float(np.float32(0.1)), 1.0
        edges = []
        for k in range(2**i + 1):
            is_low = k < (2**i + 1) // 2
            edges.append(np.float32(low + step * k if is_low else high - step * (2**i - k)))
        for one, other in itertools.pairwise(edges):
            mean = np.float32(np.float32(one + other) / np.float32(2))
            data += [float(np.float32(10.0 ** (i - 6)) * mean)]
            data += [-data[-1]]
    return np.array(sorted(data), np.float32)


def four_bit(kind: str, *, nested: bool = False, storage: Any = np.uint8) -> Packer:
    """NF4 or FP4 of bitsandbytes, blocks of 64, in any quant_storage of the same bytes."""
    table = np.array(NF4 if kind == "nf4" else FP4, np.float32)

    def pack(rng: np.random.Generator, outputs: int, inputs: int) -> Packed:
        codes = rng.integers(0, 16, outputs * inputs)
        octets = np.array(
            [(int(a) << 4) | int(b) for a, b in zip(codes[::2], codes[1::2], strict=True)], np.uint8
        )
        num_blocks = outputs * inputs // 64
        state = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16"}
        state["shape"] = [outputs, inputs]
        tensors = {
            ".weight": octets.view(storage).reshape(-1, 1),
            ".weight.quant_map": table,
        }
        if nested:
            scale_map = dynamic_map()
            chosen = rng.integers(0, 256, num_blocks)
            factors = rng.uniform(0.02, 0.05, -(-num_blocks // 256)).astype(np.float32)
            offset = float(np.float32(0.1))
            absmax = np.array(
                [scale_map[c] * factors[i // 256] for i, c in enumerate(chosen)], np.float32
            ) + np.float32(offset)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
            tensors[".weight.absmax"] = chosen.astype(np.uint8)
            tensors[".weight.nested_absmax"] = factors
            tensors[".weight.nested_quant_map"] = scale_map
        else:
            absmax = rng.uniform(0.05, 0.2, num_blocks).astype(np.float32)
            tensors[".weight.absmax"] = absmax
        text = json.dumps(state).encode()
        tensors[f".weight.quant_state.bitsandbytes__{kind}"] = np.frombuffer(text, np.uint8)
        matrix = (table[codes].reshape(-1, 64) * absmax[:, None]).reshape(outputs, inputs)
        return Packed(tensors, matrix)

    return pack


def eight_bit() -> Packer:
    """int8 of bitsandbytes."""

    def pack(rng: np.random.Generator, outputs: int, inputs: int) -> Packed:
        codes = rng.integers(-127, 128, (outputs, inputs)).astype(np.int8)
        scb = rng.uniform(0.1, 0.4, outputs).astype(np.float32)
        tensors = {".weight": codes, ".SCB": scb, ".weight_format": np.zeros((), np.uint8)}
        return Packed(tensors, codes.astype(np.float32) * (scb / np.float32(127))[:, None])

    return pack
