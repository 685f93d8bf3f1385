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

SCRIPT_FILES = ["train.py", "sample.py", "export.py", "prepare_single_parquet.py", "make_demo.py"]


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


@pytest.mark.parametrize("script, cls", SCRIPTS)
def test_help_without_docstrings_lists_the_settings(script, cls, monkeypatch):
    """With python -OO, __doc__ is None."""
    monkeypatch.setattr(script, "__doc__", None)
    result = run_here(script, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("settings (")


@pytest.mark.parametrize("script", SCRIPT_FILES)
def test_packages_that_are_too_old_are_named_once_before_they_are_imported(script, tmp_path):
    for package in ("numpy-1.26.4", "torch-2.4.1"):
        name, version = package.split("-")
        folder = tmp_path / f"{package}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    result = run(script, "--help", env={"PYTHONPATH": str(tmp_path)})
    assert_one_sentence(result, "numpy 1.26.4 is too old: 2.0 or newer is needed; torch 2.4.1 is")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="new in Python 3.11")
@pytest.mark.parametrize("script", SCRIPT_FILES)
def test_a_script_that_cannot_import_the_package_says_why(script):
    result = run(script, "--help", env={"PYTHONSAFEPATH": "1"})
    assert_one_sentence(result, "No module named 'onenight': keep this script next to onenight/")


@pytest.mark.parametrize(
    "script, name, remedy",
    [
        (train_script, "ckpt.pt", "write --out_dir={folder}, or --init_from={folder}/ckpt.pt to"),
        (sample_script, "best.pt", "write --out_dir={folder}, or --init_from={folder}/best.pt to"),
        (export_script, "ckpt.pt", "write --out_dir={folder}, or --init_from={folder}/ckpt.pt to"),
        (prepare_script, "train.bin", "write --out_dir={folder}"),
        (sample_script, "samples.txt", "write --out_dir={folder}"),
    ],
)
def test_a_file_as_out_dir_is_refused_with_the_folder_to_write(script, name, remedy, tmp_path):
    (tmp_path / name).touch()
    result = run_here(script, f"--out_dir={tmp_path / name}")
    assert_one_sentence(result, "out_dir takes a folder, not a file; ")
    assert remedy.format(folder=tmp_path) in result.stderr
    assert os.listdir(tmp_path) == [name]


def test_a_file_as_dataset_is_refused_with_the_folder_to_write(bins):
    result = run_here(train_script, f"--dataset={bins / 'train.bin'}")
    assert_one_sentence(result, f"not a file; write --dataset={bins}\n")


@pytest.mark.parametrize("script", [train_script, sample_script, export_script])
def test_the_folder_of_a_run_as_init_from_is_refused_with_the_file_to_write(
    script, tmp_path, monkeypatch
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/ckpt.pt").touch()
    monkeypatch.chdir(tmp_path)
    flags = ["--init_from=run"]
    if script is export_script:
        flags.append("--export_dir=new")
    result = run_here(script, *flags)
    assert_one_sentence(result, "the folder of a run; write --init_from=run/ckpt.pt")


@pytest.mark.parametrize("script", [train_script, sample_script])
def test_a_setting_of_nanogpt_that_is_none_here_is_explained(script):
    result = run_here(script, "--vocab_size=50304")
    assert_one_sentence(result, "no key 'vocab_size'; it follows from the data or the checkpoint")


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
