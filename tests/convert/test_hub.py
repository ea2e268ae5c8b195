"""Names on the Hub: what is fetched, which commit is taken, and what happens without a network."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mixtral_jax.convert import convert, hub
from mixtral_jax.convert.manifest import read_manifest
from mixtral_jax.convert.reader import Checkpoint
from mixtral_jax.errors import BAD_DATA, INPUT_NOT_FOUND, IO_ERROR, USAGE, MixtralError
from mixtral_jax.language_model import EMBEDDED_FOLDER

huggingface_hub = importlib.import_module("huggingface_hub")
errors = importlib.import_module("huggingface_hub.errors")
constants = importlib.import_module("huggingface_hub.constants")

REPO = "org/tiny"
SHA, OLDER = "a" * 40, "b" * 40


def fill(cache: Path, source: Path, sha: str, *, ref: str | None, leave_out: str = "") -> Path:
    """Lays files out as huggingface_hub's cache does: blobs, refs and links."""
    home = cache / "models--org--tiny"
    snapshot = home / "snapshots" / sha
    for folder in (home / "blobs", home / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and path.name != leave_out:
            content = path.read_bytes()
            blob = home / "blobs" / hashlib.sha256(content).hexdigest()
            blob.write_bytes(content)
            (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    if ref is not None:
        (home / "refs" / ref).write_text(sha)
    return snapshot


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def refusal(name: str | Path, code: int = INPUT_NOT_FOUND) -> str:
    with pytest.raises(MixtralError) as caught:
        hub.resolve(name)
    assert caught.value.code == code
    assert "; fix: " in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_cached_names_are_found_offline_by_branch_and_by_commit(cache):
    main = fill(cache, EMBEDDED_FOLDER, SHA, ref="main")
    older = fill(cache, EMBEDDED_FOLDER, OLDER, ref="v0.1")
    notes: list[str] = []
    for name, folder in (
        (REPO, main),
        (f"{REPO}@main", main),
        (f"{REPO}@v0.1", older),
        (f"{REPO}@{OLDER}", older),
    ):
        assert hub.resolve(name, notes.append) == hub.Source(folder, REPO, folder.name)
    assert notes[2] == f"HF_HUB_OFFLINE is set: using {REPO} at {OLDER} from the cache"
    assert "neither a folder nor in the cache" in refusal(f"{REPO}@v9")
    assert "neither a folder nor in the cache" in refusal("org/other")


def test_a_folder_of_that_name_comes_first(cache, tmp_path, monkeypatch):
    fill(cache, EMBEDDED_FOLDER, SHA, ref="main")
    (tmp_path / REPO).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve(REPO) == hub.Source(Path(REPO))


@pytest.mark.parametrize(
    "name", ["nowhere", "/a/b", "./a/b", "../a/b", "a/b/c", "a/b@", "a b/c", "~/x", "a/\n", ""]
)
def test_what_is_no_name_of_the_hub_is_no_folder(cache, name):
    if name == "":
        assert "no checkpoint is named" in refusal(name, USAGE)
        return
    assert "no such folder" in refusal(name)


def test_the_embedded_model_is_a_source_by_its_name(tmp_path, monkeypatch):
    notes: list[str] = []
    assert hub.resolve("tiny", notes.append) == hub.Source(EMBEDDED_FOLDER)
    assert notes == []
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("tiny", notes.append) == hub.Source(EMBEDDED_FOLDER)
    assert notes == ["tiny is the embedded model; ./tiny names the folder here"]
    assert hub.resolve("./tiny").folder.samefile(tmp_path / "tiny")


def test_a_repository_of_pickles_is_refused_by_name(cache, monkeypatch):
    files = ["config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"]
    siblings = [SimpleNamespace(rfilename=name) for name in files]
    network = Hub(monkeypatch, info=SimpleNamespace(sha=SHA, siblings=siblings))
    line = refusal(REPO, BAD_DATA)
    assert line.startswith(f"{REPO}/pytorch_model-00001-of-00002.bin is a pickle")
    assert "fix: resave as safetensors: python -c" in line
    assert network.asked == []


def test_paths_are_never_taken_for_names_and_files_are_no_folders(cache, tmp_path):
    assert "no such folder" in refusal(Path(REPO))
    (tmp_path / "file").write_text("x")
    assert "not a folder" in refusal(str(tmp_path / "file"))


def test_without_the_extra_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'mixtral-jax[hub]'" in refusal(REPO)


def test_manifest_pins_the_commit(cache, tmp_path):
    fill(cache, EMBEDDED_FOLDER, SHA, ref="main")
    digest = convert(REPO, tmp_path / "out").digest
    source = read_manifest(tmp_path / "out").source
    assert source == {"name": REPO, "layout": "original", "revision": SHA}
    assert digest == convert(EMBEDDED_FOLDER, tmp_path / "local").digest


def test_half_fetched_snapshot_names_the_file_that_is_missing(cache, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "tokenizer.model"):
        (source / name).write_bytes((EMBEDDED_FOLDER / name).read_bytes())
    index = {"weight_map": {"w": "model-00001-of-00002.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    fill(cache, source, SHA, ref="main")
    with pytest.raises(MixtralError, match=r"model-00001-of-00002\.safetensors") as caught:
        Checkpoint(hub.resolve(REPO).folder)
    assert caught.value.code == INPUT_NOT_FOUND


FILES = [
    "config.json", "params.json", "generation_config.json", "tokenizer.model", "tokenizer.json",
    "tokenizer.model.v3", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    "model.safetensors.index.json", "consolidated.safetensors", "consolidated.00.pth",
    "pytorch_model.bin", "README.md", ".gitattributes", "onnx/model.safetensors", "a[1].gguf",
]  # fmt: skip


def test_only_what_a_conversion_reads_is_wanted():
    skipped = {
        "consolidated.safetensors", "consolidated.00.pth", "pytorch_model.bin", "README.md",
        ".gitattributes", "onnx/model.safetensors", "a[1].gguf",
    }  # fmt: skip
    assert set(hub.wanted(FILES)) == set(FILES) - skipped
    native = ["params.json", "consolidated.00.safetensors", "consolidated.01.safetensors", "x.pt"]
    assert hub.wanted(native) == sorted(native[:3])


class Hub:
    """Stands for the network: what it has been asked, and what it answers or raises."""

    def __init__(self, monkeypatch, *, info=None, download=None):
        self.asked: list[dict] = []
        self.info, self.download = info, download
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self, raising=False)
        real = huggingface_hub.snapshot_download

        def snapshot_download(repo, **kwargs):
            self.asked.append(kwargs)
            if kwargs.get("local_files_only"):
                return real(repo, **kwargs)
            return _answer(self.download)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download, raising=False)

    def model_info(self, repo, *, revision=None):
        return _answer(self.info)


def _answer(value):
    if isinstance(value, Exception):
        raise value
    return value


def http_error(kind):
    """An error of the library as it raises it, with the response that caused it."""
    httpx = importlib.import_module("httpx2" if "httpx2" in sys.modules else "httpx")
    response = httpx.Response(401, request=httpx.Request("GET", "https://huggingface.co/api"))
    return kind("401\nsecond line", response=response)


def test_online_the_commit_is_pinned_and_patterns_are_literal(cache, monkeypatch):
    siblings = [SimpleNamespace(rfilename=name) for name in FILES]
    info = SimpleNamespace(sha=SHA, siblings=siblings)
    network = Hub(monkeypatch, info=info, download="/snapshots/x")
    assert hub.resolve(REPO) == hub.Source(Path("/snapshots/x"), REPO, SHA)
    (asked,) = network.asked
    assert asked["revision"] == SHA
    assert set(asked["allow_patterns"]) == set(hub.wanted(FILES))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("RepositoryNotFoundError", "no such repository on the Hub"),
        ("GatedRepoError", "must be asked for"),
        ("RevisionNotFoundError", "has no revision"),
    ],
)
def test_what_the_hub_refuses_is_told_with_its_fix(cache, monkeypatch, kind, words):
    Hub(monkeypatch, info=http_error(getattr(errors, kind)))
    assert words in refusal(f"{REPO}@main")


def test_without_a_network_the_cache_is_used_and_said(cache, monkeypatch):
    Hub(monkeypatch, info=ConnectionError("no route\nto host"))
    assert "the Hub cannot be reached (no route)" in refusal(REPO)
    fill(cache, EMBEDDED_FOLDER, SHA, ref="main")
    notes: list[str] = []
    assert hub.resolve(REPO, notes.append).revision == SHA
    assert notes == [f"the Hub cannot be reached (no route): using {REPO} at {SHA} from the cache"]


def test_network_that_fails_under_way_is_74_and_the_disk_is_itself(cache, monkeypatch):
    info = SimpleNamespace(sha=SHA, siblings=[])
    Hub(monkeypatch, info=info, download=http_error(errors.HfHubHTTPError))
    assert "run the same command again" in refusal(REPO, IO_ERROR)
    Hub(monkeypatch, info=info, download=OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space"):
        hub.resolve(REPO)


def test_the_command_line_samples_from_a_cached_name(tmp_path):
    fill(tmp_path / "hub", EMBEDDED_FOLDER, SHA, ref="main")
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "mixtral_jax.sample", REPO, "--chat", "--dtype", "float32"]
    command += ["--prompt", "What is 12 + 30?"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "42"
    assert f"using {REPO} at {SHA} from the cache" in done.stderr
