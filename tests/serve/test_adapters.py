"""Several adapters in one batch: each row is answered as its adapter alone would answer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from mixtral_jax.errors import BAD_CONFIG, MixtralError
from mixtral_jax.kernels.contract import contract
from mixtral_jax.language_model import load
from mixtral_jax.serve.adapters import with_adapters
from mixtral_jax.serve.request import Refused, ServeRequest, ServeSampling
from mixtral_jax.weights import Adapted, RowAdapted, choose_adapters
from tests.convert import checkpoints
from tests.serve.conftest import SMALL
from tests.serve.requests import finished

ATTENTION = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkvo"]
PROMPTS = [(1, 5, 9), tuple(range(3, 40)), (7,)]


@pytest.fixture(scope="module")
def config(small_config):
    return small_config(num_local_experts=4)


@pytest.fixture(scope="module")
def tensors(config) -> dict[str, np.ndarray]:
    return checkpoints.mild_tensors(config)


@pytest.fixture(scope="module")
def base(tmp_path_factory, config, tensors) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("base") / "hf", config, tensors)


def write(folder: Path, tensors: dict[str, np.ndarray], modules: list[str], rank: int) -> Path:
    folder.mkdir(parents=True)
    draw, factors = np.random.default_rng(rank), {}
    for module in modules:
        out, summed = tensors[f"{module}.weight"].shape
        for letter, shape in (("A", (rank, summed)), ("B", (out, rank))):
            name = f"base_model.model.{module}.lora_{letter}.weight"
            factors[name] = 0.5 * draw.standard_normal(shape, np.float32)
    names = sorted({module.rpartition(".")[2] for module in modules})
    asked = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(asked))
    save_file(factors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tensors) -> dict[str, Path]:
    """Of other ranks, scales and modules."""
    at = tmp_path_factory.mktemp("adapters")
    queries = [name for name in ATTENTION if name.endswith(("q_proj", "v_proj"))]
    return {
        "all": write(at / "all", tensors, ATTENTION, 3),
        "queries": write(at / "queries", tensors, queries, 2),
    }


def test_a_product_of_rows_is_that_of_each_rows_own_adapter():
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    x, w, a, b = draw(4, 5, 8), draw(6, 8), draw(3, 2, 8), draw(3, 6, 2)
    scales, ids = jnp.asarray([0.0, 0.5, 2.0]), jnp.asarray([2, 0, 1, 2])
    a, b = a.at[0].set(0), b.at[0].set(0)
    at_rest = RowAdapted(w, a, b, scales)
    chosen = choose_adapters({"w": at_rest, "other": w}, ids)
    got = contract("BTD,OD->BTO", x, chosen["w"])
    for row, k in enumerate(ids.tolist()):
        own = Adapted(w, a[k], b[k], float(scales[k]))
        np.testing.assert_allclose(got[row], contract("BTD,OD->BTO", x, own)[row], atol=1e-5)
    np.testing.assert_array_equal(got[1], contract("BTD,OD->BTO", x, w)[1])
    np.testing.assert_array_equal(
        contract("BTD,OD->BTO", x, at_rest), contract("BTD,OD->BTO", x, w)
    )


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["1x1", "2x2", "1x2x2"])
def test_rows_of_one_batch_use_their_own_adapters(make_engine, base, adapters, mesh):
    lm = with_adapters(load(base, mesh=mesh), adapters)
    options = dataclasses.replace(SMALL, max_total_tokens=128, prefix_cache_bytes=1 << 20)
    engine = make_engine(lm, options, adapters=tuple(adapters))
    assert engine.model.adapters == ("all", "queries")
    expected = {}
    for name in (None, *adapters):
        alone = load(base, mesh=mesh, adapter=None if name is None else str(adapters[name]))
        answers = alone.generate(prompt_token_ids=PROMPTS, max_new_tokens=12, ignore_eos=True)
        expected[name] = [tuple(answer.token_ids) for answer in answers]
    assert len({tuple(answers) for answers in expected.values()}) == 3
    for _ in range(2):  # the second time out of the prefix cache
        tickets = [
            (name, i, engine.submit(asked(prompt, name)))
            for i, prompt in enumerate(PROMPTS)
            for name in expected
        ]
        ends = [(name, i, finished(ticket)) for name, i, ticket in tickets]
        for name, i, end in ends:
            assert end.token_ids == expected[name][i], (name, i)
    assert sum(end.cached_tokens for _, _, end in ends) == 3 * 32
    assert engine.stats().counters["compilations_since_ready"] == 0
    with pytest.raises(Refused, match="all, queries"):
        engine.submit(asked(PROMPTS[0], "other"))


def asked(prompt: tuple[int, ...], name: str | None) -> ServeRequest:
    sampling = ServeSampling(max_new_tokens=12, ignore_eos=True)
    return ServeRequest(prompt_ids=prompt, sampling=sampling, adapter_id=name)


def test_an_adapter_of_experts_is_refused(tmp_path, base, tensors):
    routers = [f"model.layers.{i}.block_sparse_moe.gate" for i in range(2)]
    folder = write(tmp_path / "router", tensors, routers, 2)
    with pytest.raises(MixtralError, match="attention alone") as caught:
        with_adapters(load(base), {"x": folder})
    assert caught.value.code == BAD_CONFIG
    adapter = write(tmp_path / "one", tensors, ATTENTION, 2)
    with pytest.raises(MixtralError, match="already"):
        with_adapters(load(base, adapter=str(adapter)), {"x": adapter})
