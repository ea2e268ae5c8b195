"""Many processes, one engine: process 0 serves, the others execute what it says."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from mixtral_jax.language_model import LanguageModel
from mixtral_jax.serve.commands import Command, Stop, from_json, to_json
from mixtral_jax.serve.device import Device, DevicePlan
from mixtral_jax.sharding import hosts


def tell(command: Command) -> None:
    """On process 0: sends a command to the others, right before it is executed here."""
    if hosts.num_processes() > 1:
        hosts.order(to_json(command))


def follow(lm: LanguageModel, plan: DevicePlan) -> None:
    """On the others: executes commands until process 0 says that no more come.

    A lost process ends all of them (sharding/peers.py), here too. A first SIGTERM or SIGINT is left
    to process 0, which finishes what runs and then tells the others: clusters signal every process
    of a group at once, and one that left early would end all answers.

    Args:
        lm: the same model, loaded on the same mesh.
        plan: that of the engine (``plan_limits`` of the same options).
    """
    _leave_signals_to_first()
    device = Device(lm.model, lm.placement, plan)
    while not isinstance(command := from_json(hosts.await_order()), Stop):
        device.execute(command)


def _leave_signals_to_first() -> None:
    """The second signal is taken as it would have been without this."""
    if threading.current_thread() is not threading.main_thread():
        return  # signals are not its business
    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.getsignal(number)

        def once(got: int, frame: FrameType | None, before: Any = before) -> None:
            signal.signal(got, before)

        signal.signal(number, once)
