"""Two processes that want to write to the same folder: the second is refused."""

import re
import subprocess

from helpers import (
    PROGRAMS,
    assert_one_sentence,
    metrics,
    read_files,
    run,
    start,
    start_training,
    train,
    train_here,
    wait_for_iter,
    wait_for_line,
    write_parquet,
)

PREPARE = "prepare_single_parquet.py"


def test_a_second_training_is_refused_until_the_first_has_ended(bins, tmp_path):
    first = start_training(bins, tmp_path, max_iters=10_000, eval_interval=10_000)
    wait_for_iter(first, 3)
    second = train(bins, tmp_path)
    assert_one_sentence(second, f"{tmp_path}: another run (process {first.pid} on ")
    assert "parameters:" not in second.stdout  # it stops before it measures or takes memory
    assert re.search(
        r" since \d{4}-\d\d-\d\d \d\d:\d\d\) is writing there; wait until it ends, or choose",
        second.stderr,
    )
    first.kill()
    first.communicate()

    # The stale lock of the killed run is harmless.
    assert "lock" in read_files(tmp_path)
    third = train_here(bins, tmp_path, max_iters=3)
    assert third.returncode == 0, third.stderr
    assert [record["iter"] for record in metrics(tmp_path)] == [0, 0, 1, 2, 3]
    assert not {"lock", "lock.txt"} & read_files(tmp_path).keys()


def test_a_second_preparation_is_refused_and_changes_nothing(tmp_path):
    source = write_parquet(tmp_path / "a.parquet", [f"text {i}" for i in range(500)])
    out_dir = tmp_path / "out"
    arguments = [source, f"--out_dir={out_dir}"]
    assert run(PREPARE, *arguments).returncode == 0
    complete = read_files(out_dir)

    program = [PROGRAMS / "prepare_and_wait.py"]
    first = start(program, *arguments, "--overwrite", "--val_fraction=0.1", stdin=subprocess.PIPE)
    wait_for_line(first, "waiting")
    before = read_files(out_dir)
    # The first of these would have nothing to do, because its files are complete.
    for flags in ([], ["--overwrite"], ["--val_fraction=0.1"]):
        second = run(PREPARE, *arguments, *flags)
        assert_one_sentence(second, f"another run (process {first.pid} on ")
    assert read_files(out_dir) == before
    # Verifying writes nothing, and is allowed.
    assert run(PREPARE, "--verify", f"--out_dir={out_dir}").returncode == 0

    _, stderr = first.communicate("\n")
    assert first.returncode == 0, stderr
    after = read_files(out_dir)
    assert after.keys() == complete.keys()
    assert after != complete
    assert run(PREPARE, "--verify", f"--out_dir={out_dir}").returncode == 0
