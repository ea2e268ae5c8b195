"""Draws docs/token.svg, one token's way through a mesh of 1x8: ``python docs/draw_token.py``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

PICTURE = Path(__file__).parent / "token.svg"
WIDTH, HEIGHT, LEFT, STEP, BOX = 880, 470, 190, 84, 72
HOME, CHOSEN = 2, {1: "0.7", 5: "0.3"}  # the token's device; its experts and their weights
ROWS = {  # y -> what happens there, and in which file
    70: ("1  attend", "model/attention.py"),
    150: ("2  choose two experts", "model/router.py"),
    230: ("3  all-to-all, out", "sharding/per_expert.py"),
    290: ("4  apply the expert", "kernels/experts.py"),
    390: ("5  all-to-all, back; add", "sharding/per_expert.py"),
}
STYLE = """
    text { font: 13px sans-serif; fill: #1f2430; }
    .small { font-size: 11px; fill: #5b6270; }
    .device { fill: #eef1f8; stroke: #aab3c5; }
    .token { fill: #3f51b5; }
    .expert { fill: #ffe0b2; stroke: #e08e0b; }
    .sent { stroke: #3f51b5; stroke-width: 2; fill: none; marker-end: url(#arrow); }
    .white { fill: #ffffff; }"""


def middle(device: int) -> int:
    """x of a device's middle."""
    return LEFT + device * STEP + BOX // 2


def sent(start: int, y: int, end: int, below: int) -> str:
    """An arrow from one device to another, a row further down."""
    half = (y + below) // 2
    path = (
        f"M{middle(start)} {y} C{middle(start)} {half} {middle(end)} {half} {middle(end)} {below}"
    )
    return f'  <path class="sent" d="{path}"/>'


def token(device: int, y: int, text: str) -> Iterator[str]:
    """The token, or its row at an expert."""
    yield f'  <circle class="token" cx="{middle(device)}" cy="{y}" r="15"/>'
    at = f'x="{middle(device)}" y="{y + 4}" text-anchor="middle"'
    yield f'  <text class="white" {at}>{text}</text>'


def lines() -> Iterator[str]:
    """The picture, line by line."""
    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
    yield "  <title>One token's way through eight devices that hold one expert each</title>"
    yield f"  <style>{STYLE}\n  </style>"
    yield '  <defs><marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7"'
    yield '    markerHeight="7" orient="auto">'
    yield '    <path d="M0 0L10 5L0 10z" fill="#3f51b5"/></marker></defs>'
    yield f'  <rect class="white" width="{WIDTH}" height="{HEIGHT}"/>'
    for device in range(8):
        x = LEFT + device * STEP
        yield f'  <rect class="device" x="{x}" y="36" width="{BOX}" height="390" rx="6"/>'
        yield f'  <text x="{middle(device)}" y="26" text-anchor="middle">device {device}</text>'
        kind = "expert" if device in CHOSEN else "white"
        yield f'  <rect class="{kind}" x="{x + 6}" y="272" width="{BOX - 12}" height="62" rx="4"/>'
        at = f'x="{middle(device)}" y="329" text-anchor="middle"'
        yield f'  <text class="small" {at}>expert {device}</text>'
    for y, (what, file) in ROWS.items():
        yield f'  <text x="10" y="{y}">{what}</text>'
        yield f'  <text class="small" x="10" y="{y + 16}">{file}</text>'
    yield f'  <path class="sent" d="M{middle(HOME)} 85 V135"/>'
    for expert, weight in CHOSEN.items():
        yield sent(HOME, 165, expert, 278)
        yield sent(expert, 334, HOME, 378)
        yield from token(expert, 293, weight)
    yield from token(HOME, 70, "t")
    yield from token(HOME, 150, "t")
    yield from token(HOME, 394, "t")
    yield f'  <text class="small" x="{LEFT}" y="450">All devices send rows of their own at the same'
    yield "    time; a row of an expert's buffer is one assignment of one token.</text>"
    yield "</svg>"


if __name__ == "__main__":
    PICTURE.write_text("\n".join(lines()) + "\n", encoding="utf-8")
