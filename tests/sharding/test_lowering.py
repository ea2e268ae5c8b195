"""What a GPU or TPU would be given: prefill, decode_step and a gradient step, by ``jax.export``."""

from __future__ import annotations

import functools
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from mixtral_jax.decode import steps
from mixtral_jax.decode.sampling import SamplingOptions, row_sampling
from mixtral_jax.model.transformer import assemble
from mixtral_jax.sharding.dispatch import DispatchOptions
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.place import place
from mixtral_jax.sharding.placement import MeshPlacement
from mixtral_jax.sharding.strategy import Strategy
from tests.kernels.quantized import in_codes
from tests.models import random_leaves, random_model, random_tokens
from tests.slow import mostly_slow

ROWS, CHUNK, SLOTS, LAYERS = 16, 16, 64, 2
DATA, TENSOR = Strategy(), Strategy(attention="tensor")
# jax promises no stability of this call between versions; no artifact is kept.
TRITON = "__gpu$xla.gpu.triton"
UNCHECKED = [export.DisabledSafetyCheck.custom_call(name) for name in ("ragged_all_to_all", TRITON)]
METHODS = {
    "all_to_all": (r"stablehlo\.all_to_all", 2),
    "all_to_all_once": (r"stablehlo\.all_to_all", 3),
    "ragged": (r"@ragged_all_to_all", 3),
}


@pytest.fixture(scope="module")
def model(small_config):
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 4}  # to be split
    return random_model(small_config(num_hidden_layers=LAYERS, **heads))


def programs(model, placement):
    """The three programs as functions of arrays alone, with arguments."""
    state = steps.empty_state(
        model.config,
        np.zeros((ROWS,), np.int32),
        np.zeros((ROWS,), bool),
        slots=SLOTS,
        dtype=jnp.float32,
        placement=placement,
    )
    tokens = random_tokens(model.config, (ROWS, CHUNK))
    counts = np.full((ROWS,), CHUNK, np.int32)
    rows = row_sampling([SamplingOptions()] * ROWS, [0] * ROWS, model.config.vocab_size)
    limits = steps.Limits(np.full(ROWS, 4, np.int32), np.zeros(ROWS, bool), np.array([2], np.int32))

    def loss(model, tokens):
        logs = jax.nn.log_softmax(model(tokens, placement=placement)[:, :-1])
        return -jnp.take_along_axis(logs, tokens[:, 1:, None], axis=-1).mean()

    def gradient_step(model, tokens):
        value, gradient = jax.value_and_grad(loss)(model, tokens)
        return value, jax.tree.map(lambda w, g: w - 0.1 * g, model, gradient)

    prefill = functools.partial(inspect.unwrap(steps.prefill), placement=placement)
    decode_step = functools.partial(inspect.unwrap(steps.decode_step), placement=placement)
    return {
        "prefill": (prefill, (model, state, tokens, counts)),
        "decode_step": (decode_step, (model, state, rows, limits, np.int32(4))),
        "gradient_step": (gradient_step, (model, jnp.asarray(tokens))),
    }


CASES = [
    ("tpu", "1x8", DATA, "all_to_all_once"),
    ("cuda", "1x8", DATA, "ragged"),
    ("tpu", "2x2x2", TENSOR, "all_to_all"),
]
MORE = [
    ("cuda", "1x8", DATA, "all_to_all"),
    ("tpu", "1x8", DATA, "ragged"),
    ("cuda", "2x2x2", TENSOR, "all_to_all"),
    ("cuda", "1x8", TENSOR, "all_to_all"),
    ("tpu", "1x8", TENSOR, "all_to_all_once"),
    ("cuda", "2x2x2", DATA, "ragged"),
]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in MORE]


@pytest.mark.parametrize(("platform", "text", "strategy", "method"), CASES + SLOW, ids=str)
def test_programs_lower_for_accelerators(model, tmp_path, platform, text, strategy, method):
    mesh = MeshSpec.parse(text).build()
    placement = MeshPlacement(mesh, DispatchOptions(method=method), strategy=strategy)
    placed = place(model, mesh, strategy=strategy)
    for name, (program, arguments) in programs(placed, placement).items():
        lower = export.export(jax.jit(program), platforms=[platform], disabled_checks=UNCHECKED)
        artifact = lower(*arguments)
        assert artifact.platforms == (platform,)
        assert artifact.nr_devices == 8
        written = write(artifact, tmp_path / f"{name}.{platform}")
        operation, each = METHODS[method]
        # What prefill's last layer makes is used by nobody, so its experts do not run. The backward
        # pass sends all rows once more.
        layers = LAYERS - (name == "prefill")
        least = layers * each + (layers * 2 if name == "gradient_step" else 0)
        assert len(re.findall(operation, written)) >= least, name
        if method != "ragged":
            # The operation, not the word: locations name whoever traced a cached function first.
            assert not re.search(METHODS["ragged"][0], written)
    files = {"prefill", "decode_step", "gradient_step"}
    assert {path.stem for path in tmp_path.glob(f"*.{platform}.mlir")} == {
        f"{name}.{platform}" for name in files
    }


def write(artifact: export.Exported, path: Path) -> str:
    """The artifact's StableHLO as a file, and what is read from it (tests/export serializes)."""
    text = path.with_name(f"{path.name}.mlir")
    text.write_text(artifact.mlir_module())
    found = text.read_text()
    assert "module @" in found
    assert "func.func public @main" in found
    return found


# Triton calls of a layer, `replicated`: attention, then hidden and down. A gradient step runs them
# forwards; backwards, the weights' and rows' gradients of three products are grouped.
PALLAS = {"prefill": (LAYERS + 2 * (LAYERS - 1), 0), "decode_step": (3 * LAYERS, 0)}
PALLAS["gradient_step"] = (3 * LAYERS, 2 * 3 * LAYERS)


@pytest.mark.parametrize("text", [pytest.param("1x1", marks=pytest.mark.slow), "1x8"])
def test_programs_lower_with_the_gpu_kernels(model, text):
    mesh = MeshSpec.parse(text).build()
    placement = MeshPlacement(mesh, DispatchOptions(method="replicated"), kernels="gpu")
    placed = place(model, mesh, layout="stacked")
    for name, (program, arguments) in programs(placed, placement).items():
        lower = export.export(jax.jit(program), platforms=["cuda"], disabled_checks=UNCHECKED)
        artifact = lower(*arguments).mlir_module()
        triton, grouped = PALLAS[name]
        assert artifact.count(f"@{TRITON}") == triton, name
        assert artifact.count("chlo.ragged_dot") >= grouped, name


@pytest.mark.parametrize("name", mostly_slow(["int8", "int4", "nf4 nested", "fp8"], ["nf4 nested"]))
@pytest.mark.parametrize("method", mostly_slow(["replicated", "all_to_all"], ["all_to_all"]))
def test_experts_in_packed_codes_lower_for_a_gpu(small_config, name, method):
    """Two Triton calls a layer and dispatch; no array of a stack's or a matrix's weights."""
    D, F, E = 128, 384, 8
    config = small_config(hidden_size=D, intermediate_size=F, num_hidden_layers=1, head_dim=32)
    leaves = {
        path: in_codes(name, np.asarray(leaf)) if leaf.ndim == 3 else leaf
        for path, leaf in random_leaves(config).items()
    }
    mesh = MeshSpec.parse("1x8").build()
    placement = MeshPlacement(mesh, DispatchOptions(method=method), kernels="gpu")
    placed = place(assemble(config, leaves), mesh, layout="stacked")
    program, arguments = programs(placed, placement)["decode_step"]
    lower = export.export(jax.jit(program), platforms=["cuda"], disabled_checks=UNCHECKED)
    artifact = lower(*arguments).mlir_module()
    # Attention; hidden and down; under all_to_all once more, for the path that is always exact.
    assert artifact.count(f"@{TRITON}") == (3 if method == "replicated" else 5)
    assert not re.search(rf"tensor<(1x|{E}x)?({F}x{D}|{D}x{F})x(f32|bf16)>", artifact)


def test_programs_lower_with_the_tpu_kernels(model):
    mesh = MeshSpec.parse("1x8").build()
    placement = MeshPlacement(mesh, kernels="tpu")
    placed = place(model, mesh, layout="stacked")
    for name, (program, arguments) in programs(placed, placement).items():
        artifact = export.export(jax.jit(program), platforms=["tpu"])(*arguments).mlir_module()
        assert "chlo.ragged_dot" in artifact, name
