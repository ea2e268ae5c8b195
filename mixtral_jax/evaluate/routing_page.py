"""Text on a page of its own, every token in the colour of the expert that it goes to first."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_jax.evaluate.routing import Choices
from mixtral_jax.evaluate.routing_report import names_of
from mixtral_jax.evaluate.study import Study
from mixtral_jax.plots import check_file
from mixtral_jax.tokenizer import Tokenizer

DEFAULT_TOKENS = 2000
_TEMPLATE = Path(__file__).with_name("routing_page.html")
_RETURN = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"


def check_page(path: Path) -> None:
    """Refuses a page that could not be written, before anything is computed.

    Raises:
        MixtralError: as ``check_file``.
    """
    check_file("--html", path, (".html", ".htm"))


def page(study: Study, title: str, tokenizer: Tokenizer) -> str:
    """One HTML file that needs no other: styles and script inside, no outside address.

    Args:
        study: of texts whose first tokens were kept; they are what is shown.
        title: of the page.
        tokenizer: spells the tokens.
    """
    kept = [each.kept for each in study.texts]
    shown = [choices for choices in kept if choices is not None]
    num_layers, _, num_experts = study.total.by_choice.shape
    count = sum(len(choices.token_ids) for choices in shown)
    names = names_of([each.dataset for each in study.texts])
    bound = f"The first {count:,} tokens of {study.total.tokens:,}"
    bound += f", {len(names)} texts." if len(names) > 1 else "."
    sections = [
        f"<h2>{html.escape(name)}</h2>\n<div class=text>{_spans(choices, tokenizer)}</div>"
        for name, choices in zip(names, kept, strict=True)
        if choices is not None
    ]
    parts = {
        "title": html.escape(title),
        "styles": "\n".join(_style(expert, num_experts) for expert in range(num_experts)),
        "layers": "".join(f"<option value={i}>{i}</option>" for i in range(num_layers)),
        "legend": "".join(
            f"<button class=e{expert}>expert {expert}</button>" for expert in range(num_experts)
        ),
        "bound": bound,
        "texts": "\n".join(sections),
        "data": _json(_data(shown, tokenizer, num_layers)),
    }
    # At once: a text may hold what looks like a place of the template.
    template = _TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"@(\w+)@", lambda place: parts[place[1]], template)


def spelled(tokenizer: Tokenizer, token_id: int) -> tuple[str, bool]:
    """How a token is shown, and whether that is its name instead of its text."""
    if tokenizer.byte_of(token_id) == ord("\n"):
        return "\n", False
    if tokenizer.is_control(token_id) or tokenizer.byte_of(token_id) is not None:
        return tokenizer.pieces[token_id], True
    return tokenizer.text_of(token_id), False


def _spans(choices: Choices, tokenizer: Tokenizer) -> str:
    """Coloured by layer 0; the script paints the others."""
    spans = []
    for token_id, expert in zip(choices.token_ids, choices.expert_ids[0, :, 0], strict=True):
        text, is_name = spelled(tokenizer, int(token_id))
        shown = html.escape(text).replace("\n", f"{_RETURN}\n")
        shown = f"<small class=piece>{shown}</small>" if is_name else shown
        spans.append(f"<span class=e{expert}>{shown}</span>")
    return "".join(spans)


def _data(shown: Sequence[Choices], tokenizer: Tokenizer, num_layers: int) -> dict[str, Any]:
    ids = [int(token_id) for choices in shown for token_id in choices.token_ids]
    return {
        "tokens": [spelled(tokenizer, token_id)[0] for token_id in ids],
        "layers": [
            {
                "experts": [row for c in shown for row in c.expert_ids[layer].tolist()],
                "weights": [
                    row
                    for c in shown
                    for row in np.round(c.weights[layer].astype(np.float64), 3).tolist()
                ],
            }
            for layer in range(num_layers)
        ],
    }


def _json(value: Any) -> str:
    """JSON that cannot end the element that it stands in."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _style(expert: int, num_experts: int) -> str:
    hue = round(360 * expert / num_experts)
    return f".e{expert} {{ background: hsl({hue} var(--s) var(--l)); }}"
