"""A power cut between two evaluations costs the iterations since the last checkpoint, no more."""

from helpers import PROGRAMS, flags_of, load, start, train_here, wait_for_iter


def test_a_checkpoint_is_saved_every_ten_minutes_between_evaluations(bins, tmp_path):
    """The run's clock is fast: ten minutes are 0.06 seconds. A kill stands for the power cut."""
    changes = {"eval_interval": 10**6, "max_iters": 60}
    assert train_here(bins, tmp_path / "undisturbed", **changes).returncode == 0
    killed = tmp_path / "killed"
    process = start([PROGRAMS / "train_with_fast_clock.py"], *flags_of(bins, killed, changes))
    wait_for_iter(process, 30)
    process.kill()
    process.communicate()
    assert 0 < load(killed)["iter_num"] < 60
    assert train_here(bins, killed, init_from="resume", **changes).returncode == 0
    assert load(killed)["best_val_loss"] == load(tmp_path / "undisturbed")["best_val_loss"]
