"""export.py: the folder, its model card, and what it refuses."""

import json
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import export as export_script
from helpers import assert_one_sentence, make_random_bins, metrics, run, run_here, train_here
from random_models import save_random_checkpoint

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
# The folder and its card


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
    assert "| best val loss | 3.2500 " in card_of(tmp_path / "it")


def test_the_card_of_a_run_has_its_facts(tmp_path):
    data = tmp_path / "my_web"
    data.mkdir()
    # Few tokens: an evaluation computes 50,304 logits for each.
    make_random_bins(data, vocab_size=50257, n_tokens=300)
    settings = {"n_layer": 1, "max_iters": 2, "eval_interval": 1}
    result = train_here(data, tmp_path, **settings, decay_lr=False)
    assert result.returncode == 0, result.stderr
    assert export(tmp_path, tmp_path / "my-gpt").returncode == 0
    card = card_of(tmp_path / "my-gpt")
    evaluations = [line for line in metrics(tmp_path) if "val_loss" in line]
    best = min(evaluations, key=lambda line: line["val_loss"])
    for fact in [
        "# my-gpt",
        "a GPT2LMHeadModel with GPT-2's tokenizer",
        "| shape | 1 layers, 2 heads, 32 wide, context 32 tokens |",
        "| data | my_web |",
        f"| training | 2 iterations, {2 * 2 * 8 * 32:,} tokens |",
        "| optimizer | adamw, learning rate 0.01 |",
        f"| best val loss | {best['val_loss']:.4f} nats per token, at iteration {best['iter']} |",
    ]:
        assert fact in card
    assert str(tmp_path) not in card

    # A folder inside of the run's does not get its facts: it may have been changed since.
    inside = tmp_path / "my-gpt"
    again = tmp_path / "again"
    flags = [f"--init_from={inside}", f"--export_dir={again}"]
    assert run_here(export_script, *flags).returncode == 0
    assert "context 32 tokens" in card_of(again)
    assert "my_web" not in card_of(again)
    assert f"{best['val_loss']:.4f}" not in card_of(again)


def test_the_code_in_the_card_runs(folder, monkeypatch, capsys):
    """It writes as much as the context of 48 allows."""
    code = re.search(r"```python\n(.*?)```", card_of(folder), re.S)[1]
    assert "max_new_tokens=44" in code
    monkeypatch.chdir(folder.parent)
    exec(code, {})
    assert capsys.readouterr().out.startswith("Once upon a time")


# -----------------------------------------------------------------------------
# What is refused


def test_an_existing_folder_is_never_overwritten(folder):
    before = (folder / "README.md").stat().st_mtime_ns
    assert_one_sentence(export(folder.parent / "run", folder), str(folder))
    assert (folder / "README.md").stat().st_mtime_ns == before
    assert sorted(file.name for file in folder.iterdir()) == FILES


@pytest.mark.parametrize("fault", ["<|im_start|>", "transformer.ln_f.bias"])
def test_added_tokens_and_missing_weights_are_refused(fault, folder, tmp_path):
    changed = shutil.copytree(folder, tmp_path / "changed")
    if fault == "<|im_start|>":
        (changed / "added_tokens.json").write_text(json.dumps({fault: 50257}))
    else:
        weights = load_file(changed / "model.safetensors")
        del weights[fault]
        save_file(weights, changed / "model.safetensors")
    flags = [f"--init_from={changed}", f"--export_dir={tmp_path / 'it'}"]
    assert_one_sentence(run_here(export_script, *flags), fault)
    assert not (tmp_path / "it").exists()


def test_an_export_that_cannot_be_written_leaves_nothing(tmp_path):
    """No file may be larger than 1 MB, and the weights are."""
    resource = pytest.importorskip("resource")  # of POSIX
    save_random_checkpoint(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        result = export(tmp_path, tmp_path / "it")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_one_sentence(result, str(tmp_path / "it"))
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.pt"]


def test_folders_need_transformers_and_checkpoints_do_not(folder, tmp_path, monkeypatch):
    run_dir = folder.parent / "run"
    (tmp_path / "transformers.py").write_text("raise ImportError")  # found before the real one
    flags = [f"--out_dir={run_dir}", "--num_samples=1", "--max_new_tokens=2", "--device=cpu"]
    result = run("sample.py", *flags, env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert_one_sentence(export(run_dir, tmp_path / "it"), "transformers")
