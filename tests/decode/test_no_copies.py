"""A step of decode copies no weight and no cache: read from the compiled program."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import jax
import numpy as np
import pytest

from mixtral_jax.config import ModelConfig
from mixtral_jax.decode import steps
from mixtral_jax.decode.sampling import SamplingOptions, row_sampling
from mixtral_jax.kernels.table import cache_dtype
from mixtral_jax.model.placement import LOCAL
from mixtral_jax.model.transformer import assemble, leaf_specs
from mixtral_jax.weights import slots_of
from tests.environ import EMITTERS, HAS_OLDER_EMITTERS
from tests.slow import mostly_slow

# Widths whose weights and caches are far larger than any activation of a few rows.
CONFIG = ModelConfig(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    num_local_experts=4,
    max_position_embeddings=4096,
    rope_theta=1e6,
)
SLOTS = 512
# Of benchmarks/, and what its temporaries may take at batch 1.
BENCH = dataclasses.replace(
    CONFIG,
    vocab_size=32_000,
    hidden_size=1024,
    intermediate_size=3584,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_local_experts=8,
)
MOST_TEMPORARIES = 64_000_000
SIZES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "u16": 2, "s8": 1, "u8": 1, "pred": 1}
# What may be as large as a weight: it is no copy, or it is in place.
IN_PLACE = ("parameter", "get-tuple-element", "tuple", "while", "conditional", "call", "bitcast")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\w+)\[([\d,]*)\]\S* ([\w\-]+)\(")


def decode_program(dtype: str, rows: int, config: ModelConfig = CONFIG) -> tuple[str, int]:
    """HLO and bytes of temporaries of decode_step, experts laid out as ``load`` does."""

    def shape_of(spec) -> object:
        leaf = jax.ShapeDtypeStruct(spec.shape, dtype)
        slots = functools.partial(slots_of, shards=1)
        return jax.eval_shape(slots, leaf) if len(spec.shape) == 3 else leaf

    model = assemble(config, {path: shape_of(spec) for path, spec in leaf_specs(config).items()})
    state = jax.eval_shape(
        functools.partial(
            steps.empty_state,
            config,
            slots=SLOTS,
            dtype=cache_dtype(LOCAL.kernels, None, dtype),
            placement=LOCAL,
        ),
        jax.ShapeDtypeStruct((rows,), "int32"),
        jax.ShapeDtypeStruct((rows,), "bool"),
    )
    sampling = row_sampling([SamplingOptions()] * rows, [0] * rows, config.vocab_size)
    zeros = np.zeros((rows,), np.int32)
    limits = steps.Limits(zeros, zeros.astype(bool), np.zeros((1,), np.int32))
    lowered = steps.decode_step.lower(model, state, sampling, limits, np.int32(32), placement=LOCAL)
    compiled = lowered.compile({EMITTERS: True} if HAS_OLDER_EMITTERS else None)  # as users have it
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text
    assert memory is not None
    return text, memory.temp_size_in_bytes


def made(hlo: str, least: int) -> list[str]:
    """Shapes of the arrays of at least so many bytes that the program makes, one per instruction.

    What happens inside a fusion is no array; a fusion is one instruction where it is called.
    """
    found, is_fused = [], False
    for line in hlo.splitlines():
        if not line.startswith(" "):
            is_fused = line.startswith(("%fused_", "%wrapped_"))
        match = INSTRUCTION.match(line)
        if not match or is_fused or match[4] in IN_PLACE or "scatter" in match[1]:
            continue
        dims = [int(dim) for dim in match[3].split(",") if dim]
        if SIZES.get(match[2], 8) * math.prod(dims) >= least:
            found.append(f"{match[2]}[{match[3]}]")
    return found


@pytest.mark.parametrize("rows", [2, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_copy_of_weights_or_cache(dtype, rows):
    program, temporaries = decode_program(dtype, rows)
    # The least thing that must stay: keys of one layer, or the smallest projection.
    cache = rows * SLOTS * CONFIG.num_key_value_heads * CONFIG.head_dim
    kv_proj = CONFIG.num_key_value_heads * CONFIG.head_dim * CONFIG.hidden_size
    least = min(cache, kv_proj) * jax.numpy.dtype(dtype).itemsize
    scores = rows * CONFIG.num_attention_heads * SLOTS * 4
    assert least > scores, "no activation is as large"
    assert made(program, least) == []
    # Sampling holds a few [rows, vocabulary] arrays.
    assert temporaries < 16 * rows * CONFIG.vocab_size * 4 + 2**20


@pytest.mark.parametrize("dtype", mostly_slow(["float32", "bfloat16"], ["bfloat16"]))
def test_temporaries_of_the_benchmark_model(dtype):
    _, temporaries = decode_program(dtype, 1, BENCH)
    assert temporaries <= MOST_TEMPORARIES


def test_a_planted_copy_is_seen():
    def transposes(x: jax.Array, w: jax.Array) -> jax.Array:
        return (x @ w.T, w.T.copy())[1]

    shapes = (
        jax.ShapeDtypeStruct((2, 512), "float32"),
        jax.ShapeDtypeStruct((256, 512), "float32"),
    )
    hlo = jax.jit(transposes).lower(*shapes).compile().as_text() or ""
    assert made(hlo, 256 * 512 * 4)
