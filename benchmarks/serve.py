"""How much does a server write for many clients at once, and how soon?

Starts our server and ``transformers serve`` (with and without continuous batching) on the same
random weights, each in turn, and asks both the same: a closed loop (clients that each wait for
their answer) or an open one (Poisson arrivals). One client is what a server without batching
would do for all. ``--url`` measures a server that runs already, whichever it is.

    python benchmarks/serve.py --clients 1 16 --lengths 128/128 --json
    python benchmarks/serve.py --url http://localhost:3000 --rates 2 --lengths 128/2048 2048/128
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import _load
import _ours
import _servers
from _common import report, run_script
from rich.console import Console

from mixtral_jax.errors import USAGE, MixtralError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Loads servers and times their answers."""

    url: str | None = None
    """Measure this server alone; else ours and transformers are started."""
    name: str = "tiny"
    """With --url: the model that requests name."""
    model: str = "bench"
    """bench (0.79 G parameters), small, or a preset; random weights."""
    layers: int | None = None
    """Fewer than the model's, to fit."""
    dtype: str = "bfloat16"
    """Of weights and activations."""
    lengths: tuple[str, ...] = ("128/128",)
    """Tokens of prompt / of answer: 128/128, 128/2048, 2048/128, 1024/1024."""
    clients: tuple[int, ...] = (1, 16)
    """Closed loops: clients that each have one request at a time."""
    rates: tuple[float, ...] = ()
    """Open loops: requests per second, at random times (Poisson)."""
    per_client: int = 2
    """Requests of each client of a closed loop."""
    requests: int = 32
    """Requests of an open loop."""
    peers: bool = True
    """Also transformers serve."""
    rounds: int = 2
    """Of all servers in turn; medians count."""
    tokenizer: Path | None = None
    """A tokenizer.model; mistral-common's v1, if not given."""
    flags: str = ""
    """More flags for our server, in one text."""
    quick: bool = False
    """A small model and few tokens: does it still run?"""
    json: bool = False
    """Print one JSON line instead of a table."""


def parse_lengths(text: str) -> tuple[int, int]:
    """Tokens of prompt and answer."""
    prompt, slash, answer = text.partition("/")
    if not (slash and prompt.isdigit() and answer.isdigit() and int(prompt) > 1 and int(answer)):
        raise MixtralError("--lengths", expected="PROMPT/ANSWER", got=repr(text), code=USAGE)
    return int(prompt), int(answer)


def loads(options: Options) -> list[dict[str, Any]]:
    """What is asked of each server: one row of the table each."""
    found = []
    for text in options.lengths:
        prompt, answer = parse_lengths(text)
        shape = {"lengths": text, "prompt": prompt, "answer": answer}
        found += [shape | {"clients": c, "number": c * options.per_client} for c in options.clients]
        found += [shape | {"rate": r, "number": options.requests} for r in options.rates]
    return found


def measure(
    options: Options, kind: str, url: str, name: str, tokenizer: Path, round_: int
) -> list[dict[str, Any]]:
    """All loads on one server."""
    rows = []
    for number, load in enumerate(loads(options)):
        # Prompts of their own for each load and round: no prefix that was cached helps.
        seed = 1000 * round_ + number
        prompts = _servers.texts(tokenizer, load["number"] + 1, load["prompt"], seed)
        asked = _load.Load(
            url=url,
            model=name,
            prompts=prompts[:1],
            max_tokens=4,
        )
        if number == 0:
            _load.run(asked)  # whatever is made at the first request
        answers = _load.run(
            dataclasses.replace(
                asked,
                prompts=prompts[1:],
                max_tokens=load["answer"],
                clients=load.get("clients", 1),
                rate=load.get("rate"),
            )
        )
        what = f"{load['clients']} clients" if "clients" in load else f"{load['rate']:g}/s"
        rows.append(
            {"server": kind, "lengths": load["lengths"], "load": what, **_load.summary(answers)}
        )
        Console(stderr=True).print(rows[-1])
    return rows


def medians(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each server and load, over the rounds."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["server"], row["lengths"], row["load"]), []).append(row)
    return [
        {
            key: round(statistics.median(row[key] for row in group), 3)
            if isinstance(value, int | float)
            else value
            for key, value in group[0].items()
        }
        for group in groups.values()
    ]


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Our tokens per second over those of one client and of the faster transformers."""
    found: dict[str, float] = {}
    rate = {(row["server"], row["lengths"], row["load"]): row["tok/s"] for row in rows}
    for (server, lengths, load), value in rate.items():
        if server != _servers.OURS:
            continue
        alone = rate.get((server, lengths, "1 clients"))
        if alone and load != "1 clients":
            found[f"{lengths} {load}: ours / ours one at a time"] = round(value / alone, 3)
        peers = [
            rate[peer, lengths, load]
            for peer in (_servers.PEER, _servers.PEER_BATCHING)
            if (peer, lengths, load) in rate
        ]
        if peers:
            found[f"{lengths} {load}: ours / transformers serve"] = round(value / max(peers), 3)
    return found


def main(options: Options) -> int:
    """Runs and prints."""
    if options.quick:
        options = dataclasses.replace(
            options, model="small", lengths=("8/4",), clients=(1, 2), per_client=1, rounds=1,
            peers=False,
        )  # fmt: skip
    tokenizer, rows = _servers.tokenizer_file(options.tokenizer), []
    if options.url is not None:
        for round_ in range(options.rounds):
            rows += measure(options, options.url, options.url, options.name, tokenizer, round_)
    else:
        config = _ours.config_of(options.model, options.layers)
        vocab = 32000 if options.model == "small" else config.vocab_size
        config = dataclasses.replace(config, vocab_size=vocab)
        kinds = [_servers.OURS]
        kinds += [_servers.PEER, _servers.PEER_BATCHING] if options.peers else []
        with tempfile.TemporaryDirectory(prefix="serve-") as parent:
            folder = Path(parent) / "model"
            _servers.write_folder(folder, config, options.dtype, tokenizer)
            for round_ in range(options.rounds):
                for kind in kinds[:: 1 if round_ % 2 == 0 else -1]:
                    flags = options.flags.split() if kind == _servers.OURS else ()
                    with _servers.serving(kind, folder, options.dtype, flags) as url:
                        rows += measure(options, kind, url, str(folder), tokenizer, round_)
    rows = medians(rows)
    fields = dataclasses.asdict(options) | {"tokenizer": tokenizer.name, "ratios": ratios(rows)}
    report(rows, is_json=options.json, **fields)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, Options))
