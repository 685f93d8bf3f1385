"""export.py: the folder, its model card, and what it refuses."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import export as export_script
import sample as sample_script
from helpers import ROOT, assert_one_sentence, make_bins, metrics, run, run_here, train_here
from model import ARCHITECTURES
from random_models import SHAPE, save_random_checkpoint

FILES = [
    "README.md",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
]


def export(out_dir, export_dir, *flags):
    """Run export.py in this process."""
    return run_here(export_script, f"--out_dir={out_dir}", f"--export_dir={export_dir}", *flags)


def card_of(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An exported folder, which tests do not change. `run` beside it has the checkpoint."""
    home = tmp_path_factory.mktemp("export")
    (home / "run").mkdir()
    save_random_checkpoint(home / "run")
    result = run("export.py", f"--out_dir={home / 'run'}", f"--export_dir={home / 'it'}")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # transformers prints nothing
    assert result.stdout == f"{home / 'it'}: {', '.join(FILES)}\n"
    return home / "it"


# -----------------------------------------------------------------------------
# The folder


def test_the_folder_has_the_files_that_are_printed(folder):
    assert sorted(file.name for file in folder.iterdir()) == FILES


def test_the_number_format_of_the_weights_is_chosen_by_dtype(tmp_path):
    checkpoint = save_random_checkpoint(tmp_path, False, "qwen3")
    result = export(tmp_path, tmp_path / "it", "--dtype=bfloat16")
    assert result.returncode == 0, result.stderr
    weights = load_file(tmp_path / "it" / "model.safetensors")
    expected = checkpoint["model"]["transformer.ln_f.weight"].bfloat16()
    assert torch.equal(weights["model.norm.weight"], expected)
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_a_checkpoint_file_as_nanogpt_writes_it_is_exported(tmp_path):
    facts = {"best_val_loss": torch.tensor(3.25), "config": {"dataset": "owt"}, "iter_num": 7}
    save_random_checkpoint(tmp_path, bias=False, **facts)
    (tmp_path / "ckpt.pt").rename(tmp_path / "best.pt")
    flags = [f"--init_from={tmp_path / 'best.pt'}", f"--export_dir={tmp_path / 'it'}"]
    result = run_here(export_script, *flags)
    assert result.returncode == 0, result.stderr
    weights = load_file(tmp_path / "it" / "model.safetensors")
    assert not weights["transformer.ln_f.bias"].any()  # our model has none, with bias=False
    assert "| best val loss | 3.2500 " in card_of(tmp_path / "it")


def test_without_out_dir_the_newest_run_is_exported(tmp_path, monkeypatch):
    (tmp_path / "out-b").mkdir()
    save_random_checkpoint(tmp_path / "out-b")
    monkeypatch.chdir(tmp_path)
    result = export("", "it")
    assert result.returncode == 0, result.stderr
    assert "out-b" in result.stdout
    assert (tmp_path / "it" / "config.json").exists()


def test_an_exported_model_can_be_trained_further_and_exported_again(tmp_path):
    save_random_checkpoint(tmp_path, False, "qwen3")
    assert export(tmp_path, tmp_path / "it").returncode == 0
    # Few tokens: an evaluation computes 50,304 logits for each.
    make_bins(tmp_path, train_tokens=1000, val_tokens=200)
    steps = {"max_iters": 2, "eval_interval": 1, "learning_rate": 1e-3, "decay_lr": False}
    settings = {**SHAPE, **steps, "architecture": "qwen3", "init_from": tmp_path / "it"}
    del settings["vocab_size"]
    result = train_here(tmp_path, tmp_path / "out", **settings)
    assert result.returncode == 0, result.stderr
    val_losses = [line["val_loss"] for line in metrics(tmp_path / "out") if "val_loss" in line]
    assert val_losses[-1] < val_losses[0]

    # The card of the new run has what its checkpoint says.
    assert export(tmp_path / "out", tmp_path / "tuned").returncode == 0
    card = card_of(tmp_path / "tuned")
    tokens = 2 * 2 * 8 * 48
    assert f"| training | 2 iterations, {tokens:,} tokens |" in card
    assert f"| best val loss | {min(val_losses):.4f} " in card


# -----------------------------------------------------------------------------
# The model card


@pytest.fixture
def trained(tmp_path):
    """The exported folder of a run, inside of the run's folder, which has other numbers too."""
    config = {
        "dataset": "/data/my_web",
        "learning_rate": 5e-4,
        "optimizer": "muon",
        "embedding_lr": 0.01,
        "head_lr": 0.0,
        "warmup_iters": 10,
    }
    facts = {"iter_num": 1000, "tokens": 384_000, "best_val_loss": 3.25, "config": config}
    save_random_checkpoint(tmp_path, **facts)
    record = {"iter": 1500, "tokens": 576_000, "val_loss": 3.0}  # after the checkpoint
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert export(tmp_path, tmp_path / "my-gpt").returncode == 0
    return tmp_path / "my-gpt"


def test_the_card_summarizes_the_training_as_the_checkpoint_has_it(trained):
    card = card_of(trained)
    facts = [
        "# my-gpt",
        "a GPT2LMHeadModel with GPT-2's tokenizer",
        "| shape | 2 layers, 2 heads, 32 wide, context 48 tokens |",
        "| data | my_web |",
        "| training | 1,000 iterations, 384,000 tokens |",
        "| settings | optimizer muon, learning_rate 0.0005, embedding_lr 0.01, warmup_iters 10 |",
        "| best val loss | 3.2500 nats per token |",
    ]
    assert [fact for fact in facts if fact not in card] == []
    assert "576,000" not in card
    assert str(trained.parent) not in card


def test_a_folder_inside_of_a_run_does_not_get_the_runs_facts(trained):
    """It may have been changed since it was exported."""
    flags = [f"--init_from={trained}", f"--export_dir={trained.parent / 'again'}"]
    assert run_here(export_script, *flags).returncode == 0
    card = card_of(trained.parent / "again")
    assert "context 48 tokens" in card
    for fact in ("3.25", "1,000", "384,000", "my_web", "muon"):
        assert fact not in card


@pytest.mark.parametrize("block_size", [32, 1024])
def test_the_code_in_the_card_runs(block_size, tmp_path, monkeypatch, capsys):
    """It writes as much as the context allows, and 100 tokens at most."""
    monkeypatch.setitem(SHAPE, "block_size", block_size)
    save_random_checkpoint(tmp_path)
    assert export(tmp_path, tmp_path / "my-gpt").returncode == 0
    code = re.search(r"```python\n(.*?)```", card_of(tmp_path / "my-gpt"), re.S)[1]
    assert f"max_new_tokens={min(100, block_size - 4)}" in code
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr().out.startswith("Once upon a time")


# -----------------------------------------------------------------------------
# What is refused


def test_a_missing_export_dir_is_refused():
    assert_one_sentence(run_here(export_script), "--export_dir")


def test_an_existing_folder_is_never_overwritten(folder):
    before = (folder / "README.md").stat().st_mtime_ns
    assert_one_sentence(export(folder.parent / "run", folder), str(folder))
    assert (folder / "README.md").stat().st_mtime_ns == before
    assert sorted(file.name for file in folder.iterdir()) == FILES


def test_a_nan_in_the_weights_is_refused_with_its_tensor(tmp_path):
    checkpoint = save_random_checkpoint(tmp_path)
    checkpoint["model"]["transformer.h.1.mlp.c_fc.weight"][3, 5] = float("nan")
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    assert_one_sentence(export(tmp_path, tmp_path / "it"), "transformer.h.1.mlp.c_fc.weight")
    assert not (tmp_path / "it").exists()


def test_an_architecture_that_transformers_lacks_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "gpt7", ARCHITECTURES["gpt2"])
    save_random_checkpoint(tmp_path, architecture="gpt7")
    assert_one_sentence(export(tmp_path, tmp_path / "it"), "gpt7")
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.pt"]


def test_added_tokens_are_refused_instead_of_left_out(folder, tmp_path):
    chat = shutil.copytree(folder, tmp_path / "chat")
    (chat / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 50257}))
    flags = [f"--init_from={chat}", f"--export_dir={tmp_path / 'it'}"]
    assert_one_sentence(run_here(export_script, *flags), "<|im_start|>")
    assert not (tmp_path / "it").exists()


def test_a_folder_that_cannot_be_created_is_refused(tmp_path):
    save_random_checkpoint(tmp_path)
    result = export(tmp_path, tmp_path / "ckpt.pt" / "it")
    assert_one_sentence(result, "ckpt.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.pt"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no ulimit")
def test_an_export_that_cannot_be_written_leaves_nothing(tmp_path):
    """No file may be larger than 1 MB, and the weights are."""
    save_random_checkpoint(tmp_path)
    flags = f"--out_dir={tmp_path} --export_dir={tmp_path / 'it'}"
    command = f"ulimit -f 1000; {sys.executable} {ROOT / 'export.py'} {flags}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert_one_sentence(result, str(tmp_path / "it"))
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.pt"]


def test_folders_need_transformers_and_checkpoints_do_not(folder, tmp_path, monkeypatch):
    run_dir = folder.parent / "run"
    (tmp_path / "transformers.py").write_text("raise ImportError")  # found before the real one
    flags = [f"--out_dir={run_dir}", "--num_samples=1", "--max_new_tokens=2", "--device=cpu"]
    result = run("sample.py", *flags, env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert_one_sentence(run_here(sample_script, f"--init_from={folder}"), "transformers")
    assert_one_sentence(export(run_dir, tmp_path / "it"), "transformers")
