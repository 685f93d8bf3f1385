"""device.py: the device, its number formats, torch.compile, and memory.

Where a GPU answers, its answers are replaced, so no GPU is needed.
"""

import functools
import re
from pathlib import Path

import pytest
import torch

from helpers import load, train_here
from onenight import device as device_module
from onenight.device import (
    choose_device,
    choose_dtype,
    free_memory,
    is_out_of_memory,
    limit_memory,
)
from onenight.errors import UserError

CPU = torch.device("cpu")
CUDA = torch.device("cuda")

# -----------------------------------------------------------------------------
# The device and its number formats


@pytest.mark.parametrize(
    "has_cuda, has_mps, name",
    [(True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_is_the_gpu_if_there_is_one(monkeypatch, has_cuda, has_mps, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)
    ones = torch.ones
    chosen = []
    monkeypatch.setattr(torch, "ones", lambda size, device: chosen.append(device) or ones(size))
    choose_device("auto")
    assert chosen == [name]


@pytest.mark.parametrize("name", ["gpu", "meta"])
def test_a_device_that_is_not_here_or_holds_no_numbers_is_refused(name):
    with pytest.raises(UserError, match=f"device={name}"):
        choose_device(name)


@pytest.mark.parametrize(
    "asked, device, has_bfloat16, chosen",
    [
        ("auto", CUDA, True, "bfloat16"),
        ("auto", CUDA, False, "float16"),
        ("auto", CPU, True, "float32"),
        # What the device lacks is replaced.
        ("bfloat16", CUDA, False, "float16"),
        ("float16", CPU, True, "float32"),
    ],
)
def test_the_number_format_is_the_one_asked_for_unless_the_device_lacks_it(
    monkeypatch, asked, device, has_bfloat16, chosen
):
    monkeypatch.setattr(device_module, "supports_bfloat16", lambda device: has_bfloat16)
    assert choose_dtype(asked, device) == chosen


# -----------------------------------------------------------------------------
# torch.compile


def test_without_a_compiler_a_run_goes_on_uncompiled(bins, tmp_path, monkeypatch):
    def fail(graph, inputs):
        raise FileNotFoundError("c++")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=fail))
    result = train_here(bins, tmp_path, compile=True, max_iters=1)
    assert result.returncode == 0, result.stderr
    assert "torch.compile" in result.stdout
    assert load(tmp_path)["iter_num"] == 1
    assert load(tmp_path)["config"]["compile"] is False


# -----------------------------------------------------------------------------
# Memory


@pytest.fixture
def card(monkeypatch):
    """Set the free memory of a card of 12 GB, and whether Windows' driver runs it. Return the
    limits that are set then: fractions of the card's memory."""
    fractions = []

    def set_card(free_gb, has_windows_driver=False):
        monkeypatch.setattr(device_module, "WINDOWS_GPU_DRIVER", has_windows_driver)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_gb * 1e9, 12e9))
        monkeypatch.setattr(
            torch.cuda,
            "set_per_process_memory_fraction",
            lambda fraction, device: fractions.append(fraction),
        )
        return fractions

    return set_card


@pytest.mark.parametrize(
    "free_gb, limit_gb, usable_gb",
    [(11.6, 0, 11.3), (9.0, 0, 9.0), (11.6, 8, 7.3)],
    ids=["empty card", "card in use", "limit"],
)
def test_the_reserve_is_taken_from_the_size_of_the_card_but_not_from_what_is_free(
    card, free_gb, limit_gb, usable_gb
):
    card(free_gb)
    assert free_memory(CUDA, limit_gb) == pytest.approx(usable_gb * 1e9)


def test_a_process_may_use_all_memory_unless_a_limit_is_set(card):
    fractions = card(11.6)
    limit_memory(0.0, CUDA)
    assert fractions == []
    limit_memory(8.0, CUDA)
    assert fractions == [pytest.approx(7.3 / 12)]


def test_windows_driver_is_kept_from_using_the_computers_memory(card):
    """It would, silently, and a run would be many times slower."""
    fractions = card(11.0, has_windows_driver=True)
    limit_memory(0.0, CUDA)
    assert fractions == [pytest.approx(10.5 / 12)]
    assert free_memory(CUDA) == pytest.approx(10.5e9)  # which the plan goes by


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="reads the memory from /proc")
def test_the_free_memory_of_a_cpu_is_what_the_system_reports():
    total = re.search(r"MemTotal: *(\d+) kB", Path("/proc/meminfo").read_text())
    assert 0 < free_memory(CPU) < 1024 * int(total[1])


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("could not create a primitive"),  # oneDNN
        MemoryError(),
    ],
)
def test_errors_of_all_devices_count_as_out_of_memory(error):
    assert is_out_of_memory(error)


def test_other_errors_do_not_count_as_out_of_memory():
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert not is_out_of_memory(error)
