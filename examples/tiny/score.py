"""Counts exact answers on held-out prompts: ``python -m examples.tiny.score``.

Every prompt is answered greedily by the same code that users run; an answer is right if its text is
the expected text, letter for letter. Ends with exit code 1 where a target is missed.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mixtral_jax as mj
from examples.tiny.text import Conversation, Example, held_out
from examples.tiny.tokens import encode
from mixtral_jax import cli
from mixtral_jax.errors import OK, USAGE, MixtralError
from mixtral_jax.evaluate.exact import Question, ask
from mixtral_jax.language_model import LanguageModel
from mixtral_jax.model.placement import Placement
from mixtral_jax.model.transformer import Mixtral

OVERALL, EACH_FAMILY, EACH_EXPERT = 0.95, 0.90, 0.03
MISSED = 1  # the exit code where a target is missed
MAX_NEW_TOKENS = 96
ROWS = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Counts exact answers on held-out prompts."""

    checkpoint: tyro.conf.Positional[str] = "tiny"
    """A checkpoint folder, or 'tiny'."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations."""
    per_family: Annotated[int, tyro.conf.arg(metavar="N")] = 600
    """Prompts of each family, where there are so many."""
    seed: int = 0
    """Chooses the prompts."""
    mistakes: int = 0
    """Print so many wrong answers of each family, on stderr."""
    json: bool = False
    """Print one JSON line and nothing else on stdout."""
    debug: bool = False
    """Show tracebacks."""

    def __post_init__(self):
        if self.per_family < 1:
            got = self.per_family
            raise MixtralError("--per-family", expected="1 or more", got=got, code=USAGE)


@dataclasses.dataclass(frozen=True)
class Score:
    """Right answers and questions of each family, and the expert loads of each layer.

    ``loads[layer][expert]`` is the share of the layer's assignments over prompts and answers.
    """

    right: dict[str, int]
    asked: dict[str, int]
    loads: list[list[float]]
    mistakes: list[tuple[Example, str]]

    @property
    def overall(self) -> float:
        """Exact answers per question."""
        return sum(self.right.values()) / sum(self.asked.values())

    def share(self, family: str) -> float:
        """Exact answers per question of a family."""
        return self.right[family] / self.asked[family]

    @property
    def least_load(self) -> float:
        """Of any expert in any layer."""
        return min(min(layer) for layer in self.loads)

    def is_enough(self) -> bool:
        """Whether every target is reached."""
        families = min(map(self.share, self.asked))
        reached = self.overall >= OVERALL and families >= EACH_FAMILY
        return reached and self.least_load >= EACH_EXPERT

    def record(self) -> dict[str, Any]:
        """As JSON."""
        families = {name: round(self.share(name), 4) for name in self.asked}
        loads = [[round(share, 4) for share in layer] for layer in self.loads]
        asked = sum(self.asked.values())
        overall = round(self.overall, 4)
        return {
            "overall": overall,
            "asked": asked,
            "is_enough": self.is_enough(),
            "families": families,
            "expert_loads": loads,
        }


Watch = Callable[[Sequence[Any]], Iterable[Any]]


def score(lm: LanguageModel, examples: Sequence[Example], watch: Watch = iter) -> Score:
    """Asks every example. ``watch`` wraps the batches, to show progress."""
    asked = collections.Counter(example.family for example in examples)
    right: collections.Counter[str] = collections.Counter(dict.fromkeys(asked, 0))
    questions = [Question(prompt=example.prompt, answer=example.answer) for example in examples]
    asking = ask(lm, questions, chat=True, max_new_tokens=MAX_NEW_TOKENS, batch=ROWS, watch=watch)
    mistakes = []
    for example, answer in zip(examples, asking.answers, strict=True):
        if answer.generated_text == example.answer:
            right[example.family] += 1
        else:
            mistakes.append((example, answer.generated_text))
    return Score(dict(right), dict(asked), expert_loads(lm, examples), mistakes)


@functools.partial(jax.jit, static_argnames="placement")
def _chosen(model: Mixtral, tokens: Any, valid: Any, placement: Placement) -> Any:
    routing = model.hidden(tokens, valid, placement=placement).routing
    return [layer.expert_ids for layer in routing]


def expert_loads(lm: LanguageModel, examples: Sequence[Example]) -> list[list[float]]:
    """Share of each layer's assignments by expert, over the prompts with their right answers."""
    assert lm.tokenizer is not None
    rows = [encode(Conversation((example,)), lm.tokenizer).token_ids for example in examples]
    length = 16 * -(-max(map(len, rows)) // 16)
    counts = np.zeros((lm.config.num_hidden_layers, lm.config.num_local_experts))
    for i in range(0, len(rows), ROWS):
        chunk = [*rows[i : i + ROWS], *[[]] * (ROWS - len(rows[i : i + ROWS]))]
        tokens = np.array([row + [0] * (length - len(row)) for row in chunk], np.int32)
        valid = np.arange(length) < np.array([len(row) for row in chunk])[:, None]
        chosen = jax.device_get(_chosen(lm.model, tokens, valid, lm.placement))
        for layer, expert_ids in enumerate(chosen):
            used = expert_ids[valid.reshape(-1)].reshape(-1)
            counts[layer] += np.bincount(used, minlength=counts.shape[1])
    return (counts / counts.sum(axis=1, keepdims=True)).tolist()


def table(result: Score) -> Table:
    """For people."""
    made = Table("family", "asked", "right", "share")
    for family in result.asked:
        share = f"{result.share(family):.1%}"
        made.add_row(family, str(result.asked[family]), str(result.right[family]), share)
    total, right = sum(result.asked.values()), sum(result.right.values())
    made.add_section()
    made.add_row("all", str(total), str(right), f"{result.overall:.1%}")
    made.caption = f"least load of an expert, of any layer: {result.least_load:.1%}"
    return made


def main(options: Options) -> int:
    """Loads, asks, prints."""
    lm = mj.load(options.checkpoint, mesh="1x1", dtype=options.dtype)
    console = Console(stderr=True)
    watch = functools.partial(track, description="asking", console=console, transient=True)
    examples = held_out(options.per_family, seed=options.seed)
    result = score(lm, examples, watch)
    shown: collections.Counter[str] = collections.Counter()
    for example, got in result.mistakes:
        shown[example.family] += 1
        if shown[example.family] <= options.mistakes:
            line = f"{example.family}: {example.prompt!r}: {got!r}, not {example.answer!r}"
            print(line, file=sys.stderr)
    if options.json:
        print(json.dumps({"dtype": options.dtype, **result.record()}))
    else:
        Console().print(table(result))
    return OK if result.is_enough() else MISSED


if __name__ == "__main__":
    sys.exit(cli.run(main, Options, "python -m examples.tiny.score"))
