"""train.py --hours on machines that change their speed, by a clock that the tests advance.

A run must end within 1 % of its hours, or within an iteration and an evaluation if they take
longer, with its learning rate at the end of the schedule.
"""

import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

import train as train_script
from helpers import TINY, load, metrics, train_by_clock
from onenight.training.trainer import StopRequested, Trainer

PEAK_LR = 1e-2
NIGHT = {
    "hours": 8.0,
    "max_iters": 6500,
    "lr_decay_iters": 6500,
    "learning_rate": PEAK_LR,
    "min_lr": 0.0,
    "eval_interval": 100,
    "log_interval": 50,
}
TRAPEZOID = {**NIGHT, "warmup_iters": 40, "warmdown_iters": 4550}
COSINE = {**NIGHT, "warmup_iters": 200}


class Machine:
    """A machine that computes nothing, and its clock.

    An iteration takes 45 seconds and an evaluation 60, or what `seconds` and `eval_seconds` return
    for the hours since the start. The first iteration takes 5 minutes, a checkpoint 5 seconds.
    """

    def __init__(self):
        self.clock = 1000.0
        self.started = self.clock
        self.seconds = lambda hours: 45.0
        self.eval_seconds = lambda hours: 60.0
        self.stops_at = None  # the iteration in which a stop is requested
        self.last_s = 0.0  # seconds of the last iteration
        self.last_eval_s = 0.0
        self.rates = []  # the learning rate of each iteration
        self.fractions = []

    def now(self):
        return self.clock

    def hours(self):
        return (self.clock - self.started) / 3600

    def pause(self, seconds):
        """Let time pass between a stop and a resume, which must not count."""
        self.clock += seconds
        self.started += seconds

    # What the machine does instead of train.py's functions of these names

    def forward_backward(self, trainer):
        iter_num = trainer.progress.iter_num
        if self.stops_at == iter_num:
            self.stops_at = None
            raise StopRequested
        self.last_s = self.seconds(self.hours()) if iter_num > 0 else 300.0
        self.clock += self.last_s
        return torch.tensor(5.0)

    def clip_and_update(self, trainer, loss):
        self.rates.append(trainer.optimizers["optimizer"].param_groups[0]["lr"])
        self.fractions.append(trainer.progress.fraction)
        return 1.0

    def mean_loss(self):
        """Evaluate one of the two splits."""
        self.last_eval_s = self.eval_seconds(self.hours())
        self.clock += self.last_eval_s / 2
        return 5.0

    def save(self):
        self.clock += 5


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    save_checkpoint = train_script.save_checkpoint

    def save(*arguments, **options):
        machine.save()
        save_checkpoint(*arguments, **options)

    monkeypatch.setattr(train_script, "forward_backward", machine.forward_backward)
    monkeypatch.setattr(train_script, "clip_and_update", machine.clip_and_update)
    monkeypatch.setattr(train_script, "save_checkpoint", save)
    monkeypatch.setattr(Trainer, "mean_loss", lambda trainer, tokens: machine.mean_loss())
    monkeypatch.setattr("onenight.training.metrics.draw_losses", lambda *arguments: None)  # slow
    return machine


def train_by(machine, bins, out_dir, **settings):
    """Train by the machine's clock, with TINY and `settings` from a config file."""
    settings = {**TINY, "dataset": str(bins), "out_dir": str(out_dir), **settings}
    lines = [f"{key} = {value!r}\n" for key, value in settings.items()]
    config_file = out_dir.with_suffix(".py")
    config_file.write_text("".join(lines))
    result = train_by_clock(machine.now, config_file)
    assert result.returncode == 0, result.stderr
    return result


def assert_ended_on_time(machine, out_dir, hours):
    """Assert that the run has ended on time, by its own clock and by the machine's."""
    seconds = hours * 3600
    tolerance = max(0.01 * seconds, machine.last_s + machine.last_eval_s + 10)
    checkpoint = load(out_dir)
    assert checkpoint["elapsed_s"] == pytest.approx(seconds, abs=tolerance)
    assert machine.clock - machine.started == pytest.approx(seconds, abs=tolerance)
    assert checkpoint["fraction"] == 1.0
    assert machine.rates[-1] < 0.02 * PEAK_LR
    assert metrics(out_dir)[-1]["lr"] == 0


def assert_smooth(machine):
    """Assert that the schedule never went back, and that the rate had no jumps after the warmup."""
    assert machine.fractions == sorted(machine.fractions)
    peak = machine.rates.index(max(machine.rates))
    changes = [abs(after - before) for before, after in pairwise(machine.rates[peak:])]
    assert max(changes) < 0.02 * PEAK_LR


# The speed and the evaluations of machines that change, as changes to a Machine. `hours` are those
# since the start of a run of 8 hours.
CHANGES = {
    "steady": {},
    "3x slower from 60 % on": {"seconds": lambda hours: 45.0 if hours < 4.8 else 135.0},
    "3x faster from 60 % on": {"seconds": lambda hours: 45.0 if hours < 4.8 else 15.0},
    "3x slower for a tenth of the run": {
        "seconds": lambda hours: 135.0 if 3.6 < hours < 4.4 else 45.0
    },
    "every fifth iteration 5x slower": {
        "seconds": lambda hours: 225.0 if round(hours * 3600 / 45) % 5 == 0 else 45.0
    },
    "a pause of half an hour": {"seconds": lambda hours: 1800.0 if 4 < hours < 4.0125 else 45.0},
    "an evaluation that takes 10x as long": {
        "eval_seconds": lambda hours: 600.0 if 4 < hours < 5.3 else 60.0
    },
    "a last evaluation that takes 10x as long": {
        "eval_seconds": lambda hours: 600.0 if hours > 7.8 else 60.0
    },
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_a_run_ends_on_time_whatever_the_machine_does(machine, bins, tmp_path, changes):
    for name, value in changes.items():
        setattr(machine, name, value)
    train_by(machine, bins, tmp_path / "out", **TRAPEZOID)
    assert_ended_on_time(machine, tmp_path / "out", 8)
    assert_smooth(machine)


def test_with_a_cosine_a_run_ends_on_time_as_well(machine, bins, tmp_path):
    machine.seconds = CHANGES["3x slower from 60 % on"]["seconds"]
    train_by(machine, bins, tmp_path / "out", **COSINE)
    assert_ended_on_time(machine, tmp_path / "out", 8)
    assert_smooth(machine)


def test_stopped_and_resumed_twice_it_ends_on_time(machine, bins, tmp_path):
    """Once before the decay and once in it. The pauses do not count."""
    out_dir = tmp_path / "out"
    for iter_num in (100, 450):
        machine.stops_at = iter_num
        stopped = train_by(machine, bins, out_dir, **TRAPEZOID, init_from=start_of(out_dir))
        assert f"stopped at iter {iter_num};" in stopped.stdout
        assert load(out_dir)["fraction"] < 1
        machine.pause(90_000)
    resumed = train_by(machine, bins, out_dir, **TRAPEZOID, init_from="resume")
    assert "changed since" not in resumed.stdout
    assert_ended_on_time(machine, out_dir, 8)
    assert_smooth(machine)


def start_of(out_dir):
    return "resume" if (out_dir / "ckpt.pt").exists() else "scratch"


@pytest.mark.parametrize("stops_at", [100, 450], ids=["before the decay", "in the decay"])
@pytest.mark.parametrize("hours", [7.0, 10.0], ids=["fewer hours", "more hours"])
def test_resumed_with_other_hours_it_ends_when_they_do(machine, bins, tmp_path, stops_at, hours):
    """The learning rate goes on from where it was."""
    out_dir = tmp_path / "out"
    machine.stops_at = stops_at
    train_by(machine, bins, out_dir, **TRAPEZOID)
    machine.pause(90_000)
    resumed = train_by(
        machine, bins, out_dir, **{**TRAPEZOID, "hours": hours, "init_from": "resume"}
    )
    assert f"changed since: hours 8.0 -> {hours}" in resumed.stdout
    assert_ended_on_time(machine, out_dir, hours)
    assert_smooth(machine)


def test_resumed_with_fewer_hours_than_have_passed_it_ends_at_once(machine, bins, tmp_path):
    out_dir = tmp_path / "out"
    machine.stops_at = 450
    train_by(machine, bins, out_dir, **TRAPEZOID)
    train_by(machine, bins, out_dir, **{**TRAPEZOID, "hours": 1.0, "init_from": "resume"})
    assert load(out_dir)["iter_num"] == 451
    assert load(out_dir)["fraction"] == 1.0


def test_a_finished_run_is_extended_by_more_hours(machine, bins, tmp_path):
    out_dir = tmp_path / "out"
    train_by(machine, bins, out_dir, **TRAPEZOID)
    finished = train_by(machine, bins, out_dir, **TRAPEZOID, init_from="resume")
    extend = "to extend it, resume with --hours above 8\n"
    assert f"this run is finished (iter {load(out_dir)['iter_num']}); {extend}" in finished.stdout

    machine.clock = machine.started + load(out_dir)["elapsed_s"]
    first_new = len(machine.rates)
    train_by(machine, bins, out_dir, **{**TRAPEZOID, "hours": 10.0, "init_from": "resume"})
    # After 8 of 10 hours, 2/7 of the decay is left.
    assert machine.rates[first_new] == pytest.approx(2 / 7 * PEAK_LR, rel=0.02)
    assert_ended_on_time(machine, out_dir, 10)


@pytest.mark.parametrize("iter_num, max_iters", [(100, 622), (450, 620), (3, 0)])
def test_a_run_of_an_older_version_is_resumed(machine, bins, tmp_path, iter_num, max_iters):
    """Older versions decided on a number of iterations when they had measured the speed."""
    out_dir = tmp_path / "out"
    machine.stops_at = iter_num
    train_by(machine, bins, out_dir, **TRAPEZOID)
    checkpoint = load(out_dir)
    for key in ("fraction", "tokens"):
        del checkpoint[key]
    older = {
        "hours": 8.0 if max_iters else 0.0,
        "decisions": 1 if max_iters else 0,
        "max_iters": max_iters,
        "warmdown_iters": round(0.7 * max_iters),
    }
    torch.save({**checkpoint, **older}, out_dir / "ckpt.pt")
    machine.fractions.clear()  # the older version had none

    train_by(machine, bins, out_dir, **TRAPEZOID, init_from="resume")
    assert metrics(out_dir)[-1]["tokens"] == load(out_dir)["iter_num"] * 512
    assert_ended_on_time(machine, out_dir, 8)
    assert_smooth(machine)


def test_by_the_real_clock_a_short_run_ends_on_time(bins, tmp_path):
    """It has few iterations to measure, and the machine may be busy with other tests."""
    settings = {**TRAPEZOID, "hours": 5 / 3600, "eval_interval": 1000}
    started = time.monotonic()
    result = train_by(SimpleNamespace(now=time.monotonic), bins, tmp_path / "out", **settings)
    assert time.monotonic() - started == pytest.approx(5, rel=0.3)
    assert load(tmp_path / "out")["elapsed_s"] == pytest.approx(5, rel=0.3)
    assert metrics(tmp_path / "out")[-1]["lr"] == 0
    assert "\ndone\n" in result.stdout
