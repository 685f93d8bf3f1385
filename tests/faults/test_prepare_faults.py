"""prepare_single_parquet.py, killed, interrupted or out of disk space, continues correctly."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from helpers import (
    PROGRAMS,
    assert_one_sentence,
    read_files,
    run,
    start,
    wait_until,
    write_parquet,
)
from reference import TEXTS, read_bins, reference_bins

pytestmark = pytest.mark.skipif(
    os.name != "posix", reason="needs POSIX signals, fork and resource limits"
)

PREPARE = "prepare_single_parquet.py"
PREPARE_OFTEN = PROGRAMS / "prepare_often.py"  # saves every 20 ms


@pytest.fixture(scope="module")
def long_source(tmp_path_factory):
    """A file with about 3 million tokens, and its bins."""
    texts = [f"{i} {text}" if text else text for i in range(15) for text in TEXTS]
    path = tmp_path_factory.mktemp("long") / "long.parquet"
    return write_parquet(path, texts, row_group_size=5000), reference_bins(texts)


def saved_rows(out_dir):
    """Return the rows that an unfinished preparation has saved."""
    try:
        return json.loads((out_dir / "prepare.json").read_text())["state"]["rows"]
    except FileNotFoundError:
        return 0


# -----------------------------------------------------------------------------
# Kills and signals


def interrupt_after_next_save(source, out_dir, number, delay):
    """Start a preparation and send it a signal, `delay` seconds after it has saved more rows.

    Return its output.
    """
    before = saved_rows(out_dir)
    process = start(PREPARE_OFTEN, source, f"--out_dir={out_dir}", "--num_workers=1")
    wait_until(lambda: saved_rows(out_dir) > before or process.poll() is not None)
    time.sleep(delay)
    process.send_signal(number)
    output, errors = process.communicate()
    assert "Traceback" not in errors
    return output


def test_a_preparation_that_is_stopped_at_random_moments_continues(long_source, tmp_path):
    source, expected = long_source
    whole = tmp_path / "whole"
    result = run(PREPARE_OFTEN, source, f"--out_dir={whole}")
    assert result.returncode == 0, result.stderr

    rng = random.Random(1)
    out_dir = tmp_path / "out"
    rows = 0
    stops = 0
    for number in (
        signal.SIGKILL,
        signal.SIGKILL,
        signal.SIGTERM,
        signal.SIGKILL,
        signal.SIGINT,
        signal.SIGKILL,
    ):
        output = interrupt_after_next_save(source, out_dir, number, delay=rng.uniform(0, 0.1))
        if rows:
            assert f"continuing at row {rows:,}\n" in output
        if (out_dir / "train.bin").exists():
            assert (out_dir / "train.bin").read_bytes() == expected[0]
        if (out_dir / "meta.json").exists():
            break
        assert saved_rows(out_dir) > rows
        rows = saved_rows(out_dir)
        stops += 1
    assert stops >= 3  # otherwise the file is too small for this machine

    result = run(PREPARE_OFTEN, source, f"--out_dir={out_dir}")
    assert result.returncode == 0, result.stderr
    is_continued = f"continuing at row {rows:,}\n" in result.stdout
    assert is_continued or "complete already" in result.stdout
    assert read_bins(out_dir) == expected
    assert read_files(out_dir) == read_files(whole)
    assert read_files(out_dir).keys() == {"meta.json", "train.bin", "val.bin"}


def test_unfinished_work_is_not_lost_to_other_settings_or_input(long_source, tmp_path):
    source, expected = long_source
    out_dir = tmp_path / "out"
    interrupt_after_next_save(source, out_dir, signal.SIGKILL, delay=0)
    for name in ("lock", "lock.txt"):  # of the killed process, and harmless
        (out_dir / name).unlink()
    before = read_files(out_dir)

    changed = bytearray(source.read_bytes())
    changed[len(changed) // 3] ^= 1  # the size and the footer stay the same
    (tmp_path / source.name).write_bytes(changed)
    for arguments, words in (
        ([source, "--val_fraction=0.01"], "other settings (val_fraction 0.005, now 0.01)"),
        ([tmp_path / source.name], "the same files before they were changed"),
    ):
        result = run(PREPARE, *arguments, f"--out_dir={out_dir}")
        assert_one_sentence(result, f"contains an unfinished preparation of {words}")
    assert read_files(out_dir) == before

    assert "continuing at row" in run(PREPARE, source, f"--out_dir={out_dir}").stdout
    assert read_bins(out_dir) == expected


@pytest.mark.parametrize("old_files", ["no files", "other bins"])
@pytest.mark.parametrize("fault", ["kill", "full_disk"])
def test_a_fault_at_any_step_of_writing_leaves_complete_files(fault, old_files, tmp_path):
    old = tmp_path / "old"
    new = tmp_path / "new"
    source = write_parquet(tmp_path / "a.parquet", TEXTS[:300])
    old.mkdir()
    arguments = [source]
    if old_files == "other bins":
        result = run(PREPARE, source, f"--out_dir={old}", "--val_fraction=0.1")
        assert result.returncode == 0, result.stderr
        arguments.append("--overwrite")
    assert run(PREPARE, source, f"--out_dir={new}").returncode == 0

    program = PROGRAMS / "prepare_with_faults.py"
    result = run(program, fault, old, new, tmp_path / "out", *arguments)
    assert result.returncode == 0, result.stderr
    # Among the steps are two flushes and the journal, then the renaming of both bins and meta.json.
    assert int(result.stdout) > 12


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_stops_at_once_even_in_a_very_long_document(number, tmp_path):
    letters = "abcdefghijklmnopqrstuvwxyz"
    word = "".join(random.Random(3).choices(letters, k=8_000_000))  # takes its thread seconds
    source = write_parquet(tmp_path / "a.parquet", [*TEXTS[:500], word])
    out_dir = tmp_path / "out"
    process = start(PREPARE, source, f"--out_dir={out_dir}")
    wait_until((out_dir / "train.bin.partial").exists)
    time.sleep(0.3)
    assert process.poll() is None

    sent = time.monotonic()
    process.send_signal(number)
    output, errors = process.communicate()
    assert time.monotonic() - sent < 2
    assert process.returncode == 130
    assert "stopped; run the same command again to continue" in output
    assert errors == ""
    assert not (out_dir / "train.bin").exists()


# -----------------------------------------------------------------------------
# Disks that are full


@pytest.fixture(scope="module")
def dense_source(tmp_path_factory):
    """A file with so many tokens per byte that the estimate of the space is too low; its bins."""
    rng = random.Random(2)
    texts = ["".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(500)) for _ in range(1000)]
    bins = reference_bins(texts)
    estimated_tokens = 1000 * (500 * 3 / 4 + 1)  # of 4 bytes each, and one end-of-text per document
    assert len(bins[0]) > 2 * 2 * estimated_tokens
    path = tmp_path_factory.mktemp("dense") / "dense.parquet"
    return write_parquet(path, texts), bins


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1.2 MB, and a function that enlarges it."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options):
        command = ["mount", "-t", "tmpfs", *options, "tmpfs", folder]
        return subprocess.run(command, capture_output=True, text=True)

    if not shutil.which("mount"):
        pytest.skip("there is no mount command")
    mounted = mount("-o", "size=1200k")
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    yield folder, lambda: mount("-o", "remount,size=20m")
    subprocess.run(["umount", folder], check=True)


def test_a_preparation_continues_after_a_full_disk_was_enlarged(dense_source, small_disk):
    source, expected = dense_source
    disk, enlarge = small_disk
    words = "No space left on device; fix that and run the same command again to continue"
    assert_one_sentence(run(PREPARE_OFTEN, source, f"--out_dir={disk}"), words)
    assert not (disk / "train.bin").exists()
    rows = saved_rows(disk)
    assert rows > 0

    # Without more space it fails again, but loses nothing.
    assert_one_sentence(run(PREPARE_OFTEN, source, f"--out_dir={disk}"), words)
    assert saved_rows(disk) >= rows

    enlarge()
    result = run(PREPARE_OFTEN, source, f"--out_dir={disk}")
    assert result.returncode == 0, result.stderr
    assert "continuing at row" in result.stdout
    assert read_bins(disk) == expected


def test_a_preparation_continues_after_a_limit_of_the_file_size(dense_source, tmp_path):
    import resource

    source, expected = dense_source
    command = [sys.executable, PREPARE_OFTEN, source, f"--out_dir={tmp_path}"]
    limits = (1_200_000, 1_200_000)
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
    )
    words = "File too large; fix that and run the same command again to continue"
    assert_one_sentence(result, words)
    assert not (tmp_path / "train.bin").exists()
    assert "continuing at row" in run(PREPARE_OFTEN, source, f"--out_dir={tmp_path}").stdout
    assert read_bins(tmp_path) == expected


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(long_source, small_disk):
    source, _ = long_source
    disk, _ = small_disk
    result = run(PREPARE, source, f"--out_dir={disk}")
    assert_one_sentence(result, "MB are free; free some space, choose another --out_dir, or set")
    assert list(disk.iterdir()) == []
    # What fits is prepared.
    result = run(PREPARE, source, f"--out_dir={disk}", "--max_tokens=100000")
    assert result.returncode == 0, result.stderr
