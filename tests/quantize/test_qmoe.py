"""QMoE of whole checkpoints: experts below one bit, on any mesh of whole experts, never damaged."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mixtral_jax as mj
from mixtral_jax import cli
from mixtral_jax.config import read_config
from mixtral_jax.convert import ConvertOptions, convert
from mixtral_jax.convert.manifest import read_manifest
from mixtral_jax.convert.orbax import read_leaf
from mixtral_jax.convert.orbax_leaves import WEIGHTS
from mixtral_jax.errors import BAD_CONFIG, BAD_DATA, INTERRUPTED, OK, USAGE, MixtralError
from mixtral_jax.language_model import EMBEDDED_FOLDER
from mixtral_jax.plan.schemes import weight_bytes
from mixtral_jax.quantize.__main__ import Options, main
from mixtral_jax.quantize.driver import Calibration, quantize_checkpoint, quantize_gptq
from mixtral_jax.quantize.gptq import output_error
from mixtral_jax.quantize.makers import Recipe
from mixtral_jax.quantize.qmoe import QmoeRecipe, room, rounded_to_nearest, solve_rows, tensor_of
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.strategy import Strategy
from mixtral_jax.ternary_code import coded_lengths
from mixtral_jax.weights import QTensor, expert_matrices
from tests.models import bytes_held
from tests.quantize.gptq_text import small_checkpoint, write_text
from tests.slow import mostly_slow

DATA_FREE = Recipe(scheme="qmoe")
PROMPTS = [[1, 7, 300, 41], [1, 90, 12, 5, 1200, 33, 8, 2, 77]]
MESHES = ("1x1", "1x8", "2x4")
GATE = "layers.0.moe.experts.gate"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "calibration.jsonl", 40, seed=1)


@pytest.fixture
def small(tmp_path, small_config) -> Path:
    sizes = {"num_hidden_layers": 1, "num_local_experts": 8}
    return small_checkpoint(tmp_path / "hf", small_config, **sizes)


@pytest.fixture
def made(tmp_path, small) -> Path:
    quantize_checkpoint(small, tmp_path / "q", DATA_FREE)
    return tmp_path / "q"


def run(*arguments: str) -> int:
    return cli.run(main, Options, "python -m mixtral_jax.quantize", arguments)


def tokens(lm, prompts=PROMPTS) -> list:
    found = lm.generate(prompt_token_ids=prompts, max_new_tokens=6, temperature=0, ignore_eos=True)
    return [completion.token_ids for completion in found]


def test_logits_are_the_same_on_every_mesh_of_whole_experts(made):
    found = [mj.load(made, mesh=m, dtype="float32").logits([PROMPTS[1]]) for m in MESHES]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=2e-4)
        np.testing.assert_array_equal(other.argmax(-1), found[0].argmax(-1))


@pytest.mark.parametrize("kernels", mostly_slow(["visit", "gpu"], ["visit"]))
def test_a_row_decodes_as_its_logits_say(made, kernels):
    """Few rows take other kernels than prompts do."""
    lm = mj.load(made, mesh="1x1", dtype="float32", kernels=kernels)
    (written,) = tokens(lm, PROMPTS[:1])
    whole = [*PROMPTS[0], *written]
    best = lm.logits([whole])[0].argmax(-1)
    assert list(best[len(PROMPTS[0]) - 1 : -1]) == list(written)


@pytest.mark.slow
def test_tokens_are_the_same_on_every_mesh_of_whole_experts(tmp_path):
    quantize_checkpoint(EMBEDDED_FOLDER, tmp_path / "q", DATA_FREE)
    rows = [tokens(mj.load(tmp_path / "q", mesh=m, dtype="float32")) for m in MESHES]
    assert rows[0] == rows[1] == rows[2]
    assert len(rows[0][0]) == 6


def test_a_mesh_that_would_cut_rows_is_refused(made):
    for mesh in ("1x4x2", "1x1x2"):
        with pytest.raises(MixtralError, match=r"codes whole rows.*without a tensor axis") as no:
            mj.load(made, mesh=mesh)
        assert no.value.code == BAD_CONFIG
    config = read_config(made, note=lambda line: None)
    with pytest.raises(MixtralError, match="codes whole rows"):
        weight_bytes(config, MeshSpec.parse("1x4x2"), Strategy(), scheme="qmoe")


def test_load_makes_what_lies_on_disk_and_plan_knows_its_bytes(small, made):
    stored = mj.load(made, mesh="1x8", dtype="float32")
    lines: list[str] = []
    direct = mj.load(small, mesh="1x8", dtype="float32", quantize="qmoe", note=lines.append)
    mine, theirs = jax.tree.leaves(direct.model), jax.tree.leaves(stored.model)
    for got, want in zip(mine, theirs, strict=True):
        np.testing.assert_array_equal(got, want)
    experts = next(line.split() for line in lines if line.startswith("experts"))
    assert experts[-1] == "qmoe"
    attention = next(line.split() for line in lines if line.startswith("attention"))
    assert attention[-1] == "float32"
    plan = weight_bytes(
        direct.config, MeshSpec.parse("1x8"), Strategy(), dtype="float32", scheme="qmoe"
    )
    assert plan.total == bytes_held(mine, jax.devices()[3])


def test_it_is_copied_as_it_is_and_dequantized_to_what_it_stands_for(tmp_path, made):
    convert(made, tmp_path / "half", ConvertOptions(dtype="bfloat16"))
    before, after = (read_manifest(folder).leaves for folder in (made, tmp_path / "half"))
    assert before.keys() == after.keys()
    for path, record in before.items():
        assert (record == after[path]) == (".qmoe." in path), path
    convert(made, tmp_path / "plain", ConvertOptions(dequantize=True, dtype="float32"))
    w = read_leaf(tmp_path / "plain", GATE)
    scales = np.asarray(read_leaf(made, f"{GATE}.qmoe.scales")).astype(np.float32)
    assert set(np.unique(np.asarray(w) / scales)) == {-1, 0, 1}
    held = mj.load(made, mesh="1x1", dtype="float32").model.layers[0].moe.experts.gate[...]
    for got, matrix in zip(expert_matrices(held), np.asarray(w), strict=True):
        assert isinstance(got, QTensor)
        np.testing.assert_array_equal(got.dequantize(), matrix)


def change(folder: Path, value: int) -> None:
    """Changes a codeword of expert 1."""
    codes = folder / WEIGHTS / f"{GATE}.qmoe.codes"
    file = next(path for path in codes.rglob("1.0.0"))
    words = np.frombuffer(file.read_bytes(), "<u2").copy()
    assert words[4] != value
    words[4] = value
    file.write_bytes(words.tobytes())


def test_a_damaged_codeword_is_found_at_load(made):
    change(made, 1)  # a pair alone
    with pytest.raises(MixtralError, match=r"gate.qmoe.codes\[1\]: its bytes are not those") as no:
        mj.load(made, mesh="1x1")
    assert no.value.code == BAD_DATA
    # Without digests a row of another length is still found.
    with pytest.raises(MixtralError, match=r"gate.qmoe.codes\[1\]: codewords are damaged") as no:
        mj.load(made, mesh="1x8", verify=False)
    assert no.value.code == BAD_DATA
    with pytest.raises(MixtralError, match="its bytes are not those") as no:
        convert(made, made.parent / "plain", ConvertOptions(dequantize=True))
    assert no.value.code == BAD_DATA


def correlated(inputs: int) -> jax.Array:
    """A Hessian of inputs that move together."""
    draw = np.random.default_rng(1)
    mix = draw.normal(size=(inputs, inputs)) / np.sqrt(np.arange(1, inputs + 1))
    x = (draw.normal(size=(4 * inputs, inputs)) @ mix.T).astype(np.float32)
    return jnp.asarray(2 * x.T @ x)


@pytest.mark.parametrize("act_order", [False, True])
def test_fitted_rows_fit_their_room_and_move_outputs_less(act_order):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(32, 128)).astype(np.float32))
    hessian = correlated(128)
    made = solve_rows(w, hessian, room(128), QmoeRecipe(act_order=act_order))
    assert (coded_lengths(made.codes) <= room(128)).all()
    ours = output_error(w - tensor_of(made).dequantize(), hessian)
    nearest = output_error(w - rounded_to_nearest(w), hessian)
    assert float(ours) < 0.65 * float(nearest)
    # No other scale of those codes is better.
    for factor in (0.97, 1.03):
        other = made._replace(scales=made.scales * factor)
        assert float(output_error(w - tensor_of(other).dequantize(), hessian)) > float(ours)


def test_inputs_that_never_moved_have_no_weight_and_no_factor_is_told():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32))
    hessian = correlated(64).at[3].set(0).at[:, 3].set(0)
    assert not solve_rows(w, hessian, room(64), QmoeRecipe()).codes[:, 3].any()
    bad = solve_rows(w, -hessian, room(64), QmoeRecipe())
    assert np.isnan(bad.scales).all()


def test_calibrated_experts_are_nearer_and_attention_stays(tmp_path, small, text):
    calibration = Calibration(path=text, samples=40, length=128)
    whole = quantize_gptq(small, tmp_path / "whole", QmoeRecipe(), calibration)
    for layer in whole.layers:
        assert len(layer.outputs) == 3  # of experts alone
        assert layer.total.gptq < layer.total.nearest
    assert whole.coded is not None
    assert 0.9 * whole.coded.held < whole.coded.bytes <= whole.coded.held
    rows = {row.group: row.scheme for row in whole.coverage}
    assert (rows["experts"], rows["attention"]) == ("qmoe", "float32")


@pytest.mark.slow
def test_a_layer_written_earlier_is_passed_through_with_its_attention(tmp_path, small_config, text):
    src = small_checkpoint(tmp_path / "hf2", small_config, num_hidden_layers=2)
    calibration = Calibration(path=text, samples=40, length=128)
    whole = quantize_gptq(src, tmp_path / "whole", QmoeRecipe(), calibration).converted
    lines: list[str] = []

    def stop() -> bool:
        return any(line.startswith("layer 0: output error") for line in lines)

    with pytest.raises(MixtralError) as refusal:
        quantize_gptq(src, tmp_path / "q", QmoeRecipe(), calibration, note=lines.append, stop=stop)
    assert refusal.value.code == INTERRUPTED
    done = quantize_gptq(
        src, tmp_path / "q", QmoeRecipe(), calibration, note=lines.append
    ).converted
    assert any("resuming" in line for line in lines)
    assert done.digest == whole.digest


def test_the_command_tells_codewords_used_and_held(tmp_path, small, capfd):
    arguments = (str(small), str(tmp_path / "q"), "--scheme", "qmoe")
    assert run(*arguments, "--json") == OK
    report = json.loads(capfd.readouterr().out)
    rows = {row["group"]: row for row in report["coverage"]}
    coded = report["coded"]
    assert coded["parameters"] == rows["experts"]["parameters"]
    assert coded["held"] * 8 == 0.75 * coded["parameters"]
    assert 0.9 * coded["held"] < coded["bytes"] <= coded["held"]
    assert len(report["errors"]) == 3
    assert all(0.6 < error["relative"] < 0.8 for error in report["errors"].values())
    assert run(*arguments) == OK  # complete already
    assert "of 0.750 bits per weight" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--damp", "0.2"), "give --calibration as well"),
        (("--bits", "2"), "--bits is not for qmoe"),
        (("--bits", "2", "--calibration", "x.txt"), "--bits is not for qmoe"),
        (("--damp", "0", "--calibration", "x.txt"), "--damp: expected above 0"),
        (("--asymmetric",), "not for qmoe"),
        (("--group-size", "64"), "not for qmoe"),
        (("--double-quant",), "not for qmoe"),
    ],
)
def test_options_that_are_not_for_it_are_refused(tmp_path, capfd, options, words):
    assert run("tiny", str(tmp_path / "q"), "--scheme", "qmoe", *options) == USAGE
    err = capfd.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_rows_that_do_not_fill_their_codewords_are_refused(tmp_path, small_config, text):
    src = small_checkpoint(tmp_path / "odd", small_config, hidden_size=96, num_hidden_layers=1)
    for act in (
        lambda: quantize_checkpoint(src, tmp_path / "q", DATA_FREE),
        lambda: quantize_gptq(src, tmp_path / "q", QmoeRecipe(), Calibration(path=text)),
    ):
        with pytest.raises(MixtralError, match="a multiple of 64 inputs, got 96") as refusal:
            act()
        assert refusal.value.code == BAD_CONFIG
