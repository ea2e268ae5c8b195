"""Which process of how many this is: from flags, or from the environment of the cluster."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from mixtral_jax.errors import USAGE, MixtralError

# Ports that SLURM jobs share a host with: one per job, below the range that systems hand out.
_SLURM_PORTS = (20_000, 10_000)
_TPU_PORT = 8476
_SHORTEST_TIMEOUT = 3  # beats are a second apart, and a busy host delays them
_LARGEST_PORT = 65_534  # the heartbeat takes the port after the coordinator's


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """One of many processes that run a command together, each started with the same arguments."""

    coordinator: str | None = None
    """HOST:PORT of process 0, the same for every process; port + 1 is used as well. Found by itself
    under SLURM and on TPU pods."""
    num_processes: int | None = None
    """How many processes run this command together."""
    process_id: int | None = None
    """Which of them this is, from 0."""
    peer_timeout: float = 10.0
    """Seconds without a sign of life after which a process is given up (exit code 76); 3 at
    least."""

    def __post_init__(self):
        if not _SHORTEST_TIMEOUT <= self.peer_timeout < float("inf"):
            expected, got = f"at least {_SHORTEST_TIMEOUT} s", self.peer_timeout
            raise MixtralError("--peer-timeout", expected=expected, got=got, code=USAGE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where process 0 listens, how many processes there are, and which this is."""

    host: str
    port: int
    num_processes: int
    process_id: int

    def __post_init__(self):
        if not 0 < self.port <= _LARGEST_PORT:
            expected = f"HOST:PORT with a port up to {_LARGEST_PORT}"
            raise MixtralError("--coordinator", expected=expected, got=self.port, code=USAGE)
        if self.num_processes < 1:
            got = self.num_processes
            raise MixtralError("--num-processes", expected="at least 1", got=got, code=USAGE)
        if not 0 <= self.process_id < self.num_processes:
            raise MixtralError(
                "--process-id",
                expected=f"0 to {self.num_processes - 1}",
                got=self.process_id,
                code=USAGE,
            )

    @property
    def coordinator(self) -> str:
        """``host:port``, as jax.distributed takes it."""
        return f"{self.host}:{self.port}"


def find_cluster(options: ProcessOptions, environ: Mapping[str, str]) -> Cluster | None:
    """The cluster asked for, else the one that the environment describes, else None.

    Flags win over ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``, these
    over SLURM (a step of several tasks) and TPU pods (``TPU_WORKER_HOSTNAMES``).

    Raises:
        MixtralError: exit code 64 for a part of the three flags or variables, or for values that
            make no sense.
    """
    asked = (options.coordinator, options.num_processes, options.process_id)
    if asked == (None, None, None):
        names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        missing = [name for name in names if not environ.get(name)]
        if len(missing) == len(names):
            return _slurm(environ) or _tpu_pod(environ)
        if missing:
            expected, fix = f"all of {', '.join(names)}", "set all three, or none"
            got = f"no {' and no '.join(missing)}"
            raise MixtralError("environment", expected=expected, got=got, fix=fix, code=USAGE)
        coordinator, *counts = (environ[name] for name in names)
        asked = (coordinator, *(_integer(n, c) for n, c in zip(names[1:], counts, strict=True)))
    coordinator, num_processes, process_id = asked
    if coordinator is None or num_processes is None or process_id is None:
        raise MixtralError(
            "many processes",
            expected="all of --coordinator, --num-processes and --process-id",
            got="a part of them",
            fix="give all three, or none under SLURM or on a TPU pod",
            code=USAGE,
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise MixtralError("--coordinator", expected="HOST:PORT", got=repr(coordinator), code=USAGE)
    if num_processes == 1 and process_id == 0:
        return None
    return Cluster(host=host, port=int(port), num_processes=num_processes, process_id=process_id)


def _slurm(environ: Mapping[str, str]) -> Cluster | None:
    """Inside ``srun``: the first host of the step, and a port made of the job's number."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
    if not all(environ.get(name) for name in names):
        return None
    job, nodes, tasks, rank = (environ[name] for name in names)
    count = _integer(names[2], tasks)
    if count == 1:
        return None
    first, width = _SLURM_PORTS
    port = first + 2 * (_integer(names[0], job) % (width // 2))
    return Cluster(
        host=first_host(nodes), port=port, num_processes=count, process_id=_integer(names[3], rank)
    )


def first_host(nodes: str) -> str:
    """The first host of a SLURM list: ``n1``, ``n1,n2``, ``n[001-015],m2``, ``n[001,007-015]``."""
    found = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    if found is None:
        raise MixtralError("SLURM_STEP_NODELIST", expected="hosts", got=repr(nodes), code=USAGE)
    return found[1] + (found[2] or "")


def _tpu_pod(environ: Mapping[str, str]) -> Cluster | None:
    """Hosts of one TPU slice, as GKE and the TPU runtime name them."""
    hosts = [h for h in environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if h]
    if len(hosts) < 2 or not environ.get("TPU_WORKER_ID"):
        return None
    rank = _integer("TPU_WORKER_ID", environ["TPU_WORKER_ID"])
    return Cluster(host=hosts[0], port=_TPU_PORT, num_processes=len(hosts), process_id=rank)


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise MixtralError(name, expected="an integer", got=repr(text), code=USAGE) from None
