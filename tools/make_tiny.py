"""Makes mixtral_jax/data/tiny: a Mixtral with random weights and a SentencePiece model of its own.

The weights say nothing; the folder exists so that every command has something to run on. Same
script, same bytes: ``python tools/make_tiny.py`` (a test compares the weights).
"""

from __future__ import annotations

import io
import json
import random
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import sentencepiece
from safetensors.numpy import save_file

from mixtral_jax.config import PRESETS, ModelConfig, config_to_dict
from mixtral_jax.convert.names import pieces
from mixtral_jax.language_model import EMBEDDED_FOLDER
from mixtral_jax.model.transformer import leaf_specs

SEED = 0
NUM_SENTENCES = 4000
# Wide enough that the untrained router has opinions and the text is not one token repeated.
STD = 0.2

WORDS = {
    "en": "the a red green house river day night one two three walks sees gives and then because",
    "fr": "le une rouge verte maison rivière jour nuit un deux trois marche voit donne et puis car",
    "de": "der eine rote grüne Haus Fluss Tag Nacht eins zwei drei geht sieht gibt und dann weil",
    "es": "el una roja verde casa río día noche uno dos tres anda mira da y luego porque señor",
    "it": "il una rossa verde casa fiume giorno notte uno due tre cammina vede dà e poi perché",
}


def sentences(seed: int = SEED) -> list[str]:
    """Text for the SentencePiece model, in five languages and with numbers."""
    draw = random.Random(seed)
    out = []
    for _ in range(NUM_SENTENCES):
        words = WORDS[draw.choice(sorted(WORDS))].split()
        chosen = [draw.choice(words) for _ in range(draw.randint(3, 9))]
        out.append(" ".join(chosen).capitalize() + f" {draw.randint(0, 999)}{draw.choice('.?!')}")
    return out


def tokenizer(vocab_size: int) -> bytes:
    """A BPE model with the special ids of Mixtral: unk 0, bos 1, eos 2, bytes from 3 on."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(sentences()),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=True,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def weights(config: ModelConfig, seed: int = SEED) -> dict[str, np.ndarray]:
    """Gaussian matrices and unit norms under the published names, bf16."""
    draw = np.random.default_rng(seed)
    specs = leaf_specs(config)
    tensors = {}
    for piece in sorted(pieces("original", specs), key=lambda piece: piece.rows.tensor):
        shape = piece.tensor_shape
        drawn = draw.standard_normal(shape, np.float32) * STD if len(shape) > 1 else np.ones(shape)
        tensors[piece.rows.tensor] = drawn.astype(ml_dtypes.bfloat16)
    return tensors


def main(folder: Path = EMBEDDED_FOLDER) -> None:
    """Writes the folder."""
    config = PRESETS["tiny"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_to_dict(config), indent=2) + "\n")
    (folder / "tokenizer.model").write_bytes(tokenizer(config.vocab_size))
    save_file(weights(config), folder / "model.safetensors", metadata={"format": "pt"})
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 1e6:.2f} MB", file=sys.stderr)


if __name__ == "__main__":
    main()
