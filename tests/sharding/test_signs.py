"""Who is stuck and who only slow, by what they last said of themselves."""

from __future__ import annotations

import time
from typing import Any

from mixtral_jax.sharding.signs import PATIENCE, Peer, Work, find_lost

TIMEOUT = 10.0


def peer(now: float = 0.0, **fields: Any) -> Peer:
    made = Peer("host", lambda message: None, 0.0)
    for name, value in {"heard": now, **fields}.items():
        setattr(made, name, value)
    return made


def found(now: float, **fields: Any) -> int | None:
    """Who is lost where process 0 came to step 1 at once, and process 1 did not."""
    lost = find_lost({0: peer(now, steps=1), 1: peer(now, **fields)}, now, TIMEOUT)
    return None if lost is None else lost[0]


def test_idle_for_a_whole_timeout_is_stuck():
    assert found(10.0) is None
    assert found(10.1) == 1
    assert found(10.1, computed=1.0) is None, "one sign of work is enough"
    assert found(11.1, computed=1.0) == 1
    assert found(100.0, moved=91.0) is None
    assert found(101.1, moved=91.0) == 1


def test_patience_with_a_process_that_only_computes_ends():
    late = PATIENCE * TIMEOUT + 1
    assert found(late - 2, computed=late - 3) is None
    assert found(late, computed=late - 1) == 1
    assert found(late, computed=late - 1, moved=late - 2) is None, "one that loads goes on"


def test_only_who_is_behind_is_stuck_and_who_left_is_not():
    assert found(100.0, steps=1) is None
    assert found(100.0, has_left=True) is None
    assert found(100.0, heard=89.0, steps=1) == 1, "silent, wherever it is"


def test_work_is_computing_or_moving_data(tmp_path):
    work = Work()
    time.sleep(0.3)
    assert work.since() == {"computes": False, "moves": False}
    until = time.process_time() + 0.1
    while time.process_time() < until:
        pass
    assert work.since()["computes"]
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    assert work.since()["moves"]
    assert not work.since()["moves"]
