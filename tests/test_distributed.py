"""distributed.py: what the processes of torchrun exchange (faults/test_torchrun.py trains)."""

import json
from pathlib import Path

import pytest

from helpers import PROGRAMS, run_torchrun
from onenight.distributed import TORCHRUN_VARIABLES, Ranks, start_ranks


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory):
    """What torchrun printed, and what each of two processes got (see exchange.py)."""
    folder = tmp_path_factory.mktemp("exchange")
    result = run_torchrun(2, PROGRAMS / "exchange.py", folder)
    assert result.returncode == 0, result.stderr
    return result, [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_only_the_first_process_prints(exchanged):
    result, processes = exchanged
    assert result.stdout == "printed once\n"
    assert [process["is_first"] for process in processes] == [True, False]
    assert [process["world_size"] for process in processes] == [2, 2]
    assert [process["device"] for process in processes] == ["cpu", "cpu"]


def test_all_processes_get_the_same(exchanged):
    shapes = [[3, 30], [7], [], [20, 20], [50], [2, 3, 4]]
    for process in exchanged[1]:
        for sums in (process["sums"][::2], process["sums"][1::2]):  # float32 and float64
            assert [shape for shape, _ in sums] == shapes
            # Number i is i + 1 times 1 in the first process, and times 2 in the second.
            assert [values for _, values in sums] == [[3.0 * (i + 1)] for i in range(6)]
        assert process["any"] == [True, True, False]
        assert process["from_first"] == 7.5


def test_the_first_process_decides_how_far_a_run_with_hours_is(exchanged):
    """If one of them did another iteration, it would wait for the others for ever."""
    for process in exchanged[1]:
        assert process["fractions"] == [0.25, 1.0]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads thread names from /proc")
def test_no_thread_of_the_process_group_outlives_it(exchanged):
    """A thread that frees a tensor while Python exits aborts the process, once in many runs."""
    for process in exchanged[1]:
        assert process["threads"] == [True, False]


def test_without_torchrun_there_is_one_process(monkeypatch):
    for name in TORCHRUN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert start_ranks("cpu") == (Ranks(), "cpu")
    # Some batch systems set a few of its variables.
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert start_ranks("cpu") == (Ranks(), "cpu")
