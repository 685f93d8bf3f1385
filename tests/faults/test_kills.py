"""Runs that are killed and resumed. tests/torture/train.py kills more often."""

import random
import signal
import time

import pytest

from forks import Training, assert_same_run, at, needs_fork
from helpers import load

pytestmark = needs_fork


def test_a_run_that_is_killed_three_times_ends_as_an_undisturbed_one(bins, undisturbed, tmp_path):
    generator = random.Random(5)
    for iter_num in (8, 20, 30):
        training = Training(bins, tmp_path, init_from="auto")
        training.wait_for_iter(iter_num)
        time.sleep(generator.random() / 20)
        training.process.kill()
        assert training.end() == -signal.SIGKILL
    resumed = Training(bins, tmp_path, init_from="resume")
    assert resumed.end() == 0, resumed.output()
    assert_same_run(undisturbed, tmp_path)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_old_one_whole(
    bins, undisturbed, tmp_path, monkeypatch
):
    """From iteration 20 on, the first file to become longer than 100 kB kills the process."""
    resource = pytest.importorskip("resource")

    def limit_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    at(monkeypatch, 20, limit_files)
    assert Training(bins, tmp_path).end() == -signal.SIGXFSZ
    assert (tmp_path / "ckpt.pt").stat().st_size > 200_000
    assert load(tmp_path)["iter_num"] == 15
    monkeypatch.undo()
    resumed = Training(bins, tmp_path, init_from="resume")
    assert resumed.end() == 0, resumed.output()
    assert_same_run(undisturbed, tmp_path)
    assert not list(tmp_path.glob("*.partial"))
