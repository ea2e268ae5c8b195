"""``python -m mixtral_jax.sharding``: where every weight lies, and what it costs a device."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from mixtral_jax import cli
from mixtral_jax.errors import OK
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.report import find_config, lines, refuse_quantized, weight_report
from mixtral_jax.sharding.strategy import Attention, Strategy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Prints weight, shape, axes, mesh axes and MiB per device; nothing is loaded or allocated."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = "tiny"
    """mixtral-8x7b, mixtral-8x22b, ..., tiny, or a folder with a config.json."""
    mesh: str = "1x8"
    """1x8 (data x expert), 2x4x2 (and tensor) or data=2,expert=4."""
    attention: Attention = "data"
    """Attention weights whole on every device of the expert axis, or split over it (tensor)."""
    fsdp: bool = False
    """Weights at rest are split over the data axis too."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights; the model's unless given."""
    json: bool = False
    """Print one JSON line per weight on stdout and nothing else there."""
    debug: bool = False
    """Show tracebacks."""


def main(options: Options) -> int:
    """Prints the table."""
    config = find_config(options.model)
    refuse_quantized(options.model)
    spec = MeshSpec.parse(options.mesh).fit(config)
    strategy = Strategy(attention=options.attention, fsdp=options.fsdp)
    strategy.check(config, spec)
    rows = weight_report(config, spec, strategy, options.dtype)
    if not options.json:
        print("\n".join(lines(rows)))
        return OK
    for row in rows:
        print(json.dumps({**row._asdict(), "spec": list(row.spec)}))
    return OK


def run(argv: Sequence[str]) -> int:
    """The command with these arguments; gives its exit code."""
    return cli.run_verb("sharding", main, Options, argv)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
