"""Disks that are full, fail for a moment, or offer little; and a folder that is moved away.

A save that fails never ends a run: the old checkpoint stays, and the save is tried again.
"""

import errno
import os
import shutil
import signal
import subprocess

import pytest

import train as train_script
from forks import RUN, Training, assert_same_end, at, needs_fork
from helpers import load, metrics, train_here

needs_posix = pytest.mark.skipif(os.name != "posix", reason="Windows has nothing like it")


def raising(number):
    """Return a function that raises the OSError of an errno."""

    def call(*arguments, **options):
        raise OSError(number, os.strerror(number))

    return call


@pytest.fixture(autouse=True)
def try_again_at_once(monkeypatch):
    """And at the end of the run for only half a second."""
    monkeypatch.setattr(train_script, "RETRY_S", 0)
    monkeypatch.setattr(train_script, "GIVE_UP_S", 0.5)


# -----------------------------------------------------------------------------
# A disk without room


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", tmp_path]
    if not hasattr(os, "geteuid") or os.geteuid() or subprocess.run(mount).returncode:
        pytest.skip("mounting a small file system needs Linux and root")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_a_run_does_not_start_on_a_disk_without_room_for_its_checkpoints(bins, small_disk):
    free = shutil.disk_usage(small_disk).free
    (small_disk / "other").write_bytes(bytes(free - 600_000))
    out_dir = small_disk / "out"
    refused = train_here(bins, out_dir)
    assert refused.returncode == 1
    assert str(out_dir) in refused.stderr
    assert "iter 0:" not in refused.stdout


def test_a_run_on_a_disk_that_is_full_for_a_while_ends_as_an_undisturbed_one(
    bins, undisturbed, small_disk, monkeypatch
):
    out_dir = small_disk / "out"
    saved = []

    def fill():
        room = 100_000  # so that a checkpoint begins to be written
        (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - room))

    def make_room():
        saved.append(load(out_dir)["iter_num"])
        (small_disk / "filler").unlink()

    at(monkeypatch, 20, fill)
    at(monkeypatch, 40, make_room)
    result = train_here(bins, out_dir, **RUN)
    assert result.returncode == 0, result.stderr
    assert saved == [15]
    # And not torch's "enforce fail at inline_container.cc".
    assert os.strerror(errno.ENOSPC) in result.stdout
    assert_same_end(undisturbed, out_dir)
    assert not list(out_dir.glob("*.partial"))


def limit_files(monkeypatch, iter_num):
    """From this iteration on, let no file of the process become longer than 100 kB."""
    resource = pytest.importorskip("resource")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    at(monkeypatch, iter_num, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard)))


@needs_fork
def test_a_run_whose_end_cannot_be_saved_fails_and_can_be_resumed(
    bins, undisturbed, tmp_path, monkeypatch
):
    limit_files(monkeypatch, 50)
    training = Training(bins, tmp_path)
    assert training.end() == 1
    assert "Traceback" not in training.output()
    assert str(tmp_path) in training.output().splitlines()[-1]
    assert load(tmp_path)["iter_num"] == 45
    monkeypatch.undo()
    resumed = Training(bins, tmp_path, init_from="resume")
    assert resumed.end() == 0, resumed.output()
    assert_same_end(undisturbed, tmp_path)


@needs_fork
def test_a_stop_ends_the_attempts_to_save_the_end_of_a_run(bins, tmp_path, monkeypatch):
    monkeypatch.setattr(train_script, "RETRY_S", 60)
    monkeypatch.setattr(train_script, "GIVE_UP_S", 3600)
    limit_files(monkeypatch, 50)
    training = Training(bins, tmp_path)
    training.wait_for(r"(?s)step 60.*/ckpt\.pt")
    os.kill(training.pid, signal.SIGTERM)
    assert training.end() == 128 + signal.SIGTERM, training.output()
    assert load(tmp_path)["iter_num"] == 45


# -----------------------------------------------------------------------------
# A disk that fails, or offers little


def test_a_save_that_fails_for_a_moment_is_done_again(bins, undisturbed, tmp_path, monkeypatch):
    fsync = os.fsync
    seen = []

    def fail_once(target):
        is_checkpoint = os.stat(target).st_size > 200_000
        if is_checkpoint and seen == ["iter 20"]:
            seen.append("failed")
            raising(errno.EIO)()
        return fsync(target)

    monkeypatch.setattr(os, "fsync", fail_once)
    at(monkeypatch, 20, lambda: seen.append("iter 20"))
    at(monkeypatch, 40, lambda: seen.append(load(tmp_path)["iter_num"]))
    result = train_here(bins, tmp_path, **RUN)
    assert result.returncode == 0, result.stderr
    assert os.strerror(errno.EIO) in result.stdout
    assert seen == ["iter 20", "failed", 30]  # the next evaluation is at iteration 45
    assert_same_end(undisturbed, tmp_path)


@needs_posix
def test_a_disk_that_cannot_flush_or_lock_and_reports_no_size_is_used(
    bins, undisturbed, tmp_path, monkeypatch
):
    (tmp_path / "lock").write_text("1234\nanother-host\n")  # of a run that was killed there
    monkeypatch.setattr("fcntl.flock", raising(errno.ENOSYS))
    monkeypatch.setattr(os, "fsync", raising(errno.EINVAL))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 0))
    result = train_here(bins, tmp_path, **RUN)
    assert result.returncode == 0, result.stderr
    assert_same_end(undisturbed, tmp_path)


@needs_posix
def test_a_folder_that_is_moved_away_is_made_again(bins, undisturbed, tmp_path, monkeypatch):
    out_dir = tmp_path / "out"
    moved = tmp_path / "moved"
    at(monkeypatch, 20, lambda: out_dir.rename(moved))
    result = train_here(bins, out_dir, **RUN)
    assert result.returncode == 0, result.stderr
    assert load(moved)["iter_num"] == 15
    assert_same_end(undisturbed, out_dir)
    assert [record["iter"] for record in metrics(out_dir) if "lr" in record] == [*range(20, 60)]


def test_metrics_and_a_picture_that_cannot_be_written_cost_nothing_else(
    bins, undisturbed, tmp_path, monkeypatch
):
    (tmp_path / "metrics.jsonl").mkdir()
    monkeypatch.setattr("onenight.records.draw_losses", lambda *arguments: 1 / 0)
    result = train_here(bins, tmp_path, **RUN)
    assert result.returncode == 0, result.stderr
    assert_same_end(undisturbed, tmp_path)
