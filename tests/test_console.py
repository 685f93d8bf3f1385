"""Output and signals: a run must survive the terminal, the pipe and the disk that it prints to."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, load, metrics, start, start_training, train, wait_for_iter, wait_for_line

pytestmark = pytest.mark.skipif(os.name != "posix", reason="POSIX signals and shells")
LONG = {"max_iters": 10**6, "lr_decay_iters": 10**6}


def in_shell(bins, out_dir, redirection, before="", **changes):
    """train.py in a shell, with its output redirected."""
    settings = {**TINY, "dataset": bins, "out_dir": out_dir, **changes}
    flags = " ".join(f"--{key}={value}" for key, value in settings.items())
    script = f"set -o pipefail; {before} {sys.executable} {ROOT / 'train.py'} {flags} {redirection}"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)


def test_closing_the_terminal_saves(bins, tmp_path):
    process = start_training(bins, tmp_path, **LONG)
    wait_for_line(process, "iter 12:")
    process.send_signal(signal.SIGHUP)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert load(tmp_path)["iter_num"] >= 13 and "--init_from=resume" in stdout


def test_a_hangup_that_was_ignored_from_the_start_stays_ignored(bins, tmp_path):
    settings = {**TINY, "dataset": bins, "out_dir": tmp_path}
    ignoring = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.executable, "
    ignoring += "[sys.executable, *sys.argv[1:]])"  # as nohup does
    command = ["-c", ignoring, "-u", ROOT / "train.py", *(f"--{key}={value}" for key, value in settings.items())]
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
    assert load(tmp_path)["iter_num"] == 45
    assert [record["iter"] for record in metrics(tmp_path) if "train_loss" in record] == list(range(45))


def test_a_terminal_that_is_gone_does_not_end_a_run(bins, tmp_path):
    """A pseudo-terminal whose other end is closed: every print raises EIO."""
    ours, theirs = os.openpty()
    settings = {**TINY, "dataset": bins, "out_dir": tmp_path}
    command = [sys.executable, ROOT / "train.py", *(f"--{key}={value}" for key, value in settings.items())]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    os.read(ours, 100)
    os.close(ours)
    assert process.wait(timeout=60) == 0
    assert load(tmp_path)["iter_num"] == 45


def test_a_path_that_the_console_cannot_encode(bins, tmp_path):
    out_dir = tmp_path / "ночь"
    result = train(bins, out_dir, env={"PYTHONIOENCODING": "cp1252"})
    assert result.returncode == 0, result.stderr
    assert load(out_dir)["iter_num"] == 45


@pytest.mark.parametrize("script", ["train.py", "sample.py", "export.py", "prepare_single_parquet.py"])
def test_ctrl_c_during_the_imports_is_silent(script, tmp_path):
    process = start(script, cwd=tmp_path)
    modules = Path(f"/proc/{process.pid}/maps")
    while "numpy" not in modules.read_text():  # the imports have come so far
        time.sleep(0.005)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr


def test_ctrl_c_at_any_other_moment_is_silent(tmp_path):
    """Of a plan, an evaluation, a sample and an export, which all take seconds: at three moments each."""
    bins = tmp_path
    for split in ("train", "val"):
        np.random.default_rng(0).integers(0, 50257, 20_000).astype("<u2").tofile(bins / f"{split}.bin")
    assert train(bins, tmp_path / "out", max_iters=1).returncode == 0
    before = sorted((path.name, path.stat().st_mtime) for path in (tmp_path / "out").iterdir())
    flags = {**TINY, "dataset": bins, "out_dir": tmp_path / "out", "init_from": "resume"}
    training = ["train.py", *(f"--{key}={value}" for key, value in flags.items())]
    commands = [
        [*training, "--plan", "--compile"],
        [*training, "--eval_only", "--eval_iters=1000"],
        ["sample.py", f"--out_dir={tmp_path / 'out'}", "--device=cpu"],
        ["export.py", f"--out_dir={tmp_path / 'out'}", f"--export_dir={tmp_path / 'export'}"],
    ]
    codes = set()
    for seconds in (1, 2, 3):
        processes = [start(*command) for command in commands]
        time.sleep(seconds)
        for process in processes:
            process.send_signal(signal.SIGINT)
        for process in processes:
            _, stderr = process.communicate(timeout=60)
            codes.add(process.returncode)
            assert process.returncode in (130, 0), stderr  # 0: it had ended
            assert "Traceback" not in stderr
    assert 130 in codes
    assert before == sorted((path.name, path.stat().st_mtime) for path in (tmp_path / "out").iterdir())


def test_a_checkpoint_is_saved_between_evaluations_too(bins, tmp_path):
    """Ten minutes are shortened here; what a kill leaves is resumed to the same end as an undisturbed run."""
    changes = {"eval_interval": 10**6, "max_iters": 60}
    assert train(bins, tmp_path / "whole", **changes).returncode == 0
    settings = {**TINY, "dataset": bins, "out_dir": tmp_path / "x", **changes}
    flags = [f"--{key}={value}" for key, value in settings.items()]
    code = "import sys; sys.path.insert(0, sys.argv[1]); import train; train.SAVE_S = 0.05; train.main(sys.argv[2:])"
    process = start(["-c", code, ROOT], *flags)
    wait_for_iter(process, 30)
    process.kill()
    process.communicate()
    assert 0 < load(tmp_path / "x")["iter_num"] < 60
    assert train(bins, tmp_path / "x", init_from="resume", **changes).returncode == 0
    assert load(tmp_path / "x")["best_val_loss"] == load(tmp_path / "whole")["best_val_loss"]


def test_foreign_lines_in_the_metrics_are_left_out_at_a_resume(bins, tmp_path):
    assert train(bins, tmp_path, max_iters=20).returncode == 0
    file = tmp_path / "metrics.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:5], '{"note": 1}', "text", "[]", *lines[5:], '{"iter": ']))
    resumed = train(bins, tmp_path, init_from="resume")
    assert resumed.returncode == 0, resumed.stderr
    assert f"{file}: 4 lines are damaged or not ours, and left out" in resumed.stdout
    assert [record["iter"] for record in metrics(tmp_path) if "train_loss" in record] == list(range(45))


def test_metrics_and_a_picture_that_cannot_be_written_stop_nothing(bins, tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    result = train(bins, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("metrics.jsonl: cannot be written") == 1
    assert load(tmp_path)["iter_num"] == 45
