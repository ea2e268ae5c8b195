"""The loop: resumed runs are those that were never interrupted, and every end is in order."""

from __future__ import annotations

import dataclasses
import os
import signal

import jax
import numpy as np
import pytest

from mixtral_jax.errors import BAD_DATA, INTERRUPTED, MixtralError
from mixtral_jax.finetune import stop as stops
from mixtral_jax.finetune.options import RunOptions
from mixtral_jax.finetune.stop import Stop
from tests.finetune import fakes
from tests.finetune.fakes import (
    STEPS,
    FakeBatches,
    FakeTrainer,
    assert_same,
    log_of,
    loop,
    num_steps,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts: its folder and its last state."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    one = loop(folder)
    one.train()
    return folder, one.trainer.state


def stop_after(folder, steps: int, **given) -> None:
    stop = Stop()
    with pytest.raises(MixtralError) as caught:
        loop(folder, stop=stop, batches=fakes.stopping(steps, stop), **given).train()
    assert caught.value.code == INTERRUPTED


@pytest.mark.parametrize("cut", [1, 7, 10, 20, 39])
def test_stopped_and_resumed_is_the_unbroken_run(tmp_path, whole, cut):
    folder, state = whole
    stop_after(tmp_path, cut)
    assert log_of(tmp_path) == log_of(folder)[: len(log_of(tmp_path))]
    second = loop(tmp_path)
    second.train()
    assert num_steps(second) == STEPS - cut
    assert_same(second.trainer.state, state)
    assert log_of(tmp_path) == log_of(folder)


def test_stopped_five_times_too(tmp_path, whole):
    folder, state = whole
    for cut in (2, 3, 11, 20, 31):
        stop_after(tmp_path, cut)
    last = loop(tmp_path)
    last.train()
    assert_same(last.trainer.state, state)
    assert log_of(tmp_path) == log_of(folder)


def test_the_comparison_sees_data_that_is_not_restored(tmp_path, whole, monkeypatch):
    stop_after(tmp_path, 20)
    monkeypatch.setattr(FakeBatches, "restore", lambda self, state: None)
    second = loop(tmp_path)
    second.train()
    with pytest.raises(AssertionError):
        assert_same(second.trainer.state, whole[1])


def test_the_comparison_sees_a_line_that_forgot_its_steps(tmp_path, whole, monkeypatch):
    stop_after(tmp_path, 20)  # lines are of three steps: two of the next were gathered
    monkeypatch.setattr(fakes.Loop, "_resume", _without_window(fakes.Loop._resume))
    loop(tmp_path).train()
    assert log_of(tmp_path) != log_of(whole[0])


def _without_window(resume):
    def resume_without(self):
        position = resume(self)
        self._window = type(self._window)()
        return position

    return resume_without


def test_lines_hold_the_means_of_their_steps_and_the_last_one_what_is_left(whole):
    lines = log_of(whole[0])
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == [*range(3, STEPS, 3), STEPS]
    evaluated = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [10, 20, 30, 40]
    assert trained[-1]["loss"] < trained[0]["loss"] / 2
    assert evaluated[-1]["eval_perplexity"] == pytest.approx(np.exp(evaluated[-1]["eval_loss"]))
    assert np.shape(trained[0]["expert_load"]) == (fakes.LAYERS, fakes.EXPERTS)
    tokens = sum(int((fakes.make_batch(n).tokens > 50).sum()) for n in range(STEPS))
    assert trained[-1]["num_tokens"] == tokens


def test_a_finished_run_does_nothing_more_and_a_larger_max_steps_goes_on(tmp_path, whole):
    notes: list[str] = []
    half = loop(tmp_path, total_steps=20)
    half.train()
    again = loop(tmp_path, total_steps=20)
    assert again.train() == {}
    assert num_steps(again) == 0
    assert_same(again.trainer.state, half.trainer.state)
    more = loop(tmp_path, note=notes.append)
    more.train()
    assert num_steps(more) == 20
    assert "it was to have 20 steps: the learning rate follows the new schedule" in notes
    steps = [line["step"] for line in log_of(tmp_path)]
    assert steps == sorted(steps)
    assert steps[-1] == STEPS


def test_a_log_is_as_it_was_after_steps_that_were_not_reported(tmp_path, whole):
    loop(tmp_path, total_steps=10).train()
    before = log_of(tmp_path)
    silent = dataclasses.replace(fakes.RUN, report_to="none")
    loop(tmp_path, total_steps=20, run=silent).train()
    loop(tmp_path).train()
    assert log_of(tmp_path)[: len(before)] == before
    after = [line["step"] for line in log_of(tmp_path)[len(before) :]]
    assert after[0] == 21
    assert after[-1] == STEPS


def test_a_run_begins_when_nothing_refused_it(tmp_path):
    begun: list[int] = []
    loop(tmp_path, total_steps=10, begun=lambda: begun.append(1)).train()
    with pytest.raises(MixtralError, match="--learning-rate"):
        loop(tmp_path, bound={"--learning-rate": "0.1"}, begun=lambda: begun.append(2)).train()
    assert begun == [1]


def test_another_option_is_refused_by_name_and_leaves_the_run_as_it_was(tmp_path, whole):
    stop_after(tmp_path, 20)
    with pytest.raises(
        MixtralError, match=r"--learning-rate 0\.05, got --learning-rate 0\.1"
    ) as caught:
        loop(tmp_path, bound={"--learning-rate": "0.1"}).train()
    assert caught.value.code == BAD_DATA
    with pytest.raises(MixtralError, match="other data"):
        loop(tmp_path, batches=FakeBatches("others")).train()
    second = loop(tmp_path)
    second.train()
    assert_same(second.trainer.state, whole[1])
    assert log_of(tmp_path) == log_of(whole[0])


@pytest.mark.parametrize("nan_at", [1, 10, 25, STEPS])
def test_a_loss_that_is_no_number_ends_it_and_is_in_no_checkpoint(tmp_path, nan_at):
    with pytest.raises(MixtralError, match=f"step {nan_at}, of batch {nan_at - 1}: ") as caught:
        loop(tmp_path, trainer=FakeTrainer(nan_at=nan_at)).train()
    assert caught.value.code == BAD_DATA
    steps = sorted(int(path.name[11:]) for path in tmp_path.glob("checkpoint-*"))
    assert steps == [step for step in (10, 20, 30) if step < nan_at][-2:]
    sound = f"checkpoint-{steps[-1]} is sound" if steps else "there is no checkpoint"
    assert sound in str(caught.value)


def test_samples_are_in_the_log(tmp_path):
    run = RunOptions(save_steps=10, report_to="jsonl", sample_steps=8, sample_prompts=("1+1=",))
    loop(
        tmp_path, run=run, total_steps=10, sample=lambda: [{"prompt": "1+1=", "text": "2"}]
    ).train()
    found = [line for line in log_of(tmp_path) if "samples" in line]
    assert [line["step"] for line in found] == [8, 10]
    assert found[0]["samples"] == [{"prompt": "1+1=", "text": "2"}]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_75(tmp_path, whole, signum, capfd):
    def watch(taken: int) -> None:
        if taken == 5:
            os.kill(os.getpid(), signum)

    before = signal.getsignal(signum)
    with Stop() as stop, pytest.raises(MixtralError) as caught:
        loop(tmp_path, stop=stop, batches=FakeBatches(watch=watch)).train()
    assert signal.getsignal(signum) is before
    assert caught.value.code == INTERRUPTED
    assert (tmp_path / "checkpoint-5").is_dir()
    assert "saving a checkpoint after this step" in capfd.readouterr().err
    second = loop(tmp_path)
    second.train()
    assert_same(second.trainer.state, whole[1])
    assert log_of(tmp_path) == log_of(whole[0])


def test_a_signal_does_not_wait_for_an_evaluation_which_is_made_up_for(tmp_path, whole):
    stop, seen = Stop(), []

    def evaluation():
        for n in (1000, 1001):
            seen.append(n)
            stop.asked = len(seen) == 3  # in the first batch of the second evaluation
            yield fakes.make_batch(n)

    with pytest.raises(MixtralError) as caught:
        loop(tmp_path, stop=stop, evaluation=evaluation).train()
    assert caught.value.code == INTERRUPTED
    assert len(seen) == 3
    assert (tmp_path / "checkpoint-20").is_dir()
    assert [line["step"] for line in log_of(tmp_path) if "eval_loss" in line] == [10]
    second = loop(tmp_path)
    second.train()
    assert_same(second.trainer.state, whole[1])
    assert log_of(tmp_path) == log_of(whole[0])


def test_a_finished_run_is_evaluated_when_that_is_asked_for_later(tmp_path):
    assert "eval_loss" not in loop(tmp_path, total_steps=10, evaluation=None).train()
    again = loop(tmp_path, total_steps=10)
    assert again.train()["step"] == 10
    assert num_steps(again) == 0
    assert "eval_loss" in log_of(tmp_path)[-1]
    assert again.told["eval_loss"] == log_of(tmp_path)[-1]["eval_loss"]


def test_a_second_signal_ends_at_once_as_does_one_with_nothing_to_save(monkeypatch, capfd):
    ended: list[int] = []
    monkeypatch.setattr(stops.os, "_exit", ended.append)
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert (ended, stop.asked) == ([INTERRUPTED], False)
        stop.is_saving = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert (len(ended), stop.asked) == (1, True)
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended == [INTERRUPTED, INTERRUPTED]
    assert "fix: run the same command again to resume" in capfd.readouterr().err


def test_a_run_goes_on_on_another_mesh(tmp_path, whole):
    """Every array is placed anew; here the numbers are the same to the last bits of rounding."""
    stop_after(tmp_path, 20)
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))

    def sharding(x):
        spec = jax.P("data") if x.ndim else jax.P()
        return jax.NamedSharding(mesh, spec)

    second = loop(tmp_path, trainer=FakeTrainer(sharding=sharding))
    second.train()
    assert num_steps(second) == 20
    assert second.trainer.state.trained["w"].sharding.num_devices == 8
    for a, b in zip(fakes.arrays(second.trainer.state), fakes.arrays(whole[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
