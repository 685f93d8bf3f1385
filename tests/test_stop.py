"""A stop takes a micro-batch, or a batch of an evaluation, and not an iteration; with torchrun as without."""

import os
import re
import signal
import subprocess
import time

import numpy as np
import pytest
from conftest import ROOT, flags_of, load, losses, start, start_training, stop, train, wait_for_line

HOURS_LONG = {"gradient_accumulation_steps": 10**6, "max_iters": 9, "lr_decay_iters": 9}  # an iteration of hours


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_in_an_iteration_of_hours(bins, tmp_path, number):
    process = start_training(bins, tmp_path, **HOURS_LONG)
    wait_for_line(process, "step 0:")
    time.sleep(0.3)
    stdout, seconds = stop(process, number)
    assert "stopped at iter 0; to continue" in stdout and seconds < 10
    assert load(tmp_path)["iter_num"] == load(tmp_path)["position"] == 0


def test_the_dropped_iteration_is_done_again_when_resuming(bins, tmp_path):
    """Two long iterations with dropout, the second one stopped: the metrics of an undisturbed run."""
    changes = {"gradient_accumulation_steps": 150, "max_iters": 3, "lr_decay_iters": 30, "dropout": 0.1}
    assert train(bins, tmp_path / "whole", **changes).returncode == 0
    process = start_training(bins, tmp_path / "parts", **changes)
    wait_for_line(process, "iter 0:")
    stdout, _ = stop(process)
    assert "stopped at iter 1;" in stdout
    assert train(bins, tmp_path / "parts", init_from="resume", **changes).returncode == 0
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_a_stop_in_a_long_evaluation(tmp_path):
    """It is not counted as done, and is made when the run is resumed."""
    for split in ("train", "val"):
        np.random.default_rng(0).integers(0, 250, 2_000_000).astype("<u2").tofile(tmp_path / f"{split}.bin")
    (tmp_path / "meta.json").write_text('{"vocab_size": 250}')
    process = start_training(tmp_path, tmp_path / "out", eval_iters=10**4, eval_interval=3, batch_size=1)
    wait_for_line(process, "memory:")
    time.sleep(3)  # in the evaluation before the first iteration
    stdout, seconds = stop(process)
    assert "stopped at iter 0;" in stdout and "step 0:" not in stdout and seconds < 10
    resumed = train(tmp_path, tmp_path / "out", init_from="resume", eval_interval=3, batch_size=1, max_iters=1)
    assert re.findall("^step ([0-9]+):", resumed.stdout, re.M) == ["0", "1"]


@pytest.mark.parametrize("to_all", [True, False], ids=["Ctrl-C", "SIGTERM to one process"])
def test_a_stop_under_torchrun_in_an_iteration_of_hours(bins, tmp_path, to_all):
    """torchrun kills its processes 30 seconds after a Ctrl-C."""
    accumulation = 10**6 if to_all else 3000  # a process that does not hear it finishes its share first
    flags = flags_of(bins, tmp_path, {**HOURS_LONG, "gradient_accumulation_steps": accumulation})
    process = start(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py", *flags])
    wait_for_line(process, "step 0:")
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    time.sleep(0.3)
    for worker in workers if to_all else workers[-1:]:
        os.kill(int(worker), signal.SIGINT if to_all else signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "stopped at iter 0;" in stdout
    assert load(tmp_path)["iter_num"] == load(tmp_path)["position"] == 0
