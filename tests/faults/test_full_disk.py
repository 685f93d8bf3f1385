"""A disk that fills up during a run, and one that has no room at its start."""

import contextlib
import os
import shutil
import subprocess

import pytest

from helpers import (
    assert_one_sentence,
    load,
    start_training,
    train_here,
    wait_for_line,
)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path]
    if not hasattr(os, "geteuid") or os.geteuid() or subprocess.run(mount).returncode:
        pytest.skip("mounting a small file system needs Linux and root")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def fill(path):
    """Write to a file until the disk is full."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)


def test_a_disk_that_fills_up_ends_the_run_and_keeps_its_checkpoint(bins, small_disk):
    out_dir = small_disk / "out"
    process = start_training(bins, out_dir, max_iters=10**6, lr_decay_iters=10**6)
    wait_for_line(process, "iter 25:")
    good = load(out_dir)["iter_num"]
    filler = small_disk / "filler"
    fill(filler)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert len(stderr.strip().splitlines()) == 1, stderr
    assert "--init_from=resume continues from the last checkpoint" in stderr

    filler.unlink()
    names = [name for name in ("ckpt.pt", "ckpt-previous.pt") if (out_dir / name).exists()]
    assert load(out_dir, names[0])["iter_num"] >= good
    resumed = train_here(bins, out_dir, init_from="resume", max_iters=good + 40)
    assert resumed.returncode == 0, resumed.stderr


def test_a_run_does_not_start_on_a_disk_without_room_for_its_checkpoints(bins, small_disk):
    free = shutil.disk_usage(small_disk).free
    (small_disk / "filler").write_bytes(bytes(free - 300_000))
    refused = train_here(bins, small_disk / "out")
    assert_one_sentence(refused, "the checkpoints need 0.0 GB of disk space")
