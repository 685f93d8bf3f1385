"""onenight/system/distributed.py: what the processes of torchrun exchange."""

from pathlib import Path

import pytest
import torch

from helpers import PROGRAMS, flags_of, run_torchrun
from onenight.system.distributed import TORCHRUN_VARIABLES, Ranks, start_ranks


def test_tensors_are_summed_in_a_few_large_messages(monkeypatch):
    """all_reduce() is replaced by one that doubles: a second process with the same tensors."""
    sizes = []

    def all_reduce(tensor):
        sizes.append(tensor.numel())
        tensor.mul_(2)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr("onenight.system.distributed.BUCKET_BYTES", 400)
    shapes = [(3, 30), (7,), (), (20, 20), (50,), (2, 3, 4)]
    tensors = []
    for shape in shapes:
        for dtype in (torch.float32, torch.float64):
            tensors.append(torch.rand(shape, dtype=dtype))
    expected = [2 * tensor for tensor in tensors]
    Ranks(world_size=2).sum(tensors)
    for tensor, double in zip(tensors, expected):
        assert torch.equal(tensor, double)
    assert len(sizes) < len(tensors)
    assert sum(sizes) == sum(tensor.numel() for tensor in tensors)


def test_a_single_process_exchanges_nothing(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: 1 / 0)
    tensor = torch.ones(3)
    ranks = Ranks()
    ranks.sum([tensor])
    assert tensor.tolist() == [1, 1, 1]
    assert ranks.any(True) is True
    assert ranks.any(False) is False
    assert ranks.from_first(2.5) == 2.5
    assert ranks.is_first


def test_variables_left_over_from_torchrun_are_reported_and_ignored(monkeypatch, capsys):
    for name in TORCHRUN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert start_ranks("cpu") == (Ranks(), "cpu")
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert start_ranks("cpu") == (Ranks(), "cpu")
    assert capsys.readouterr().out == (
        "torchrun's variables RANK, WORLD_SIZE are set, but LOCAL_RANK, MASTER_ADDR, MASTER_PORT "
        "are not: training with one process\n"
    )


def test_two_processes_agree():
    result = run_torchrun(2, PROGRAMS / "exchange.py")
    assert result.returncode == 0, result.stderr
    # The second process has printed to nowhere.
    assert result.stdout.splitlines() == ["sums [3.0, 30.0]", "any True False", "from first 7.5"]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads thread names from /proc")
def test_no_thread_of_the_process_group_outlives_the_run(bins, tmp_path):
    """A thread that frees a tensor while Python exits aborts the process, once in many runs.

    The run also ends only if both processes agree on when the hours are over.
    """
    flags = flags_of(bins, tmp_path / "out", {"hours": 3 / 3600})
    schedule = ("--max_iters", "--lr_decay_iters", "--warmup_iters")  # --hours replaces it
    flags = [flag for flag in flags if not flag.startswith(schedule)]
    result = run_torchrun(2, PROGRAMS / "train_and_list_threads.py", *flags)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("gloo threads in the run: True, after it: False") == 2, result.stderr
