"""The embedded model: sizes that fit every mesh, the wheel that carries it, what is said of it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from safetensors import safe_open

import mixtral_jax
from examples.tiny.score import EACH_EXPERT, EACH_FAMILY, OVERALL
from examples.tiny.tokens import CONTROL
from mixtral_jax.config import PRESETS, read_config
from mixtral_jax.language_model import EMBEDDED_FOLDER
from mixtral_jax.model.transformer import num_parameters
from mixtral_jax.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
FILE = EMBEDDED_FOLDER / "model.safetensors"
MAX_BYTES = 9_000_000
MAX_WHEEL_BYTES = 16_000_000


def test_config_is_the_preset():
    assert read_config(EMBEDDED_FOLDER) == PRESETS["tiny"]


def test_sizes_divide_by_every_mesh_and_group():
    config = PRESETS["tiny"]
    assert config.hidden_size % 128 == config.intermediate_size % 128 == 0
    assert config.num_attention_heads % 8 == config.vocab_size % 8 == 0
    assert config.num_key_value_heads in (4, 8)
    assert (config.num_local_experts, config.num_experts_per_tok) == (8, 2)
    assert config.max_position_embeddings >= 2048
    assert 2e6 <= num_parameters(config) <= 4.5e6


def test_weights_are_bf16_under_published_names():
    with safe_open(FILE, framework="np") as tensors:
        assert tensors.metadata() == {"format": "pt"}
        names = set(tensors.keys())
        assert {tensors.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert "model.layers.3.block_sparse_moe.experts.7.w2.weight" in names
    config = json.loads((EMBEDDED_FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["MixtralForCausalLM"]


def test_tokenizer_fits_the_model():
    tokenizer = Tokenizer.from_folder(EMBEDDED_FOLDER)
    config = PRESETS["tiny"]
    assert tokenizer.vocab_size == config.vocab_size
    assert tokenizer.bos_id == config.bos_token_id
    assert (tokenizer.eos_id,) == config.eos_token_ids
    assert tokenizer.version == "v3"
    assert [tokenizer.control_id(name) for name in CONTROL] == list(range(3, 10))
    for text in ("¿Cómo se dice «rojo»?", "日本 🙂", "12+30=", "two  spaces "):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("1234", bos=False)) == 5, "digits are split, after one space"


def test_folder_is_small():
    files = sorted(file.name for file in EMBEDDED_FOLDER.iterdir())
    assert files == ["config.json", "model.safetensors", "tokenizer.model"]
    assert sum(file.stat().st_size for file in EMBEDDED_FOLDER.iterdir()) < MAX_BYTES


def test_the_committed_score_reaches_the_targets():
    """What `python -m examples.tiny.record` wrote when the folder was made."""
    record = json.loads((ROOT / "examples/tiny/results/score.json").read_text())
    assert record["sha256"] == hashlib.sha256(FILE.read_bytes()).hexdigest()
    scores = record["scores"]
    assert scores.keys() == {"trained, float32", "stored, float32", "stored, bfloat16"}
    for found in scores.values():
        assert found["overall"] >= OVERALL
        assert min(found["families"].values()) >= EACH_FAMILY
        assert min(map(min, found["expert_loads"])) >= EACH_EXPERT
        assert found["asked"] > 6000
    found = scores["stored, float32"]
    said = f"exact answer to {found['overall']:.1%} of {found['asked']:,} held-out prompts"
    assert said in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def build(target: str, source: Path, folder: Path) -> Path:
    argv = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    built = subprocess.run(argv, cwd=source, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


def test_the_source_archive_makes_the_same_wheel(wheel, tmp_path):
    archive = build("sdist", ROOT, tmp_path / "sdist")
    assert archive.name == f"mixtral_jax-{mixtral_jax.__version__}.tar.gz"
    assert archive.stat().st_size < MAX_WHEEL_BYTES
    with tarfile.open(archive) as files:
        files.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    again = build("wheel", source, tmp_path / "again")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert {file.filename: file.CRC for file in first.infolist()} == {
            file.filename: file.CRC for file in second.infolist()
        }


def test_the_wheel_is_typed_and_has_the_console_script(wheel):
    with zipfile.ZipFile(wheel) as archive:
        assert "mixtral_jax/py.typed" in archive.namelist()
        folder = f"mixtral_jax-{mixtral_jax.__version__}.dist-info"
        points = archive.read(f"{folder}/entry_points.txt").decode()
        metadata = archive.read(f"{folder}/METADATA").decode()
    assert points.split() == ["[console_scripts]", "mixtral-jax", "=", "mixtral_jax.__main__:main"]
    assert "Classifier: Typing :: Typed\n" in metadata


def test_the_wheel_carries_the_model_and_runs_elsewhere(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert {f"mixtral_jax/data/tiny/{file.name}" for file in EMBEDDED_FOLDER.iterdir()} <= {*names}
    assert not [name for name in names if name.startswith(("tests/", "examples/"))]
    assert wheel.stat().st_size < MAX_WHEEL_BYTES
    # Found before the editable installation: the wheel's own files answer.
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    where = "import mixtral_jax; print(mixtral_jax.__file__)"
    argv = ["-m", "mixtral_jax", "sample", "--chat", "--prompt", "12+30=", "--mesh", "1x1"]
    runs = [
        subprocess.run(
            [sys.executable, *args],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for args in (["-c", where], argv)
    ]
    assert runs[0].startswith(str(tmp_path / "site"))
    assert runs[1] == "42"
