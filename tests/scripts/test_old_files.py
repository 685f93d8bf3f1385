"""Files that older programs wrote still load.

tests/fixtures/old_files.tar.xz has a checkpoint, bins and an export of this project at a435e3a, and
a checkpoint of nanoGPT at 3adf61e. The numbers here are what those programs printed when they wrote
the files.
"""

import re
import tarfile

import pytest

import prepare_single_parquet as prepare_script
import sample as sample_script
from helpers import ROOT, load, run_here, train_here

SETTINGS = {
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 8,
    "block_size": 16,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "bias": True,
    "max_iters": 40,
    "lr_decay_iters": 40,
    "warmup_iters": 2,
    "learning_rate": 1e-2,
    "min_lr": 1e-3,
    "eval_interval": 10,
    "init_from": "resume",
}


@pytest.fixture
def old(tmp_path):
    with tarfile.open(ROOT / "tests" / "fixtures" / "old_files.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def resume(old, name, **changes):
    """Resume a run at iteration 20, and finish it. Return the validation losses by iteration."""
    result = train_here(old / "tokens", old / name, **{**SETTINGS, **changes})
    assert result.returncode == 0, result.stderr
    iterations = re.findall(r"^iter (\d+):", result.stdout, re.M)
    assert iterations == [str(number) for number in range(20, 40)]
    assert load(old / name)["iter_num"] == 40
    printed = re.findall(r"^step (\d+): .* val loss ([\d.]+)$", result.stdout, re.M)
    return {int(iter_num): float(loss) for iter_num, loss in printed}


def test_a_checkpoint_is_resumed_as_the_old_program_would_have_continued(old):
    """The same dropout, and the same data in the same order."""
    val_losses = resume(old, "run", dropout=0.1)
    tolerance = 2e-3  # CPUs differ
    assert val_losses == {
        30: pytest.approx(3.2092, abs=tolerance),
        40: pytest.approx(3.1331, abs=tolerance),
    }


def test_a_checkpoint_of_nanogpt_is_resumed(old):
    val_losses = resume(old, "nanogpt")
    # nanoGPT estimates its loss from random batches.
    assert val_losses[20] == pytest.approx(3.469, abs=0.1)
    assert val_losses[40] < val_losses[30] < val_losses[20]


def test_bins_are_complete(old):
    bins = old / "prepared"
    verified = run_here(prepare_script, "--verify", f"--out_dir={bins}")
    assert verified.stdout.count("good") == 2, verified.stderr
    flags = [f"--out_dir={bins}", "--val_fraction=0.1"]
    again = run_here(prepare_script, bins / "old.parquet", *flags)
    assert "is complete already" in again.stdout, again.stderr


def test_an_export_is_sampled_with_the_same_text(old):
    flags = [
        "--start=Once upon a time",
        "--temperature=0",
        "--num_samples=1",
        "--max_new_tokens=24",
        "--device=cpu",
    ]
    result = run_here(sample_script, f"--init_from={old / 'exported'}", *flags)
    text = "Once upon a timeOnce andOnce andOnce and and and" + 8 * "Once and"
    assert result.stdout == f"{text}\n---------------\n", result.stderr
