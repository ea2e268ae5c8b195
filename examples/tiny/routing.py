"""What the experts of the embedded model are for: ``python -m examples.tiny.routing docs``.

Writes routing-tiny.md into that folder, with routing-languages.svg and routing-families.svg, from
conversations of ``examples.tiny.data``. Every number there comes from this command, so run it again
whenever the embedded model changes: ``make routing``.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from examples.tiny.data import as_json, groups, write_lines
from mixtral_jax import cli
from mixtral_jax.errors import INPUT_NOT_FOUND, OK, MixtralError
from mixtral_jax.evaluate.pictures import draw_routing
from mixtral_jax.evaluate.routing_report import class_tokens, most_of
from mixtral_jax.evaluate.specialisation import mutual_information, uniform_repetition
from mixtral_jax.evaluate.study import Study, study
from mixtral_jax.evaluate.text import TextFile
from mixtral_jax.evaluate.token_classes import CLASSES
from mixtral_jax.evaluate.windows import Windowing
from mixtral_jax.language_model import load
from mixtral_jax.tokenizer import Tokenizer

KINDS = {"language": "languages", "family": "families"}
SCHEME = "int8"
BATCH = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Writes routing-tiny.md and its pictures."""

    folder: tyro.conf.Positional[Path]
    """That exists; files of these names are replaced."""
    per_group: Annotated[int, tyro.conf.arg(metavar="N")] = 100
    """Conversations of each language, and of each family."""
    seed: int = 0
    """Chooses them."""
    debug: bool = False
    """Show tracebacks."""

    def __post_init__(self):
        if not self.folder.is_dir():
            what, fix = f"no folder {self.folder}", "make it first"
            raise MixtralError(what, fix=fix, code=INPUT_NOT_FOUND)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines] + [""]


def by_text(found: Study, kind: str) -> list[str]:
    """Where most of each text goes, and how far apart they are."""
    assert found.divergence is not None
    assert found.by_chance is not None
    names = [text.dataset.file.split("-")[1].split(".")[0] for text in found.texts]
    tokens = ", ".join(
        f"{name} {text.counts.tokens:,}" for name, text in zip(names, found.texts, strict=True)
    )
    rows = [
        [layer, *(most_of(text.counts.shares[layer]) for text in found.texts), f"{bits:.3f}"]
        for layer, bits in enumerate(found.divergence)
    ]
    chance = f"{found.by_chance:.3f} is what equal texts would have by chance"
    return [
        f"The expert that gets most of each {kind}'s assignments, and the generalized "
        f"Jensen-Shannon divergence of their loads in bits ({chance}). Tokens: {tokens}.",
        "",
        *table(["layer", *names, "divergence"], rows),
    ]


def of_all(found: Study) -> list[str]:
    """Repetition, classes of tokens, and the agreement with the other model."""
    total = found.total
    _, A, E = total.by_choice.shape
    uniform = uniform_repetition(E, A)
    rows = []
    for layer in range(len(total.counts)):
        repeats = total.same_first[layer], total.same_any[layer]
        rows.append([layer, *(f"{each / total.pairs:.1%}" for each in repeats)])
    present = [i for i, tokens in enumerate(class_tokens(total)) if tokens]
    information = mutual_information(total.by_class)
    classes = []
    for layer, counts in enumerate(total.by_class):
        shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
        cells = [most_of(shares[i]) for i in present]
        classes.append([layer, *cells, f"{information[layer]:.3f}"])
    lines = [
        f"Consecutive tokens with the same first choice ({uniform.first:.1%} if choices were even "
        f"and independent), and with an expert in common ({uniform.any:.1%}).",
        "",
        *table(["layer", "same first choice", "an expert in common"], rows),
        "The expert that gets most of each class of tokens, and the mutual information of class "
        "and expert in bits.",
        "",
        *table(["layer", *(CLASSES[i] for i in present), "information"], classes),
    ]
    if found.agreement is not None:
        alike = [
            [layer, f"{first:.2%}", f"{same:.2%}"]
            for layer, (first, same) in enumerate(zip(*found.agreement[:2], strict=True))
        ]
        lines += [
            f"In {SCHEME}: tokens with the same first choice, and with the same set of experts.",
            "",
            *table(["layer", "same first choice", "same set"], alike),
        ]
    return lines


def main(options: Options) -> int:
    """Writes the files."""
    lm, rounded = load(mesh="1x1"), load(mesh="1x1", quantize=SCHEME)
    assert isinstance(lm.tokenizer, Tokenizer)
    command = f"python -m examples.tiny.routing docs --per-group {options.per_group}"
    lines = [
        "# The experts of the embedded model",
        "",
        f"Made by `{command} --seed {options.seed}`; how to read it: [evaluate.md](evaluate.md).",
        "",
    ]
    files = groups(options.per_group, seed=options.seed)
    for kind, plural in KINDS.items():
        names = [name for name in files if name.startswith(f"{kind}-")]
        with tempfile.TemporaryDirectory() as made:
            write_lines(Path(made), {name: as_json(files[name]) for name in names})
            found = study(
                [lm, rounded] if kind == "language" else [lm],
                [TextFile(Path(made) / name) for name in names],
                tokenizer=lm.tokenizer,
                windowing=Windowing(context=256),
                batch=BATCH,
            )
        picture = f"routing-{plural}.svg"
        title = f"The embedded model on conversations, {options.per_group} of each {kind}"
        draw_routing(found, title, options.folder / picture)
        lines += [f"## By {kind}", "", *by_text(found, kind)]
        lines += [f"![Loads by {kind}]({picture})", ""]
        if kind == "language":
            lines += [f"## All {plural} together", "", *of_all(found)]
    path = options.folder / "routing-tiny.md"
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print(f"{path}, {', '.join(f'routing-{plural}.svg' for plural in KINDS.values())}")
    return OK


if __name__ == "__main__":
    sys.exit(cli.run(main, Options, "python -m examples.tiny.routing"))
