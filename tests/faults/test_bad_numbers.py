"""Losses and weights that are not finite, in whole runs: they never cost more than some data."""

import math

import pytest
import torch

import train as train_script
from configurator import UserError
from helpers import load, make_run, make_trainer, metrics
from onenight.training.trainer import StopRequested


class Poisoned:
    """A forward pass whose loss is NaN in training if is_poisoned(progress) is true."""

    def __init__(self, trainer, is_poisoned):
        self.trainer = trainer
        self.is_poisoned = is_poisoned

    def __call__(self, x, y):
        _, loss = self.trainer.model(x, y)
        is_training = torch.is_grad_enabled()
        if is_training and self.is_poisoned(self.trainer.progress):
            loss = loss * math.nan
        return None, loss


def train_poisoned(bins, out_dir, is_poisoned, **changes):
    """Train with such a forward pass. Return the trainer."""
    trainer = make_trainer(bins, out_dir=str(out_dir), **changes)
    trainer.compiled_model = Poisoned(trainer, is_poisoned)
    train_script.train(make_run(trainer, out_dir))
    return trainer


def has_finite_weights(checkpoint):
    return all(value.isfinite().all() for value in checkpoint["model"].values())


def test_iterations_with_a_nan_loss_make_no_update_and_the_run_learns(bins, tmp_path, capsys):
    trainer = train_poisoned(bins, tmp_path, lambda progress: progress.iter_num in (7, 8, 30))
    assert trainer.progress.iter_num == 45
    assert trainer.progress.skipped_iters == 3
    assert load(tmp_path)["skipped_iters"] == 3
    assert trainer.progress.best_val_loss < 3
    printed = capsys.readouterr().out
    assert printed.count("non-finite loss or gradient: update skipped") == 3
    assert printed.count("loss nan") == 3
    records = {record["iter"]: record for record in metrics(tmp_path) if "val_loss" not in record}
    assert records[7].keys().isdisjoint({"train_loss", "grad_norm"})
    assert records[9]["grad_norm"] > 0


def test_data_that_give_nan_are_passed_over_after_going_back(bins, tmp_path, capsys):
    """The windows of iterations 25 to 34 do: twice five of them lead back to iteration 20."""
    poisoned_windows = range(25 * 16, 35 * 16)
    trainer = train_poisoned(bins, tmp_path, lambda progress: progress.position in poisoned_windows)
    assert trainer.progress.iter_num == 45
    assert trainer.progress.skipped_iters == 10
    # 25 iterations, 5 more, then from 20 on 5 more, and from 20 to the end.
    assert trainer.progress.position == (25 + 5 + 5 + 25) * 16
    assert trainer.progress.tokens == 45 * 512
    printed = capsys.readouterr().out
    assert printed.count("back to iter 20, continuing with later data") == 2
    steps = [record["iter"] for record in metrics(tmp_path) if "train_loss" in record]
    assert steps == list(range(45))
    assert has_finite_weights(load(tmp_path))


def test_a_loss_that_stays_nan_ends_the_run_with_a_good_checkpoint(bins, tmp_path):
    with pytest.raises(UserError, match="ckpt.pt is good: resume with .*learning_rate"):
        train_poisoned(bins, tmp_path, lambda progress: progress.iter_num >= 25)
    assert load(tmp_path)["iter_num"] == 20
    assert has_finite_weights(load(tmp_path))


def test_a_loss_that_is_nan_from_the_start_ends_the_run(bins, tmp_path):
    with pytest.raises(UserError, match="before any checkpoint; try a lower --learning_rate"):
        train_poisoned(bins, tmp_path, lambda progress: True)


def test_weights_that_are_not_finite_are_never_saved(bins, tmp_path, capsys):
    """An update breaks them in the last iteration before the end of the run, once."""
    trainer = make_trainer(bins, out_dir=str(tmp_path), max_iters=41)
    broken_at = []

    def break_weights(*_):
        if trainer.progress.iter_num == 40 and not broken_at:
            broken_at.append(40)
            with torch.no_grad():
                trainer.model.transformer.wpe.weight[31] = math.inf

    trainer.optimizers["optimizer"].register_step_post_hook(break_weights)
    train_script.train(make_run(trainer, tmp_path))
    assert broken_at == [40]
    assert trainer.progress.iter_num == 41
    assert "back to iter 40" in capsys.readouterr().out
    for name in ("ckpt.pt", "ckpt-previous.pt", "best.pt"):
        assert has_finite_weights(load(tmp_path, name)), name


def test_weights_that_are_not_finite_are_not_saved_by_a_stop(bins, tmp_path):
    trainer = make_trainer(bins, out_dir=str(tmp_path))

    def break_weights(*_):
        if trainer.progress.iter_num == 25:
            trainer.stop_requested = lambda: True
            with torch.no_grad():
                trainer.model.transformer.wpe.weight[31] = math.inf

    trainer.optimizers["optimizer"].register_step_post_hook(break_weights)
    with pytest.raises(StopRequested):
        train_script.train(make_run(trainer, tmp_path))
    assert trainer.progress.iter_num == 20
    assert load(tmp_path)["iter_num"] == 20
    assert has_finite_weights(load(tmp_path))
