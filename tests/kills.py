"""Programs that kill themselves without warning at the n-th system event."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.environ import without_devices

ROOT = Path(__file__).parents[1]

# Opening, renaming, making, removing count, in whatever thread they happen, from ``begin`` on.
_COUNTING = """
import os, signal, sys
events, n = 0, int(sys.argv.pop(1))
def count(event, arguments):
    global events
    if event.startswith(("open", "os.", "shutil.")):
        events += 1
        if events == n:
            os.kill(os.getpid(), signal.SIGKILL)
def begin():
    sys.addaudithook(count)
import jax; jax.config.update("jax_platforms", "cpu")
"""


def run_killed(program: str, n: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a program with ``begin`` and ``events`` at hand, and ``arguments`` from sys.argv[1] on.

    Args:
        program: Python; it calls ``begin`` where the counting is to begin.
        n: the event that kills it; -1 for none.
        arguments: of the program.
    """
    return subprocess.run(
        [sys.executable, "-c", _COUNTING + program, str(n), *map(str, arguments)],
        cwd=ROOT,
        # Nobody gets the devices that the tests simulate for themselves.
        env=without_devices() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
