"""A run survives the terminal, the pipe, the encoding and the files that it writes to."""

import os
import subprocess
import sys

import pytest

from helpers import PROGRAMS, ROOT, flags_of, load, metrics, run, train, train_here

SHORT = {"max_iters": 12, "eval_interval": 12}


def train_in_shell(bins, out_dir, redirection):
    """Run train.py in bash with its output redirected."""
    flags = " ".join(flags_of(bins, out_dir, SHORT))
    command = f"set -o pipefail; {sys.executable} {ROOT / 'train.py'} {flags} {redirection}"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True)


@pytest.mark.skipif(os.name != "posix", reason="needs bash")
@pytest.mark.parametrize("redirection", ["> /dev/full", "| head -n 7", ">&-", ">&- 2>&-"])
def test_a_run_survives_output_that_fails(bins, tmp_path, redirection):
    result = train_in_shell(bins, tmp_path, redirection)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert load(tmp_path)["iter_num"] == 12
    iters = [record["iter"] for record in metrics(tmp_path) if "train_loss" in record]
    assert iters == list(range(12))


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_a_run_survives_the_loss_of_its_terminal(bins, tmp_path):
    """The other end of a pseudo-terminal is closed, so that every print raises EIO."""
    controller, terminal = os.openpty()
    command = [sys.executable, ROOT / "train.py", *flags_of(bins, tmp_path, SHORT)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=terminal, stderr=terminal, env=env)
    os.close(terminal)
    os.read(controller, 100)
    os.close(controller)
    assert process.wait(timeout=60) == 0
    assert load(tmp_path)["iter_num"] == 12


def test_a_run_survives_a_path_that_its_console_cannot_encode(bins, tmp_path):
    out_dir = tmp_path / "ночь"
    result = train(bins, out_dir, env={"PYTHONIOENCODING": "cp1252"}, **SHORT)
    assert result.returncode == 0, result.stderr
    assert load(out_dir)["iter_num"] == 12


def test_a_picture_that_cannot_be_drawn_is_not_announced_and_costs_nothing_else(
    bins, tmp_path, monkeypatch
):
    monkeypatch.setattr("onenight.training.metrics.draw_losses", lambda *arguments: 1 / 0)
    result = train_here(bins, tmp_path, **SHORT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("loss.png: cannot be written (division by zero)") == 1
    assert "loss picture:" not in result.stdout
    assert (tmp_path / "samples.txt").exists()


@pytest.mark.skipif(os.name != "posix", reason="needs the list of users of POSIX")
def test_a_run_of_an_unknown_user_without_a_home_directory_writes_all_its_files(bins, tmp_path):
    cache = tmp_path / "file" / "cache"
    cache.parent.write_text("")
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(cache)}  # torch cannot create it
    program = PROGRAMS / "train_as_unknown_user.py"
    result = run(program, *flags_of(bins, tmp_path, SHORT), env=environment)
    assert result.returncode == 0, result.stderr
    assert f"{cache}: cannot be written to (Not a directory): using TORCHINDUCTOR" in result.stdout
    assert "there is no home directory: using MPLCONFIGDIR=" in result.stdout
    assert f"loss picture: {tmp_path / 'loss.png'}" in result.stdout
    assert (tmp_path / "loss.png").exists()
    assert (tmp_path / "samples.txt").exists()


def test_a_run_survives_metrics_and_a_picture_that_cannot_be_written(bins, tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    result = train_here(bins, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("metrics.jsonl: cannot be written") == 1
    assert load(tmp_path)["iter_num"] == 45
