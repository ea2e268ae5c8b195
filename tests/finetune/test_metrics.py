"""The log: windows of steps, cut and gone on with; event files that TensorBoard reads; curves."""

from __future__ import annotations

import json
import struct
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_jax.errors import BAD_CONFIG, MixtralError
from mixtral_jax.finetune import metrics, progress
from mixtral_jax.finetune.curves import draw_curves
from mixtral_jax.finetune.measures import Window, evaluated, fetch, is_finite
from mixtral_jax.finetune.metrics import EVENTS, NAME, MetricsLog, read_lines, scalars
from mixtral_jax.finetune.progress import Machine, ProgressLine, Speed, told
from tests.finetune import fakes

LINE = {"step": 5, "loss": 1.5, "learning_rate": 1e-4, "dropped": [0, 3]}


def found(loss: float, tokens: float = 10.0) -> dict[str, np.ndarray]:
    values = {"loss": loss, "tokens": tokens, "learning_rate": loss, "dropped": [1.0, 2.0]}
    values |= {"grad_norm": 1.0, "mean_token_accuracy": loss, "aux_loss": 2.0}
    return {name: np.asarray(value, np.float64) for name, value in values.items()}


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=12), st.data())
def test_a_window_goes_on_from_json_as_if_nothing_had_happened(losses, data):
    cut = data.draw(st.integers(0, len(losses)))
    whole, first, second = Window(), Window(), Window()
    for i, loss in enumerate(losses):
        whole.add(found(loss))
        if i == cut:
            second.restore(json.loads(json.dumps(first.state())))
        (first if i < cut else second).add(found(loss))
    if cut < len(losses):
        assert second.take() == whole.take()


def test_a_line_tells_means_sums_and_the_latest():
    window = Window()
    window.add(found(1.0))
    window.add(found(2.0))
    line = window.take()
    assert (line["loss"], line["learning_rate"], line["tokens"]) == (1.5, 2.0, 20)
    assert (line["dropped"], line["num_tokens"]) == ([2, 4], 20)
    window.add(found(3.0))
    assert window.take()["num_tokens"] == 30


def test_measures_of_dpo_are_left_out_of_sft():
    batch = fakes.make_batch(0)
    measures = fakes.FakeTrainer().evaluate(batch)
    assert "rewards/margins" not in fetch(measures, is_dpo=False)
    assert "rewards/margins" in fetch(measures, is_dpo=True)
    assert is_finite(fetch(measures, is_dpo=True))


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_seen(name, value):
    assert not is_finite({**found(1.0), name: np.asarray(value)})


def test_evaluated_batches_count_by_their_tokens():
    line = evaluated([found(1.0, tokens=30), found(2.0, tokens=10), found(9.0, tokens=0)])
    assert line["eval_loss"] == pytest.approx(1.25)
    assert line["eval_perplexity"] == pytest.approx(np.exp(1.25))
    assert line["eval_tokens"] == 40


def test_evaluated_preferences_count_by_pairs():
    """The last batch has one pair, beside empty rows; and long answers."""

    def of(value: float, *, pairs: int, tokens: int) -> dict[str, np.ndarray]:
        names = ("rewards/margins", "rewards/accuracies")
        rewards = {name: np.asarray(value) for name in names}
        return {**found(value, tokens=tokens), "pairs": np.asarray(float(pairs)), **rewards}

    line = evaluated([of(1.0, pairs=3, tokens=10), of(5.0, pairs=1, tokens=30)])
    assert line["eval_loss"] == 2.0
    assert line["eval_rewards/margins"] == line["eval_rewards/accuracies"] == 2.0
    assert line["eval_mean_token_accuracy"] == pytest.approx(
        evaluated([found(1.0, tokens=10), found(5.0, tokens=30)])["eval_mean_token_accuracy"]
    )
    assert (line["eval_pairs"], line["eval_tokens"]) == (4, 40)
    assert "eval_perplexity" not in line


def test_what_follows_the_position_is_cut_off(tmp_path):
    log = MetricsLog(tmp_path, "jsonl")
    log.write({"step": 1, "loss": 1.0})
    position = log.position()
    log.write({"step": 2, "loss": 2.0})
    log.close()
    with open(tmp_path / NAME, "ab") as file:
        file.write(b'{"step": 3, "lo')  # torn by a kill
    log = MetricsLog(tmp_path, "jsonl", position=position)
    log.write({"step": 2, "loss": 3.0})
    log.close()
    assert [(line["step"], line["loss"]) for line in read_lines(tmp_path / NAME)] == [
        (1, 1.0),
        (2, 3.0),
    ]


def test_a_log_that_lost_lines_is_told_and_goes_on(tmp_path):
    notes: list[str] = []
    log = MetricsLog(tmp_path, "jsonl", position=100, note=notes.append)
    log.write(LINE)
    log.close()
    assert "shorter" in notes[0]
    assert len(list(read_lines(tmp_path / NAME))) == 1


def test_none_touches_no_file(tmp_path):
    log = MetricsLog(tmp_path, "none")
    log.write(LINE)
    assert log.position() == 0
    log.close()
    assert list(tmp_path.iterdir()) == []


def events(folder) -> list[tuple[int, str, float]]:
    """Step, tag and value of every scalar of event files (records of TensorFlow)."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    scalars_found = []
    for path in folder.glob("events.out.tfevents.*"):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            for value in event.summary.value:
                scalars_found.append((event.step, value.tag, value.simple_value))
    return scalars_found


def test_event_files_are_made_anew_from_the_log(tmp_path):
    pytest.importorskip("tensorboardX")
    log = MetricsLog(tmp_path, "tensorboard")
    log.write(LINE)
    position = log.position()
    log.write({"step": 6, "loss": 9.0, "eval_loss": 1.0})
    log.close()
    log = MetricsLog(tmp_path, "tensorboard", position=position)
    log.write({"step": 6, "loss": 2.0, "samples": [{"prompt": "p", "text": "t"}]})
    log.close()
    assert len(list((tmp_path / EVENTS).iterdir())) == 1
    found = events(tmp_path / EVENTS)
    losses = [(step, value) for step, tag, value in found if tag == "train/loss"]
    assert losses == [(5, 1.5), (6, 2.0)]
    assert (5, "router/dropped/layer_1", 3.0) in found
    assert not [tag for _, tag, _ in found if tag == "eval/loss"]


def test_a_line_as_scalars():
    line = {"step": 1, "eval_loss": 2.0, "expert_load": [[0.5, 0.25], [0.1, 0.9]], "mfu": None}
    assert scalars(line) == {
        "eval/loss": 2.0,
        "router/max_expert_load/layer_0": 0.5,
        "router/max_expert_load/layer_1": 0.9,
    }


def test_without_a_writer_of_event_files_it_is_told_at_once(monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    metrics.check_report_to("jsonl")
    with pytest.raises(MixtralError, match="--report-to jsonl") as caught:
        metrics.check_report_to("tensorboard")
    assert caught.value.code == BAD_CONFIG


def test_speed_leaves_pauses_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    speed = Speed(Machine(flops_per_token=1e9, peak_flops=1e12))
    speed.add(500)
    now[0] += 2
    with speed.paused():
        now[0] += 50
    assert speed.take() == {"seconds": 2.0, "tokens_per_second": 250.0, "mfu": 0.25}
    now[0] += 1
    assert Speed().take() == {}


def test_the_line_of_progress(capsys, monkeypatch):
    line = {"step": 3, "loss": 1.23456, "tokens_per_second": 1234.5, "mfu": 0.431}
    assert told(line) == "loss 1.2346  1,234 tokens/s  MFU 43.1%"
    with ProgressLine(3, 0) as shown:
        shown.step(2)
        shown.tell(line)
    assert capsys.readouterr().err == f"step 3/3  {told(line)}\n"
    with ProgressLine(3, 0, is_shown=False) as hidden:
        hidden.tell(line)
    assert capsys.readouterr().err == ""
    assert not sys.stderr.isatty()


def test_curves_are_drawn_from_the_log(tmp_path):
    pytest.importorskip("matplotlib")
    one = fakes.loop(tmp_path / "out")
    one.train()
    draw_curves(tmp_path / "out" / NAME, tmp_path / "curves.svg")
    picture = (tmp_path / "curves.svg").read_text()
    for word in ("learning rate", "evaluation", "router entropy"):
        assert word in picture
