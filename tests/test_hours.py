"""train.py --hours: nights by a clock of the test, and twenty seconds by the real one."""

import re

from onenight import metrics as metrics_module
from onenight.trainer import Stopped, Trainer

import pytest
from conftest import load, metrics, train, train_here

import train as train_script

NIGHT = {
    "hours": 8.0,
    "max_iters": 6500,
    "lr_decay_iters": 6500,
    "min_lr": 0.0,
    "log_interval": 50,
    "eval_interval": 1000,
}
TRAPEZOID = {**NIGHT, "warmup_iters": 40, "warmdown_iters": 4550}
COSINE = {**NIGHT, "warmup_iters": 200}
STEADY, CHANGING = 0.02, 0.05  # what is promised for a machine of steady speed, and for one that changes


class Machine:
    """A machine that computes nothing, and its clock: an iteration takes 4.5 seconds, or what `seconds` says of the
    time since the start, the first one 60; an evaluation of a split 30, a checkpoint 5."""

    def __init__(self):
        self.now, self.started, self.seconds, self.stops_at = 1000.0, 1000.0, lambda since: 4.5, None

    def monotonic(self):
        return self.now

    def step(self, trainer, lr_share):
        if self.stops_at == trainer.progress.iter_num:
            self.stops_at = None
            raise Stopped
        first = trainer.progress.iter_num == 0
        self.now += 60 if first else self.seconds(self.now - self.started)
        trainer.progress.iter_num += 1
        trainer.progress.position += trainer.windows_per_iter
        return 5.0

    def evaluate(self):
        self.now += 30
        return 5.0


@pytest.fixture
def machine(monkeypatch):
    machine, save_checkpoint = Machine(), train_script.save_checkpoint

    def save(*arguments, **options):
        machine.now += 5
        save_checkpoint(*arguments, **options)

    monkeypatch.setattr(train_script, "time", machine)
    monkeypatch.setattr(metrics_module, "time", machine)
    monkeypatch.setattr(train_script, "save_checkpoint", save)
    monkeypatch.setattr(Trainer, "step", lambda trainer, lr_share: machine.step(trainer, lr_share))
    monkeypatch.setattr(Trainer, "evaluate", lambda trainer, tokens: machine.evaluate())
    return machine


def decisions(stdout):
    """The iterations that the lines about the length name."""
    return [int(iters.replace(",", "")) for iters in re.findall(r"^hours: ([\d,]+) iterations", stdout, re.M)]


def assert_ended(machine, out_dir, hours, tolerance):
    """At the end of the schedule, by the run's own clock and by the machine's."""
    checkpoint = load(out_dir)
    assert checkpoint["iter_num"] == checkpoint["max_iters"]
    assert checkpoint["elapsed_s"] == pytest.approx(hours * 3600, rel=tolerance)
    assert machine.now - machine.started == pytest.approx(hours * 3600, rel=tolerance)
    assert metrics(out_dir)[-1]["lr"] == 0


@pytest.mark.parametrize("settings, n_decisions", [(TRAPEZOID, 2), (COSINE, 1)], ids=["trapezoid", "cosine"])
def test_a_night_ends_in_time(machine, bins, tmp_path, settings, n_decisions):
    result = train_here(bins, tmp_path, **settings)
    assert result.returncode == 0, result.stderr
    lengths = decisions(result.stdout)
    assert len(lengths) == n_decisions and load(tmp_path)["max_iters"] == lengths[-1]
    assert_ended(machine, tmp_path, 8, STEADY)


@pytest.mark.parametrize("factor", [0.7, 1.5], ids=["faster", "slower"])
def test_a_machine_that_changes_before_the_decay_still_ends_in_time(machine, bins, tmp_path, factor):
    machine.seconds = lambda since: 4.5 * (factor if since > 3600 else 1)
    result = train_here(bins, tmp_path, **TRAPEZOID)
    first, last = decisions(result.stdout)
    assert last > 1.1 * first if factor < 1 else last < 0.9 * first
    assert_ended(machine, tmp_path, 8, CHANGING)


def test_stopped_and_resumed_it_takes_its_decisions_along(machine, bins, tmp_path):
    """Once before and once in the decay; the pauses do not count."""
    machine.stops_at = 500
    first = train_here(bins, tmp_path, **TRAPEZOID)
    assert "stopped at iter 500;" in first.stdout
    decided = load(tmp_path)
    assert [decided["max_iters"]] == decisions(first.stdout)
    machine.now, machine.started, machine.stops_at = machine.now + 9e4, machine.started + 9e4, 4000
    second = train_here(bins, tmp_path, **TRAPEZOID, init_from="resume")
    assert "stopped at iter 4,000;" in second.stdout and "changed since" not in second.stdout
    (length,) = decisions(second.stdout)  # the last one, where the decay began
    assert length == pytest.approx(decided["max_iters"], rel=STEADY)
    machine.now, machine.started = machine.now + 9e4, machine.started + 9e4
    third = train_here(bins, tmp_path, **{**TRAPEZOID, "hours": 1.0}, init_from="resume")
    assert f"the decay has begun, so the run still ends at iter {length:,}" in third.stdout
    assert decisions(third.stdout) == [] and load(tmp_path)["max_iters"] == length
    assert_ended(machine, tmp_path, 8, STEADY)


def test_other_hours_before_the_decay_decide_anew(machine, bins, tmp_path):
    machine.stops_at = 500
    train_here(bins, tmp_path, **TRAPEZOID)
    assert load(tmp_path)["decisions"] == 1
    resumed = train_here(bins, tmp_path, **{**TRAPEZOID, "hours": 4.0}, init_from="resume")
    assert len(decisions(resumed.stdout)) == 2, resumed.stdout
    assert_ended(machine, tmp_path, 4, STEADY)


def test_a_real_run_ends_in_time(bins, tmp_path):
    """One so short has few iterations to measure, with other tests beside it: see benchmarks/LOG.md."""
    seconds = 20
    changes = {"gradient_accumulation_steps": 8, "log_interval": 10, "eval_interval": 300, "hours": seconds / 3600}
    result = train(bins, tmp_path, **changes, warmup_iters=0, warmdown_iters=30, min_lr=0.0)
    assert result.returncode == 0, result.stderr
    assert len(decisions(result.stdout)) == 2
    assert load(tmp_path)["elapsed_s"] == pytest.approx(seconds, rel=0.3)


def test_the_plan_tells_what_the_hours_buy(bins):
    plans = [train_here(bins, "unused", plan=True, plan_tflops=1.0, hours=hours).stdout for hours in (1.0, 2.0)]
    iterations = [int(re.search(r"([\d,]+) iterations", plan)[1].replace(",", "")) for plan in plans]
    assert iterations[1] == pytest.approx(2 * iterations[0], abs=1)
    assert "time: 1h 00m" in plans[0] or "time: 59m" in plans[0]
    assert "over 4 the same text teaches little more" in plans[0]
