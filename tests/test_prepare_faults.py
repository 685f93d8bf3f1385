"""prepare_single_parquet.py killed, interrupted, or out of disk space: it continues to the same result."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, assert_one_sentence, run, start, wait_until, write_parquet
from test_prepare import PREPARE, TEXTS, read_bins, reference_bins

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals, fork and resource limits")


# The script with a checkpoint every 20 ms, so that a run of half a second has many.
IMPATIENT = ["-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import prepare_single_parquet as script; "
             "script.main(sys.argv[1:], checkpoint_s=0.02)"]  # fmt: skip


def run_impatient(*arguments, **options):
    command = [sys.executable, *IMPATIENT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def long_source(tmp_path_factory):
    """About 3 million tokens, and the bins that they are."""
    many = [f"{i} {text}" if text else text for i in range(15) for text in TEXTS]
    return write_parquet(tmp_path_factory.mktemp("long") / "long.parquet", many, row_group_size=5000), reference_bins(
        many
    )


def rows_done(out_dir):
    try:
        return json.loads((out_dir / "prepare.json").read_text())["state"]["rows"]
    except FileNotFoundError:
        return 0


def test_killed_at_random_moments_it_continues(long_source, tmp_path):
    (source, expected), out_dir, rng = long_source, tmp_path / "out", random.Random(1)
    whole = run_impatient(source, f"--out_dir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    reached = [0]
    for how in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
        process = start(IMPATIENT, source, f"--out_dir={out_dir}", "--num_workers=1")
        # Some of the work is done, then any moment: by then a run of its own has about half a second left.
        wait_until(lambda running=process: rows_done(out_dir) > reached[-1] or running.poll() is not None)
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(how)
        output, errors = process.communicate()
        assert "Traceback" not in errors
        if reached[-1]:
            assert f"continuing at row {reached[-1]:,}\n" in output
        if (out_dir / "train.bin").exists():
            assert (out_dir / "train.bin").read_bytes() == expected[0]
        if (out_dir / "meta.json").exists():
            break
        reached.append(rows_done(out_dir))
        assert reached[-1] > reached[-2]
    assert len(reached) > 3  # that is, it was killed three times before it was done
    result = run_impatient(source, f"--out_dir={out_dir}")
    assert result.returncode == 0
    assert f"continuing at row {reached[-1]:,}\n" in result.stdout or "complete already" in result.stdout
    assert read_bins(out_dir) == expected == read_bins(tmp_path / "whole")
    assert (out_dir / "meta.json").read_bytes() == (tmp_path / "whole" / "meta.json").read_bytes()
    assert sorted(path.name for path in out_dir.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_other_settings_or_input_are_refused(long_source, tmp_path):
    (source, expected), out_dir = long_source, tmp_path / "out"
    process = start(IMPATIENT, source, f"--out_dir={out_dir}", "--num_workers=1")
    wait_until(lambda: rows_done(out_dir))
    process.kill()
    process.communicate()
    raw = bytearray(source.read_bytes())
    raw[len(raw) // 3] ^= 1  # the same size, the same footer
    (tmp_path / source.name).write_bytes(raw)
    for name in ("lock", "lock.txt"):  # of the killed process; they hold nobody up
        (out_dir / name).unlink()
    left = {path.name: path.read_bytes() for path in out_dir.iterdir()}
    for arguments, words in (
        ((source, "--val_fraction=0.01"), "an unfinished preparation of other settings (val_fraction 0.005, now 0.01)"),
        ((tmp_path / source.name,), "an unfinished preparation of the same files before they were changed"),
    ):
        assert_one_sentence(run(PREPARE, *arguments, f"--out_dir={out_dir}"), words)
    assert {path.name: path.read_bytes() for path in out_dir.iterdir()} == left
    assert "continuing at row" in run(PREPARE, source, f"--out_dir={out_dir}").stdout
    assert read_bins(out_dir) == expected


# Prepares again and again, and each time dies, or finds the disk full, one step later: at a flush, renaming or removal.
STEP_BY_STEP = """
import errno, hashlib, json, os, shutil, signal, sys
from pathlib import Path
import prepare_single_parquet

fault, old, new, out, *arguments = sys.argv[1:]
arguments.append(f"--out_dir={out}")
prepare_single_parquet.read_ranks()  # once for all children

def fail_at(step):
    left = [step]
    def failing(function):
        def wrapper(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0 and fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if left[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **kwargs)
        return wrapper
    os.replace, os.fsync, Path.unlink = failing(os.replace), failing(os.fsync), failing(Path.unlink)

def prepare_in_child(step):
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        fail_at(step)
        try:
            prepare_single_parquet.main(arguments)
        except SystemExit as sentence:
            os._exit(2 if "No space left on device" in str(sentence) else 3)
        finally:
            os._exit(1 if sys.exc_info()[0] else 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}

for step in range(1, 100):
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(old, out)
    code = prepare_in_child(step)
    assert code in ((0, -signal.SIGKILL) if fault == "kill" else (0, 2)), (step, code)
    found = files(out)
    pairs = [(None, None)] + [(bins.get("train.bin"), bins.get("val.bin")) for bins in (files(old), files(new))]
    there = (found.get("train.bin"), found.get("val.bin"))
    assert any(all(bin in (None, right) for bin, right in zip(there, pair)) for pair in pairs), step
    if "meta.json" in found:
        for split in ("train", "val"):
            digest = hashlib.sha256(found[f"{split}.bin"]).hexdigest()
            assert json.loads(found["meta.json"])[split]["sha256"] == digest, step
    assert prepare_in_child(0) == 0, step
    assert files(out) == files(new), step
    if code == 0:
        break
print(step)
"""


@pytest.mark.parametrize("before", ["nothing", "other bins"])
@pytest.mark.parametrize("fault", ["kill", "full disk"])
def test_a_fault_at_any_step_of_writing_leaves_whole_files(fault, before, tmp_path):
    old, new, out = tmp_path / "old", tmp_path / "new", tmp_path / "out"
    source = write_parquet(tmp_path / "a.parquet", TEXTS[:300])
    old.mkdir()
    if before == "other bins":
        assert run(PREPARE, source, f"--out_dir={old}", "--val_fraction=0.1").returncode == 0
    assert run(PREPARE, source, f"--out_dir={new}").returncode == 0
    overwrite = ["--overwrite"] if before == "other bins" else []
    command = [sys.executable, "-c", STEP_BY_STEP, fault, old, new, out, source, *overwrite]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 12  # two fsyncs and a journal, before the renaming of two bins and of meta.json


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_it_stops_at_once_even_in_a_very_long_document(how, tmp_path):
    one_word = "".join(random.Random(3).choices("abcdefghijklmnopqrstuvwxyz", k=8_000_000))  # takes its thread long
    source = write_parquet(tmp_path / "a.parquet", [*TEXTS[:500], one_word])
    process = start(PREPARE, source, f"--out_dir={tmp_path / 'out'}")
    wait_until((tmp_path / "out" / "train.bin.partial").exists)
    time.sleep(0.3)
    assert process.poll() is None
    sent = time.monotonic()
    process.send_signal(how)
    output, errors = process.communicate()
    assert time.monotonic() - sent < 2  # and not the seconds that the word still takes
    assert process.returncode == 130
    assert "stopped; the same command continues from here" in output
    assert errors == ""
    assert not (tmp_path / "out" / "train.bin").exists()


@pytest.fixture(scope="module")
def dense_source(tmp_path_factory):
    """Text with far more tokens per byte than English, so that the estimate of the space is too low."""
    rng = random.Random(2)
    many = ["".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(500)) for _ in range(1000)]
    expected = reference_bins(many)
    path = write_parquet(tmp_path_factory.mktemp("dense") / "dense.parquet", many)
    estimate = 2 * (1000 * 500 * 3 / 4 + 1000)  # bytes of text over 4, and one end-of-text each
    assert len(expected[0]) > 2 * estimate
    return path, expected


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1.2 MB, and a function that makes it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options):
        return subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", folder], capture_output=True, text=True)

    if not shutil.which("mount") or (failed := mount("-o", "size=1200k")).returncode:
        pytest.skip(
            f"cannot mount a small file system: {failed.stderr.strip() if shutil.which('mount') else 'no mount'}"
        )
    yield folder, lambda: mount("-o", "remount,size=20m")
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_ends_in_a_sentence_and_continues_after_room_is_made(dense_source, small_disk):
    (source, expected), (disk, enlarge) = dense_source, small_disk
    result = run_impatient(source, f"--out_dir={disk}")
    assert_one_sentence(result, "No space left on device; once that is solved, the same command continues from here")
    assert not (disk / "train.bin").exists()
    done = rows_done(disk)
    assert done > 0
    assert_one_sentence(run_impatient(source, f"--out_dir={disk}"), "")  # once more without room: refused, nothing lost
    assert rows_done(disk) >= done
    enlarge()
    result = run_impatient(source, f"--out_dir={disk}")
    assert result.returncode == 0, result.stderr
    assert "continuing at row" in result.stdout
    assert read_bins(disk) == expected


def test_a_file_size_limit_ends_in_a_sentence_and_continues(dense_source, tmp_path):
    import resource

    source, expected = dense_source
    limit = 1_200_000
    limited = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))}
    result = run_impatient(source, f"--out_dir={tmp_path}", **limited)
    assert_one_sentence(result, "File too large; once that is solved, the same command continues from here")
    assert not (tmp_path / "train.bin").exists()
    assert "continuing at row" in run_impatient(source, f"--out_dir={tmp_path}").stdout
    assert read_bins(tmp_path) == expected


def test_a_disk_that_is_too_small_is_refused_at_the_start(long_source, small_disk):
    result = run(PREPARE, long_source[0], f"--out_dir={small_disk[0]}")
    assert_one_sentence(result, "MB are to be written, but only")
    assert list(small_disk[0].iterdir()) == []
    # what fits is taken
    result = run(PREPARE, long_source[0], f"--out_dir={small_disk[0]}", "--max_tokens=100000")
    assert result.returncode == 0, result.stderr
