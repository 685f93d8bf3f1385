"""Output and signals: a run must survive the terminal, the pipe and the disk that it prints to."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    ROOT,
    flags_of,
    load,
    metrics,
    start,
    train,
    train_here,
    wait_for_iter,
    wait_for_line,
    wait_until,
)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="POSIX signals and shells")
SHORT = {"max_iters": 12, "eval_interval": 12}


def in_shell(bins, out_dir, redirection):
    """train.py in a shell, with its output redirected."""
    flags = " ".join(flags_of(bins, out_dir, SHORT))
    script = f"set -o pipefail; {sys.executable} {ROOT / 'train.py'} {flags} {redirection}"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)


def test_a_hangup_that_was_ignored_from_the_start_stays_ignored(bins, tmp_path):
    ignoring = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.executable, "
    ignoring += "[sys.executable, *sys.argv[1:]])"  # as nohup does
    command = ["-c", ignoring, "-u", ROOT / "train.py", *flags_of(bins, tmp_path, {})]
    process = start(command)
    wait_for_line(process, "iter 2:")
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert load(tmp_path)["iter_num"] == 45


@pytest.mark.parametrize("redirection", ["> /dev/full", "| head -n 7", ">&-", ">&- 2>&-"])
def test_output_that_fails_does_not_end_a_run(bins, tmp_path, redirection):
    result = in_shell(bins, tmp_path, redirection)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert load(tmp_path)["iter_num"] == 12
    assert [record["iter"] for record in metrics(tmp_path) if "train_loss" in record] == list(range(12))


def test_a_terminal_that_is_gone_does_not_end_a_run(bins, tmp_path):
    """A pseudo-terminal whose other end is closed: every print raises EIO."""
    ours, theirs = os.openpty()
    command = [sys.executable, ROOT / "train.py", *flags_of(bins, tmp_path, SHORT)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    os.read(ours, 100)
    os.close(ours)
    assert process.wait(timeout=60) == 0
    assert load(tmp_path)["iter_num"] == 12


def test_a_path_that_the_console_cannot_encode(bins, tmp_path):
    out_dir = tmp_path / "ночь"
    result = train(bins, out_dir, env={"PYTHONIOENCODING": "cp1252"}, **SHORT)
    assert result.returncode == 0, result.stderr
    assert load(out_dir)["iter_num"] == 12


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="sees in Linux's /proc what is imported")
@pytest.mark.parametrize("script", ["train.py", "sample.py", "export.py", "prepare_single_parquet.py"])
def test_ctrl_c_during_the_imports_is_silent(script, tmp_path):
    process = start(script, cwd=tmp_path)
    modules = Path(f"/proc/{process.pid}/maps")
    while "numpy" not in modules.read_text():  # the imports have come so far
        time.sleep(0.005)
        assert process.poll() is None
    interrupt(process)


def test_ctrl_c_at_any_other_moment_is_silent(tmp_path):
    """In an evaluation, a sample and an export, once each has begun."""
    for split in ("train", "val"):
        np.random.default_rng(0).integers(0, 50257, 20_000).astype("<u2").tofile(tmp_path / f"{split}.bin")
    out_dir, export = tmp_path / "out", tmp_path / "export"
    assert train_here(tmp_path, out_dir, max_iters=1, eval_iters=1).returncode == 0
    before = sorted((path.name, path.stat().st_mtime) for path in out_dir.iterdir())
    flags = flags_of(tmp_path, out_dir, {"init_from": "resume", "eval_only": True, "eval_iters": 1000})
    evaluation = start("train.py", *flags)
    wait_for_line(evaluation, "resuming")
    interrupt(evaluation)
    sample = start("sample.py", f"--out_dir={out_dir}", "--device=cpu", "--max_new_tokens=100000")
    sample.stdout.readline()
    interrupt(sample)
    exporting = start("export.py", f"--out_dir={out_dir}", f"--export_dir={export}")
    wait_until((tmp_path / "export.partial").exists)
    interrupt(exporting)
    assert not export.exists() and not (tmp_path / "export.partial").exists()
    assert before == sorted((path.name, path.stat().st_mtime) for path in out_dir.iterdir())


def interrupt(process):
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr


def test_a_checkpoint_is_saved_between_evaluations_too(bins, tmp_path):
    """Ten minutes are shortened here; what a kill leaves is resumed to the same end as an undisturbed run."""
    changes = {"eval_interval": 10**6, "max_iters": 60}
    assert train_here(bins, tmp_path / "whole", **changes).returncode == 0
    flags = flags_of(bins, tmp_path / "x", changes)
    code = "import sys; sys.path.insert(0, sys.argv[1]); import train; train.SAVE_S = 0.05; train.main(sys.argv[2:])"
    process = start(["-c", code, ROOT], *flags)
    wait_for_iter(process, 30)
    process.kill()
    process.communicate()
    assert 0 < load(tmp_path / "x")["iter_num"] < 60
    assert train_here(bins, tmp_path / "x", init_from="resume", **changes).returncode == 0
    assert load(tmp_path / "x")["best_val_loss"] == load(tmp_path / "whole")["best_val_loss"]


def test_foreign_lines_in_the_metrics_are_left_out_at_a_resume(bins, tmp_path):
    assert train_here(bins, tmp_path, max_iters=20).returncode == 0
    file = tmp_path / "metrics.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:5], '{"note": 1}', "text", "[]", *lines[5:], '{"iter": ']))
    resumed = train_here(bins, tmp_path, init_from="resume")
    assert resumed.returncode == 0, resumed.stderr
    assert f"{file}: 4 lines are damaged or not ours, and left out" in resumed.stdout
    assert [record["iter"] for record in metrics(tmp_path) if "train_loss" in record] == list(range(45))


def test_metrics_and_a_picture_that_cannot_be_written_stop_nothing(bins, tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    result = train_here(bins, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("metrics.jsonl: cannot be written") == 1
    assert load(tmp_path)["iter_num"] == 45
