"""Training with several processes."""

import signal

import pytest

from forks import RUN
from helpers import ROOT, flags_of, load, losses, start, train_here, wait_for_line

SETTINGS = {**RUN, "dropout": 0.0, "max_iters": 30}  # each process draws its own dropout


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="sends POSIX signals")
def test_two_processes_train_as_one_and_save_when_they_are_stopped(bins, tmp_path):
    """One process resumes what two have begun."""
    assert train_here(bins, tmp_path / "alone", **SETTINGS).returncode == 0

    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    process = start(launcher, *flags_of(bins, tmp_path / "both", SETTINGS), cwd=ROOT)
    wait_for_line(process, "iter 5:")
    process.send_signal(signal.SIGTERM)  # torchrun sends it on, and kills them after 30 seconds
    process.communicate(timeout=60)
    assert 5 < load(tmp_path / "both")["iter_num"] < 30

    resumed = train_here(bins, tmp_path / "both", init_from="resume", **SETTINGS)
    assert resumed.returncode == 0, resumed.stderr
    for record, expected in zip(losses(tmp_path / "both"), losses(tmp_path / "alone"), strict=True):
        # Sums in another order differ by float32's rounding, which 30 iterations magnify.
        assert record == pytest.approx(expected, rel=1e-3)
