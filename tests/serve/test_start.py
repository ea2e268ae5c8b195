"""What a command asks becomes an engine, or one line that says why not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mixtral_jax.errors import BAD_CONFIG, USAGE, MixtralError
from mixtral_jax.serve.limits import EngineOptions, plan_limits
from mixtral_jax.serve.request import EngineProtocol, Refused, ServeRequest, ServeSampling
from mixtral_jax.serve.start import start
from tests.convert import checkpoints
from tests.serve.requests import finished


@dataclasses.dataclass
class Options:
    """As the command's: fields of LoadOptions and EngineOptions, adapters by name."""

    load: dict[str, Any] = dataclasses.field(default_factory=dict)
    engine: dict[str, Any] = dataclasses.field(default_factory=dict)
    adapters: dict[str, str] = dataclasses.field(default_factory=dict)
    checkpoint_method: str | None = None

    def load_fields(self) -> dict[str, Any]:
        return self.load

    def engine_fields(self) -> dict[str, Any]:
        return {"max_total_tokens": 64, "prefill_chunk": 16} | self.engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_config):
    config = small_config(num_local_experts=2, num_hidden_layers=1)
    return checkpoints.write(
        tmp_path_factory.mktemp("base") / "hf", config, checkpoints.random_tensors(config)
    )


def test_a_folder_becomes_an_engine_that_loads_then_serves(folder):
    engine = start(str(folder), Options())
    assert engine is not None
    try:
        assert isinstance(engine, EngineProtocol)
        assert engine.tokenizer is None
        request = ServeRequest(prompt_ids=(3, 4), sampling=ServeSampling(max_new_tokens=3))
        if engine.state() == "loading":
            with pytest.raises(Refused) as caught:
                engine.submit(request)
            assert caught.value.kind == "unavailable"
        engine.wait()
        assert engine.state() == "ready"
        assert finished(engine.submit(request)).prompt_tokens == 2
        assert (engine.model.name, engine.limits.max_total_tokens) == (str(folder), 64)
    finally:
        engine.close()


def test_a_checkpoint_that_is_not_quantized_as_asked_is_refused(folder):
    with pytest.raises(MixtralError, match="gptq") as caught:
        start(str(folder), Options(checkpoint_method="gptq"))
    assert caught.value.code == BAD_CONFIG


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"max_total_tokens": 1000}, "max-total-tokens"),
        ({"max_input_tokens": 64}, "max-input-tokens"),
        ({"max_batch_prefill_tokens": 10}, "max-batch-prefill-tokens"),
        ({"max_batch_total_tokens": 100}, "max-batch-total-tokens"),
        ({"prefill_chunk": 48}, "prefill-chunk"),
        ({"steps_per_call": 0}, "steps-per-call"),
        ({"waiting_served_ratio": float("nan")}, "waiting-served-ratio"),
    ],
)
def test_limits_that_do_not_fit_are_refused(small_lm, fields, told):
    with pytest.raises(MixtralError, match=told) as caught:
        plan_limits(small_lm, EngineOptions(**({"max_total_tokens": 64} | fields)))
    assert caught.value.code == USAGE
