"""Training with several processes: the results of one, whatever their number."""

import re

import pytest

from helpers import flags_of, load, losses, run_torchrun


def test_many_processes_train_as_one_and_a_run_may_change_their_number(
    bins, finished_run, tmp_path
):
    settings = {"init_from": "auto", "max_iters": 20}
    first = run_torchrun(4, "train.py", *flags_of(bins, tmp_path, settings))
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("init_from=auto: starting from scratch") == 1
    assert len(re.findall("^iter 5:", first.stdout, re.M)) == 1  # only one process prints
    resumed = run_torchrun(2, "train.py", *flags_of(bins, tmp_path, {"init_from": "auto"}))
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("init_from=auto: resuming") == 1
    for one, other in zip(losses(finished_run), losses(tmp_path), strict=True):
        assert one["iter"] == other["iter"]
        assert one["tokens"] == other["tokens"]
        for key in ("train_loss", "val_loss", "train_loss_eval"):
            # float32 rounding, which grows over 45 iterations
            assert one.get(key, 0) == pytest.approx(other.get(key, 0), rel=1e-3)


def test_processes_with_different_clocks_end_a_run_with_hours_together(bins, tmp_path):
    """If one of them did another iteration, it would wait for the others for ever."""
    flags = flags_of(bins, tmp_path, {"hours": 2 / 3600, "log_interval": 1000})
    flags = [flag for flag in flags if not flag.startswith("--max_iters")]
    result = run_torchrun(2, "train.py", *flags)
    assert result.returncode == 0, result.stderr
    assert load(tmp_path)["fraction"] == 1.0
    assert load(tmp_path)["iter_num"] > 0
