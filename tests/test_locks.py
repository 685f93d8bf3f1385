"""Two processes that want to write into one folder: the second is refused, and names the first."""

import errno
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import (
    ROOT,
    assert_one_sentence,
    run,
    start,
    start_training,
    train,
    train_here,
    wait_for_iter,
    wait_for_line,
)
from conftest import write_parquet as write

PREPARE = "prepare_single_parquet.py"


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_second_run_is_refused_until_the_first_has_ended(bins, tmp_path):
    first = start_training(bins, tmp_path, max_iters=10_000, eval_interval=10_000)
    wait_for_iter(first, 3)
    second = train(bins, tmp_path)
    assert_one_sentence(second, f"{tmp_path}: another run (process {first.pid} on ")
    assert re.search(r" since \d{4}-\d\d-\d\d \d\d:\d\d\) is writing there; wait for it, or choose", second.stderr)
    first.kill()
    first.communicate()
    assert "lock" in files(tmp_path)  # what a kill leaves behind holds nobody up
    third = train_here(bins, tmp_path, max_iters=3)
    assert third.returncode == 0, third.stderr
    assert [json.loads(line)["iter"] for line in files(tmp_path)["metrics.jsonl"].splitlines()] == [0, 0, 1, 2, 3]
    assert not {"lock", "lock.txt"} & files(tmp_path).keys()


# prepare_single_parquet.py that waits in the middle for a line of its input
WAITING = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import prepare_single_parquet as script
finish = script.finish
script.finish = lambda writer: (writer.checkpoint(), print("waiting"), sys.stdin.readline(), finish(writer))[-1]
script.main(sys.argv[1:])
"""


def test_a_second_preparation_is_refused_and_harms_nothing(tmp_path):
    source, out_dir = write(tmp_path / "a.parquet", [f"text {i}" for i in range(500)]), tmp_path / "out"
    arguments = [source, f"--out_dir={out_dir}"]
    assert run(PREPARE, *arguments).returncode == 0
    complete = files(out_dir)
    first = start(["-c", WAITING], *arguments, "--overwrite", "--val_fraction=0.1", stdin=subprocess.PIPE)
    wait_for_line(first, "waiting")
    before = files(out_dir)
    for more in ([], ["--overwrite"], ["--val_fraction=0.1"]):  # one of them is complete already
        assert_one_sentence(run(PREPARE, *arguments, *more), f"another run (process {first.pid} on ")
    assert files(out_dir) == before
    assert run(PREPARE, "--verify", f"--out_dir={out_dir}").returncode == 0  # which writes nothing
    errors = first.communicate("\n")[1]
    assert first.returncode == 0, errors
    assert files(out_dir).keys() == complete.keys() and files(out_dir) != complete
    assert run(PREPARE, "--verify", f"--out_dir={out_dir}").returncode == 0


# prepare_single_parquet.py on a disk whose locks fail with the error that the first argument says
WITHOUT_LOCKS = f"""
import errno, os, sys
sys.path.insert(0, {str(ROOT)!r})
import filelock
import prepare_single_parquet as script
def fail(*args, **kwargs):
    raise eval(sys.argv[1])
filelock.FileLock.acquire = fail
script.main(sys.argv[2:])
"""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))", os.strerror(errno.ENOLCK)),
        ("NotImplementedError('no flock')", "no flock"),
    ],
)
def test_a_disk_without_locks_is_written_to_with_a_warning(error, words, tmp_path):
    source, out_dir = write(tmp_path / "a.parquet", ["a", "b", "c"]), tmp_path / "out"
    command = [sys.executable, "-c", WITHOUT_LOCKS, error, source, f"--out_dir={out_dir}"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"{out_dir}: cannot be locked ({words}), so start no second run there\n" in result.stdout
    assert files(out_dir).keys() == {"train.bin", "val.bin", "meta.json"}
