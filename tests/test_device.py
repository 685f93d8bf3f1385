"""device.py: the device, its number formats, torch.compile, and memory.

Where a GPU answers, its answers are replaced, so no GPU is needed.
"""

import re
from pathlib import Path

import pytest
import torch

from helpers import load, train
from onenight import device as device_module
from onenight.device import (
    autocast,
    choose_device,
    choose_dtype,
    free_memory,
    is_out_of_memory,
    limit_memory,
    peak_memory_gb,
    set_up_device,
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


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "", "meta", "lazy", "hpu", "xla"])
def test_a_device_that_is_not_here_or_holds_no_numbers_is_refused(name):
    with pytest.raises(UserError, match=f"device={name}"):
        choose_device(name)


@pytest.mark.parametrize(
    "asked, device, has_bfloat16, chosen",
    [
        ("auto", CUDA, True, "bfloat16"),
        ("auto", CUDA, False, "float16"),
        ("auto", CPU, True, "float32"),
        ("auto", CPU, False, "float32"),
        ("float32", CUDA, True, "float32"),
        ("float16", CUDA, True, "float16"),
        ("bfloat16", CPU, True, "bfloat16"),
        # What the device lacks is replaced.
        ("bfloat16", CPU, False, "float32"),
        ("bfloat16", CUDA, False, "float16"),
        ("float16", CPU, True, "float32"),
    ],
)
def test_the_number_format_is_the_one_asked_for_unless_the_device_lacks_it(
    monkeypatch, capsys, asked, device, has_bfloat16, chosen
):
    monkeypatch.setattr(device_module, "supports_bfloat16", lambda device: has_bfloat16)
    assert choose_dtype(asked, device) == chosen
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (asked not in ("auto", chosen))  # a replacement is said
    assert all(chosen in line for line in lines)


@pytest.mark.filterwarnings("error")  # autocast warns of float32
def test_autocast_computes_products_in_the_format_and_float32_switches_it_off():
    matrix = torch.ones(4, 4)
    with autocast("bfloat16", CPU):
        assert (matrix @ matrix).dtype == torch.bfloat16
    with autocast("float32", CPU):
        assert (matrix @ matrix).dtype == torch.float32


# -----------------------------------------------------------------------------
# torch.compile


def test_without_a_compiler_a_run_goes_on_uncompiled(bins, tmp_path):
    """In a process of its own, because torch reads the environment variables once."""
    env = {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    result = train(bins, tmp_path / "out", env=env, compile=True, max_iters=1)
    assert result.returncode == 0, result.stderr
    assert "torch.compile" in result.stdout
    assert load(tmp_path / "out")["iter_num"] == 1
    assert load(tmp_path / "out")["config"]["compile"] is False


def test_compiling_is_tried_only_if_it_was_asked_for(monkeypatch):
    def fail(function):
        raise RuntimeError("tried")

    monkeypatch.setattr(torch, "compile", fail)
    assert set_up_device("cpu", "float32", compiled=False) == (CPU, "float32", False)


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
    [(11.6, 0, 11.3), (9.0, 0, 9.0), (11.6, 8, 7.3), (5.0, 8, 5.0), (11.6, 24, 11.3)],
    ids=["empty card", "card in use", "limit", "limit of a card in use", "limit above the card's"],
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


def test_a_cpu_has_no_limit_and_no_peak(card):
    fractions = card(11.6)
    limit_memory(8.0, CPU)
    assert fractions == []
    assert peak_memory_gb(CPU) == (0.0, 0.0)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="reads the memory from /proc")
def test_the_free_memory_of_a_cpu_is_what_the_system_reports():
    total = re.search(r"MemTotal: *(\d+) kB", Path("/proc/meminfo").read_text())
    assert 0 < free_memory(CPU) < 1024 * int(total[1])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.1 GB)"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("could not create a primitive"),  # oneDNN
        MemoryError(),
    ],
)
def test_errors_of_all_devices_count_as_out_of_memory(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        KeyError("out of memory"),
    ],
)
def test_other_errors_do_not_count_as_out_of_memory(error):
    assert not is_out_of_memory(error)
