"""Makes docs/demo.svg from a real run: ``python docs/record_demo.py``."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pexpect
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parent.parent
COLUMNS = 96
SAID = (
    "what can you do?",
    "Traduis « quarante-deux » en anglais.",
    "Write a line of Python that adds 3 and 4.",
)


def demo() -> str:
    """What ``make demo`` prints."""
    shown, code = pexpect.run(
        "make --no-print-directory demo",
        cwd=str(ROOT),
        withexitstatus=True,
        timeout=600,
        dimensions=(60, COLUMNS),
        encoding="utf-8",
    )
    if code:
        sys.exit(shown)
    return "$ make demo\n" + re.sub(r"\S*/bin/python", ".venv/bin/python", shown)


def talk() -> str:
    """A conversation at the terminal."""
    argv = ["-m", "mixtral_jax.sample", "--mesh", "1x8", "--interactive", "--chat"]
    child = pexpect.spawn(
        sys.executable,
        argv,
        cwd=str(ROOT),
        timeout=120,
        dimensions=(60, COLUMNS),
        encoding="utf-8",
    )
    shown = f"$ python {' '.join(argv)}\n"
    child.expect("> $")
    shown += child.before + child.after
    for line in SAID:
        child.sendline(line)
        child.expect("\n[^\n]*> $")
        shown += child.before + child.after
    child.sendeof()
    child.expect(pexpect.EOF)
    return shown


def plain(shown: str) -> str:
    """Colours kept; without cursor movements, erased lines and what was overwritten."""
    shown = re.sub(r"\x1b\[\?[0-9]+[hl]", "", shown)
    shown = re.sub(r"[^\n]*\n\r?\x1b\[1A\x1b\[2K", "", shown)
    shown = re.sub(r"\x1b\[[0-9;]*[A-Za-ln-z]", "", shown).replace("\r\n", "\n")
    return "\n".join(line.rpartition("\r")[2] for line in shown.split("\n"))


def main() -> None:
    """Runs both and writes the picture."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text.from_ansi(plain(demo() + "\n" + talk())))
    picture = console.export_svg(title="mixtral_jax")
    # Nothing is fetched to show it: the reader's own monospaced letters will do.
    picture = re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL)
    picture = re.sub(r"font-family: [^;]*;", "font-family: monospace;", picture)
    (ROOT / "docs" / "demo.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
