"""Checkpoints: bit for bit, any damage is seen, and what a killed process leaves is passed over."""

from __future__ import annotations

import dataclasses
import errno
import json
import random
import shutil
import subprocess

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mixtral_jax.errors import BAD_DATA, IO_ERROR, MixtralError
from mixtral_jax.finetune import checkpoint_record, checkpoints
from mixtral_jax.finetune.checkpoint_record import Saved, problem
from mixtral_jax.finetune.checkpoints import Checkpoints
from mixtral_jax.finetune.options import RunOptions
from tests.finetune.fakes import STEPS, assert_same, log_of, loop, num_steps

SAVED = Saved(step=3, total_steps=9, data={"n": 1}, log={"position": 0}, options={"--seed": "1"})


def state() -> dict:
    draw = np.random.default_rng(1)
    return {
        "f32": jnp.asarray(draw.standard_normal((4, 6)), jnp.float32),
        "bf16": jnp.asarray(draw.standard_normal((3, 2)).astype(ml_dtypes.bfloat16)),
        "codes": jnp.asarray(draw.integers(0, 256, (5,)), jnp.uint8),
        "nested": ({"count": jnp.int32(7)}, [jnp.float32(np.nan)]),
    }


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def save(folder, tree=None, step: int = 3) -> None:
    kept = Checkpoints(folder, note=lambda line: None)
    kept.save(state() if tree is None else tree, dataclasses.replace(SAVED, step=step))
    kept.wait()
    kept.close()


def newest(folder, notes=None):
    return Checkpoints(folder, note=(notes if notes is not None else []).append).newest()


def test_arrays_of_every_dtype_come_back_bit_for_bit(tmp_path):
    save(tmp_path)
    kept = Checkpoints(tmp_path)
    record = kept.newest()
    assert record is not None
    assert record.saved == SAVED
    assert_same(kept.restore(record, abstract(state())), state())


def test_what_is_saved_may_be_donated_at_once(tmp_path):
    @jax.jit
    def make():
        return {"w": jnp.arange(1 << 20, dtype=jnp.float32)}

    overwrite = jax.jit(lambda tree: {"w": tree["w"] * -1}, donate_argnums=0)
    tree, kept = make(), Checkpoints(tmp_path)
    kept.save(tree, SAVED)
    for _ in range(3):
        tree = overwrite(tree)
    jax.block_until_ready(tree)
    kept.wait()
    record = kept.newest()
    assert record is not None
    assert_same(kept.restore(record, abstract(make())), make())


@pytest.mark.parametrize(
    "other",
    [
        {"f32": jnp.zeros((4, 6), jnp.bfloat16)},
        {"f32": jnp.zeros((6, 4), jnp.float32)},
        {"more": jnp.zeros(1)},
    ],
)
def test_other_arrays_are_refused_and_never_cast(tmp_path, other):
    save(tmp_path)
    kept = Checkpoints(tmp_path)
    record = kept.newest()
    assert record is not None
    with pytest.raises(MixtralError, match=next(iter(other))) as caught:
        kept.restore(record, abstract({**state(), **other}))
    assert caught.value.code == BAD_DATA


def test_any_flipped_bit_is_seen(tmp_path):
    save(tmp_path)
    folder = tmp_path / "checkpoint-3"
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    assert problem(folder) is None
    rng = random.Random(3)
    for _ in range(60):
        path = rng.choice(files)
        content = bytearray(path.read_bytes())
        whole = bytes(content)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        assert problem(folder) is not None, path
        path.write_bytes(whole)
    assert problem(folder) is None


def _flip(folder):
    path = max((folder / "state").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def _cut(folder):
    path = max((folder / "state").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    path.write_bytes(path.read_bytes()[:-1])


def _forget(folder):
    (folder / "checkpoint.json").unlink()


def _alter(folder):
    path = folder / "checkpoint.json"
    content = json.loads(path.read_bytes())
    path.write_text(json.dumps({**content, "step": content["step"] + 1}))


def _add(folder):
    (folder / "state" / "more").write_bytes(b"x")


def _empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize("damage", [_flip, _cut, _forget, _alter, _add, _empty])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    whole = loop(tmp_path / "whole")
    whole.train()
    loop(tmp_path / "out", total_steps=STEPS).train()
    damage(tmp_path / "out" / f"checkpoint-{STEPS}")
    notes: list[str] = []
    second = loop(tmp_path / "out", note=notes.append)
    second.train()
    assert num_steps(second) == 10
    assert f"checkpoint-{STEPS} is damaged" in notes[0]
    assert_same(second.trainer.state, whole.trainer.state)
    assert log_of(tmp_path / "out") == log_of(tmp_path / "whole")
    assert (tmp_path / "out" / f"checkpoint-{STEPS}.damaged").is_dir()
    assert problem(tmp_path / "out" / f"checkpoint-{STEPS}") is None


def test_with_none_sound_nothing_begins_anew_by_itself(tmp_path):
    for step in (3, 4):
        save(tmp_path, step=step)
        _flip(tmp_path / f"checkpoint-{step}")
    for _ in range(2):  # the second time, too
        with pytest.raises(MixtralError, match=r"checkpoint-4: .*; checkpoint-3: .*digest") as e:
            newest(tmp_path)
        assert e.value.code == BAD_DATA
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EACCES, errno.EMFILE, errno.EIO])
def test_a_checkpoint_that_cannot_be_read_now_is_not_set_aside(tmp_path, monkeypatch, number):
    save(tmp_path)

    def digests(folder):
        raise OSError(number, "not now")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_record, "digests", digests)
        with pytest.raises(MixtralError, match="checkpoint-3 cannot be read") as caught:
            newest(tmp_path)
    assert caught.value.code == IO_ERROR
    assert newest(tmp_path) is not None


def test_what_a_killed_process_left_is_removed_and_other_folders_stay(tmp_path):
    save(tmp_path)
    for name in ("checkpoint-9.saving", "checkpoint-1.deleting", "checkpoint-x", "mine.saving"):
        (tmp_path / name).mkdir()
    record = newest(tmp_path)
    assert record is not None
    assert record.saved.step == 3
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-3", "checkpoint-x", "mine.saving"]


@pytest.mark.parametrize(
    ("limit", "kept"), [(1, [40]), (2, [30, 40]), (3, [20, 30, 40]), (None, [10, 20, 30, 40])]
)
def test_so_many_checkpoints_are_kept(tmp_path, limit, kept):
    run = RunOptions(save_steps=10, save_total_limit=limit, report_to="none")
    one = loop(tmp_path, run=run)
    one.train()
    assert one.checkpoints.steps() == kept
    assert all(problem(one.checkpoints.path(step)) is None for step in kept)


def test_a_disk_that_fills_up_ends_it_with_74_and_what_is_whole_stays(tmp_path, monkeypatch):
    real, written = checkpoints.write_record, []

    def write(folder, saved, leaves):
        if saved.step == 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(saved.step)
        real(folder, saved, leaves)

    monkeypatch.setattr(checkpoints, "write_record", write)
    with pytest.raises(MixtralError, match="checkpoint-20 was not saved; kept: checkpoint-10") as e:
        loop(tmp_path).train()
    assert e.value.code == IO_ERROR
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-10"]
    monkeypatch.setattr(checkpoints, "write_record", real)
    second = loop(tmp_path)
    second.train()
    assert num_steps(second) == 30


def test_too_small_a_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(MixtralError, match="not enough disk space") as caught:
        loop(tmp_path).train()
    assert caught.value.code == IO_ERROR
    assert list(tmp_path.glob("checkpoint-*")) == []


def test_a_full_disk_in_earnest(tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a disk is not allowed here")
    try:
        monkeypatch.setattr(checkpoints, "check_disk", lambda *arguments: None)
        kept = Checkpoints(disk)
        kept.save({"w": jnp.zeros(1000)}, SAVED)
        kept.wait()
        with pytest.raises(MixtralError, match=r"disk of .* is full") as caught:  # noqa: PT012 (now or then)
            kept.save({"w": jnp.ones(100_000)}, dataclasses.replace(SAVED, step=4))
            kept.wait()
        assert caught.value.code == IO_ERROR
        kept.close()
        assert [path.name for path in disk.iterdir()] == ["checkpoint-3"]
        assert problem(disk / "checkpoint-3") is None
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_checkpoint_of_another_version_stays_where_it_is(tmp_path, monkeypatch):
    save(tmp_path)
    monkeypatch.setattr(checkpoint_record, "VERSION", 2)
    for look in (newest, lambda folder: Checkpoints(folder).glance()):
        with pytest.raises(MixtralError, match="version: expected 2, got 1") as caught:
            look(tmp_path)
        assert caught.value.code == BAD_DATA
    assert (tmp_path / "checkpoint-3").is_dir()
