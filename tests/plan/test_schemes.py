"""Sizes of quantized weights: arithmetic written out, and what lies on a device."""

from __future__ import annotations

import jax
import pytest
from flax import nnx

import mixtral_jax as mj
from mixtral_jax import cli
from mixtral_jax.config import PRESETS
from mixtral_jax.convert import convert
from mixtral_jax.errors import BAD_CONFIG, BAD_DATA, USAGE, MixtralError
from mixtral_jax.plan import __main__ as plan
from mixtral_jax.plan import schemes
from mixtral_jax.plan.schemes import Stored, stored_in, weight_bytes
from mixtral_jax.qtensor import SCHEMES
from mixtral_jax.quantize.driver import Calibration, quantize_checkpoint, quantize_gptq
from mixtral_jax.quantize.gptq_recipe import GptqRecipe
from mixtral_jax.quantize.makers import Recipe
from mixtral_jax.sharding import __main__ as sharding
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.strategy import Strategy
from tests.convert.quantized import published
from tests.models import bytes_held
from tests.quantize.gptq_text import small_checkpoint, write_text
from tests.slow import mostly_slow

D, F, LAYERS, EXPERTS = 4096, 14336, 32, 8  # of 8x7B
MATRICES = [(D, D), (1024, D), (1024, D), (D, D), *EXPERTS * [(F, D), (F, D), (D, F)]]
PLAIN = 2 * 32_000 * D + LAYERS * (EXPERTS * D + 2 * D) + D


def size_of_8x7b(scheme: str | None) -> int:
    config = PRESETS["mixtral-8x7b"]
    return weight_bytes(config, MeshSpec(), Strategy(), dtype="bfloat16", scheme=scheme).total


def test_nf4_of_8x7b_is_the_arithmetic():
    """Half a byte for a code, an f32 scale for 64 of them; 16 bits for all else."""
    count = sum(o * i for o, i in MATRICES)
    want = LAYERS * (count // 2 + count // 64 * 4) + 2 * PLAIN
    assert size_of_8x7b("nf4") == want == 26_649_042_944


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_of_8x7b_is_the_arithmetic(bits):
    """Groups of 128: 16-bit scales and 8-bit zero points; an order of 32 bits per input."""
    quantized = sum(o * i * bits // 8 + o * i // 128 * 3 + 4 * i for o, i in MATRICES)
    assert size_of_8x7b(f"gptq{bits}") == LAYERS * quantized + 2 * PLAIN


def test_every_scheme_can_be_planned():
    assert set(SCHEMES) <= set(schemes.SCHEMES)
    sizes = {scheme: size_of_8x7b(scheme) for scheme in schemes.SCHEMES}
    assert max(sizes.values()) < 0.6 * size_of_8x7b(None)
    assert sizes["gptq"] == sizes["gptq4"] > sizes["gptq3"] > sizes["gptq2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, small_config):
    """Folders of ours and a published one, by what they hold; made once each."""
    root, found = tmp_path_factory.mktemp("plan"), {}
    src = small_checkpoint(root / "hf", small_config)

    def make(kind: str):
        if kind in found:
            return found[kind]
        dst = root / kind
        if kind == "nf4":
            quantize_checkpoint(src, dst, Recipe(scheme="nf4", double_quant=True))
        elif kind == "gptq3":
            text = Calibration(path=write_text(root / "t.jsonl", 8, seed=1), samples=4, length=32)
            quantize_gptq(src, dst, GptqRecipe(bits=3, group=32, act_order=True), text)
        elif kind == "plain":
            convert(src, dst)
        else:
            published.publish(published.CASES[kind]).write(dst)
        found[kind] = dst
        return dst

    return make


KINDS = ["nf4", "gptq3", "gptq4 32 order unfused"]


@pytest.mark.parametrize("mesh", mostly_slow(["1x1", "1x2x2", "1x4"], ["1x2x2"]))
@pytest.mark.parametrize("kind", mostly_slow(KINDS, ["nf4"]))
def test_a_folder_is_planned_as_it_lies_on_a_device(folders, kind, mesh):
    """Nested scales and activation orders, which a split matrix has not, among it."""
    folder = folders(kind)
    stored = stored_in(str(folder))
    assert stored is not None
    lm = mj.load(folder, mesh=mesh)
    held = bytes_held(nnx.state(lm.model), jax.devices()[0])
    dtype = str(lm.model.embed_tokens.get_value().dtype)
    spec = MeshSpec.parse(mesh)
    assert weight_bytes(lm.config, spec, Strategy(), dtype=dtype, scheme=stored).total == held


def test_a_plain_folder_and_a_preset_hold_no_scheme(folders):
    assert stored_in(str(folders("plain"))) is None
    assert stored_in("mixtral-8x7b") is None


def run(command, capsys, *arguments: str) -> tuple[int, str]:
    code = cli.run(command.main, command.Options, "it", arguments)
    return code, capsys.readouterr().err


def test_another_scheme_than_the_folder_has_is_refused(folders, capsys):
    folder = str(folders("nf4"))
    assert isinstance(stored_in(folder, "nf4"), Stored)
    with pytest.raises(MixtralError, match=r"--quantize int8: .* is quantized already") as refusal:
        stored_in(folder, "int8")
    assert refusal.value.code == BAD_DATA
    code, err = run(plan, capsys, "--model", folder, "--train", "full", "--mesh", "1x1")
    assert (code, "is quantized, and cannot be trained" in err) == (USAGE, True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_of_plain_weights_refuses_quantized_folders(folders, capsys, kind):
    code, err = run(sharding, capsys, str(folders(kind)), "--mesh", "1x1")
    assert (code, err.count("\n")) == (BAD_CONFIG, 1)
    assert "mixtral_jax.plan --model" in err
