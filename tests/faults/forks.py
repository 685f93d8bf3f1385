"""train.py in a process that is forked from the test's.

To signals, locks and the disk it is a process like any other, but it does not need the three
seconds of imports, and it has the test's monkeypatches.
"""

from onenight.startup import run_script

import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time

import pytest
import torch

import train as train_script
from helpers import STARTED, flags_of, load, losses, wait_until
from onenight.trainer import Trainer

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")

# Changes to TINY: the run that the faults happen to. An evaluation saves a checkpoint.
RUN = {
    "dropout": 0.1,
    "batch_size": 2,
    "max_iters": 60,
    "eval_interval": 15,
    "eval_tokens": 1024,
}
STOP_SIGNALS = [
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
]


class Training:
    """train.py with TINY, RUN and `changes`. `prepare` is called in its process first."""

    def __init__(self, bins, out_dir, prepare=lambda: None, **changes):
        self.log = tempfile.TemporaryFile(buffering=0)
        flags = flags_of(bins, out_dir, {**RUN, **changes})
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=self.run, args=(prepare, flags))
        self.process.start()
        self.pid = self.process.pid
        STARTED.append(self.process)

    def run(self, prepare, flags):
        for number in (1, 2):
            os.dup2(self.log.fileno(), number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        prepare()
        sys.stdout = stream_of(1)
        sys.stderr = stream_of(2)
        sys.argv = ["train.py", *flags]
        run_script(train_script.main)

    def output(self):
        """Return what it has printed so far, to stdout and stderr."""
        return os.pread(self.log.fileno(), 10**7, 0).decode()

    def wait_for(self, pattern):
        """Wait until it has printed a regular expression."""
        wait_until(lambda: re.search(pattern, self.output()) or not self.process.is_alive())
        assert re.search(pattern, self.output()), self.output()

    def wait_for_iter(self, number):
        """Wait until it has printed iteration `number` or a later one."""
        while True:
            self.wait_for("iter .*: loss")
            if int(re.findall(r"iter (\d+): loss", self.output())[-1]) >= number:
                return
            assert self.process.is_alive(), self.output()
            time.sleep(0.002)

    def end(self):
        """Wait for its end. Return its exit status, or minus the signal that has killed it."""
        self.process.join(60)
        return self.process.exitcode


def stream_of(number):
    """Return a text stream that writes to a file descriptor, None if it is closed, as Python has
    it in sys.stdout."""
    try:
        return open(number, "w", closefd=False)
    except OSError:
        return None


def at(monkeypatch, iter_num, action):
    """Call action() once, in the middle of iteration `iter_num`: after half of its gradient."""
    micro_step = Trainer.micro_step
    calls = []

    def with_action(trainer, x, y):
        if trainer.progress.iter_num == iter_num:
            calls.append(iter_num)
            if len(calls) == 2:
                action()
        return micro_step(trainer, x, y)

    monkeypatch.setattr(Trainer, "micro_step", with_action)


def signal_itself(number):
    os.kill(os.getpid(), number)


def assert_same_end(one, other):
    """Assert that two runs have the same weights, optimizer state and progress, to the bit."""
    first = load(one)
    second = load(other)
    for key in ("iter_num", "position", "tokens", "best_val_loss", "best_iter", "skipped_iters"):
        assert first[key] == second[key], key
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    for number, state in first["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, second["optimizer"]["state"][number][name]), (number, name)
    best = load(other, "best.pt")["model"]
    for name, value in load(one, "best.pt")["model"].items():
        assert torch.equal(value, best[name]), name


def assert_same_run(one, other):
    """Assert that two runs have ended the same, and recorded the same."""
    assert_same_end(one, other)
    assert losses(one) == losses(other)


def assert_finite(out_dir, *names):
    """Assert that the weights in these checkpoints are finite numbers."""
    for name in names:
        assert all(value.isfinite().all() for value in load(out_dir, name)["model"].values()), name
