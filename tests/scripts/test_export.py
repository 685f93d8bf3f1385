"""export.py: the folder, its model card, and what it refuses."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import export as export_script
import sample as sample_script
from helpers import ROOT, assert_one_sentence, load, make_bins, metrics, run, run_here, train_here
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


# ---- the folder


def test_the_folder_has_the_files_that_are_printed(folder):
    assert sorted(file.name for file in folder.iterdir()) == FILES


def test_the_number_format_of_the_weights_is_chosen_by_dtype(tmp_path):
    save_random_checkpoint(tmp_path, False, "qwen3")
    result = export(tmp_path, tmp_path / "it", "--dtype=bfloat16")
    assert result.returncode == 0, result.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "it")
    assert model.dtype == torch.bfloat16


def test_a_checkpoint_file_is_exported(tmp_path):
    save_random_checkpoint(tmp_path, bias=False)
    (tmp_path / "ckpt.pt").rename(tmp_path / "best.pt")
    flags = [f"--init_from={tmp_path / 'best.pt'}", f"--export_dir={tmp_path / 'it'}"]
    result = run_here(export_script, *flags)
    assert result.returncode == 0, result.stderr
    weights = load_file(tmp_path / "it" / "model.safetensors")
    assert not weights["transformer.ln_f.bias"].any()  # our model has none, with bias=False


def test_without_out_dir_the_newest_run_is_exported(tmp_path, monkeypatch):
    (tmp_path / "out-b").mkdir()
    save_random_checkpoint(tmp_path / "out-b")
    monkeypatch.chdir(tmp_path)
    result = export("", "it")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == "out_dir=out-b, the newest run here"
    assert (tmp_path / "it" / "config.json").exists()


def test_an_exported_model_can_be_trained_further_and_sampled(tmp_path):
    save_random_checkpoint(tmp_path, False, "qwen3")
    assert export(tmp_path, tmp_path / "it").returncode == 0
    # Few tokens: an evaluation computes 50,304 logits for each.
    make_bins(tmp_path, train_tokens=1000, val_tokens=200)
    settings = {
        **SHAPE,
        "architecture": "qwen3",
        "init_from": tmp_path / "it",
        "max_iters": 2,
        "eval_interval": 1,
        "learning_rate": 1e-3,
        "decay_lr": False,
    }
    del settings["vocab_size"]
    result = train_here(tmp_path, tmp_path / "out", **settings)
    assert result.returncode == 0, result.stderr
    val_losses = [
        record["val_loss"] for record in metrics(tmp_path / "out") if "val_loss" in record
    ]
    assert val_losses[-1] < val_losses[0]
    flags = ["--num_samples=1", "--max_new_tokens=5", "--device=cpu"]
    sampled = run_here(sample_script, f"--init_from={tmp_path / 'it'}", *flags)
    assert sampled.stdout.count("---------------") == 1, sampled.stderr


# ---- the model card


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The exported folder of a run with metrics."""
    home = tmp_path_factory.mktemp("trained")
    config = {
        "dataset": "/data/my_web",
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-4,
        "optimizer": "muon",
        "embedding_lr": 0.01,
        "head_lr": 0.0,
        "warmup_iters": 10,
    }
    save_random_checkpoint(home, config=config, iter_num=1000, best_val_loss=3.25)
    records = [
        {"iter": 500, "val_loss": 3.25, "elapsed_s": 50},
        {"iter": 1000, "val_loss": 3.5, "elapsed_s": 3725.0},
        {"iter": 1500, "val_loss": 3.0, "elapsed_s": 9000.0},  # after the checkpoint
    ]
    lines = [json.dumps(record) + "\n" for record in records]
    (home / "metrics.jsonl").write_text("".join(lines))
    assert export(home, home / "my-gpt").returncode == 0
    return home / "my-gpt"


def test_the_model_card_summarizes_the_training(trained):
    card = (trained / "README.md").read_text()
    facts = [
        "# my-gpt",
        "a GPT2LMHeadModel with GPT-2's tokenizer",
        "| shape | 2 layers, 2 heads, 32 wide, context 48 tokens |",
        "| data | my_web |",
        "| iterations | 1,000 of 384 tokens, 384,000 in total |",
        "| settings | optimizer muon, learning_rate 0.0005, embedding_lr 0.01, warmup_iters 10 |",
        "| val loss | 3.5000 nats per token at iteration 1,000 |",
        "| time | 1h 02m |",
        "| best val loss | 3.2500 |",
    ]
    assert [fact for fact in facts if fact not in card] == []
    assert str(trained.parent) not in card


def test_the_model_card_has_the_tokens_of_a_run_that_changed_its_batch_size(bins, tmp_path):
    flags = {"max_iters": 20, "gradient_accumulation_steps": 4}
    assert train_here(bins, tmp_path, max_iters=10).returncode == 0
    assert train_here(bins, tmp_path, init_from="resume", **flags).returncode == 0
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8))
    tokens = 10 * 512 + 10 * 1024
    for name in ("ckpt.pt", "best.pt"):
        checkpoint = load(tmp_path, name)
        card = export_script.model_card("my-gpt", theirs, checkpoint, [])
        assert f"| iterations | 20, the last of 1,024 tokens, {tokens:,} in total |" in card


def test_the_code_in_the_model_card_runs(trained, monkeypatch, capsys):
    card = (trained / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    monkeypatch.chdir(trained.parent)
    exec(code.replace("max_new_tokens=100", "max_new_tokens=3"), {})
    assert capsys.readouterr().out.startswith("Once upon a time")


# ---- what is refused


def test_a_missing_export_dir_is_refused():
    assert_one_sentence(run("export.py"), "--export_dir=FOLDER")


def test_an_existing_folder_is_never_overwritten(folder):
    before = (folder / "README.md").stat().st_mtime_ns
    assert_one_sentence(export(folder.parent / "run", folder), "already exists")
    assert (folder / "README.md").stat().st_mtime_ns == before


def test_a_missing_checkpoint_is_refused(tmp_path):
    assert_one_sentence(export(tmp_path, tmp_path / "it"), "no such checkpoint")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_created_is_refused(tmp_path):
    save_random_checkpoint(tmp_path)
    result = export(tmp_path, tmp_path / "ckpt.pt" / "it")
    assert_one_sentence(result, "cannot be written")
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.pt"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no ulimit")
def test_an_export_that_cannot_be_written_leaves_nothing(tmp_path):
    """No file may be larger than 1 MB, and the weights are."""
    save_random_checkpoint(tmp_path)
    flags = f"--out_dir={tmp_path} --export_dir={tmp_path / 'it'}"
    command = f"ulimit -f 1000; {sys.executable} {ROOT / 'export.py'} {flags}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert_one_sentence(result, "cannot be written")
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.pt"]


def test_folders_need_transformers_and_checkpoints_do_not(folder, tmp_path):
    (tmp_path / "transformers.py").write_text("raise ImportError")  # found before the real one
    without_transformers = {"PYTHONPATH": str(tmp_path)}
    remedy = 'pip install "transformers>=5"'
    run_dir = folder.parent / "run"
    flags = [f"--out_dir={run_dir}", f"--export_dir={tmp_path / 'it'}"]
    assert_one_sentence(run("export.py", *flags, env=without_transformers), remedy)
    flags = [f"--init_from={folder}"]
    assert_one_sentence(run("sample.py", *flags, env=without_transformers), remedy)
    flags = [f"--out_dir={run_dir}", "--num_samples=1", "--max_new_tokens=2", "--device=cpu"]
    result = run("sample.py", *flags, env=without_transformers)
    assert result.returncode == 0, result.stderr
