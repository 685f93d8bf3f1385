"""onenight/system/device.py: the device, its number formats, and whether torch.compile works."""

import os
import subprocess
import sys

import pytest
import torch

from configurator import UserError
from helpers import PROGRAMS, ROOT
from onenight.system.device import (
    autocast,
    choose_device,
    choose_dtype,
    measure_tflops,
    set_up_device,
)

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture
def bfloat16(monkeypatch):
    """Set whether devices have bfloat16 instructions."""

    def set_support(supported):
        monkeypatch.setattr("onenight.system.device.supports_bfloat16", lambda device: supported)

    return set_support


@pytest.mark.parametrize(
    "has_cuda, has_mps, name",
    [(True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_is_the_gpu_if_there_is_one(monkeypatch, has_cuda, has_mps, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)
    empty = torch.empty
    chosen = []
    monkeypatch.setattr(torch, "empty", lambda size, device: chosen.append(device) or empty(size))
    choose_device("auto")
    assert chosen == [name]


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="device=cuda:99 is not available here .*; try --device="):
        choose_device("cuda:99")
    with pytest.raises(UserError, match="device=gpu is not available here"):
        choose_device("gpu")


@pytest.mark.parametrize(
    "asked, device, supported, chosen",
    [
        ("auto", CUDA, True, "bfloat16"),
        ("auto", CUDA, False, "float16"),
        ("auto", CPU, True, "float32"),
        ("auto", CPU, False, "float32"),
        ("float32", CUDA, True, "float32"),
        ("float16", CUDA, True, "float16"),
        ("bfloat16", CPU, True, "bfloat16"),
    ],
)
def test_the_number_format_is_what_was_asked_for(
    bfloat16, capsys, asked, device, supported, chosen
):
    bfloat16(supported)
    assert choose_dtype(asked, device) == chosen
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "asked, device, chosen, message",
    [
        ("bfloat16", CPU, "float32", "this CPU has no bfloat16 instructions: using float32\n"),
        ("bfloat16", CUDA, "float16", "this GPU has no bfloat16 instructions: using float16\n"),
        ("float16", CPU, "float32", "float16 needs a GPU: using float32\n"),
    ],
)
def test_a_number_format_that_the_device_lacks_is_replaced_with_a_message(
    bfloat16, capsys, asked, device, chosen, message
):
    bfloat16(False)
    assert choose_dtype(asked, device) == chosen
    assert capsys.readouterr().out == message


@pytest.mark.filterwarnings("error")  # autocast warns of float32
def test_autocast_computes_matrix_products_in_the_format_and_float32_switches_it_off():
    matrix = torch.ones(4, 4)
    with autocast("bfloat16", CPU):
        assert (matrix @ matrix).dtype == torch.bfloat16
    with autocast("float32", CPU):
        assert (matrix @ matrix).dtype == torch.float32


def test_without_a_compiler_torch_compile_is_disabled_with_the_remedy(tmp_path):
    """In a process of its own, because torch reads the environment variable once."""
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "CXX": str(tmp_path / "no-compiler"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    command = [sys.executable, PROGRAMS / "compile_works.py"]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    message, answer = result.stdout.splitlines()
    assert message.startswith("torch.compile: disabled (")
    assert "). To enable it: " in message
    assert answer == "False"


def test_compiling_is_tried_only_if_it_was_asked_for(monkeypatch):
    monkeypatch.setattr("onenight.system.device.compile_works", lambda device: 1 / 0)
    assert set_up_device("cpu", "float32", compiled=False) == (CPU, "float32", False)


def test_the_measured_speed_is_that_of_the_fastest_product(monkeypatch):
    seconds = iter([5.0, 2e-3, 1e-3])  # the first is not counted
    monkeypatch.setattr("onenight.system.device.MEASURE_S", 0.0)
    monkeypatch.setattr("onenight.system.device.time_product", lambda matrix: next(seconds))
    assert measure_tflops(CPU, "float32") == pytest.approx(2 * 512**3 / 2e-3 / 1e12)
