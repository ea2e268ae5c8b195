"""Which process this is: flags, environment variables, SLURM, TPU pods."""

from __future__ import annotations

import pytest

from mixtral_jax.errors import USAGE, MixtralError
from mixtral_jax.sharding.cluster import Cluster, ProcessOptions, find_cluster, first_host

FLAGS = ProcessOptions(coordinator="a:1234", num_processes=4, process_id=3)
SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NODELIST": "gpu[007-009],cpu1",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_PROCID": "2",
}
TPU = {"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1"}
JAX = {
    "JAX_COORDINATOR_ADDRESS": "j:99",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "1",
}


def where(cluster: Cluster | None) -> tuple:
    assert cluster is not None
    return cluster.coordinator, cluster.num_processes, cluster.process_id


def test_flags_win_over_variables_over_clusters():
    assert where(find_cluster(FLAGS, {**JAX, **SLURM})) == ("a:1234", 4, 3)
    none = ProcessOptions()
    assert where(find_cluster(none, {**JAX, **SLURM, **TPU})) == ("j:99", 2, 1)
    assert where(find_cluster(none, {**SLURM, **TPU})) == ("gpu007:26912", 3, 2)
    assert where(find_cluster(none, TPU)) == ("t0:8476", 2, 1)


def test_one_process_is_no_cluster():
    assert find_cluster(ProcessOptions(), {}) is None
    assert find_cluster(ProcessOptions(), {**SLURM, "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert find_cluster(ProcessOptions(), {**TPU, "TPU_WORKER_HOSTNAMES": "t0"}) is None
    alone = ProcessOptions(coordinator="a:1", num_processes=1, process_id=0)
    assert find_cluster(alone, {}) is None


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-015],host2", "node001"),
        ("node[001,007-015]", "node001"),
        ("n-a[3]", "n-a3"),
    ],
)
def test_first_host_of_slurm(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    "fields",
    [
        {"coordinator": "a:1"},
        {"num_processes": 2, "process_id": 0},
        {"coordinator": "a", "num_processes": 2, "process_id": 0},
        {"coordinator": "a:x", "num_processes": 2, "process_id": 0},
        {"coordinator": "a:0", "num_processes": 2, "process_id": 0},
        {"coordinator": "a:65535", "num_processes": 2, "process_id": 0},
        {"coordinator": "a:1", "num_processes": 2, "process_id": 2},
        {"coordinator": "a:1", "num_processes": 0, "process_id": 0},
        {"coordinator": "a:1", "num_processes": 2, "process_id": -1},
        {"peer_timeout": 2.9},
        {"peer_timeout": float("nan")},
    ],
)
def test_refuses(fields):
    with pytest.raises(MixtralError) as caught:
        find_cluster(ProcessOptions(**fields), {})
    assert caught.value.code == USAGE


@pytest.mark.parametrize(("num", "rank"), [(0, 0), (-1, 0), (-1, -2), (0, 1)])
def test_a_wrong_number_of_processes_is_named_first(num, rank):
    asked = ProcessOptions(coordinator="a:1", num_processes=num, process_id=rank)
    with pytest.raises(MixtralError, match=f"--num-processes: expected at least 1, got {num}"):
        find_cluster(asked, {})


@pytest.mark.parametrize("missing", JAX)
def test_a_variable_that_is_missing_is_named(missing):
    some = {name: value for name, value in JAX.items() if name != missing}
    for environ in (some, {**some, missing: ""}, {**some, **SLURM}):
        with pytest.raises(MixtralError, match=f"got no {missing};") as caught:
            find_cluster(ProcessOptions(), environ)
        assert caught.value.code == USAGE
    assert find_cluster(FLAGS, some) is not None, "flags win"


def test_several_missing_variables_are_named():
    with pytest.raises(MixtralError, match="got no JAX_COORDINATOR_ADDRESS and no JAX_PROCESS_ID"):
        find_cluster(ProcessOptions(), {"JAX_NUM_PROCESSES": "2"})


def test_refuses_a_broken_environment():
    with pytest.raises(MixtralError, match="SLURM_PROCID: expected an integer, got 'x'"):
        find_cluster(ProcessOptions(), {**SLURM, "SLURM_PROCID": "x"})
