"""run.py: when an evaluation is due, when a run ends, and its figures."""

from dataclasses import replace

import pytest

from helpers import make_run, make_trainer
from onenight.system.distributed import Ranks


@pytest.fixture
def run(bins, tmp_path):
    return make_run(make_trainer(bins), tmp_path)


@pytest.mark.parametrize(
    "iter_num, evaluated_iter, expected",
    [(0, -1, True), (0, 0, False), (10, 0, False), (20, 0, True), (20, 20, False), (45, 40, True)],
)
def test_an_evaluation_is_due_at_each_interval_and_at_the_end(
    run, iter_num, evaluated_iter, expected
):
    run.progress.iter_num = iter_num
    run.progress.evaluated_iter = evaluated_iter
    assert run.evaluation_is_due() == expected


def test_a_run_is_finished_after_the_evaluation_at_its_end(run):
    run.progress.iter_num = 45
    assert not run.is_finished()
    run.progress.evaluated_iter = 45
    assert run.is_finished()


@pytest.mark.parametrize(
    "patience, stale_evals, expected", [(0, 99, False), (3, 2, False), (3, 3, True)]
)
def test_a_plateau_is_as_long_as_the_patience(bins, tmp_path, patience, stale_evals, expected):
    run = make_run(make_trainer(bins, early_stop_patience=patience), tmp_path)
    run.progress.stale_evals = stale_evals
    assert run.has_plateaued() == expected


def test_the_mfu_is_relative_to_the_ceiling_of_all_devices(run):
    flops_per_token = run.trainer.model.flops_per_token()
    ceiling = 2e-12 * flops_per_token * 512  # TFLOP/s that make 2 iterations a second
    run.plan = replace(run.plan, ceiling=ceiling)
    assert run.tokens_per_s(4.0) == 128
    assert run.mfu(1.0) == pytest.approx(0.5)


def test_only_the_first_process_writes(bins, tmp_path):
    trainer = make_trainer(bins, ranks=Ranks(rank=1))
    run = make_run(trainer, tmp_path)
    assert run.metrics is None
    assert list(tmp_path.iterdir()) == []
