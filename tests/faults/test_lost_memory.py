"""Memory that runs out during a run."""

from pathlib import Path

import pytest
import torch

import train as train_script
from helpers import PROGRAMS, flags_of, load, make_run, make_trainer, metrics, run

MUON = {"architecture": "qwen3", "optimizer": "muon", "embedding_lr": 0.1, "head_lr": 0.01}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory from /proc")
def test_a_cpu_that_runs_out_of_memory_continues_with_half_the_micro_batch(bins, tmp_path):
    sizes = {"batch_size": 16384, "gradient_accumulation_steps": 1, "max_iters": 1}
    result = run(PROGRAMS / "train_with_little_memory.py", *flags_of(bins, tmp_path, sizes))
    assert result.returncode == 0, result.stderr
    assert (
        "out of memory: continuing with --batch_size=8192 --gradient_accumulation_steps=2"
        in result.stdout
    )
    assert load(tmp_path)["iter_num"] == 1


def test_a_run_goes_on_from_its_checkpoint_if_memory_runs_out_in_an_update(bins, tmp_path, capsys):
    """AdamW's update fails once, after Muon's: the weights are half new."""
    trainer = make_trainer(bins, out_dir=str(tmp_path), **MUON)
    trainer.optimizers = {key: trainer.optimizers[key] for key in ("muon", "optimizer")}
    failed_at = []

    def fail_once(*_):
        if trainer.progress.iter_num == 25 and not failed_at:
            failed_at.append(25)
            raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer.optimizers["optimizer"].register_step_pre_hook(fail_once)
    assert train_script.train(make_run(trainer, tmp_path)) == "done"
    printed = capsys.readouterr().out
    assert "memory ran out in an update: back to iter 20, continuing with later data" in printed
    assert "continuing with --batch_size=4 --gradient_accumulation_steps=4" in printed
    assert trainer.progress.iter_num == 45
    steps = [record["iter"] for record in metrics(tmp_path) if "train_loss" in record]
    assert steps == list(range(45))
