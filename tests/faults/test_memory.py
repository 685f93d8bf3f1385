"""Memory that runs out: the iterations keep their windows, in smaller micro-batches."""

from pathlib import Path

import pytest
import torch

from forks import RUN, at
from helpers import PROGRAMS, flags_of, load, losses, run, train_here
from model import GPT

# Dropout draws other numbers for other micro-batches.
SHORT = {**RUN, "dropout": 0.0, "batch_size": 8, "max_iters": 20}


@pytest.fixture(scope="module")
def enough(bins, tmp_path_factory):
    """The folder of a run with enough memory."""
    out_dir = tmp_path_factory.mktemp("enough")
    assert train_here(bins, out_dir, **SHORT).returncode == 0
    return out_dir


@pytest.mark.parametrize("in_training", [True, False], ids=["in training", "in evaluation"])
def test_when_memory_runs_out_a_run_has_the_same_losses(
    bins, enough, tmp_path, monkeypatch, in_training
):
    """From iteration 5 on, there is no memory for more than 3 windows."""
    forward = GPT.forward
    begun = []
    rows = []

    def small_forward(model, ids, *arguments, **options):
        if len(ids) > 3 and begun and torch.is_grad_enabled() == in_training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.54 GiB.")
        rows.append(len(ids))
        return forward(model, ids, *arguments, **options)

    monkeypatch.setattr(GPT, "forward", small_forward)
    at(monkeypatch, 5, lambda: begun.append(True))
    result = train_here(bins, tmp_path, **SHORT)
    assert result.returncode == 0, result.stderr
    assert rows[-1] == 2
    for record, expected in zip(losses(tmp_path), losses(enough), strict=True):
        # Sums in another order differ by float32's rounding, which 20 iterations magnify.
        assert record == pytest.approx(expected, rel=1e-4)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory from /proc")
def test_a_cpu_that_runs_out_of_memory_continues_with_smaller_micro_batches(bins, tmp_path):
    sizes = {"batch_size": 4096, "gradient_accumulation_steps": 1, "max_iters": 1}
    result = run(PROGRAMS / "train_with_little_memory.py", *flags_of(bins, tmp_path, sizes))
    assert result.returncode == 0, result.stderr
    assert "out of memory: continuing with" in result.stdout
    assert load(tmp_path)["tokens"] == 4096 * 32
