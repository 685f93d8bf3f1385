"""Training that begins with weights: GPT-2 from a Hugging Face folder, or a checkpoint, on other data."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_sentence, load, metrics, run, train, train_here
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

GPT2_SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "bias": True}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A small random GPT-2 as transformers saves it, with 48 positions and 300 ids."""
    folder = tmp_path_factory.mktemp("gpt2")
    set_seed(0)
    config = GPT2Config(vocab_size=300, n_positions=48, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3)
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder)
    return folder, model


def loss_of(model, ids):
    """transformers' mean loss over all of `ids`, in windows of 32."""
    with torch.no_grad():
        windows = [torch.from_numpy(ids[start : start + 33]) for start in range(0, len(ids) - 1, 32)]
        total = sum(
            torch.nn.functional.cross_entropy(model(window[None, :-1]).logits[0], window[1:], reduction="sum").item()
            for window in windows
        )
    return total / (len(ids) - 1)


def test_gpt2_is_evaluated_and_trained_further(gpt2, bins, tmp_path):
    folder, model = gpt2
    settings = {**GPT2_SHAPE, "init_from": folder, "learning_rate": 1e-3, "decay_lr": False}
    result = train_here(bins, tmp_path, **settings)
    assert result.returncode == 0, result.stderr
    evals = [record["val_loss"] for record in metrics(tmp_path) if "val_loss" in record]
    ids = np.fromfile(bins / "val.bin", "<u2").astype(np.int64)
    # GELU itself for its tanh approximation moves an activation by 0.0005 at most
    assert evals[0] == pytest.approx(loss_of(model, ids), abs=2e-3)
    assert evals[-1] < evals[0] - 1
    checkpoint = load(tmp_path)
    assert checkpoint["model_args"]["vocab_size"] == 300
    assert checkpoint["model_args"]["block_size"] == 32  # of the 48 positions
    resumed = train_here(bins, tmp_path, **{**settings, "init_from": "resume"}, max_iters=50)
    assert resumed.returncode == 0, resumed.stderr
    assert re.findall(r"^iter (\d+):", resumed.stdout, re.M) == [str(i) for i in range(45, 50)]


def test_a_checkpoint_is_trained_further_from_its_first_iteration(bins, tmp_path):
    assert train_here(bins, tmp_path / "first", max_iters=20, lr_decay_iters=20).returncode == 0
    result = train_here(bins, tmp_path / "second", init_from=tmp_path / "first" / "ckpt.pt", max_iters=20)
    assert result.returncode == 0, result.stderr
    first, second = ([r for r in metrics(tmp_path / name) if "val_loss" in r] for name in ("first", "second"))
    assert second[0]["iter"] == 0 and second[0]["val_loss"] == pytest.approx(first[-1]["val_loss"], abs=1e-6)
    assert second[-1]["val_loss"] < first[-1]["val_loss"]


def test_another_shape_is_refused_in_a_sentence(gpt2, bins, tmp_path):
    refused = train_here(bins, tmp_path, init_from=gpt2[0], n_layer=3)
    assert_one_sentence(refused, "the checkpoint has n_layer=2, bias=True; start with the same")
    refused = train_here(bins, tmp_path, **GPT2_SHAPE, init_from=gpt2[0], block_size=64)
    assert_one_sentence(refused, "block_size=48")
    assert not list(tmp_path.iterdir())


def test_an_earlier_run_is_not_overwritten(gpt2, bins, tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(b"a night's work")
    refused = train(bins, tmp_path, **GPT2_SHAPE, init_from=gpt2[0])
    assert_one_sentence(refused, "--init_from=resume")
    assert (tmp_path / "ckpt.pt").read_bytes() == b"a night's work"


def test_the_config_for_finetuning(gpt2, bins, tmp_path):
    """config/finetune_gpt2.py on a small model and a few iterations."""
    flags = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--max_iters=3", "--compile=false"]
    flags += [f"--init_from={gpt2[0]}", f"--dataset={bins}", f"--out_dir={tmp_path / 'out'}", "--eval_iters=1"]
    result = run("train.py", ROOT / "config/finetune_gpt2.py", *flags)
    assert result.returncode == 0, result.stderr
    assert {r["lr"] for r in metrics(tmp_path / "out")} == {3e-5}
    assert (tmp_path / "out" / "ckpt.pt").exists()


def test_the_loss_of_other_weights_needs_no_shape(gpt2, bins, tmp_path):
    """--eval_only takes the shape from the weights, for GPT-2 and for a checkpoint of another architecture alike."""
    folder, model = gpt2
    result = train_here(bins, tmp_path / "none", init_from=folder, eval_only=True, n_layer=7, bias=False)
    assert result.returncode == 0, result.stderr
    ids = np.fromfile(bins / "val.bin", "<u2").astype(np.int64)
    printed = float(re.search(r"val loss ([\d.]+)$", result.stdout, re.M)[1])
    assert printed == pytest.approx(loss_of(model, ids), abs=2e-3)
    qwen3 = {"architecture": "qwen3", "n_head": 4, "max_iters": 5}
    trained = train_here(bins, tmp_path / "qwen3", **qwen3)
    assert trained.returncode == 0, trained.stderr
    result = train_here(bins, tmp_path / "none", init_from=tmp_path / "qwen3" / "ckpt.pt", eval_only=True)
    assert result.stdout.splitlines()[-1].split(": ")[1:] == re.findall("^step 5: (.*)", trained.stdout, re.M)
    assert not (tmp_path / "none").exists()


# ---- weights that do not fit


def test_weights_of_another_shape_are_named(gpt2, bins, tmp_path):
    """By train.py as by sample.py, for a checkpoint as for a folder."""
    assert train_here(bins, tmp_path / "run", max_iters=1).returncode == 0
    checkpoint = load(tmp_path / "run")
    weights = checkpoint["model"]
    del weights["transformer.h.1.ln_1.weight"]
    weights["transformer.h.2.ln_1.weight"], weights["transformer.ln_f.weight"] = torch.zeros(32), torch.zeros(31)
    torch.save(checkpoint, tmp_path / "bad.pt")
    faults = (
        "no transformer.h.1.ln_1.weight, an unknown transformer.h.2.ln_1.weight, transformer.ln_f.weight of shape (31,)"
    )
    for result in (
        train_here(bins, tmp_path / "new", init_from=tmp_path / "bad.pt"),
        run("sample.py", f"--init_from={tmp_path / 'bad.pt'}", "--device=cpu"),
    ):
        assert_one_sentence(result, f"bad.pt: its weights do not match its shape ({faults})")
    shutil.copytree(gpt2[0], tmp_path / "folder")
    config = json.loads((gpt2[0] / "config.json").read_text())
    (tmp_path / "folder" / "config.json").write_text(json.dumps({**config, "n_layer": 3}))
    result = train_here(bins, tmp_path / "new", init_from=tmp_path / "folder", **{**GPT2_SHAPE, "n_layer": 3})
    assert_one_sentence(result, "no transformer.h.2.attn.c_attn.bias")
    assert not (tmp_path / "new").exists()


def test_names_and_masks_of_other_programs_are_understood(bins, tmp_path):
    """DistributedDataParallel's and torch.compile's prefixes, and the causal masks of nanoGPT's first versions."""
    assert train_here(bins, tmp_path / "run", max_iters=1, bias=True).returncode == 0
    checkpoint = load(tmp_path / "run")
    weights, settings = checkpoint["model"], {"bias": True, "eval_only": True}
    losses = [train_here(bins, "none", init_from=tmp_path / "run" / "ckpt.pt", **settings).stdout.splitlines()[-1]]
    for layer in range(2):
        weights[f"transformer.h.{layer}.attn.bias"] = torch.ones(32, 32).tril().view(1, 1, 32, 32)
        weights[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    for prefix in ("_orig_mod.module.", "module._orig_mod."):
        named = {prefix + name: value for name, value in weights.items()}
        torch.save({**checkpoint, "model": named}, tmp_path / "other.pt")
        result = train_here(bins, "none", init_from=tmp_path / "other.pt", **settings)
        assert result.returncode == 0, result.stderr
        losses.append(result.stdout.splitlines()[-1])
    assert losses == [losses[0]] * 3 and "val loss" in losses[0]


def test_another_optimizer_than_the_saved_one_is_one_sentence(bins, tmp_path):
    settings = {"architecture": "qwen3", "embedding_lr": 0.01, "max_iters": 3, "eval_interval": 2}
    assert train_here(bins, tmp_path / "run", **settings).returncode == 0
    before = (tmp_path / "run" / "ckpt.pt").read_bytes()
    for changes in (
        {"optimizer": "muon", "head_lr": 0.01},
        {"embedding_lr": 0.0},
        {"embedding_lr": 0.0, "head_lr": 0.01},
    ):
        result = train_here(bins, tmp_path / "run", **{**settings, "init_from": "resume", "max_iters": 9, **changes})
        assert_one_sentence(
            result, "it has other optimizer settings; put --optimizer, --embedding_lr and --head_lr back"
        )
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == before
    shutil.copy(tmp_path / "run" / "best.pt", tmp_path / "run" / "ckpt.pt")
    result = train_here(bins, tmp_path / "run", **{**settings, "init_from": "resume"})
    latest = tmp_path / "run" / "ckpt.pt"
    assert_one_sentence(result, "it has none")
    assert_one_sentence(result, f"begin a new run with its weights: --init_from={latest} --out_dir=NEW")
    result = train_here(bins, tmp_path / "new", **{**settings, "init_from": latest})
    assert result.returncode == 0, result.stderr
