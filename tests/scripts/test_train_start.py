"""What train.py does before its first iteration: device, torch.compile, torchrun's variables."""

import re

import pytest
import torch
from torch._inductor.exc import CppCompileError, InductorError

from helpers import load, train_here
from onenight.system.distributed import TORCHRUN_VARIABLES


@pytest.mark.skipif(
    torch.cuda.is_available() or torch.backends.mps.is_available(), reason="this machine has a GPU"
)
def test_the_first_line_says_that_there_is_no_gpu(bins):
    result = train_here(bins, "unused", plan=True, device="auto")
    assert result.stdout.startswith("device: cpu (torch finds no GPU: see README), float32\n")


def test_a_run_for_which_torch_compile_does_not_work_is_not_compiled(bins, tmp_path, monkeypatch):
    monkeypatch.setattr("onenight.training.settings.compile_works", lambda device: False)
    result = train_here(bins, tmp_path, compile=True, max_iters=1)
    assert result.returncode == 0, result.stderr
    device_line = result.stdout.splitlines()[0]
    assert device_line.startswith("device: cpu")
    assert "compiled" not in device_line


def test_a_run_whose_model_cannot_be_compiled_continues_without_torch_compile(
    bins, tmp_path, monkeypatch
):
    """The small function of the trial can be compiled, and the model cannot."""

    def fail(*arguments):
        output = "/tmp/a.cpp:1: fatal error: error writing to /tmp/a.s: No space left on device"
        raise InductorError(CppCompileError(["g++"], output), None)

    monkeypatch.setattr("onenight.training.settings.compile_works", lambda device: True)
    monkeypatch.setattr("onenight.training.trainer.compile_model", lambda model: fail)
    result = train_here(bins, tmp_path, compile=True, max_iters=3)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("torch.compile: disabled (/tmp/a.cpp:1: fatal error: ") == 1
    assert "No space left on device). To enable it: set TMPDIR" in result.stdout
    assert load(tmp_path)["iter_num"] == 3


def test_a_plan_for_another_card_does_not_try_torch_compile_here(bins, monkeypatch):
    monkeypatch.setattr("onenight.training.settings.compile_works", lambda device: 1 / 0)
    result = train_here(bins, "unused", plan=True, compile=True, plan_vram_gb=12)
    assert result.returncode == 0, result.stderr
    assert "fits: yes" in result.stdout


def test_a_run_with_variables_left_over_from_torchrun_trains_with_one_process(
    bins, tmp_path, monkeypatch
):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = train_here(bins, tmp_path, max_iters=1)
    assert result.returncode == 0, result.stderr
    assert "torchrun's variables RANK, WORLD_SIZE are set" in result.stdout


def test_a_plan_does_not_wait_for_other_processes(bins, monkeypatch):
    values = ("0", "2", "0", "localhost", "29511")  # the second process never comes
    for name, value in zip(TORCHRUN_VARIABLES, values):
        monkeypatch.setenv(name, value)
    assert train_here(bins, "unused", plan=True).returncode == 0


def test_a_speed_above_the_measured_ceiling_is_explained(bins, tmp_path, monkeypatch):
    monkeypatch.setattr("onenight.training.plan.measure_tflops", lambda device, dtype: 1e-9)
    result = train_here(bins, tmp_path, max_iters=4)
    assert result.returncode == 0, result.stderr
    assert "mfu unknown (the machine was busy when its speed was measured)" in result.stdout


def test_int8_may_be_faster_than_the_ceiling_which_is_that_of_other_products(
    bins, tmp_path, monkeypatch
):
    monkeypatch.setattr("onenight.training.plan.measure_tflops", lambda device, dtype: 1e-9)
    result = train_here(bins, tmp_path, max_iters=4, int8=True)
    assert result.returncode == 0, result.stderr
    assert re.search(r"mfu \d{3,}\.\d%", result.stdout)
