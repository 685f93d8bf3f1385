"""The settings of the scripts: help, refusals, paths, and imports without effects."""

import dataclasses
import os
import subprocess
import sys

import pytest

import export as export_script
import prepare_single_parquet as prepare_script
import sample as sample_script
import train as train_script
from configurator import accepted_values, configure
from export import ExportConfig
from helpers import PROGRAMS, ROOT, TINY, assert_one_sentence, make_bins, run, run_here
from onenight.training.settings import TrainConfig
from prepare_single_parquet import PrepareConfig
from sample import SampleConfig

SCRIPTS = [
    (train_script, TrainConfig),
    (sample_script, SampleConfig),
    (export_script, ExportConfig),
    (prepare_script, PrepareConfig),
]


@pytest.mark.parametrize("script, cls", SCRIPTS)
def test_help_lists_every_setting_with_its_default_reason_and_range(script, cls):
    result = run_here(script, "--help")
    assert result.returncode == 0
    assert result.stderr == ""
    assert result.stdout.startswith(script.__doc__.strip())
    lines = result.stdout.splitlines()
    for field in dataclasses.fields(cls):
        if field.name == "paths":
            continue
        (line,) = [line for line in lines if line.strip().startswith(f"--{field.name}=")]
        assert f"={field.default!r} " in line
        assert field.metadata["reason"] in line
        accepted = accepted_values(field)
        assert line.endswith(f"({accepted})" if accepted else field.metadata["reason"])


@pytest.mark.parametrize(
    "cls, keys",
    [
        (TrainConfig, ("out_dir", "init_from", "dataset")),
        (SampleConfig, ("out_dir", "init_from")),
        (ExportConfig, ("out_dir", "init_from", "export_dir")),
        (PrepareConfig, ("out_dir",)),
    ],
)
def test_a_tilde_is_expanded_in_every_path_of_a_script(cls, keys):
    given = configure(cls, [f"--{key}=~/x" for key in keys], "")
    for key in keys:
        assert getattr(given, key) == os.path.expanduser("~/x")


def test_a_script_reports_all_problems_and_writes_nothing(tmp_path):
    """As a process, whose exit status and output are those that the user gets."""
    (tmp_path / "bad.py").write_text("max_itres = 3\n")
    result = run("train.py", "bad.py", "--compile=maybe", "--n_embd=512", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert [line.split()[0] for line in lines] == ["bad.py:", "--compile=maybe:", "n_embd=512"]
    assert os.listdir(tmp_path) == ["bad.py"]


@pytest.mark.parametrize(
    "script, arguments, words",
    [
        (train_script, ["--batch_size", "4", "--n_layer=2"], "--batch_size: write --batch_size=4"),
        (
            prepare_script,
            ["--num_workers", "4", "a.parquet"],
            "--num_workers: write --num_workers=4",
        ),
        (prepare_script, ["--out_dir="], "out_dir takes a path, not ''"),
    ],
)
def test_a_mistyped_flag_is_refused_with_one_sentence(
    script, arguments, words, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert_one_sentence(run_here(script, *arguments), words)
    assert os.listdir(tmp_path) == []


def test_a_config_file_cannot_make_a_script_exit_silently(tmp_path):
    file = tmp_path / "quits.py"
    file.write_text("raise SystemExit(0)\n")
    result = run_here(sample_script, file)
    assert_one_sentence(result, "quits.py: this config file raises SystemExit")


@pytest.mark.parametrize("dataset", ["data/t/", "~/data/t"])
def test_the_plan_finds_a_dataset_in_data_and_in_the_home_folder(dataset, tmp_path, monkeypatch):
    folder = tmp_path / "data/t"
    folder.mkdir(parents=True)
    make_bins(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # on Windows
    flags = [f"--{key}={value}" for key, value in TINY.items()]
    result = run_here(train_script, *flags, "--plan", f"--dataset={dataset}")
    assert "epochs of 20,000" in result.stdout, result.stderr


def test_importing_the_scripts_has_no_effects(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, PROGRAMS / "import_scripts.py"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert os.listdir(tmp_path) == []
