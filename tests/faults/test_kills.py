"""Runs that are stopped, killed or left with a damaged checkpoint, and then resumed.

Each must end bit for bit as an undisturbed run. tests/torture/train.py kills more often.
"""

import os
import random
import shutil
import signal
import time

import pytest
import torch

from helpers import (
    TINY,
    assert_one_sentence,
    load,
    losses,
    start_training,
    stop,
    train,
    train_here,
    wait_for_iter,
    wait_for_line,
)
from onenight.system.device import supports_bfloat16

needs_posix = pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")


def assert_same_run(one, other):
    """Assert that two runs have the same weights, optimizer state, progress and metrics."""
    first = load(one)
    second = load(other)
    assert first["iter_num"] == second["iter_num"]
    assert first["position"] == second["position"]
    assert first["tokens"] == second["tokens"]
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    for number, state in first["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, second["optimizer"]["state"][number][name]), (number, name)
    assert losses(one) == losses(other)
    first_best = load(one, "best.pt")["model"]["lm_head.weight"]
    assert torch.equal(first_best, load(other, "best.pt")["model"]["lm_head.weight"])


@needs_posix
@pytest.mark.parametrize(
    "changes, number",
    [
        ({"dropout": 0.2}, signal.SIGINT),
        ({"dtype": "bfloat16", "gradient_accumulation_steps": 1}, signal.SIGTERM),
        (
            {"dropout": 0.2, "dtype": "bfloat16", "compile": True, "n_layer": 1, "max_iters": 25},
            signal.SIGINT,
        ),
    ],
    ids=["dropout", "bfloat16", "compiled, dropout, bfloat16"],
)
def test_a_stopped_and_resumed_run_is_the_same(bins, tmp_path, changes, number):
    if "dtype" in changes and not supports_bfloat16(torch.device("cpu")):
        pytest.skip("this CPU has no bfloat16 instructions")
    changes = {**changes, "eval_interval": 10**6}  # so that only the signal can have saved it
    # torch.compile must find the same state in all runs, so each has a process of its own.
    train_all = train if changes.get("compile") else train_here
    assert train_all(bins, tmp_path / "undisturbed", **changes).returncode == 0

    process = start_training(bins, tmp_path / "stopped", **changes)
    wait_for_line(process, "iter 12:")
    stdout, _ = stop(process, number)
    assert "to continue, add --init_from=resume to the same command" in stdout
    assert 13 <= load(tmp_path / "stopped")["iter_num"] < changes.get("max_iters", 45)

    resumed = train_all(bins, tmp_path / "stopped", init_from="resume", **changes)
    assert resumed.returncode == 0, resumed.stderr
    assert "changed since" not in resumed.stdout
    assert_same_run(tmp_path / "undisturbed", tmp_path / "stopped")


@needs_posix
def test_a_second_ctrl_c_stops_at_once(bins, tmp_path):
    process = start_training(
        bins, tmp_path, batch_size=20_000, max_iters=10**6, lr_decay_iters=10**6
    )
    wait_for_line(process, "step 0:")  # then comes a micro-batch that takes seconds
    process.send_signal(signal.SIGINT)
    for line in process.stderr:
        if "Ctrl-C again" in line:
            break
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert f"stopped without saving; there is no checkpoint in {tmp_path} to resume from" in stdout
    assert "Traceback" not in stderr


@needs_posix
def test_a_run_that_is_killed_three_times_is_the_same(bins, tmp_path):
    changes = {"max_iters": 90, "eval_interval": 10, "dropout": 0.1}
    assert train_here(bins, tmp_path / "undisturbed", **changes).returncode == 0
    out_dir = tmp_path / "killed"
    generator = random.Random(5)
    for iter_num in sorted(generator.sample(range(11, 80), 3)):
        # Killed between two renames, a run has only the previous checkpoint.
        process = start_training(bins, out_dir, init_from="auto", **changes)
        wait_for_iter(process, iter_num)
        time.sleep(generator.random() / 20)
        process.kill()
        process.communicate()
    assert load(out_dir)["iter_num"] < 90
    finished = train_here(bins, out_dir, init_from="resume", **changes)
    assert finished.returncode == 0, finished.stderr
    assert_same_run(tmp_path / "undisturbed", out_dir)
    assert not list(out_dir.glob("*.partial"))


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_with_a_damaged_checkpoint_the_one_before_is_resumed(bins, finished_run, tmp_path, damage):
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    latest = tmp_path / "ckpt.pt"
    content = latest.read_bytes()
    latest.unlink()
    if damage == "truncated":
        latest.write_bytes(content[: len(content) // 2])
    result = train_here(bins, tmp_path, init_from="resume")
    assert result.returncode == 0, result.stderr
    assert f"loading {tmp_path / 'ckpt-previous.pt'} instead" in result.stdout
    assert_same_run(finished_run, tmp_path)
    # The damaged file has not replaced the good one.
    assert load(tmp_path, "ckpt-previous.pt")["iter_num"] == TINY["max_iters"]


def test_with_two_damaged_checkpoints_a_run_is_refused(bins, finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    for name in ("ckpt.pt", "ckpt-previous.pt"):
        (tmp_path / name).write_bytes(b"")
    refused = train_here(bins, tmp_path, init_from="resume")
    assert_one_sentence(refused, "ckpt-previous.pt: damaged, or not a checkpoint")
