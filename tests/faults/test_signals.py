"""Signals that ask a run to stop."""

import os
import signal
import time

import pytest

from forks import STOP_SIGNALS, Training, assert_same_run, at, needs_fork, signal_itself
from helpers import load, metrics
from onenight.trainer import Trainer

pytestmark = needs_fork


def test_after_each_stop_signal_a_run_is_saved_and_resumes_to_the_same_bits(
    bins, undisturbed, tmp_path
):
    def send(number):
        signal_itself(number)
        signal_itself(signal.SIGTERM)  # which changes nothing, as SIGXCPU that comes every second

    for i, number in enumerate(STOP_SIGNALS, 1):
        with pytest.MonkeyPatch.context() as monkeypatch:
            at(monkeypatch, 8 * i, lambda: send(number))  # noqa: B023
            stopped = Training(bins, tmp_path, init_from="auto")
            assert stopped.end() == 128 + number, stopped.output()
        # The iteration in which the signal came is done again.
        assert load(tmp_path)["iter_num"] == 8 * i
    resumed = Training(bins, tmp_path, init_from="resume")
    assert resumed.end() == 0, resumed.output()
    assert_same_run(undisturbed, tmp_path)


def test_a_stop_during_an_evaluation_repeats_the_evaluation(
    bins, undisturbed, tmp_path, monkeypatch
):
    eval_step = Trainer.eval_step

    def eval_step_with_signal(trainer, x, y):
        if trainer.progress.iter_num == 15:
            signal_itself(signal.SIGTERM)
        return eval_step(trainer, x, y)

    monkeypatch.setattr(Trainer, "eval_step", eval_step_with_signal)
    stopped = Training(bins, tmp_path)
    assert stopped.end() == 128 + signal.SIGTERM, stopped.output()
    assert load(tmp_path)["iter_num"] == 15
    assert [record["iter"] for record in metrics(tmp_path) if "val_loss" in record] == [0]
    monkeypatch.undo()
    resumed = Training(bins, tmp_path, init_from="resume")
    assert resumed.end() == 0, resumed.output()
    assert_same_run(undisturbed, tmp_path)


def test_a_stop_does_not_wait_for_the_end_of_a_long_iteration(bins, tmp_path):
    """This one would take hours. Systems kill a process some seconds after they have asked it."""
    training = Training(bins, tmp_path, gradient_accumulation_steps=10**6)
    training.wait_for("step 0:")
    time.sleep(0.1)
    os.kill(training.pid, signal.SIGTERM)
    assert training.end() == 128 + signal.SIGTERM, training.output()
    assert load(tmp_path)["position"] == 0


def test_a_second_ctrl_c_stops_without_saving(bins, tmp_path, monkeypatch):
    def press_twice():
        signal_itself(signal.SIGINT)
        signal_itself(signal.SIGINT)

    at(monkeypatch, 20, press_twice)
    training = Training(bins, tmp_path)
    assert training.end() == 130
    assert "Traceback" not in training.output()
    assert load(tmp_path)["iter_num"] == 15


def test_a_hangup_that_nohup_ignores_is_ignored(bins, tmp_path, monkeypatch):
    at(monkeypatch, 20, lambda: signal_itself(signal.SIGHUP))
    training = Training(
        bins, tmp_path, prepare=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    assert training.end() == 0, training.output()
    assert load(tmp_path)["iter_num"] == 60
