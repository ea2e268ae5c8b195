"""``python -m mixtral_jax.evaluate`` from outside: what it prints, refuses and draws."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

import mixtral_jax as mj
from mixtral_jax import cli
from mixtral_jax.evaluate.__main__ import Options, main
from mixtral_jax.evaluate.perplexity import compare, perplexity
from mixtral_jax.evaluate.windows import Windowing
from mixtral_jax.language_model import EMBEDDED_FOLDER
from tests.environ import without_devices
from tests.sharding import processes

TEXT = "12 + 30 = 42. 5 - 3 = 2.\nMonday, Tuesday, Wednesday, Thursday\n1, 2, 3, 4, 5, 6, 7\n"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mixtral_jax.evaluate", *map(str, arguments)],
        cwd=processes.ROOT,
        env=without_devices(),
        capture_output=True,
        text=True,
        check=False,
    )


def here(capsys, *arguments: object) -> tuple[int, str, str]:
    """The same in this process: (exit code, stdout, stderr)."""
    code = cli.run(main, Options, "evaluate", [str(argument) for argument in arguments])
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def noisy(tmp_path_factory) -> Path:
    """The embedded model with a little noise in its head."""

    def noise(head: np.ndarray) -> np.ndarray:
        return head + np.random.default_rng(0).standard_normal(head.shape) * 0.1 * head.std()

    return _copy(tmp_path_factory.mktemp("models") / "noisy", "lm_head.weight", noise)


def _copy(folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    """The embedded model with one tensor changed."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(EMBEDDED_FOLDER, folder)
    tensors = load_file(folder / "model.safetensors")
    kind = tensors[name].dtype
    tensors[name] = change(tensors[name].astype(np.float32)).astype(kind)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_perplexity_from_outside(text):
    done = run("perplexity", "--text", text, "--mesh", "1x8", "--context", "32", "--json")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    lm = mj.load("tiny", mesh="1x1")
    wanted = perplexity(lm, lm.encode(TEXT), windowing=Windowing(context=32))
    assert found["perplexity"] == pytest.approx(wanted.perplexity, rel=1e-5)
    assert found["scored"] == wanted.scored == len(lm.encode(TEXT)) - 1
    digest = hashlib.sha256(TEXT.encode()).hexdigest()
    assert found["text"] == {"file": "text.txt", "bytes": len(TEXT), "sha256": digest}
    assert (found["context"], found["stride"]) == (32, 16)
    assert (found["dtype"], found["mesh"], found["scheme"]) == ("float32", "1x8", "none")
    assert found["tokenizer"].startswith("SentencePiece v3, 2048 pieces, ")
    assert found["weight_bytes"] == 4 * sum(leaf.size for leaf in _leaves(lm))
    bits = wanted.nll * wanted.scored / np.log(2) / len(TEXT)
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert found["kl"] is None
    assert found["experts"] == {
        "scheme": "float32", "bytes": 4 * 3_145_728, "bits": 32.0, "groups": [],
    }  # fmt: skip
    assert found["made"] is None
    assert "simulating the 1x8 mesh" in done.stderr


def _leaves(lm: mj.LanguageModel) -> list:
    import jax
    from flax import nnx

    return jax.tree.leaves(nnx.state(lm.model))


def test_text_for_people(text, capsys):
    code, out, _ = here(capsys, "perplexity", "--text", text, "--context", 32, "--mesh", "1x1")
    assert code == 0
    names = [line.split()[0] for line in out.splitlines()]
    assert names == ["text", "tokenizer", "tokens", "windows", "mesh", "dtype", "weights",
                     "experts", "perplexity", "bits/byte"]  # fmt: skip
    assert "sha256" in out


def test_comparison(text, noisy, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "12+30=", "answer": "42"}\n{"prompt": "1+1=", "answer": "x"}\n')
    shared = ["--text", text, "--context", 32, "--mesh", "1x1"]
    names = ["perplexity", "tiny", noisy, EMBEDDED_FOLDER]
    more = ["--data", data, "--chat", "--plot", tmp_path / "table.svg", "--dtype", "float32"]
    code, out, err = here(capsys, *names, *shared, *more, "--json")
    assert code == 0, err
    first, other, same = map(json.loads, out.splitlines())
    assert other["difference"] == other["perplexity"] - first["perplexity"] != 0
    assert (same["difference"], same["kl"], same["top1_agreement"]) == (0, 0, 1)
    assert (first["kl"], first["difference"]) == (None, 0)
    assert other["routing_agreement"] == 1, "the head alone differs"
    assert other["kl"] > 1e-4
    counts = {"asked": 2, "right": 1, "exact": 1, "dropped": 0, "accuracy": 0.5}
    assert first["exact"] == counts
    plain, far = (mj.load(name, mesh="1x1", dtype="float32") for name in ("tiny", noisy))
    wanted = compare(plain, far, plain.encode(TEXT), windowing=Windowing(context=32))
    assert other["kl"] == pytest.approx(wanted.divergence.kl, rel=1e-5)
    drawn = (tmp_path / "table.svg").read_text()
    assert "mean KL divergence from tiny" in drawn
    assert "text.txt: context 32, stride 16" in drawn
    code, out, err = here(capsys, *names, *shared, "--dtype", "float32")
    assert code == 0
    assert "┃ routing ┃" in out
    assert out.count("100.00%") == 3


@pytest.mark.slow
def test_schemes(text, capsys):
    shared = ["--text", text, "--context", 32, "--mesh", "1x1", "--json"]
    code, out, err = here(capsys, "perplexity", *shared, "--schemes", "none,bfloat16,int8")
    assert code == 0, err
    plain, rounded, quantized = map(json.loads, out.splitlines())
    assert [row["scheme"] for row in (plain, rounded, quantized)] == ["none", "bfloat16", "int8"]
    assert [row["dtype"] for row in (plain, rounded)] == ["float32", "bfloat16"]
    assert quantized["weight_bytes"] < 0.4 * plain["weight_bytes"]
    assert 0 < quantized["kl"] < 0.1
    bits = quantized["experts"].pop("bits")
    assert bits == 8 * quantized["experts"]["bytes"] / 3_145_728 == pytest.approx(8.2, abs=0.02)
    # Groups are whole rows: 128 inputs of gate and up, 256 of down.
    assert (quantized["experts"]["scheme"], quantized["experts"]["groups"]) == ("int8", [128, 256])
    assert plain["weight_bytes"] == 2 * rounded["weight_bytes"]
    assert 0 < rounded["kl"] < 0.01
    assert rounded["perplexity"] == pytest.approx(plain["perplexity"], rel=0.01)


def test_exact(tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "12+30=", "answer": "42"}\n{"prompt": "1+1=", "answer": "3"}\n')
    shared = ["exact", "--data", data, "--chat", "--mesh", "1x1"]
    code, out, err = here(capsys, *shared, "--json")
    assert code == 0, err
    first, second, summary = map(json.loads, out.splitlines())
    assert first == {
        "prompt": "12+30=", "answer": "42", "generated_text": "42", "is_right": True,
        "is_exact": True,
    }  # fmt: skip
    assert (second["generated_text"], second["is_right"]) == ("2", False)
    assert (summary["asked"], summary["right"], summary["accuracy"]) == (2, 1, 0.5)
    code, out, _ = here(capsys, *shared)
    assert out == "1 of 2 right: 50.00% (1 of them end with the answer)\n"


def test_routing(text, tmp_path, capsys):
    plot, page = tmp_path / "load.svg", tmp_path / "page.html"
    shared = ["routing", "--text", text, "--mesh", "1x1", "--context", 32]
    code, out, err = here(capsys, *shared, "--plot", plot, "--html", page, "--json")
    assert code == 0, err
    found = json.loads(out)
    num_tokens = len(mj.load("tiny", mesh="1x1").encode(TEXT)) - 1
    assert [sum(layer) for layer in found["counts"]] == [2 * num_tokens] * 4
    assert found["tokens"] == num_tokens
    assert found["text"]["file"] == "text.txt"
    assert all(0 < evenness <= 1 for evenness in found["entropy"])
    assert (found["divergence"], found["other"]) == (None, None)
    drawn = plot.read_text()
    assert "share of the layer" in drawn
    assert "text.txt" in drawn
    assert "digits (" in drawn
    assert f"The first {num_tokens} tokens of {num_tokens}." in page.read_text()
    code, out, _ = here(capsys, *shared)
    assert code == 0
    assert "evenness" in out
    assert "divergence" not in out


def test_routing_of_two_texts_and_two_checkpoints(text, noisy, tmp_path, capsys):
    talk = tmp_path / "talk.jsonl"
    turns = [{"role": "user", "content": "12+30="}, {"role": "assistant", "content": "42"}]
    talk.write_text(json.dumps({"messages": turns}) + '\n{"text": "Montag, Dienstag"}\n')
    shared = ["routing", "--text", text, "--text", talk, "--mesh", "1x1", "--context", 32]
    page = tmp_path / "page.html"
    more = ["--other", noisy, "--dtype", "float32", "--html", page, "--html-tokens", 8]
    code, out, err = here(capsys, *shared, *more, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [each["file"] for each in found["texts"]] == ["text.txt", "talk.jsonl"]
    assert np.sum([each["counts"] for each in found["texts"]], axis=0).tolist() == found["counts"]
    assert found["texts"][1]["classes"]["control"]["tokens"] == 4, "<s> twice, [INST], [/INST]"
    assert found["other"]["same_set"] == [1.0] * 4, "the head alone differs"
    assert found["other"]["tokens"] == found["tokens"]
    assert all(0 < bits < 1 for bits in found["divergence"]["per_layer"])
    assert f"The first 8 tokens of {found['tokens']}, 2 texts." in page.read_text()
    code, out, err = here(capsys, *shared, "--other-scheme", "int4")
    assert code == 0, err
    assert "tokens for which tiny int4 chooses as tiny" in out
    assert "Jensen-Shannon" in out


def test_dropped_assignments_are_told_alike(tmp_path, capsys):
    """Windows of 64 tokens on 8 devices, and room for a quarter of a balanced load."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 6)
    shared = ["tiny", "--text", path, "--context", 64, "--mesh", "1x8", "--json"]
    shared += ["--overflow", "drop", "--capacity-factor", 0.25]
    code, out, err = here(capsys, "routing", *shared, "--other", "tiny")
    assert code == 0, err
    found = json.loads(out)
    assert found["dropped"] == found["texts"][0]["dropped"] == found["other"]["dropped"] > 0
    assert err.count(f"note: tiny: dropped {found['dropped']} expert assignments") == 2
    code, out, err = here(capsys, "perplexity", *shared)
    assert json.loads(out)["dropped"] == found["dropped"]
    assert f"note: tiny: dropped {found['dropped']} expert assignments" in err


def test_results_outlive_pictures_that_cannot_be_written(text, tmp_path, capsys, monkeypatch):
    def full(*given: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(Figure, "savefig", full)
    shared = ["--text", text, "--mesh", "1x1", "--context", 32, "--plot", tmp_path / "a.svg"]
    for command, line in (("perplexity", "bits/byte"), ("routing", "evenness")):
        code, out, err = here(capsys, command, *shared)
        assert code == 74
        assert line in out
        assert "error: the disk is full" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        ("", 64, "Expected one of"),
        ("perplexity", 64, "--text: expected a file; fix: --text FILE.txt"),
        ("perplexity --text a --text b", 64, "--text: expected one file, got a, b; fix: measure"),
        ("perplexity --text nowhere.txt", 66, "--text nowhere.txt: no such file"),
        ("perplexity --text .", 66, "--text .: a folder"),
        ("perplexity --text EMPTY", 65, "expected some text, got 0 bytes"),
        ("perplexity --text TEXT --context 4096", 64, "at most 2048 (max_position_embeddings)"),
        ("perplexity --text TEXT --context 8 --stride 9", 64, "--stride: expected at most the"),
        ("perplexity --text TEXT --context 1", 64, "error: --context: expected at least 2"),
        ("perplexity --text TEXT --batch 0", 64, "--batch: expected at least 1"),
        ("perplexity --text TEXT --kv-dtype int8", 64, "--kv-dtype: text is read without"),
        ("perplexity --text TEXT --chat", 64, "--chat needs --data"),
        ("perplexity --text TEXT --schemes int8,,none", 64, "--schemes: expected none,"),
        ("perplexity --text TEXT --schemes none,int9", 64, "got 'int9'"),
        ("perplexity --text TEXT --schemes none --quantize int8", 64, "--schemes none,int8"),
        ("perplexity --text TEXT --schemes int4:group-size=3", 64, "expected 32, 64, 128, got 3"),
        ("perplexity --text TEXT --schemes int4:group-size", 64, "expected group-size=64"),
        ("perplexity --text TEXT --schemes int4:size=3", 64, "options among group-size"),
        ("perplexity --text TEXT --schemes rtn3:asymmetric=1", 64, "expected asymmetric alone"),
        ("perplexity --text TEXT --schemes nf4:asymmetric", 64, "--asymmetric is not for nf4"),
        ("perplexity --text TEXT --schemes gptq", 64, "got 'gptq'"),
        ("perplexity --text TEXT --schemes gptq4", 64, "gptq4 needs calibration text"),
        ("perplexity --text TEXT --schemes int8 --calibration TEXT", 64, "no scheme reads it"),
        ("perplexity --text TEXT --schemes int8 --keep folder", 64, "nothing to keep"),
        ("perplexity --text TEXT --schemes gptq4 --calibration no.txt", 66, "no.txt: no such file"),
        ("perplexity --text TEXT --schemes gptq4 --calibration EMPTY", 64, "expected .jsonl or"),
        ("perplexity --text TEXT --schemes rtn2 --calibration-samples 0", 64, "at least 1, got 0"),
        ("perplexity --text TEXT --plot a.pdf", 64, "--plot: expected a name that ends in"),
        ("perplexity nowhere --text TEXT", 66, "no such folder: nowhere"),
        ("perplexity --text TEXT --data nowhere", 66, "--data nowhere: no such file"),
        ("perplexity tiny OTHER --text TEXT", 65, "expected the vocabulary of"),
        ("perplexity tiny LARGER --text TEXT", 65, "expected 2048 token ids, as tiny, got 4096"),
        ("perplexity BARE --text TEXT", 66, "no tokenizer.model"),
        ("exact", 64, "--data"),
        ("exact --data EMPTY", 65, "expected a line or more"),
        ("exact --data EMPTY --max-new-tokens 0", 64, "--max-new-tokens: expected at least 1"),
        ("exact --data TEXT", 65, "line 1: expected JSON"),
        ("routing --text EMPTY", 65, "got 0 bytes"),
        ("routing", 64, "--text"),
        ("routing --text TEXT --text nowhere.txt", 66, "--text nowhere.txt: no such file"),
        ("routing --text TEXT --html page.txt", 64, "--html: expected a name that ends in .html"),
        ("routing --text TEXT --html no/page.html", 66, "no folder no"),
        ("routing --text TEXT --html-tokens 0", 64, "--html-tokens: expected at least 1"),
        ("routing --text TEXT --other nowhere", 66, "no such folder: nowhere"),
        ("routing --text TEXT --other-scheme gptq4", 64, "gptq4"),
        ("routing --text TEXT --other-scheme rtn3", 64, "--other-scheme: expected one of none,"),
        ("routing --text TEXT --other-scheme int8 --quantize int8", 64, "leave --quantize out"),
        ("routing --text TEXT --other-scheme foo", 64, "fix: --other-scheme int8, or"),
        ("routing --text TEXT --other-scheme int8,int4", 64, "expected one of none,"),
        ("routing --text TEXT --other OTHER", 65, "expected the vocabulary of"),
        ("routing --text TEXT --other FEW", 65, "4 layers, 8 experts, 2 experts per token, as ti"),
        ("routing --text TEXT --plot FOLDER.SVG", 73, "folder.svg is a folder"),
        ("routing --text TEXT --html FOLDER.HTML", 73, "folder.html is a folder"),
        ("routing NAN --text TEXT", 65, "hidden states are NaN"),
    ],
)
def test_refusals(arguments, code, line, text, others, capsys):
    files = {"TEXT": text, **others}
    given = [files.get(argument, argument) for argument in arguments.split()]
    found, out, err = here(capsys, *given)
    assert found == code, err
    assert out == ""
    errors = [each for each in err.splitlines() if not each.startswith("note: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert line in errors[0]


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints that do not go with the embedded one, and an empty file."""

    folder = tmp_path_factory.mktemp("others")
    (folder / "empty").touch()
    for name in ("other", "larger", "bare"):
        shutil.copytree(EMBEDDED_FOLDER, folder / name)
    original = (EMBEDDED_FOLDER / "tokenizer.model").read_bytes()
    # One piece renamed, its length kept: the rest of the file stays what it was.
    assert original.count("▁Montag".encode()) == 1
    renamed = original.replace("▁Montag".encode(), "▁Montax".encode())
    (folder / "other" / "tokenizer.model").write_bytes(renamed)
    config = json.loads((folder / "larger" / "config.json").read_text())
    (folder / "larger" / "config.json").write_text(json.dumps(config | {"vocab_size": 4096}))
    (folder / "bare" / "tokenizer.model").unlink()
    shutil.copytree(EMBEDDED_FOLDER, folder / "few")  # refused by its config: weights do not fit
    config = json.loads((folder / "few" / "config.json").read_text())
    (folder / "few" / "config.json").write_text(json.dumps(config | {"num_local_experts": 4}))
    _copy(folder / "nan", "model.layers.1.block_sparse_moe.gate.weight", lambda w: w * np.nan)
    for name in ("folder.svg", "folder.html"):
        (folder / name).mkdir()
    names = ("other", "larger", "bare", "empty", "few", "nan", "folder.svg", "folder.html")
    return {name.upper(): folder / name for name in names}


@pytest.mark.slow
def test_two_processes_find_the_same(text):
    arguments = ["perplexity", "tiny", str(EMBEDDED_FOLDER), "--text", str(text), "--dtype"]
    arguments += ["float32", "--context", "32", "--json"]
    first, second = processes.run(["-m", "mixtral_jax.evaluate", *arguments, "--mesh", "1x8"])
    assert second.stdout == ""
    alone = run(*arguments, "--mesh", "1x1")
    for ours, wanted in zip(first.stdout.splitlines(), alone.stdout.splitlines(), strict=True):
        found = json.loads(ours)["perplexity"]
        assert found == pytest.approx(json.loads(wanted)["perplexity"], rel=1e-5)


@pytest.mark.slow
def test_two_processes_count_the_same(text, tmp_path):
    arguments = ["routing", "tiny", "--text", str(text), "--text", str(text), "--other", "tiny"]
    arguments += ["--context", "32", "--json", "--html"]
    page = [str(tmp_path / f"{name}.html") for name in ("two", "one")]
    command = ["-m", "mixtral_jax.evaluate", *arguments, page[0], "--mesh", "1x8"]
    first, second = processes.run(command)
    assert second.stdout == ""
    alone = run(*arguments, page[1], "--mesh", "1x1")
    found, wanted = json.loads(first.stdout), json.loads(alone.stdout)
    assert found.pop("mesh") != wanted.pop("mesh")
    assert found == wanted
    assert "same_set" in found["other"]
    assert Path(page[0]).read_text().count("<span") == Path(page[1]).read_text().count("<span")
