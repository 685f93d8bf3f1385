"""onenight/system/memory.py: how much GPU memory may be used, and which errors say that it is full.

The GPU's answers are replaced, so no GPU is needed.
"""

import pytest
import torch

from onenight.system.memory import is_out_of_memory, limit_memory, peak_memory_gb, usable_memory

CUDA = torch.device("cuda")


@pytest.fixture
def card(monkeypatch):
    """Set the free memory of a card of 12 GB."""

    def set_free(free_gb):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_gb * 1e9, 12e9))

    return set_free


@pytest.fixture
def limits(monkeypatch):
    """The limits that are set: fractions of the card's memory."""
    fractions = []
    monkeypatch.setattr(
        torch.cuda,
        "set_per_process_memory_fraction",
        lambda fraction, device: fractions.append(fraction),
    )
    return fractions


@pytest.mark.parametrize(
    "free_gb, limit_gb, usable_gb",
    [(11.6, 0, 11.3), (9.0, 0, 9.0), (11.6, 8, 7.3), (11.6, 24, 11.3)],
    ids=["empty card", "card in use", "vram_limit_gb", "vram_limit_gb above the card's memory"],
)
def test_the_reserve_is_subtracted_from_the_size_of_the_card_but_not_from_the_free_memory(
    card, free_gb, limit_gb, usable_gb, monkeypatch
):
    monkeypatch.setattr("onenight.system.memory.WINDOWS_GPU_DRIVER", False)
    card(free_gb)
    assert usable_memory(CUDA, limit_gb) == pytest.approx(usable_gb * 1e9)


def test_a_process_may_use_all_memory_unless_a_limit_is_set(card, limits, monkeypatch, capsys):
    monkeypatch.setattr("onenight.system.memory.WINDOWS_GPU_DRIVER", False)
    card(11.6)
    limit_memory(0.0, CUDA)
    assert limits == []
    limit_memory(8.0, CUDA)
    assert limits == [pytest.approx(7.3 / 12)]
    assert "memory: limited to 7.3 GB of the GPU's 12.0" in capsys.readouterr().out


def test_windows_driver_is_kept_from_using_the_computers_memory(card, limits, monkeypatch, capsys):
    monkeypatch.setattr("onenight.system.memory.WINDOWS_GPU_DRIVER", True)
    card(11.0)
    limit_memory(0.0, CUDA)
    assert limits == [pytest.approx(10.5 / 12)]
    assert "memory: limited to 10.5 GB of the GPU's 12.0" in capsys.readouterr().out
    assert usable_memory(CUDA) == pytest.approx(10.5e9)  # which the plan goes by


def test_a_cpu_has_no_limit_and_no_peak(limits):
    limit_memory(8.0, torch.device("cpu"))
    assert limits == []
    assert peak_memory_gb(torch.device("cpu")) == (0.0, 0.0)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.1 GB)"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
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
