"""
What was written before still loads: a checkpoint and an export of this project at a435e3a, bins of the same, and a
checkpoint of nanoGPT at 3adf61e. tests/fixtures/old_files.tar.xz holds them; the figures here are what the old programs
printed when they wrote them.
"""

import re
import tarfile

import pytest
from conftest import ROOT, load, run

SETTINGS = {
    "n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "batch_size": 4, "gradient_accumulation_steps": 2,
    "bias": True, "max_iters": 40, "lr_decay_iters": 40, "warmup_iters": 2, "learning_rate": 1e-2, "min_lr": 1e-3,
    "eval_interval": 10, "eval_iters": 1, "device": "cpu", "compile": False, "init_from": "resume",
}  # fmt: skip


@pytest.fixture
def old(tmp_path):
    with tarfile.open(ROOT / "tests" / "fixtures" / "old_files.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def resume(old, name, **changes):
    settings = {**SETTINGS, "dataset": old / "tokens", "out_dir": old / name, **changes}
    result = run("train.py", *(f"--{key}={value}" for key, value in settings.items()))
    assert result.returncode == 0, result.stderr
    assert re.findall(r"^iter (\d+):", result.stdout, re.M) == [str(i) for i in range(20, 40)]
    assert load(old / name)["iter_num"] == 40
    return {int(i): float(loss) for i, loss in re.findall(r"^step (\d+): .* val loss ([\d.]+)$", result.stdout, re.M)}


def test_a_checkpoint_is_resumed(old):
    """The undisturbed old run printed these losses; its dropout and its order of the data are still the same."""
    losses = resume(old, "run", dropout=0.1)
    assert losses == {30: pytest.approx(3.2092, abs=2e-3), 40: pytest.approx(3.1331, abs=2e-3)}  # on any CPU


def test_a_checkpoint_of_nanogpt_is_resumed(old):
    losses = resume(old, "nanogpt")
    assert losses[20] == pytest.approx(3.469, abs=0.1)  # nanoGPT's estimate, from random batches
    assert losses[40] < losses[30] < losses[20]


def test_bins_are_complete(old):
    bins = old / "prepared"
    assert run("prepare_single_parquet.py", "--verify", f"--out_dir={bins}").stdout.count("good") == 2
    again = run("prepare_single_parquet.py", bins / "old.parquet", f"--out_dir={bins}", "--val_fraction=0.1")
    assert "is complete already" in again.stdout, again.stderr


def test_an_export_is_sampled(old):
    flags = ["--start=Once upon a time", "--temperature=0", "--num_samples=1", "--max_new_tokens=24", "--device=cpu"]
    result = run("sample.py", f"--init_from={old / 'exported'}", *flags)
    text = "Once upon a timeOnce andOnce andOnce and and and" + 7 * "Once and" + "Once and\n---------------\n"
    assert result.stdout == text, result.stderr
