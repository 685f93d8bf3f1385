"""train.py --hours on machines that change their speed: it ends on time, at its lowest learning
rate."""

import time

import pytest

import train as train_script
from helpers import load, metrics, train_here
from onenight.schedule import Clock
from onenight.trainer import StopRequested, Trainer

PEAK = 1e-2
NIGHT = {
    "hours": 8,
    "max_iters": 6500,
    "learning_rate": PEAK,
    "min_lr": 0.0,
    "warmup_iters": 40,
    "warmdown": 0.7,
    "eval_interval": 100,
    "log_interval": 50,
}


class Machine:
    """A machine that computes nothing, and its clock.

    An iteration takes 45 seconds and an evaluation 60, times what `slowness` and `eval_slowness`
    return for the hours since the start. A checkpoint takes 5 seconds. All that times `scale`.
    """

    def __init__(self):
        self.seconds = 0.0
        self.scale = 1.0
        self.tick = 1e-6  # of the clock
        self.slowness = lambda hours: 1
        self.eval_slowness = lambda hours: 1
        self.stops_at = None  # the iteration in which a stop is requested
        self.rate = None  # the last learning rate

    @property
    def hours(self):
        return self.seconds / 3600

    def now(self):
        return (1000.0 + self.seconds) // self.tick * self.tick


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    save_checkpoint = train_script.save_checkpoint

    def accumulate(trainer):
        if trainer.progress.iter_num == machine.stops_at:
            raise StopRequested
        machine.seconds += machine.scale * 45 * machine.slowness(machine.hours)
        return 5.0

    def update(trainer, loss):
        machine.rate = trainer.optimizers["optimizer"].param_groups[0]["lr"]
        return 1.0

    def mean_loss(trainer, tokens):  # of one of the two splits
        machine.seconds += machine.scale * 30 * machine.eval_slowness(machine.hours)
        return 5.0

    def save(*arguments):
        machine.seconds += machine.scale * 5
        return save_checkpoint(*arguments)

    monkeypatch.setattr(Trainer, "accumulate", accumulate)
    monkeypatch.setattr(Trainer, "update", update)
    monkeypatch.setattr(Trainer, "mean_loss", mean_loss)
    monkeypatch.setattr(train_script, "save_checkpoint", save)
    monkeypatch.setattr(Clock.__init__, "__defaults__", (machine.now,))
    return machine


def train_a_night(bins, out_dir, **changes):
    result = train_here(bins, out_dir, **{**NIGHT, **changes})
    assert result.returncode == 0, result.stderr


def assert_ended_on_time(machine, out_dir, hours):
    """By the machine's clock and by the run's own record."""
    assert machine.hours == pytest.approx(hours, rel=0.01)
    assert load(out_dir)["elapsed_s"] == pytest.approx(hours * 3600, rel=0.01)
    assert machine.rate < 0.02 * PEAK


@pytest.mark.parametrize(
    "changes",
    [
        {"slowness": lambda hours: 3 if hours > 4.8 else 1},
        {"slowness": lambda hours: 1 / 3 if hours > 4.8 else 1},
        {"slowness": lambda hours: 40 if 4 < hours < 4.0125 else 1},
        {"eval_slowness": lambda hours: 10 if hours > 4 else 1},
    ],
    ids=["slower", "faster", "half an hour of pause", "slow evaluations"],
)
def test_a_run_ends_on_time_whatever_the_machine_does(machine, bins, tmp_path, changes):
    for name, value in changes.items():
        setattr(machine, name, value)
    train_a_night(bins, tmp_path)
    assert_ended_on_time(machine, tmp_path, 8)


def test_pauses_between_sessions_do_not_count_and_more_hours_extend_a_run(machine, bins, tmp_path):
    for stops_at in (100, 450, None):  # before the decay, and in it
        machine.stops_at = stops_at
        train_a_night(bins, tmp_path, init_from="auto")
        if stops_at:
            assert load(tmp_path)["iter_num"] == stops_at
        machine.seconds = load(tmp_path)["elapsed_s"]  # the clock is set back: the pause is over
    assert_ended_on_time(machine, tmp_path, 8)
    train_a_night(bins, tmp_path, init_from="resume", hours=10)
    assert_ended_on_time(machine, tmp_path, 10)


def test_by_the_real_clock_a_run_ends_on_time(bins, tmp_path):
    began = time.monotonic()
    # Without evaluations on the way: in so short a run, a slow one would cut the decay off.
    train_a_night(bins, tmp_path, hours=3 / 3600, log_interval=1, eval_interval=100_000)
    # And what it takes to begin and to end on a busy machine.
    assert time.monotonic() - began == pytest.approx(3, abs=1)
    steps = [record for record in metrics(tmp_path) if "lr" in record]
    assert steps[-1]["lr"] < 0.1 * PEAK


def test_by_a_clock_with_coarse_ticks_a_run_ends_on_time(machine, bins, tmp_path, monkeypatch):
    """Its ticks of 15.6 ms are longer than an iteration, and there are 185 in the run."""
    machine.tick = 0.0156
    machine.scale = 1e-4
    monkeypatch.setattr(time, "perf_counter", machine.now)
    train_a_night(bins, tmp_path, hours=8 * machine.scale)
    assert_ended_on_time(machine, tmp_path, 8 * machine.scale)
    assert metrics(tmp_path)[1]["tokens_per_s"] > 0
