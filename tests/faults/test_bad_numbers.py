"""Losses and weights that are not finite: they cost some data, and never a checkpoint."""

import math
import signal

import torch

from forks import RUN, Training, assert_finite, needs_fork, signal_itself
from helpers import load, metrics, train_here
from onenight.trainer import Trainer

PER_ITER = 4  # windows


def poison(monkeypatch, is_poisoned):
    """Make loss and gradient NaN wherever is_poisoned(progress) is true."""
    micro_step = Trainer.micro_step

    def poisoned(trainer, x, y):
        loss = micro_step(trainer, x, y)
        if is_poisoned(trainer.progress):
            for parameter in trainer.model.parameters():
                parameter.grad.fill_(math.nan)
            loss = loss * math.nan
        return loss

    monkeypatch.setattr(Trainer, "micro_step", poisoned)


def break_weights(monkeypatch, iter_num, action=lambda: None):
    """Make a weight infinite, once, in the update of iteration `iter_num`; then call action()."""
    update = Trainer.update
    broken = []

    def breaking(trainer, loss):
        grad_norm = update(trainer, loss)
        if trainer.progress.iter_num == iter_num and not broken:
            broken.append(iter_num)
            with torch.no_grad():
                trainer.model.transformer.wpe.weight[31] = math.inf
            action()
        return grad_norm

    monkeypatch.setattr(Trainer, "update", breaking)


def test_iterations_with_a_nan_loss_make_no_update_and_the_run_learns(bins, tmp_path, monkeypatch):
    poison(monkeypatch, lambda progress: progress.iter_num in (7, 8, 30))
    result = train_here(bins, tmp_path, **RUN)
    assert result.returncode == 0, result.stderr
    checkpoint = load(tmp_path)
    assert checkpoint["iter_num"] == 60
    assert checkpoint["skipped_iters"] == 3
    assert checkpoint["best_val_loss"] < 3  # from ln 250 = 5.5
    records = {record["iter"]: record for record in metrics(tmp_path) if "lr" in record}
    assert list(records) == list(range(60))
    assert "train_loss" not in records[7]
    assert records[9]["grad_norm"] > 0


def test_data_that_give_nan_are_passed_over_after_reloading_the_checkpoint(
    bins, tmp_path, monkeypatch
):
    """The windows of iterations 20 to 24 do: five in a row lead back to iteration 15."""
    poisoned = range(20 * PER_ITER, 25 * PER_ITER)
    poison(monkeypatch, lambda progress: progress.position in poisoned)
    result = train_here(bins, tmp_path, **RUN)
    assert result.returncode == 0, result.stderr
    checkpoint = load(tmp_path)
    assert checkpoint["iter_num"] == 60
    assert checkpoint["skipped_iters"] == 5
    assert checkpoint["position"] == (25 + 45) * PER_ITER
    assert checkpoint["tokens"] == 60 * PER_ITER * 32
    assert [record["iter"] for record in metrics(tmp_path) if "lr" in record] == list(range(60))
    assert_finite(tmp_path, "ckpt.pt", "best.pt")


def test_a_loss_that_stays_nan_ends_the_run_with_a_good_checkpoint(bins, tmp_path, monkeypatch):
    poison(monkeypatch, lambda progress: progress.iter_num >= 20)
    result = train_here(bins, tmp_path, **RUN)
    assert result.returncode == 1
    assert "NaN" in result.stderr
    assert load(tmp_path)["iter_num"] == 15
    assert_finite(tmp_path, "ckpt.pt", "best.pt")


def test_weights_that_are_not_finite_are_never_saved(bins, tmp_path, monkeypatch):
    """They break in the last iteration of the run, just before its last checkpoint."""
    break_weights(monkeypatch, 45)
    result = train_here(bins, tmp_path, **{**RUN, "max_iters": 46})
    assert result.returncode == 0, result.stderr
    assert load(tmp_path)["iter_num"] == 46
    assert_finite(tmp_path, "ckpt.pt", "best.pt")


@needs_fork
def test_weights_that_are_not_finite_are_not_saved_by_a_stop(bins, tmp_path, monkeypatch):
    break_weights(monkeypatch, 20, action=lambda: signal_itself(signal.SIGTERM))
    stopped = Training(bins, tmp_path)
    assert stopped.end() == 128 + signal.SIGTERM, stopped.output()
    assert load(tmp_path)["iter_num"] == 15
    assert_finite(tmp_path, "ckpt.pt", "best.pt")


def test_weights_whose_val_loss_is_not_finite_write_no_sample(bins, tmp_path, monkeypatch):
    """On a GPU, sampling from NaN would end the process."""
    monkeypatch.setattr(Trainer, "sample", lambda trainer: "a sample")
    monkeypatch.setattr(Trainer, "mean_loss", lambda trainer, tokens: math.nan)
    result = train_here(bins, tmp_path, max_iters=2)
    assert result.returncode == 0, result.stderr
    assert "a sample" not in result.stdout
    assert not any("sample" in record for record in metrics(tmp_path))
