"""The first minutes of train.py: the device, what compiling lacks, the speed, and how the model learns to write."""

import re
import time

from onenight import metrics as metrics_module
from onenight.device import choose_dtype, limit_memory, usable_memory
from onenight.metrics import Metrics, Pace

import numpy as np
import pytest
import torch
from conftest import load, losses, make_trainer, metrics, start_training, stop, train, train_here, wait_for_line

import train as train_script


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="for a CPU alone")
def test_the_first_line_says_that_there_is_no_gpu(bins):
    result = train_here(bins, "unused", plan=True, device="auto")
    assert result.stdout.startswith("device: cpu (torch finds no GPU: see README), float32\n")


def test_without_a_compiler_it_trains_uncompiled_and_says_what_is_lacking(bins, tmp_path):
    env = {"CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    result = train(bins, tmp_path / "out", compile=True, max_iters=1, env=env)
    assert result.returncode == 0, result.stderr
    assert len(re.findall("^compile: off, because .*; to get it, ", result.stdout, re.M)) == 1
    assert re.search("^device: cpu, float32$", result.stdout, re.M)


def test_a_plan_for_another_machine_does_not_compile_here(bins, monkeypatch):
    monkeypatch.setattr("onenight.device.compile_works", lambda device: 1 / 0)
    result = train_here(bins, "unused", plan=True, compile=True, plan_vram_gb=12)
    assert result.returncode == 0 and "fits: yes" in result.stdout


def test_variables_of_torchrun_that_are_left_over(bins, tmp_path, monkeypatch):
    """A run started with some of them trains alone; a plan never waits for other processes."""
    env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": None}
    result = train(bins, tmp_path, max_iters=1, env=env)
    assert result.returncode == 0, result.stderr
    assert "RANK and WORLD_SIZE set, but not all that torchrun sets" in result.stdout
    for name, value in {**env, "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}.items():
        monkeypatch.setenv(name, value)  # the other process never comes
    assert train_here(bins, tmp_path, plan=True).returncode == 0


def test_a_line_every_thirty_seconds_whatever_log_interval_is(bins, monkeypatch):
    trainer = make_trainer(bins, log_interval=10**6)
    pace = Pace(trainer, 1.0, time.monotonic())
    for _ in range(2):
        trainer.step()
    assert not pace.log_is_due()  # iteration 1, just after the start
    half_a_minute_later = pace.logged + 31
    monkeypatch.setattr(metrics_module.time, "monotonic", lambda: half_a_minute_later)
    assert pace.log_is_due() and not pace.log_is_due()


def test_a_speed_over_the_ceiling_is_explained(bins, tmp_path, capsys):
    trainer = make_trainer(bins, max_iters=4)
    train_script.train(trainer, Metrics(tmp_path), Pace(trainer, 1e-9, time.monotonic()), tmp_path)
    assert "mfu unknown (the machine was busy when it was measured)" in capsys.readouterr().out


def test_a_cpu_without_bfloat16_instructions_takes_float32(monkeypatch, capsys):
    monkeypatch.setattr("onenight.device.supports_bfloat16", lambda device: False)
    assert choose_dtype("bfloat16", torch.device("cpu")) == "float32"
    assert "no bfloat16 instructions: using float32" in capsys.readouterr().out
    assert choose_dtype("bfloat16", torch.device("cuda")) == "float16"


@pytest.mark.parametrize(
    "free, limit, usable",
    [(11.6, 0, 11.3), (9.0, 0, 9.0), (11.6, 8, 7.3)],
    ids=["an empty card", "one that others use", "vram_limit_gb"],
)
def test_the_reserve_of_a_card_is_taken_once(monkeypatch, free, limit, usable):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * 1e9, 12e9))
    assert usable_memory(torch.device("cuda"), limit) == pytest.approx(usable * 1e9)


def test_windows_is_kept_from_the_computers_memory(monkeypatch, capsys):
    """Its driver, also in WSL2, would go on there, many times slower; elsewhere the process may take what it can."""
    fractions, cuda = [], torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (11e9, 12e9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: fractions.append(share))
    limit_memory(0.0, cuda)
    monkeypatch.setattr("onenight.device.WINDOWS_DRIVER", True)
    limit_memory(0.0, cuda)
    assert fractions == [pytest.approx(10.5 / 12)]
    assert "memory: limited to 10.5 GB of the GPU's 12.0" in capsys.readouterr().out


def test_wandbs_address_is_printed(bins, tmp_path):
    """By a package of that name which answers as wandb does with a key and a network."""
    (tmp_path / "wandb.py").write_text(
        "import types\n"
        "Settings = dict\n"
        "login = lambda **options: True\n"
        "init = lambda **options: types.SimpleNamespace(\n"
        "    id='1', url='https://wandb.ai/me/owt/runs/1', log=lambda *record, **options: None)\n"
    )
    result = train(bins, tmp_path / "out", wandb_log=True, max_iters=1, env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    assert "wandb: https://wandb.ai/me/owt/runs/1\n" in result.stdout


# ---- samples


@pytest.fixture(scope="module")
def text_bins(tmp_path_factory):
    """Random ids of GPT-2's whole vocabulary."""
    folder = tmp_path_factory.mktemp("text")
    for split in ("train", "val"):
        np.random.default_rng(0).integers(0, 50257, 400).astype("<u2").tofile(folder / f"{split}.bin")
    return folder


SMALL = {"n_layer": 1, "gradient_accumulation_steps": 1, "max_iters": 12, "lr_decay_iters": 12, "dropout": 0.1}


def train_losses(out_dir):
    return {record["iter"]: record["train_loss"] for record in losses(out_dir) if "train_loss" in record}


def test_each_evaluation_shows_a_sample_that_a_resumed_run_repeats(text_bins, tmp_path):
    changes = {**SMALL, "eval_interval": 5}
    whole = train_here(text_bins, tmp_path / "whole", **changes)
    assert whole.returncode == 0, whole.stderr
    text = (tmp_path / "whole" / "samples.txt").read_text(encoding="utf-8")
    evals = [record for record in metrics(tmp_path / "whole") if "val_loss" in record]
    for line, record in zip(text.splitlines(), evals, strict=True):
        assert line == f"iter {record['iter']}, val loss {record['val_loss']:.4f}: {record['sample']}"
    assert len(re.findall("^sample: .{20}", whole.stdout, re.M)) == len(evals) == 4
    process = start_training(text_bins, tmp_path / "parts", **changes)
    wait_for_line(process, "iter 6:")
    stop(process)
    assert train_here(text_bins, tmp_path / "parts", init_from="resume", **changes).returncode == 0
    assert (tmp_path / "parts" / "samples.txt").read_text(encoding="utf-8") == text
    # Without the samples in between it is the same training.
    assert train_here(text_bins, tmp_path / "rare", **SMALL, eval_interval=100).returncode == 0
    assert train_losses(tmp_path / "rare") == train_losses(tmp_path / "whole")
    rare, whole = (load(tmp_path / name)["model"]["lm_head.weight"] for name in ("rare", "whole"))
    assert torch.equal(rare, whole)


def test_a_sample_that_fails_is_a_line(text_bins, monkeypatch, capsys):
    trainer = make_trainer(text_bins, **SMALL)
    monkeypatch.setattr("onenight.trainer.begin_document", lambda *arguments: 1 / 0)
    assert trainer.sample() == "" and "no sample: division by zero" in capsys.readouterr().out
    trainer.step()
    assert trainer.model.training
