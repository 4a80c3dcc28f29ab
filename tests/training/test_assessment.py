"""Figures of a model over windows whose answers are known, and what is written about a run."""

import json
import time

import pytest
import torch

from flashdrive_node.engine.batched_policy import Plan
from flashdrive_node.evaluation.history_baseline import HistoryBaseline
from flashdrive_node.training.assessment import assess, stated
from flashdrive_node.training.training_log import Stopwatch, TrainingLog, mean_rows
from training.conftest import noisy_pictures


def test_errors_and_decisions_are_counted(model, scribe, windows):
    count = 8
    some = windows.rows(torch.arange(count))
    samples = scribe.write(some, noisy_pictures(count))
    truth = model.action_space.to_path(samples.actions, samples.speed).xyz

    class Almost:
        """One metre to the left everywhere; the first text makes no sense, the second says nothing."""

        def __init__(self):
            self.model = model
            self.first = 0

        def plan(self, images, xyz, rot, nav):
            rows = slice(self.first, self.first + len(nav))
            self.first += len(nav)
            texts = ["Fly.", "", *some.sentences[2:]][rows]
            shifted = truth[rows, None] + torch.tensor([0.0, 1.0, 0.0])
            return Plan(texts, shifted[..., :2], shifted, shifted, shifted)

    result = assess(Almost(), HistoryBaseline(model.config.action_space), some, samples, batch=3)
    assert result["windows"] == count
    assert result["ade_m"] == pytest.approx(1.0, abs=1e-4)
    assert result["fde_m"] == pytest.approx(1.0, abs=1e-4)
    assert result["history_ade_m"] > 0
    assert result["malformed"] == pytest.approx(2 / count)
    assert result["decision_accuracy"] == result["class_accuracy"] == pytest.approx((count - 2) / count)
    assert sum(row["windows"] for row in result["by_class"].values()) == count
    wrong = {stated(some.decision[i].tolist()).label for i in (0, 1)}
    assert {name for name, row in result["by_class"].items() if row["accuracy"] < 1} == wrong


def test_log_is_written_with_its_picture(tmp_path):
    log = TrainingLog({"device": "cpu"})
    for step in (1, 2, 3):
        log.training.append({"seconds": float(step), "step": step, "text": 1.0 / step, "flow": 0.0})
    log.validation.append({"seconds": 3.0, "step": 3, "text": 0.5})
    log.result = {"ade_m": 2.0}
    log.write(tmp_path)
    written = json.loads((tmp_path / "training.json").read_text())
    assert written["training"][2]["text"] == pytest.approx(1 / 3)
    assert written["result"] == {"ade_m": 2.0}
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert mean_rows([{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 2.0}]) == {"a": 2.0, "b": 2.0}
    assert mean_rows([]) == {}


def test_parts_of_a_loop_are_timed_now_and_then():
    watch = Stopwatch(torch.device("cpu"), every=2)
    for pause in (0.0, 0.02, 0.0, 0.04):
        with watch.part("sleep"):
            time.sleep(pause)
    assert 0.03 <= watch.means["sleep"] < 0.2
    with watch.part("once"):
        pass
    assert "once" not in watch.means
