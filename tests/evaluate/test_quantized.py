"""Rows that are quantized on the disk: what the quantize command makes, and nothing left behind."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import get_type_hints

import pytest

import mixtral_jax as mj
from examples.tiny import data
from mixtral_jax import cli
from mixtral_jax.convert.manifest import read_manifest
from mixtral_jax.errors import USAGE, MixtralError
from mixtral_jax.evaluate.perplexity import perplexity
from mixtral_jax.evaluate.table import parse_schemes
from mixtral_jax.evaluate.windows import Windowing
from mixtral_jax.quantize import options as quantize
from mixtral_jax.quantize import spelling
from mixtral_jax.quantize.driver import Calibration, quantize_gptq
from mixtral_jax.quantize.gptq_recipe import GptqRecipe
from tests.evaluate.test_command import TEXT, here
from tests.quantize.gptq_text import small_checkpoint


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def calibration(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "other.txt"
    path.write_text("7 + 8 = 15. 20 - 4 = 16.\nFriday, Saturday, Sunday\n2, 4, 6, 8, 10\n" * 4)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory, small_config) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("small") / "hf", small_config)


@pytest.mark.slow
def test_schemes_with_options_are_made_in_a_temporary_folder(
    text, small, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    shared = ["perplexity", small, "--text", text, "--context", 32, "--mesh", "1x1", "--json"]
    word = "rtn2:group-size=32:asymmetric"
    plot = tmp_path / "table.svg"
    code, out, err = here(capsys, *shared, "--schemes", f"none,{word}", "--plot", plot)
    assert code == 0, err
    assert list(tmp_path.iterdir()) == [plot], "no folder stays"
    plain, row = map(json.loads, out.splitlines())
    assert (row["scheme"], row["experts"]["bits"], row["experts"]["groups"]) == (word, 2.75, [32])
    assert row["dtype"] == plain["dtype"]
    assert row["made"] == {
        "options": {"scheme": "rtn", "group_size": 32, "asymmetric": True, "bits": 2},
        "calibration": None, "layers": [],
    }  # fmt: skip
    assert row["kl"] > 0
    drawn = plot.read_text()
    assert "bits per weight of the experts" in drawn
    assert word in drawn


@pytest.mark.slow
def test_gptq_is_what_the_quantize_command_makes_and_can_be_kept(
    text, small, calibration, tmp_path, capsys
):
    keep, word = tmp_path / "kept" / "folders", "gptq2:group-size=32:asymmetric"
    shared = ["perplexity", small, "--text", text, "--context", 32, "--mesh", "1x1", "--keep", keep]
    fitted = ["--calibration", calibration, "--calibration-samples", 3, "--calibration-length", 40]
    code, out, err = here(capsys, *shared, *fitted, "--schemes", f"none,{word}", "--json")
    assert code == 0, err
    assert f"note: {word}: layer 0: output error" in err
    _, row = map(json.loads, out.splitlines())
    assert row["made"]["options"] == {
        "scheme": "gptq", "group_size": 32, "asymmetric": True, "bits": 2,
        "calibration": "other.txt", "samples": 3, "length": 40,
    }  # fmt: skip
    content, lm = calibration.read_bytes(), mj.load(small, mesh="1x1")
    assert row["made"]["calibration"] == {
        "file": "other.txt", "bytes": len(content), "windows": 3, "tokens": 3 * 40,
        "sha256": hashlib.sha256(content).hexdigest(), "samples": 3, "length": 40,
    }  # fmt: skip
    layers = row["made"]["layers"]
    assert [sum(layer["tokens"]) for layer in layers] == [2 * 3 * 40] * 2
    assert all(layer["output_error"] < layer["rounded_to_nearest"] for layer in layers)
    (folder,) = keep.iterdir()
    recipe = GptqRecipe(bits=2, group=32, symmetric=False)
    by_hand = Calibration(path=calibration, samples=3, length=40)
    made = quantize_gptq(small, tmp_path / "by hand", recipe, by_hand).converted
    assert read_manifest(folder).digest == made.digest
    kept, windowing = mj.load(folder, mesh="1x1"), Windowing(context=32)
    wanted = perplexity(kept, lm.encode(TEXT), windowing=windowing)
    assert row["perplexity"] == pytest.approx(wanted.perplexity, rel=1e-6)

    code, out, err = here(capsys, *shared, *fitted, "--schemes", f"none,{word}")
    assert code == 0, err
    assert "is complete already" in err
    (line,) = [line for line in out.splitlines() if line.startswith("calibrated")]
    assert line.split()[1:4] == ["other.txt,", str(len(content)), "bytes,"]
    notes = out[out.index("┘") :]
    assert "quantize --scheme gptq --group-size 32 --asymmetric --bits 2 --calibration" in notes
    first = f"{layers[0]['output_error']:.4f} ({layers[0]['rounded_to_nearest']:.4f})"
    assert f"output error by layer (rounded to nearest): {first}, " in notes
    few = [f"layer {x['layer']}: {', '.join(map(str, x['few_tokens']))}" for x in layers]
    assert f"too few tokens, fitted to all of them: experts of {'; '.join(few)}\n" in notes


@pytest.mark.slow
def test_gptq_of_the_embedded_model_is_nearer_than_rounded_to_nearest(tmp_path, capsys):
    """In f32, as the embedded model runs, though the folders made of it say bfloat16."""
    assert cli.run(data.main, data.Options, "data", [str(tmp_path / "data"), "--lines", "100"]) == 0
    capsys.readouterr()
    files = {name: tmp_path / "data" / name for name in (data.TEXT, data.CALIBRATION)}
    given = ["perplexity", "--text", files[data.TEXT], "--context", 128, "--mesh", "1x1", "--json"]
    given += ["--calibration", files[data.CALIBRATION], "--calibration-length", 128]
    words = ["none", "rtn3", "gptq3", "rtn2", "gptq2"]
    code, out, err = here(capsys, *given, "--schemes", ",".join(words))
    assert code == 0, err
    rows = dict(zip(words, map(json.loads, out.splitlines()), strict=True))
    assert {row["dtype"] for row in rows.values()} == {"float32"}
    for bits in (3, 2):
        ours, nearest = rows[f"gptq{bits}"], rows[f"rtn{bits}"]
        assert ours["experts"]["bytes"] == nearest["experts"]["bytes"]
        assert ours["kl"] < 0.6 * nearest["kl"]
        assert ours["perplexity"] < nearest["perplexity"]


def test_the_same_text_is_refused_under_any_name(text, tmp_path, capsys):
    (tmp_path / "copy.txt").write_bytes(text.read_bytes())
    for path in (text, tmp_path / "copy.txt"):
        given = ["perplexity", "--text", text, "--schemes", "gptq4", "--calibration", path]
        code, out, err = here(capsys, *given)
        assert (code, out) == (64, "")
        assert err.startswith(f"error: --calibration {path}: expected another text")


def test_every_scheme_of_the_quantize_command_has_a_name():
    """So that a new one is in the table as soon as it is there."""
    schemes = {spelling.options_of(name).scheme for name in spelling.names()}
    known = get_type_hints(quantize.Options)["scheme"]
    assert schemes == set(spelling._literals(known))
    assert parse_schemes(",".join(spelling.names())) == spelling.names()


def test_options_of_a_run_are_none_of_a_scheme():
    for word in ("int4:format=gptq", "int4:format", "gptq4:src=x", "int8:json"):
        with pytest.raises(MixtralError, match="options among") as caught:
            parse_schemes(word)
        assert caught.value.code == USAGE


def test_options_that_need_text_are_taken_with_text():
    words = ("qmoe:act-order", "qmoe:damp=0.2", "gptq3:act-order", "int8")
    assert parse_schemes(",".join(words), Path("calibration.jsonl")) == words
    with pytest.raises(MixtralError, match="calibration"):
        parse_schemes("qmoe:act-order")
