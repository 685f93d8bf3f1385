"""Signals: a stop is quick and loses nothing, and Ctrl-C never prints a traceback."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from helpers import (
    PROGRAMS,
    ROOT,
    flags_of,
    load,
    losses,
    make_random_bins,
    start,
    start_training,
    stop,
    train_here,
    wait_for_line,
    wait_until,
)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")

# An iteration of hours, which would not end before a test does.
LONG_ITERATION = {"gradient_accumulation_steps": 10**6, "max_iters": 9, "lr_decay_iters": 9}


def interrupt(process):
    """Send SIGINT and assert that the process ends with its exit status and without a traceback."""
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr


# -----------------------------------------------------------------------------
# A stop that saves


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_stop_does_not_wait_for_the_end_of_a_long_iteration(bins, tmp_path, number):
    process = start_training(bins, tmp_path, **LONG_ITERATION)
    wait_for_line(process, "step 0:")
    time.sleep(0.3)
    stdout, seconds = stop(process, number)
    assert "stopped at iter 0; to continue" in stdout
    assert seconds < 10
    checkpoint = load(tmp_path)
    assert checkpoint["iter_num"] == 0
    assert checkpoint["position"] == 0


def test_the_discarded_iteration_is_repeated_after_resuming(bins, tmp_path):
    """Two long iterations with dropout, stopped in the second, give an undisturbed run's losses."""
    changes = {
        "gradient_accumulation_steps": 150,
        "max_iters": 3,
        "lr_decay_iters": 30,
        "dropout": 0.1,
    }
    assert train_here(bins, tmp_path / "undisturbed", **changes).returncode == 0
    process = start_training(bins, tmp_path / "stopped", **changes)
    wait_for_line(process, "iter 0:")
    stdout, _ = stop(process)
    assert "stopped at iter 1;" in stdout
    resumed = train_here(bins, tmp_path / "stopped", init_from="resume", **changes)
    assert resumed.returncode == 0, resumed.stderr
    assert losses(tmp_path / "stopped") == losses(tmp_path / "undisturbed")


def test_a_stop_in_an_evaluation_repeats_the_evaluation_after_resuming(tmp_path):
    make_random_bins(tmp_path, vocab_size=250, n_tokens=2_000_000)
    (tmp_path / "meta.json").write_text('{"vocab_size": 250}')
    changes = {"eval_interval": 3, "batch_size": 1}
    process = start_training(tmp_path, tmp_path / "out", eval_iters=10**4, **changes)
    wait_for_line(process, "memory:")
    time.sleep(3)  # until the evaluation before the first iteration
    stdout, seconds = stop(process)
    assert "stopped at iter 0;" in stdout
    assert "step 0:" not in stdout
    assert seconds < 10
    resumed = train_here(tmp_path, tmp_path / "out", init_from="resume", max_iters=1, **changes)
    assert re.findall("^step ([0-9]+):", resumed.stdout, re.M) == ["0", "1"]


@pytest.mark.parametrize("to_all", [True, False], ids=["Ctrl-C", "SIGTERM to one process"])
def test_a_stop_under_torchrun_is_quick(bins, tmp_path, to_all):
    """torchrun kills its processes 30 seconds after a Ctrl-C."""
    # A process that did not get the signal first completes its part of the iteration.
    accumulation = 10**6 if to_all else 3000
    changes = {**LONG_ITERATION, "gradient_accumulation_steps": accumulation}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = start([*launcher, ROOT / "train.py", *flags_of(bins, tmp_path, changes)])
    wait_for_line(process, "step 0:")
    pgrep = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    workers = [int(pid) for pid in pgrep.stdout.split()]
    time.sleep(0.3)
    if to_all:
        for worker in workers:
            os.kill(worker, signal.SIGINT)
    else:
        os.kill(workers[-1], signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "stopped at iter 0;" in stdout
    checkpoint = load(tmp_path)
    assert checkpoint["iter_num"] == 0
    assert checkpoint["position"] == 0


def test_a_hangup_that_was_ignored_from_the_start_stays_ignored(bins, tmp_path):
    flags = flags_of(bins, tmp_path, {})
    process = start([PROGRAMS / "ignore_hangup.py", "-u", ROOT / "train.py", *flags])
    wait_for_line(process, "iter 2:")
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert load(tmp_path)["iter_num"] == 45


# -----------------------------------------------------------------------------
# Ctrl-C where there is nothing to save


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads imported files from /proc")
@pytest.mark.parametrize(
    "script", ["train.py", "sample.py", "export.py", "prepare_single_parquet.py"]
)
def test_ctrl_c_during_the_imports_is_silent(script, tmp_path):
    process = start(script, cwd=tmp_path)
    mapped_files = Path(f"/proc/{process.pid}/maps")
    while "numpy" not in mapped_files.read_text():
        time.sleep(0.005)
        assert process.poll() is None
    interrupt(process)


def test_ctrl_c_in_an_evaluation_a_sample_or_an_export_is_silent_and_changes_no_file(tmp_path):
    make_random_bins(tmp_path, vocab_size=50257, n_tokens=2_000)
    out_dir = tmp_path / "out"
    export_dir = tmp_path / "export"
    partial_export = tmp_path / "export.partial"
    assert train_here(tmp_path, out_dir, max_iters=1, eval_iters=1).returncode == 0
    before = sorted((path.name, path.stat().st_mtime) for path in out_dir.iterdir())

    make_random_bins(tmp_path, vocab_size=50257, n_tokens=50_000)  # a longer evaluation
    changes = {"init_from": "resume", "eval_only": True, "allow_new_data": True}
    evaluation = start_training(tmp_path, out_dir, eval_iters=1000, **changes)
    wait_for_line(evaluation, "resuming")
    interrupt(evaluation)

    sample = start("sample.py", f"--out_dir={out_dir}", "--device=cpu", "--max_new_tokens=100000")
    sample.stdout.readline()
    interrupt(sample)

    export = start("export.py", f"--out_dir={out_dir}", f"--export_dir={export_dir}")
    wait_until(partial_export.exists)
    interrupt(export)
    assert not export_dir.exists()
    assert not partial_export.exists()

    assert sorted((path.name, path.stat().st_mtime) for path in out_dir.iterdir()) == before
