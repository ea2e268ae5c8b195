"""GPTQ of whole checkpoints: nearer outputs and text than rounding, on any mesh, resumable."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mixtral_jax as mj
from mixtral_jax import cli
from mixtral_jax.config import read_config
from mixtral_jax.convert import ConvertOptions, convert
from mixtral_jax.convert.leaves import open_leaves
from mixtral_jax.convert.names import Chunk
from mixtral_jax.errors import (
    BAD_CONFIG,
    BAD_DATA,
    INPUT_NOT_FOUND,
    INTERRUPTED,
    OK,
    USAGE,
    MixtralError,
)
from mixtral_jax.language_model import EMBEDDED_FOLDER
from mixtral_jax.model.transformer import Mixtral, assemble, leaf_specs
from mixtral_jax.quantize.__main__ import Options, main
from mixtral_jax.quantize.calibration import read_windows
from mixtral_jax.quantize.driver import Calibration, quantize_gptq
from mixtral_jax.quantize.gptq import round_to_nearest
from mixtral_jax.quantize.gptq_layer import (
    Batch,
    LayerInput,
    LayerPass,
    batches_of,
    embedded,
)
from mixtral_jax.quantize.gptq_recipe import SCALES, GptqRecipe
from mixtral_jax.quantize.source import is_quantized
from mixtral_jax.tokenizer import Tokenizer
from tests.quantize.gptq_text import small_checkpoint, write_text
from tests.slow import mostly_slow

ROOT = Path(__file__).parents[2]
RECIPES = {
    4: GptqRecipe(bits=4),
    3: GptqRecipe(bits=3, group=32, symmetric=False, act_order=True),
    2: GptqRecipe(bits=2, group=32, symmetric=False),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "calibration.jsonl", 120, seed=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory, text):
    """Folder and report of the embedded model in so many bits, made once each."""
    folder, found = tmp_path_factory.mktemp("made"), {}
    calibration = Calibration(path=text, samples=120, length=256)

    def make(bits: int):
        if bits not in found:
            dst = folder / str(bits)
            found[bits] = dst, quantize_gptq(EMBEDDED_FOLDER, dst, RECIPES[bits], calibration)
        return found[bits]

    return make


@pytest.fixture
def small(tmp_path, small_config) -> Path:
    return small_checkpoint(tmp_path / "hf", small_config)


def plain_leaves(folder: Path) -> dict[str, np.ndarray]:
    """All leaves of a checkpoint of plain weights, f32."""
    config = read_config(folder, note=lambda line: None)
    specs = leaf_specs(config)
    leaves = open_leaves(folder, specs, head_dim=config.head_dim)
    found = {}
    for path, spec in specs.items():
        value = np.empty(spec.shape, leaves.dtype(path))
        experts = range(spec.shape[0]) if ".experts." in path else [None]
        for e in experts:
            part = value if e is None else value[e]
            leaves.read_rows(Chunk(path, e), 0, part.shape[0], part)
        found[path] = value.astype(np.float32)
    leaves.close()
    return found


def rounded_model(bits: int) -> Mixtral:
    """The embedded model, rounded to nearest on the grid of a recipe."""
    recipe, config = RECIPES[bits], read_config(EMBEDDED_FOLDER)
    how = {"bits": bits, "group": recipe.group, "symmetric": recipe.symmetric}

    def rounded(w: np.ndarray) -> jax.Array:
        rows = jnp.asarray(w.reshape(-1, w.shape[-1]))
        return round_to_nearest(rows, scale_dtype=SCALES, **how).reshape(w.shape)

    specs = leaf_specs(config)
    leaves = plain_leaves(EMBEDDED_FOLDER)
    found = {p: rounded(w) if is_quantized(specs[p]) else jnp.asarray(w) for p, w in leaves.items()}
    return assemble(config, found)


@jax.jit
def _logprobs(model: Mixtral, ids: jax.Array, valid: jax.Array) -> jax.Array:
    logs = jax.nn.log_softmax(model(ids[:, :-1], valid[:, :-1]))
    return jnp.take_along_axis(logs, ids[:, 1:, None], axis=-1)[..., 0]


def perplexity(model: Mixtral, batches: list[Batch]) -> float:
    found = []
    for batch in batches:
        logs = np.asarray(_logprobs(model, batch.ids, batch.valid), np.float64)
        found.append(logs[batch.valid[:, 1:]])
    return float(np.exp(-np.concatenate(found).mean()))


@pytest.mark.parametrize("bits", mostly_slow(RECIPES, [3]))
def test_every_layer_is_nearer_than_rounded_to_nearest(made, bits):
    _, report = made(bits)
    assert [layer.layer for layer in report.layers] == [0, 1, 2, 3]
    for layer in report.layers:
        assert layer.total.gptq < 0.6 * layer.total.nearest
        assert len(layer.outputs) == 7
        for leaf, error in layer.outputs.items():
            assert error.gptq < error.nearest, leaf
    rows = {row.group: row for row in report.coverage}
    assert rows["experts"].scheme == rows["attention"].scheme == f"gptq{bits}"


@pytest.mark.parametrize("bits", mostly_slow([4, 3, 2], []))
def test_perplexity_of_other_text_is_lower_than_rounded_to_nearest(tmp_path, made, bits):
    other = write_text(tmp_path / "other.jsonl", 300, seed=2)
    tokenizer = Tokenizer.from_folder(EMBEDDED_FOLDER)
    batches = batches_of(read_windows(other, tokenizer, samples=300, length=128), 128)
    folder, _ = made(bits)
    ours = perplexity(mj.load(folder, mesh="1x1", dtype="float32").model, batches)
    theirs = perplexity(rounded_model(bits), batches)
    plain = perplexity(mj.load("tiny", mesh="1x1", dtype="float32").model, batches)
    print(f"{bits} bits: plain {plain:.3f}, gptq {ours:.3f}, rounded to nearest {theirs:.3f}")
    assert plain * 0.99 < ours < theirs


@pytest.mark.slow
def test_tokens_are_the_same_on_every_mesh(made):
    folder, _ = made(3)  # with groups in activation order, and zero points
    prompts = [[1, 7, 300, 41], [1, 90, 12, 5, 1200, 33, 8, 2, 77]]
    rows = []
    for mesh in ("1x1", "1x8", "2x4"):
        lm = mj.load(folder, mesh=mesh, dtype="float32")
        done = lm.generate(
            prompt_token_ids=prompts, max_new_tokens=8, temperature=0, ignore_eos=True
        )
        rows.append([completion.token_ids for completion in done])
    assert rows[0] == rows[1] == rows[2]


def test_every_token_goes_to_two_experts(made, text):
    _, report = made(3)
    tokenizer = Tokenizer.from_folder(EMBEDDED_FOLDER)
    count = sum(map(len, read_windows(text, tokenizer, samples=120, length=256)))
    for layer in report.layers:
        assert sum(layer.tokens) == 2 * count
        assert layer.few_tokens == ()


class Plain:
    """Matrices that nobody quantizes; sums every Hessian, for its shape."""

    def __init__(self, leaves: dict[str, np.ndarray]):
        self.leaves, self.traces = leaves, {}

    def matrix(self, chunk, hessian):
        w = self.leaves[chunk.leaf]
        w = w if chunk.expert is None else w[chunk.expert]
        self.traces[chunk] = hessian()
        assert self.traces[chunk].shape == (w.shape[-1],) * 2
        return jnp.asarray(w)


@pytest.mark.slow
def test_the_pass_through_layers_is_that_of_the_model(text):
    """With windows of unequal length; and the Hessians of q, k and v are of what q, k, v read."""
    config, leaves = read_config(EMBEDDED_FOLDER), plain_leaves(EMBEDDED_FOLDER)
    tokenizer = Tokenizer.from_folder(EMBEDDED_FOLDER)
    batches = batches_of(read_windows(text, tokenizer, samples=12, length=64), 64)
    assert len(batches) > 1
    hidden, plain = embedded(leaves["embed_tokens"], batches), Plain(leaves)
    for i in range(config.num_hidden_layers):
        norms = {n: leaves[f"layers.{i}.{n}.weight"] for n in ("attention_norm", "moe_norm")}
        layer = LayerPass(
            layer=i,
            config=config,
            batches=batches,
            others=LayerInput(norms, leaves[f"layers.{i}.moe.router.weight"]),
            matrices=plain,
            all_tokens=False,
        )
        layer.run(hidden)
    model = assemble(config, {path: jnp.asarray(w) for path, w in leaves.items()})
    for batch, x in zip(batches, hidden, strict=True):
        want = model.hidden(jnp.asarray(batch.ids), jnp.asarray(batch.valid)).x
        got = model.norm(jnp.asarray(x))
        np.testing.assert_allclose(got[batch.valid], want[batch.valid], atol=2e-3)
    rows = np.concatenate([leaves["embed_tokens"][batch.ids[batch.valid]] for batch in batches])
    scale = np.sqrt((rows**2).mean(axis=-1, keepdims=True) + config.rms_norm_eps)
    normed = rows / scale * leaves["layers.0.attention_norm.weight"]
    first = plain.traces[Chunk("layers.0.attention.k_proj", None)]
    np.testing.assert_allclose(first, 2 * normed.T @ normed, rtol=1e-3, atol=1e-2)


@pytest.mark.slow
def test_an_expert_of_few_tokens_is_named_and_fitted_to_all(tmp_path, small, text):
    few, notes = Calibration(path=text, samples=2, length=20), []
    recipe = GptqRecipe(group=32)
    report = quantize_gptq(small, tmp_path / "q", recipe, few, note=notes.append)
    assert all(layer.few_tokens == (0, 1, 2, 3) for layer in report.layers)
    line = next(line for line in notes if line.startswith("layer 1"))
    count = report.layers[1].tokens[2]
    assert "fewer than 64 went to expert" in line
    assert f"2 ({count})" in line
    asked = GptqRecipe(group=32, all_token_hessians=True)
    same = quantize_gptq(small, tmp_path / "all", asked, few)
    assert same.converted.digest == report.converted.digest
    many = Calibration(path=text, samples=40, length=64)
    routed = quantize_gptq(small, tmp_path / "routed", recipe, many).converted
    everything = quantize_gptq(small, tmp_path / "everything", asked, many).converted
    assert routed.digest != everything.digest


@pytest.mark.parametrize("cut", mostly_slow([0, 9, 43, 63], [43]))
def test_an_interrupted_run_is_resumed_to_the_same_digest(tmp_path, small, text, cut):
    """Before the first layer, between leaves and inside a layer; finished layers are kept."""
    recipe = GptqRecipe(bits=3, group=32, act_order=True)
    calibration = Calibration(path=text, samples=20, length=64)
    whole = quantize_gptq(small, tmp_path / "whole", recipe, calibration)
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > cut

    with pytest.raises(MixtralError, match="interrupted") as refusal:
        quantize_gptq(small, tmp_path / "q", recipe, calibration, stop=stop)
    assert refusal.value.code == INTERRUPTED
    notes: list[str] = []
    again = quantize_gptq(small, tmp_path / "q", recipe, calibration, note=notes.append)
    assert again.converted.digest == whole.converted.digest
    made = [line for line in notes if line.startswith("layer ")]
    assert len(made) == (1 if cut == 63 else 2)
    assert again.layers == whole.layers, "those that the interrupted run made, too"
    assert again.errors == whole.errors


KILLED = """
import os, signal, sys
import jax; jax.config.update("jax_platforms", "cpu")
from mixtral_jax.quantize.driver import Calibration, quantize_gptq
from mixtral_jax.quantize.gptq_recipe import GptqRecipe
made = []
def note(line):
    made.append(line.startswith("layer "))
    if line.startswith(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
calibration = Calibration(path=sys.argv[3], samples=20, length=64)
report = quantize_gptq(sys.argv[1], sys.argv[2], GptqRecipe(group=32), calibration, note=note)
print(report.converted.digest, sum(made), len(report.layers), len(report.errors))
"""


def run_and_kill(src: Path, dst: Path, text: Path, at: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", KILLED, str(src), str(dst), str(text), at],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_kill_and_a_rerun_give_the_same_digest(tmp_path, small, text):
    killed = run_and_kill(small, tmp_path / "q", text, "layer 1")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = run_and_kill(small, tmp_path / "q", text, "never")
    assert again.returncode == 0, again.stderr
    calibration = Calibration(path=text, samples=20, length=64)
    whole = quantize_gptq(small, tmp_path / "whole", GptqRecipe(group=32), calibration)
    digest, *counts = again.stdout.split()
    assert digest == whole.converted.digest
    assert counts == ["1", "2", "14"], "one layer made, both reported"
    assert (len(whole.layers), len(whole.errors)) == (2, 14)


def run(*arguments: str) -> int:
    return cli.run(main, Options, "python -m mixtral_jax.quantize", arguments)


def test_the_command_prints_layers_and_verifies(tmp_path, small, text, capfd):
    dst = str(tmp_path / "q")
    options = ("--scheme", "gptq", "--bits", "2", "--group-size", "-1", "--calibration", str(text))
    options += ("--samples", "10", "--length", "64", "--damp", "0.02", "--act-order")
    assert run(str(small), dst, *options, "--json") == OK
    report = json.loads(capfd.readouterr().out)
    assert [layer["layer"] for layer in report["layers"]] == [0, 1]
    assert len(report["layers"][0]["output_errors"]) == 7
    assert len(report["layers"][0]["tokens"]) == 4
    assert run(str(small), dst, *options, "--verify") == OK
    text_out = capfd.readouterr()
    assert "every byte" in text_out.err
    convert(dst, tmp_path / "out", ConvertOptions(format="gptq"))
    assert "rounded to nearest" in text_out.out
    settings = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert (settings["damp_percent"], settings["true_sequential"]) == (0.02, True)
    assert run(str(small), dst, *options[:-1]) != OK
    assert "holds another conversion" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ((), USAGE, "--calibration FILE.txt"),
        (("--calibration", "none.txt"), INPUT_NOT_FOUND, "none.txt"),
        (("--calibration", "text.csv"), USAGE, "expected .jsonl or .txt"),
        (("--calibration", "TEXT", "--group-size", "48"), USAGE, "expected -1, 32, 64, 128"),
        (("--calibration", "TEXT", "--group-size", "128"), BAD_CONFIG, "--group-size 64"),
        (("--calibration", "TEXT", "--damp", "0"), USAGE, "above 0"),
        (("--calibration", "TEXT", "--samples", "0"), USAGE, "at least 1"),
        (("--calibration", "TEXT", "--double-quant"), USAGE, "not for gptq"),
    ],
)
def test_refusals_are_one_line(tmp_path, small, text, capfd, options, code, words):
    asked = [str(text) if word == "TEXT" else word for word in options]
    assert run(str(small), str(tmp_path / "q"), "--scheme", "gptq", *asked) == code
    err = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("note")]
    assert len(err) == 1
    assert words in err[0]
    assert not (tmp_path / "q").exists()
    assert not (tmp_path / "q.partial").exists()


def test_options_of_gptq_are_refused_elsewhere(tmp_path, small, capfd):
    zeros = (("--damp", "0"), ("--samples", "0"), ("--length", "0"))
    for option in (("--bits", "4"), ("--act-order",), ("--calibration", "x.txt"), *zeros):
        assert run(str(small), str(tmp_path / "q"), "--scheme", "int8", *option) == USAGE
        assert f"{option[0]} is not for int8" in capfd.readouterr().err


def test_inputs_that_explode_are_refused_by_name(tmp_path, small_config, text):
    src = small_checkpoint(tmp_path / "huge", small_config, num_hidden_layers=1)
    from safetensors.numpy import load_file, save_file

    file = src / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.input_layernorm.weight"][:] = 3e30
    save_file(tensors, file)
    calibration = Calibration(path=text, samples=4, length=32)
    with pytest.raises(MixtralError, match=r"layers\.0\.attention\.\w+: the Hessian") as refusal:
        quantize_gptq(src, tmp_path / "q", GptqRecipe(group=32), calibration)
    assert refusal.value.code == BAD_DATA
    assert not (tmp_path / "q.partial").exists()


def test_damage_of_the_last_tensor_is_told_before_the_first_layer(tmp_path, small, text):
    from safetensors.numpy import load_file, save_file

    file = small / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][-1, -1] = np.nan
    save_file(tensors, file)
    notes: list[str] = []
    calibration = Calibration(path=text, samples=4, length=32)
    with pytest.raises(MixtralError, match=r"lm_head\.weight has NaN .* again$") as refusal:
        quantize_gptq(small, tmp_path / "q", GptqRecipe(group=32), calibration, note=notes.append)
    assert refusal.value.code == BAD_DATA
    assert not any(line.startswith("layer") for line in notes)
