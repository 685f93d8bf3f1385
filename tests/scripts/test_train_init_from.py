"""train.py with weights to start from: GPT-2 in a Hugging Face folder, or a checkpoint."""

import json
import re
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

import train as train_script
from helpers import (
    ROOT,
    TINY,
    assert_one_sentence,
    load,
    losses,
    metrics,
    run,
    train_by_clock,
    train_here,
)
from onenight.training.settings import TrainConfig

GPT2_SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "bias": True}
# GELU and its approximation by tanh, which transformers' GPT-2 has, differ by 0.0005 at most.
GELU_TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A folder that transformers saved, and its model: a small random GPT-2 with 300 ids."""
    folder = tmp_path_factory.mktemp("gpt2")
    set_seed(0)
    config = GPT2Config(
        vocab_size=300, n_positions=48, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3
    )
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder)
    return folder, model


@torch.no_grad()
def loss_of(model, bins):
    """Return the mean loss of transformers' model over all of val.bin, in windows of 32."""
    ids = torch.from_numpy(np.fromfile(bins / "val.bin", "<u2").astype(np.int64))
    total = 0.0
    for start in range(0, len(ids) - 1, 32):
        window = ids[start : start + 33]
        logits = model(window[None, :-1]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return total / (len(ids) - 1)


def evaluations(out_dir):
    return [record for record in metrics(out_dir) if "val_loss" in record]


def last_line(result):
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


# ---- a new run


def test_gpt2_is_evaluated_trained_and_resumed(gpt2, bins, tmp_path):
    folder, model = gpt2
    settings = {**GPT2_SHAPE, "learning_rate": 1e-3, "decay_lr": False}
    result = train_here(bins, tmp_path, **settings, init_from=folder)
    assert result.returncode == 0, result.stderr
    first, *_, last = evaluations(tmp_path)
    assert first["val_loss"] == pytest.approx(loss_of(model, bins), abs=GELU_TOLERANCE)
    assert last["val_loss"] < first["val_loss"] - 1
    checkpoint = load(tmp_path)
    assert checkpoint["model_args"]["vocab_size"] == 300
    assert checkpoint["model_args"]["block_size"] == 32  # of the 48 positions

    resumed = train_here(bins, tmp_path, **settings, init_from="resume", max_iters=50)
    assert resumed.returncode == 0, resumed.stderr
    iterations = re.findall(r"^iter (\d+):", resumed.stdout, re.M)
    assert iterations == [str(number) for number in range(45, 50)]


def test_a_checkpoint_is_trained_further_from_iteration_0(bins, tmp_path):
    assert train_here(bins, tmp_path / "first", max_iters=20, lr_decay_iters=20).returncode == 0
    source = tmp_path / "first" / "ckpt.pt"
    result = train_here(bins, tmp_path / "second", init_from=source, max_iters=20)
    assert result.returncode == 0, result.stderr
    end_of_first = evaluations(tmp_path / "first")[-1]["val_loss"]
    second = evaluations(tmp_path / "second")
    assert second[0]["iter"] == 0
    assert second[0]["val_loss"] == pytest.approx(end_of_first, abs=1e-6)
    assert second[-1]["val_loss"] < end_of_first


def test_the_shipped_config_for_finetuning_works(gpt2, bins, tmp_path):
    """On a small model, for a few iterations."""
    out_dir = tmp_path / "out"
    flags = [
        f"--init_from={gpt2[0]}",
        f"--dataset={bins}",
        f"--out_dir={out_dir}",
        "--n_layer=2",
        "--n_head=2",
        "--n_embd=32",
        "--block_size=32",
        "--max_iters=3",
        "--eval_iters=1",
        "--compile=false",
    ]
    result = run("train.py", ROOT / "config/finetune_gpt2.py", *flags)
    assert result.returncode == 0, result.stderr
    assert {record["lr"] for record in metrics(out_dir)} == {3e-5}
    assert (out_dir / "ckpt.pt").exists()


# ---- --init_from=auto


def test_auto_begins_then_resumes_then_reports_the_end(bins, tmp_path):
    first = train_here(bins, tmp_path, init_from="auto", max_iters=20)
    assert first.returncode == 0, first.stderr
    line = f"init_from=auto: starting from scratch, because {tmp_path} has no checkpoint\n"
    assert first.stdout.count(line) == 1

    second = train_here(bins, tmp_path, init_from="auto")
    assert second.returncode == 0, second.stderr
    line = f"init_from=auto: resuming, because {tmp_path} has a checkpoint\n"
    assert second.stdout.count(line) == 1
    assert "resuming at iter 20" in second.stdout
    assert load(tmp_path)["config"]["init_from"] == "resume"

    third = train_here(bins, tmp_path, init_from="auto")
    assert third.returncode == 0, third.stderr
    assert "this run is finished (iter 45)" in third.stdout


def test_auto_trains_as_a_run_without_it_does(finished_run, bins, tmp_path):
    assert train_here(bins, tmp_path, init_from="auto").returncode == 0
    assert losses(tmp_path) == losses(finished_run)


def test_auto_resumes_from_the_previous_checkpoint_if_only_that_is_left(
    finished_run, bins, tmp_path
):
    shutil.copy(finished_run / "ckpt-previous.pt", tmp_path)
    result = train_here(bins, tmp_path, init_from="auto")
    assert result.returncode == 0, result.stderr
    assert "init_from=auto: resuming" in result.stdout


def test_auto_never_overwrites_a_damaged_checkpoint(bins, tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(b"a night's work")
    assert_one_sentence(train_here(bins, tmp_path, init_from="auto"), "ckpt.pt")
    assert (tmp_path / "ckpt.pt").read_bytes() == b"a night's work"


def test_auto_begins_with_the_weights_that_the_config_file_names(gpt2, bins, tmp_path):
    config = tmp_path / "config.py"
    settings = {**TINY, **GPT2_SHAPE, "init_from": str(gpt2[0]), "max_iters": 1}
    config.write_text("\n".join(f"{key} = {value!r}" for key, value in settings.items()))
    out_dir = tmp_path / "out"
    arguments = [config, f"--dataset={bins}", f"--out_dir={out_dir}", "--init_from=auto"]
    first = train_by_clock(time.monotonic, *arguments)
    assert first.returncode == 0, first.stderr
    assert f"init_from=auto: starting from {gpt2[0]}, because" in first.stdout
    assert load(out_dir)["model_args"]["vocab_size"] == 300
    second = train_by_clock(time.monotonic, *arguments, "--max_iters=2")
    assert second.returncode == 0, second.stderr
    assert "resuming at iter 1," in second.stdout


def test_auto_with_plan_and_with_eval_only_says_which_and_writes_nothing(
    finished_run, bins, tmp_path
):
    before = {path.name: path.stat().st_mtime_ns for path in finished_run.iterdir()}
    for changes in ({"plan": True}, {"eval_only": True}):
        resumed = train_here(bins, finished_run, init_from="auto", **changes)
        assert resumed.returncode == 0, resumed.stderr
        assert "init_from=auto: resuming" in resumed.stdout
        new = train_here(bins, tmp_path / "none", init_from="auto", **changes)
        assert new.returncode == 0, new.stderr
        assert "init_from=auto: starting from scratch" in new.stdout
    assert {path.name: path.stat().st_mtime_ns for path in finished_run.iterdir()} == before
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("first_has_one, expected", [(True, "resume"), (False, "scratch")])
def test_with_auto_the_first_process_decides_for_all(tmp_path, first_has_one, expected):
    """Another machine may not see its folder."""
    if not first_has_one:
        (tmp_path / "ckpt.pt").touch()
    second = SimpleNamespace(is_first=False, any=lambda flag: flag or first_has_one)
    config = TrainConfig(init_from="auto", out_dir=str(tmp_path))
    assert train_script.choose_start(config, [], second).init_from == expected


# ---- --eval_only


def test_eval_only_takes_the_shape_of_a_hugging_face_folder(gpt2, bins, tmp_path):
    folder, model = gpt2
    settings = {"init_from": folder, "eval_only": True, "n_layer": 7, "bias": False}
    result = train_here(bins, tmp_path / "none", **settings)
    printed = float(re.search(r"val loss ([\d.]+)$", last_line(result))[1])
    assert printed == pytest.approx(loss_of(model, bins), abs=GELU_TOLERANCE)
    assert not (tmp_path / "none").exists()


def test_eval_only_takes_the_architecture_of_a_checkpoint(bins, tmp_path):
    settings = {"architecture": "qwen3", "n_head": 4, "max_iters": 5}
    trained = train_here(bins, tmp_path / "qwen3", **settings)
    assert trained.returncode == 0, trained.stderr
    losses_at_the_end = re.findall("^step 5: (.*)", trained.stdout, re.M)

    source = tmp_path / "qwen3" / "ckpt.pt"
    result = train_here(bins, tmp_path / "none", init_from=source, eval_only=True)
    assert [last_line(result).partition(": ")[2]] == losses_at_the_end
    assert not (tmp_path / "none").exists()


def test_eval_only_reads_a_checkpoint_of_an_early_nanogpt_without_bias(bins, tmp_path):
    """Its models had biases, and no setting for them."""
    assert train_here(bins, tmp_path / "run", max_iters=1, bias=True).returncode == 0
    checkpoint = load(tmp_path / "run")
    del checkpoint["model_args"]["bias"]
    torch.save(checkpoint, tmp_path / "early.pt")
    lines = []
    for source in (tmp_path / "run" / "ckpt.pt", tmp_path / "early.pt"):
        result = train_here(bins, tmp_path / "none", init_from=source, eval_only=True)
        lines.append(last_line(result))
    assert "val loss" in lines[0]
    assert lines[1] == lines[0]


def test_eval_only_refuses_a_shape_that_the_optimizers_settings_do_not_suit(bins, tmp_path):
    settings = {"architecture": "qwen3", "n_head": 4, "max_iters": 1}
    assert train_here(bins, tmp_path / "qwen3", **settings).returncode == 0
    settings = {"optimizer": "muon", "embedding_lr": 0.1, "head_lr": 0.0}
    source = tmp_path / "qwen3" / "ckpt.pt"
    result = train_here(bins, tmp_path / "none", init_from=source, eval_only=True, **settings)
    assert_one_sentence(result, "head_lr")


def test_eval_only_reads_checkpoints_with_the_prefixes_and_masks_of_other_programs(bins, tmp_path):
    """DistributedDataParallel's and torch.compile's prefixes, and the masks of nanoGPT's first
    versions."""
    assert train_here(bins, tmp_path / "run", max_iters=1, bias=True).returncode == 0
    checkpoint = load(tmp_path / "run")
    weights = checkpoint["model"]
    for layer in range(2):
        weights[f"transformer.h.{layer}.attn.bias"] = torch.ones(32, 32).tril().view(1, 1, 32, 32)
        weights[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    checkpoint["model"] = {f"_orig_mod.module.{name}": value for name, value in weights.items()}
    torch.save(checkpoint, tmp_path / "other.pt")

    lines = []
    for source in (tmp_path / "run" / "ckpt.pt", tmp_path / "other.pt"):
        result = train_here(bins, tmp_path / "none", init_from=source, bias=True, eval_only=True)
        lines.append(last_line(result))
    assert "val loss" in lines[0]
    assert lines[1] == lines[0]


# ---- what is refused


def test_an_earlier_run_is_not_overwritten(gpt2, bins, tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(b"a night's work")
    refused = train_here(bins, tmp_path, **GPT2_SHAPE, init_from=gpt2[0])
    assert_one_sentence(refused, "--init_from=resume")
    assert (tmp_path / "ckpt.pt").read_bytes() == b"a night's work"


def test_another_shape_is_refused_and_nothing_is_written(gpt2, bins, tmp_path):
    refused = train_here(bins, tmp_path, init_from=gpt2[0], n_layer=3)
    assert_one_sentence(refused, "the checkpoint has n_layer=2, bias=True; set the same values")
    refused = train_here(bins, tmp_path, **GPT2_SHAPE, init_from=gpt2[0], block_size=64)
    assert_one_sentence(refused, "the checkpoint has block_size=48;")
    assert not list(tmp_path.iterdir())


def test_weights_of_a_checkpoint_that_do_not_match_its_shape_are_named(bins, tmp_path):
    assert train_here(bins, tmp_path / "run", max_iters=1).returncode == 0
    checkpoint = load(tmp_path / "run")
    checkpoint["model"]["transformer.ln_f.weight"] = torch.zeros(31)
    torch.save(checkpoint, tmp_path / "bad.pt")
    refused = train_here(bins, tmp_path / "new", init_from=tmp_path / "bad.pt")
    words = "bad.pt: its weights do not match its shape (transformer.ln_f.weight of shape (31,))"
    assert_one_sentence(refused, words)
    assert not (tmp_path / "new").exists()


def test_weights_of_a_folder_that_do_not_match_its_shape_are_named(gpt2, bins, tmp_path):
    folder = shutil.copytree(gpt2[0], tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_layer": 3}))
    settings = {**GPT2_SHAPE, "n_layer": 3}
    refused = train_here(bins, tmp_path / "new", **settings, init_from=folder)
    assert_one_sentence(refused, "no transformer.h.2.attn.c_attn.bias")
    assert not (tmp_path / "new").exists()


OPTIMIZER_SETTINGS = {
    "architecture": "qwen3",
    "embedding_lr": 0.01,
    "max_iters": 3,
    "eval_interval": 2,
}


@pytest.fixture(scope="module")
def run_with_embedding_lr(bins, tmp_path_factory):
    """A run with OPTIMIZER_SETTINGS, which tests do not change."""
    out_dir = tmp_path_factory.mktemp("optimizers") / "run"
    assert train_here(bins, out_dir, **OPTIMIZER_SETTINGS).returncode == 0
    return out_dir


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "muon", "head_lr": 0.01},
        {"embedding_lr": 0.0},
        {"embedding_lr": 0.0, "head_lr": 0.01},
    ],
    ids=["another optimizer", "fewer groups", "other groups"],
)
def test_other_optimizer_settings_than_the_saved_ones_are_refused(
    changes, run_with_embedding_lr, bins
):
    before = (run_with_embedding_lr / "ckpt.pt").read_bytes()
    settings = {**OPTIMIZER_SETTINGS, "init_from": "resume", "max_iters": 9, **changes}
    refused = train_here(bins, run_with_embedding_lr, **settings)
    assert_one_sentence(refused, "its optimizer state belongs to other settings")
    assert_one_sentence(refused, "change --optimizer, --embedding_lr and --head_lr back")
    assert (run_with_embedding_lr / "ckpt.pt").read_bytes() == before


def test_the_best_weights_cannot_be_resumed_but_a_new_run_can_start_from_them(
    run_with_embedding_lr, bins, tmp_path
):
    source = tmp_path / "ckpt.pt"
    shutil.copy(run_with_embedding_lr / "best.pt", source)
    refused = train_here(bins, tmp_path, **OPTIMIZER_SETTINGS, init_from="resume")
    assert_one_sentence(refused, "it has no optimizer state")
    remedy = f"start a new run from its weights: --init_from={source} --out_dir=NEW"
    assert_one_sentence(refused, remedy)
    result = train_here(bins, tmp_path / "new", **OPTIMIZER_SETTINGS, init_from=source)
    assert result.returncode == 0, result.stderr
