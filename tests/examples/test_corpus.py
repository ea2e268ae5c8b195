"""What the embedded model is trained from: the text, as the trainer reads it, and no weights."""

from __future__ import annotations

import collections
import itertools
import json

import pytest

from examples.tiny import corpus
from examples.tiny.data import as_row
from examples.tiny.text import Conversation, documents
from examples.tiny.tokens import encode
from mixtral_jax import cli
from mixtral_jax.config import PRESETS, read_config
from mixtral_jax.errors import INTERRUPTED
from mixtral_jax.finetune.data.encode import encode_sft
from mixtral_jax.language_model import EMBEDDED_FOLDER
from mixtral_jax.tokenizer import Tokenizer


@pytest.fixture
def no_tokenizer(monkeypatch):
    """That of the embedded model in place of one that takes seconds to make."""
    made = (EMBEDDED_FOLDER / "tokenizer.model").read_bytes()
    monkeypatch.setattr(corpus, "make_tokenizer", lambda seed: made)


def run(folder, *arguments: str) -> int:
    return cli.run(corpus.main, corpus.Options, "corpus", [str(folder), *arguments])


def test_files(tmp_path, no_tokenizer, capsys):
    count, long_count, folder = 300, 60, tmp_path / "a"
    assert run(folder, "--documents", str(count), "--long-documents", str(long_count)) == 0
    short, long = (
        [json.loads(x) for x in (folder / name).read_text(encoding="utf-8").splitlines()]
        for name in ("train.jsonl", "long.jsonl")
    )
    assert short == [as_row(document) for document in itertools.islice(documents(0), count)]
    other = itertools.islice(documents(1, marathons=corpus.MARATHONS), long_count)
    assert long == [as_row(document) for document in other]
    turns = [len(row.get("messages", [])) // 2 for row in long]
    assert max(turns) > 20
    assert turns.count(1) > 20
    assert read_config(folder / "model") == PRESETS["tiny"]
    assert sorted(path.name for path in (folder / "model").iterdir()) == [
        "config.json",
        "tokenizer.model",
    ]
    capsys.readouterr()
    assert run(folder) == 73
    assert "exists; fix: name another folder" in capsys.readouterr().err


def test_a_run_that_ends_early_leaves_no_folder(tmp_path, no_tokenizer, monkeypatch, capsys):
    def fail(document: object) -> None:
        assert not (tmp_path / "new" / "a").exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(corpus, "as_row", fail)
        assert run(tmp_path / "new" / "a", "--documents", "3") == INTERRUPTED
    assert not list((tmp_path / "new").iterdir())
    assert run(tmp_path / "new" / "a", "--documents", "3", "--long-documents", "1") == 0
    assert (tmp_path / "new" / "a" / "model" / "config.json").is_file()
    capsys.readouterr()


def test_the_trainer_reads_the_ids_that_sampling_has():
    """And scores the answers."""
    tokenizer = Tokenizer.from_folder(EMBEDDED_FOLDER)
    seen = collections.Counter()
    for document in itertools.islice(documents(2), 300):
        ids, is_target = encode_sft(as_row(document), tokenizer)
        wanted = encode(document, tokenizer)
        assert ids.tolist() == wanted.token_ids
        assert is_target.tolist() == wanted.is_answer
        if isinstance(document, Conversation):
            seen[bool(document.system), len(document.turns) > 1] += 1
    assert len(seen) == 4, "with and without a system text, one turn and more"
