"""Many processes, one program: joining, taking the same steps, and leaving.

Everything here does nothing, at no cost, where a command runs as one process.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from mixtral_jax.errors import OK, MixtralError
from mixtral_jax.sharding.agreement import Facts, option_facts, version_facts
from mixtral_jax.sharding.cluster import ProcessOptions, find_cluster
from mixtral_jax.sharding.peers import Peers

JOIN_SECONDS = 300.0
_VERDICT_SECONDS = 3.0  # a broken collective may be noticed before the peer that broke it

Tree = TypeVar("Tree")
Result = TypeVar("Result")
_peers: Peers | None = None


def join(options: ProcessOptions, command: object = None, *, with_jax: bool = True) -> bool:
    """Joins the other processes of this command, if there are any. Call it before JAX is used.

    Args:
        options: flags; without them the environment of the cluster is asked.
        command: a dataclass of what was asked, which all processes must have been asked alike.
        with_jax: start jax.distributed, so that ``jax.devices()`` are those of all processes.

    Returns:
        Whether there are others.

    Raises:
        MixtralError: exit code 64 for wrong flags, or others than those of process 0; 76 if the
            others do not come.
    """
    global _peers  # noqa: PLW0603 - a process joins once, as jax.distributed has it too
    cluster = find_cluster(options, os.environ)
    if cluster is None or _peers is not None:
        return cluster is not None
    peers = Peers(
        cluster.host,
        cluster.port + 1,
        cluster.num_processes,
        cluster.process_id,
        timeout=options.peer_timeout,
    )
    peers.join(JOIN_SECONDS)
    _peers = peers
    asked = {} if command is None else option_facts(command)
    peers.barrier("start", {**version_facts(), **asked})
    if with_jax:
        _keep_stdout_clean()
        # Or the runtime aborts the survivors (134) before we can say who is lost.
        _delay_aborts()
        jax.config.update("jax_enable_recoverability", True)
        jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.num_processes,
            cluster.process_id,
            cluster_detection_method="deactivate",
        )
    return True


def _keep_stdout_clean() -> None:
    """Libraries below Python write to file descriptor 1 (gloo does): let them write to stderr."""
    ours = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = open(ours, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # noqa: SIM115


def _delay_aborts() -> None:
    """Gives the heartbeat the last word where process 0 is gone.

    jax's client then calls abort() in a thread of its own, often before our thread has seen the end
    of its connection. The handler of SIGABRT becomes C's sleep(), which is called with the number
    of the signal: that thread sleeps 6 seconds, while ours ends the process with a line and code
    76. No handler in Python could do it: the main thread would run it, and waits in a collective.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def num_processes() -> int:
    """Processes of this command."""
    return 1 if _peers is None else _peers.num_processes


def process_id() -> int:
    """Which of them this is."""
    return 0 if _peers is None else _peers.process_id


def is_first() -> bool:
    """Whether this is the process that prints."""
    return process_id() == 0


def begin_step() -> None:
    """Call it right before a program that all processes run, when its arguments are ready."""
    if _peers is not None:
        _peers.step()


def of_first(value: float) -> float:
    """Process 0's number (as float32), in every process; each must call it."""
    if _peers is None:
        return value
    from jax.experimental import multihost_utils

    begin_step()
    return float(multihost_utils.broadcast_one_to_all(np.float32(value)))


def text_of_first(text: str) -> str:
    """Process 0's text, in every process; each must call it."""
    if _peers is None:
        return text
    from jax.experimental import multihost_utils

    length = int(of_first(float(len(text.encode()))))
    own = np.frombuffer(text.encode(), np.uint8) if is_first() else np.zeros(length, np.uint8)
    begin_step()
    return np.asarray(multihost_utils.broadcast_one_to_all(own)).tobytes().decode()


def is_any(flag: bool) -> bool:
    """Whether it holds in some process; each must call it."""
    if _peers is None:
        return flag
    from jax.experimental import multihost_utils

    begin_step()
    return bool(multihost_utils.process_allgather(np.bool_(flag)).any())


def barrier(name: str, *, may_wait_for_first: bool = False) -> None:
    """Waits for all processes.

    Args:
        name: of the barrier, the same in all.
        may_wait_for_first: process 0 is never stuck before it, whatever it does.

    Raises:
        MixtralError: exit code 64, in every process, where they came to different barriers.
    """
    if _peers is not None:
        _peers.barrier(name, may_wait_for_first=may_wait_for_first)


def by_first(
    options: ProcessOptions, command: object, done: str, work: Callable[[], Result]
) -> Result | None:
    """Joins the other processes, if there are any, and works in process 0 alone.

    Args:
        options: as ``join``.
        command: as ``join``.
        done: name of the barrier where the others wait for it, so as not to run ahead.
        work: what it does, without jax.distributed.

    Returns:
        What the work gave; None in the others.

    Raises:
        MixtralError: as ``join``.
    """
    join(options, command, with_jax=False)
    made = work() if is_first() else None
    barrier(done, may_wait_for_first=True)
    return made


def agree(name: str, facts: Callable[[], Facts]) -> None:
    """A barrier before which all must say the same of what they are about to do.

    Args:
        name: of the barrier, the same in all.
        facts: called where there are others (see agreement.py).

    Raises:
        MixtralError: exit code 64, in every process, where they differ.
    """
    if _peers is not None:
        _peers.barrier(name, facts())


def order(message: dict) -> None:
    """On process 0: tells the others, if there are any, what to do next (JSON, up to 16 MB)."""
    if _peers is not None:
        _peers.order(message)


def await_order() -> dict:
    """On the others: waits for what process 0 says to do next."""
    assert _peers is not None
    assert not is_first()
    return _peers.await_order()


def leave(code: int) -> None:
    """Says goodbye. All go together; with a fault this process ends here and does not wait."""
    if _peers is None:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if code != OK:
        _peers.leave(code)
        os._exit(code)
    _peers.barrier("end", may_wait_for_first=True)  # it prints, and its reader may be slow
    if is_first():  # holds jax's coordination service: the last to go
        _peers.wait_for_others()
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
    _peers.leave(code)


def await_verdict() -> None:
    """After an unexpected fault: time to learn that a peer is lost, which ends this process."""
    if _peers is not None:
        time.sleep(_VERDICT_SECONDS)


def fetch(tree: Tree) -> Tree:
    """Arrays to numpy, also where other processes hold parts; every process must call it.

    Args:
        tree: of jax arrays.

    Returns:
        The same tree of whole numpy arrays.
    """
    leaves, form = jax.tree.flatten(tree)
    parts = [i for i, leaf in enumerate(leaves) if _is_elsewhere(leaf)]
    if parts:
        begin_step()
        everywhere = jax.NamedSharding(leaves[parts[0]].sharding.mesh, jax.P())
        whole = _replicate([leaves[i] for i in parts], everywhere)
        for i, leaf in zip(parts, whole, strict=True):
            leaves[i] = leaf
    return jax.tree.unflatten(form, jax.device_get(leaves))


def _is_elsewhere(leaf: Any) -> bool:
    """Whether another process holds a part that this one does not."""
    return isinstance(leaf, jax.Array) and not (
        leaf.is_fully_addressable or leaf.is_fully_replicated
    )


@functools.partial(jax.jit, static_argnames=("everywhere",))
def _replicate(leaves: list[jax.Array], everywhere: jax.NamedSharding) -> list[jax.Array]:
    return jax.lax.with_sharding_constraint(leaves, everywhere)


def check_devices(num_devices: int, mesh: str) -> None:
    """Refuses a mesh that leaves a process without a part of it.

    Raises:
        MixtralError: exit code 78.
    """
    if num_processes() > 1 and num_devices != len(jax.devices()):
        count = len(jax.devices())
        raise MixtralError(
            f"mesh {mesh}",
            expected=f"all {count} devices of the {num_processes()} processes",
            got=num_devices,
        )
