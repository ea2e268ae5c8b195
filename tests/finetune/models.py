"""A small checkpoint with the embedded model's tokenizer, and conversations to learn."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixtral_jax.config import ModelConfig
from mixtral_jax.convert.hub import EMBEDDED_FOLDER
from mixtral_jax.convert.save import save_model
from mixtral_jax.tokenizer import Tokenizer, find_tokenizer
from tests.models import random_model

QUESTIONS = (("1+1=", "2"), ("2+2=", "4"), ("one and two", "three"), ("a, b,", "c"))


def make_folder(
    folder: Path, small_config: Callable[..., ModelConfig], **fields: Any
) -> tuple[Path, Path]:
    """``folder/model`` and ``folder/chat.jsonl``."""
    vocab_size = Tokenizer.from_folder(EMBEDDED_FOLDER).vocab_size
    config = small_config(vocab_size=vocab_size, num_hidden_layers=1, **fields)
    save_model(random_model(config), folder / "model")
    tokenizer = find_tokenizer(EMBEDDED_FOLDER)
    assert tokenizer is not None
    shutil.copy(tokenizer, folder / "model")
    lines = (
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in QUESTIONS
    )
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "model", folder / "chat.jsonl"
