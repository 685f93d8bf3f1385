"""prepare_single_parquet.py, killed, interrupted or out of disk space, continues correctly."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

import prepare_single_parquet as script
from helpers import (
    PROGRAMS,
    assert_one_sentence,
    read_files,
    run,
    run_here,
    start,
    wait_until,
    write_parquet,
    write_texts,
)
from reference import TEXTS

pytestmark = pytest.mark.skipif(
    os.name != "posix", reason="needs POSIX signals, fork and resource limits"
)

PREPARE_OFTEN = PROGRAMS / "prepare_often.py"  # saves every 20 ms


def prepare(*arguments):
    """Run the script in this process, undisturbed."""
    result = run_here(script, *arguments)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with about 3 million tokens in two files, with a document that is cut in two."""
    folder = tmp_path_factory.mktemp("source")
    texts = [f"{i} {text}" if text else text for i in range(8) for text in TEXTS]
    rows = [text and text.encode() for text in texts]
    rows[0] = b"some text that is not UTF-8: \xe9 " * 20_000
    write_parquet(folder / "a.parquet", rows)
    write_texts(folder / "b.jsonl.gz", texts)
    return folder


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """The files of an undisturbed preparation."""
    out_dir = tmp_path_factory.mktemp("whole")
    prepare(source, f"--out_dir={out_dir}")
    files = read_files(out_dir)
    meta = json.loads(files["meta.json"])
    assert (meta["cut_documents"], meta["replaced_documents"]) == (1, 1)
    return files


def position(out_dir):
    """Return the file and the row up to which an unfinished preparation has saved its work."""
    try:
        state = json.loads((out_dir / "prepare.json").read_text())["state"]
        return state["file"], state["rows"]
    except FileNotFoundError:
        return 0, 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_preparation_that_is_stopped_at_random_moments_continues(number, source, whole, tmp_path):
    rng = random.Random(number)
    for _ in range(2):
        before = position(tmp_path)
        process = start(PREPARE_OFTEN, source, f"--out_dir={tmp_path}", "--num_workers=1")
        wait_until(lambda before=before: position(tmp_path) > before)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == (130 if number == signal.SIGINT else -number), stderr
        assert stderr == ""
        assert "continuing" in stdout or before == (0, 0)
        assert not (tmp_path / "train.bin").exists()
        assert position(tmp_path) > before

    result = run(PREPARE_OFTEN, source, f"--out_dir={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert "continuing" in result.stdout
    assert read_files(tmp_path) == whole


def test_a_preparation_whose_last_tokens_a_power_cut_lost_begins_again(source, whole, tmp_path):
    process = start(PREPARE_OFTEN, source, f"--out_dir={tmp_path}", "--num_workers=1")
    wait_until(lambda: position(tmp_path) > (0, 0))
    process.kill()
    process.communicate()
    os.truncate(tmp_path / "train.bin.partial", 100)
    result = run(PREPARE_OFTEN, source, f"--out_dir={tmp_path}")
    assert "continuing" not in result.stdout
    assert read_files(tmp_path) == whole


def test_a_kill_at_any_step_of_writing_leaves_complete_files(tmp_path):
    source = write_parquet(tmp_path / "a.parquet", TEXTS[:300])
    old = tmp_path / "old"
    new = tmp_path / "new"
    prepare(source, f"--out_dir={old}", "--val_fraction=0.1")
    prepare(source, f"--out_dir={new}")
    program = PROGRAMS / "prepare_and_kill.py"
    result = run(program, old, new, tmp_path / "out", source, "--num_workers=1", "--overwrite")
    assert result.returncode == 0, result.stderr
    # Among the steps are two flushes and the journal, then the renaming of both bins and meta.json.
    assert int(result.stdout) > 12


def test_a_preparation_continues_after_a_limit_of_the_file_size(source, whole, tmp_path):
    import resource

    result = subprocess.run(
        [sys.executable, PREPARE_OFTEN, source, f"--out_dir={tmp_path}"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000)),
    )
    assert_one_sentence(result, str(tmp_path))
    assert not (tmp_path / "train.bin").exists()
    assert "continuing" in run(PREPARE_OFTEN, source, f"--out_dir={tmp_path}").stdout
    assert read_files(tmp_path) == whole
