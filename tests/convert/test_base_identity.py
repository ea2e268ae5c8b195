"""An adapter knows its base again, quantized or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixtral_jax import cli
from mixtral_jax.convert import convert
from mixtral_jax.convert.base_identity import check_base, identity_of
from mixtral_jax.errors import BAD_DATA, OK, MixtralError
from mixtral_jax.quantize.__main__ import Options, main
from tests.convert import checkpoints

BASES = ("hf", "ours", "hf-int8", "ours-int8", "ours-nf4")


def write(folder: Path, config, seed: int) -> None:
    """A published folder, ours, and quantized ones of each."""
    checkpoints.write(folder / "hf", config, checkpoints.random_tensors(config, seed))
    convert(folder / "hf", folder / "ours")
    for name in BASES[2:]:
        source, scheme = name.split("-")
        words = (str(folder / source), str(folder / name), "--scheme", scheme)
        assert cli.run(main, Options, "quantize", words) == OK


@pytest.fixture(scope="module")
def bases(tmp_path_factory, small_config) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    config = small_config(hidden_size=64, head_dim=16, num_hidden_layers=1, num_local_experts=2)
    for seed, name in enumerate(("one", "other")):
        (folder / name).mkdir()
        write(folder / name, config, seed)
    return folder


@pytest.mark.parametrize(
    ("trained_on", "loaded_on"),
    [
        ("hf", "hf-int8"),
        ("hf-int8", "hf"),
        ("ours", "ours-int8"),
        ("ours-int8", "ours"),
        ("ours-int8", "ours-nf4"),
        ("ours", "hf"),
        ("ours", "hf-int8"),
        ("ours", "ours"),
    ],
)
def test_an_adapter_fits_its_base_quantized_or_not_and_no_other(bases, trained_on, loaded_on):
    carried = identity_of(bases / "one" / trained_on)
    check_base("a", carried, bases / "one" / loaded_on)
    with pytest.raises(MixtralError, match="one that was trained on") as caught:
        check_base("a", carried, bases / "other" / loaded_on)
    assert caught.value.code == BAD_DATA
