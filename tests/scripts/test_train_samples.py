"""The samples that train.py writes at each evaluation."""

import re

import pytest
import torch

from helpers import (
    load,
    losses,
    make_random_bins,
    metrics,
    start_training,
    stop,
    train_here,
    wait_for_line,
)

SMALL = {
    "n_layer": 1,
    "gradient_accumulation_steps": 1,
    "max_iters": 12,
    "lr_decay_iters": 12,
    "dropout": 0.1,
}


@pytest.fixture(scope="module")
def text_bins(tmp_path_factory):
    """Bins with random ids of GPT-2's vocabulary, which samples need."""
    return make_random_bins(tmp_path_factory.mktemp("text"), vocab_size=50257, n_tokens=400)


@pytest.fixture(scope="module")
def undisturbed(text_bins, tmp_path_factory):
    """A run with an evaluation every 5 iterations: its folder, and what it printed."""
    out_dir = tmp_path_factory.mktemp("undisturbed")
    result = train_here(text_bins, out_dir, **SMALL, eval_interval=5)
    assert result.returncode == 0, result.stderr
    return out_dir, result.stdout


def samples(out_dir):
    return (out_dir / "samples.txt").read_text(encoding="utf-8")


def train_losses(out_dir):
    return {
        record["iter"]: record["train_loss"] for record in losses(out_dir) if "train_loss" in record
    }


def test_each_evaluation_prints_and_records_a_sample(undisturbed):
    out_dir, stdout = undisturbed
    evaluations = [record for record in metrics(out_dir) if "val_loss" in record]
    assert len(evaluations) == 4
    for line, record in zip(samples(out_dir).splitlines(), evaluations, strict=True):
        assert line == "iter {iter}, val loss {val_loss:.4f}: {sample}".format(**record)
    assert len(re.findall("^sample: .{20}", stdout, re.M)) == 4


def test_a_resumed_run_writes_the_same_samples(undisturbed, text_bins, tmp_path):
    out_dir, _ = undisturbed
    process = start_training(text_bins, tmp_path, **SMALL, eval_interval=5)
    wait_for_line(process, "iter 6:")
    stop(process)
    resumed = train_here(text_bins, tmp_path, init_from="resume", **SMALL, eval_interval=5)
    assert resumed.returncode == 0, resumed.stderr
    assert samples(tmp_path) == samples(out_dir)


def test_samples_do_not_change_the_training(undisturbed, text_bins, tmp_path):
    out_dir, _ = undisturbed
    assert train_here(text_bins, tmp_path, **SMALL, eval_interval=100).returncode == 0
    assert train_losses(tmp_path) == train_losses(out_dir)
    rare = load(tmp_path)["model"]["lm_head.weight"]
    frequent = load(out_dir)["model"]["lm_head.weight"]
    assert torch.equal(rare, frequent)


def test_a_sample_that_fails_is_reported_and_does_not_change_the_training(
    undisturbed, text_bins, tmp_path, monkeypatch
):
    out_dir, _ = undisturbed
    monkeypatch.setattr("onenight.training.trainer.begin_document", lambda *arguments: 1 / 0)
    result = train_here(text_bins, tmp_path, **SMALL, eval_interval=5)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("no sample: division by zero") == 4
    assert train_losses(tmp_path) == train_losses(out_dir)
