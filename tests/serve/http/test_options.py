"""The command line: TGI's flags and environment, what is refused, what reaches the engine."""

from __future__ import annotations

import dataclasses

import pytest
import tyro

from mixtral_jax import cli
from mixtral_jax.convert.hub import EMBEDDED
from mixtral_jax.errors import USAGE, MixtralError
from mixtral_jax.load_options import LoadOptions
from mixtral_jax.serve import options as serve_options
from mixtral_jax.serve.__main__ import run
from mixtral_jax.serve.launcher import WITHOUT_EFFECT, arguments
from mixtral_jax.serve.options import SCHEMES, ModelFlags, ServeOptions


def parsed(*argv: str, **environ: str) -> ServeOptions:
    words, _ = arguments(argv, environ)
    return tyro.cli(ServeOptions, args=words, config=cli.PLAIN)


TGI_FLAGS = """--model-id org/name --revision r1 --num-shard 4 --quantize bitsandbytes-nf4
--dtype bfloat16 --max-input-tokens 1000 --max-total-tokens 1200 -p 8080
--max-batch-prefill-tokens 2000 --max-concurrent-requests 9 --hostname 0.0.0.0
--waiting-served-ratio 0.5 --max-best-of 2 --json-output --payload-limit 1000
--cors-allow-origin a --cors-allow-origin b --lora-adapters x=/a,y=/b"""


def test_tgis_flags_keep_their_meanings():
    found = parsed(*TGI_FLAGS.split())
    assert found.source == "org/name@r1"
    assert found.load_fields() == {"mesh": "1x4", "dtype": "bfloat16", "quantize": "nf4"}
    assert found.adapters == {"x": "/a", "y": "/b"}
    engine = found.engine_fields()
    assert engine["max_input_tokens"] == 1000
    assert engine["max_concurrent_requests"] == 9
    assert engine["waiting_served_ratio"] == 0.5
    assert (found.http.host, found.http.port) == ("0.0.0.0", 8080)
    assert found.http.cors_allow_origin == ("a", "b")
    assert found.http.payload_limit == 1000
    assert found.request.max_best_of == 2
    assert found.watch.json_output


def test_without_arguments_the_embedded_model_is_served_locally():
    found = parsed()
    assert found.source == EMBEDDED == serve_options.EMBEDDED
    assert found.load_fields() == {}
    assert (found.http.host, found.http.port) == ("127.0.0.1", 3000)


def test_the_environment_counts_where_the_command_line_is_silent():
    environ = {
        "MODEL_ID": "org/name",
        "NUM_SHARD": "2",
        "MAX_TOTAL_TOKENS": "700",
        "MAX_INPUT_LENGTH": "600",
        "PORT": "80",
        "JSON_OUTPUT": "true",
        "DISABLE_GRAMMAR_SUPPORT": "false",
        "CORS_ALLOW_ORIGIN": "a,b",
        "HOSTNAME": "9f1c2d3e",  # a container's name is no address to listen on
    }
    found = parsed(**environ)
    assert found.source == "org/name"
    assert found.load_fields()["mesh"] == "1x2"
    assert found.engine_fields()["max_total_tokens"] == 700
    assert found.engine_fields()["max_input_tokens"] == 600
    assert (found.http.port, found.http.host) == (80, "127.0.0.1")
    assert found.watch.json_output
    assert not found.request.disable_grammar_support
    assert found.http.cors_allow_origin == ("a", "b")
    found = parsed("folder", "--port", "81", "--mesh", "1x8", "--max-total-tokens=9", **environ)
    assert found.source == "folder"
    assert found.http.port == 81
    assert found.load_fields()["mesh"] == "1x8"
    assert found.engine_fields()["max_total_tokens"] == 9


def test_what_lies_here_has_no_revision(tmp_path):
    assert parsed(MODEL_ID=str(tmp_path), REVISION="main").source == str(tmp_path)
    assert parsed(MODEL_ID="/repository", REVISION="main").source == "/repository"
    assert parsed(REVISION="main").source == EMBEDDED
    assert parsed(MODEL_ID="org/name", REVISION="main").source == "org/name@main"


@pytest.mark.parametrize(
    "argv",
    ["folder", "--port 80 folder", "--port=80 folder", "--json-output folder", "folder --port 80"],
)
def test_a_checkpoint_anywhere_in_the_command_line_counts(argv):
    found = parsed(*argv.split(), MODEL_ID="org/name", CORS_ALLOW_ORIGIN="a,b")
    assert found.source == "folder"
    assert found.http.cors_allow_origin == ("a", "b")


@pytest.mark.parametrize("argv", ["--port 80", "--json-output", "--dtype bfloat16 --debug"])
def test_the_value_of_an_option_is_no_checkpoint(argv):
    assert parsed(*argv.split(), MODEL_ID="org/name").source == "org/name"


def test_flags_without_a_use_here_are_accepted_and_said():
    words, notes = arguments(
        ["--sharded", "true", "--cuda-graphs=1,2", "--trust-remote-code", "--port", "5"], {}
    )
    assert words == ["--port", "5"]
    assert notes == [
        f"{flag} has no effect here"
        for flag in ("--sharded", "--cuda-graphs", "--trust-remote-code")
    ]
    _, notes = arguments([], {"SHARDED": "true", "NGROK": "false", "MASTER_PORT": "5"})
    assert len(notes) == 2
    everything = [
        word for flag, has_value in WITHOUT_EFFECT.items() for word in [flag, *["x"] * has_value]
    ]
    assert parsed(*everything, "--port", "5").http.port == 5


REFUSED = {
    "key": (["--api-key", "k"], {}, "--api-key"),
    "key=": (["--api-key=k"], {}, "--api-key"),
    "rope": (["--rope-scaling", "linear"], {}, "--rope-scaling is not offered"),
    "ROPE": ([], {"ROPE_FACTOR": "2"}, "ROPE_FACTOR is not offered"),
    "boolean": ([], {"JSON_OUTPUT": "maybe"}, "true or false"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_of_the_launcher(name):
    argv, environ, message = REFUSED[name]
    with pytest.raises(MixtralError, match=message) as caught:
        arguments(argv, environ)
    assert caught.value.code == USAGE


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--mesh 1x2 --num-shard 2", "one of --mesh and --num-shard"),
        ("folder --model-id other", "what to serve"),
        ("--quantize exl2", "--quantize"),
        ("--max-best-of 0", "--max-best-of"),
        ("--body-timeout -1", "--body-timeout"),
        ("--body-timeout nan", "--body-timeout"),
        ("--lora-adapters =x", "--lora-adapters"),
        ("--lora-adapters a=1,a=2", "--lora-adapters"),
        ("--port 65536", "--port: expected at most 65535"),
        ("--prometheus-port 70000", "--prometheus-port: expected at most 65535"),
    ],
)
def test_refusals_of_the_options(argv, message, capsys):
    assert cli.run(lambda options: 0, ServeOptions, "serve", argv.split()) == USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize("scheme", [*SCHEMES, None])
def test_every_scheme_is_one_of_the_loader_or_of_checkpoints(scheme):
    found = ServeOptions(model=ModelFlags(quantize=scheme))
    made = found.load_fields().get("quantize")
    assert LoadOptions(quantize=made).quantize == made
    assert (made is None) == (found.checkpoint_method is not None or scheme is None)


def test_what_the_loader_is_asked_for_it_takes():
    everything = ModelFlags(
        mesh="1x2",
        dtype="float16",
        quantize="int4",
        kv_cache_dtype="fp8_e4m3fn",
        capacity_factor=2.0,
        overflow="drop",
    )
    made = LoadOptions(**ServeOptions(model=everything).load_fields())
    assert made.kv_dtype == "fp8"
    assert made.overflow == "drop"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--api-key", "k"], "environment"),
        (["--host", "0.0.0.0"], "lets other machines in"),
    ],
)
def test_an_unsafe_server_is_refused_in_one_line(argv, message, capsys, monkeypatch):
    monkeypatch.delenv("API_KEY", raising=False)
    assert run(argv) == USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert "fix: " in line


def test_options_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parsed().http.port = 1  # type: ignore[misc]
