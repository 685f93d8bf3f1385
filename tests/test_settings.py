"""settings.py: settings that contradict one another, what a run really uses, and the configs."""

import math
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train as train_script
from configurator import configure
from helpers import ROOT, load, metrics, run_here
from onenight.errors import UserError
from onenight.plan import CARDS
from onenight.schedule import lr_multiplier
from onenight.settings import TrainConfig, resolve

CONFIGS = sorted(path.name for path in (ROOT / "config").glob("*.py"))
CPU = torch.device("cpu")


def resolved(*arguments, world_size=1) -> TrainConfig:
    """Return the settings that a run with these arguments really uses."""
    config, _ = configure(TrainConfig, [str(argument) for argument in arguments], "")
    return resolve(config, CPU, "float32", False, world_size)


# -----------------------------------------------------------------------------
# Contradictions


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--n_embd=512", "n_head"),
        ("--architecture=qwen3 --optimizer=muon", "embedding_lr"),
        ("--architecture=qwen3 --optimizer=muon --head_lr=0.01", "embedding_lr"),
        ("--architecture=qwen3 --optimizer=muon --embedding_lr=0.3", "head_lr"),
        ("--int8=True --dtype=float16", "int8"),
        ("--seed=4294967296", "seed"),  # torch and numpy take 32 bits
        ("--dropout=1", "dropout"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(flags, word):
    with pytest.raises(UserError, match=word):
        resolved(*flags.split())


def test_a_tied_head_has_the_learning_rate_of_the_embedding():
    assert resolved("--optimizer=muon", "--embedding_lr=0.3").tied_head


# -----------------------------------------------------------------------------
# What a run really uses


@pytest.mark.parametrize(
    "dataset, existing, expected",
    [
        ("t", [], "data/t"),
        ("data/t", [], "data/t"),
        ("data/t", ["data/data/t"], "data/data/t"),
        ("/somewhere/t", [], "/somewhere/t"),
    ],
)
def test_the_folder_of_the_data(dataset, existing, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in existing:
        Path(folder).mkdir(parents=True)
    assert TrainConfig(dataset=dataset).data_dir == Path(expected)


@pytest.mark.parametrize(
    "tokens_per_iter, batch_size, world_size, micro_batches",
    [
        (524_288, 16, 1, 32),
        (524_288, 16, 4, 32),  # of all processes
        (524_288, 12, 1, 43),  # the nearest: 528,384 tokens
        (524_288, 12, 4, 44),  # that the processes can share equally
        (1000, 16, 1, 1),
        (1000, 16, 4, 4),
    ],
)
def test_an_iteration_has_about_tokens_per_iter(
    tokens_per_iter, batch_size, world_size, micro_batches
):
    flags = [f"--tokens_per_iter={tokens_per_iter}", f"--batch_size={batch_size}"]
    config = resolved(*flags, world_size=world_size)
    assert config.gradient_accumulation_steps == micro_batches
    assert config.tokens_per_iter == micro_batches * batch_size * 1024


def test_a_new_run_has_the_shape_of_the_weights_that_it_starts_from():
    """But its own dropout, and shorter windows if it has these."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "bias": False, "architecture": "qwen3"}
    model_args = {**shape, "dropout": 0.1, "block_size": 64, "vocab_size": 256}
    config = TrainConfig(block_size=1024, seed=7).with_shape_of(model_args)
    assert config == TrainConfig(**shape, block_size=64, seed=7)
    assert TrainConfig(block_size=32, dropout=0.2).with_shape_of(model_args).shape == {
        **shape,
        "block_size": 32,
        "dropout": 0.2,
    }
    with pytest.raises(UserError, match="weights.pt"):  # no rate for a head of its own
        TrainConfig(init_from="weights.pt", optimizer="muon", embedding_lr=0.1).with_shape_of(
            model_args
        )


def test_an_iteration_that_the_processes_cannot_share_equally_is_refused():
    flags = ["--gradient_accumulation_steps=2", "--batch_size=2"]
    assert resolved(*flags, world_size=4).tokens_per_iter == 2 * 2 * 1024
    with pytest.raises(UserError, match="3"):
        resolved(*flags, world_size=3)


# -----------------------------------------------------------------------------
# nanoGPT's own configs

# In the style of its config/train_shakespeare_char.py.
NANOGPT = """
import time

eval_interval = 25
eval_iters = 3
log_interval = 1
always_save_checkpoint = False
wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt' + str(time.time())
gradient_accumulation_steps = 3
batch_size = 4
block_size = 32
n_layer = 1
n_head = 2
n_embd = 32
dropout = 0.2
learning_rate = 1e-2
max_iters = 25
lr_decay_iters = 20
min_lr = 1e-3
beta2 = 0.99
warmup_iters = 5
device = 'cpu'
compile = False
"""


def nanogpt_lr(it):
    """nanoGPT's get_lr() with these settings."""
    if it < 5:
        return 1e-2 * (it + 1) / (5 + 1)
    if it > 20:
        return 1e-3
    coeff = 0.5 * (1.0 + math.cos(math.pi * (it - 5) / (20 - 5)))
    return 1e-3 + coeff * (1e-2 - 1e-3)


def test_a_config_of_nanogpt_runs_as_nanogpt_means_it(bins, tmp_path):
    file = tmp_path / "nanogpt.py"
    file.write_text(NANOGPT)
    flags = [f"--dataset={bins}", f"--out_dir={tmp_path / 'out'}"]
    result = run_here(train_script, file, *flags)
    assert result.returncode == 0, result.stderr
    steps = [record for record in metrics(tmp_path / "out") if "train_loss" in record]
    assert len(steps) == 25
    assert steps[-1]["tokens"] == 24 * 3 * 4 * 32
    for record in steps:
        assert record["lr"] == pytest.approx(nanogpt_lr(record["iter"]))

    # Its three batches are as many tokens of each split.
    def losses(*more):
        result = run_here(train_script, file, *flags, "--init_from=resume", "--eval_only", *more)
        (line,) = [line for line in result.stdout.splitlines() if line.startswith("step 25")]
        return line

    assert losses() == losses("--eval_iters=0", f"--eval_tokens={3 * 4 * 32}")
    assert losses() != losses("--eval_iters=4")


# -----------------------------------------------------------------------------
# The configs that are shipped

# The config that circulates for the RTX 4070, in nanoGPT's words; its width of 512 is corrected.
CIRCULATING = {
    "out_dir": "out-fineweb-single-parquet",
    "eval_interval": 500,
    "eval_iters": 200,
    "log_interval": 50,
    "always_save_checkpoint": True,
    "wandb_log": True,
    "wandb_project": "fineweb",
    "wandb_run_name": "125M-single-parquet-4070",
    "dataset": "fineweb",
    "gradient_accumulation_steps": 32,
    "batch_size": 16,
    "block_size": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "dropout": 0.0,
    "bias": False,
    "learning_rate": 5e-4,
    "max_iters": 6000,
    "warmup_iters": 500,
    "lr_decay_iters": 6000,
    "min_lr": 5e-5,
    "beta2": 0.99,
    "weight_decay": 0.1,
    "compile": True,
}
CIRCULATING_SMALL = {
    **CIRCULATING,
    "out_dir": "out-fineweb-single-parquet-small",
    "wandb_run_name": "30M-single-parquet-4070",
    "gradient_accumulation_steps": 8,
    "batch_size": 64,
    "n_layer": 6,
    "n_head": 6,
    "n_embd": 384,
    "learning_rate": 6e-4,
    "min_lr": 6e-5,
    "max_iters": 8000,
    "lr_decay_iters": 8000,
}


@pytest.mark.parametrize(
    "name, circulating",
    [("train_fineweb_4070", CIRCULATING), ("train_fineweb_4070_small", CIRCULATING_SMALL)],
)
def test_the_fineweb_configs_are_the_circulating_ones(name, circulating, tmp_path):
    file = tmp_path / "circulating.py"
    file.write_text("".join(f"{key} = {value!r}\n" for key, value in circulating.items()))
    ours = resolved(f"config/{name}.py")
    theirs = resolved(file)
    for fraction in (i / 600 for i in range(601)):
        assert lr_multiplier(ours, fraction) == lr_multiplier(theirs, fraction)
    added = {key: getattr(ours, key) for key in ("reference_loss", "reference_label", "int8")}
    assert replace(theirs, lr_decay_iters=ours.lr_decay_iters, **added) == ours


@pytest.mark.parametrize("name", CONFIGS)
def test_the_plan_of_a_config_has_its_tokens(name, tmp_path, monkeypatch):
    """Without data, and for a card that is not here."""
    monkeypatch.chdir(tmp_path)
    result = run_here(train_script, f"config/{name}", "--plan", "--plan_card=RTX 4070")
    assert result.returncode == 0, result.stderr
    config = configure(TrainConfig, [f"config/{name}"], "")[0]
    assert f"tokens: {config.tokens_per_iter:,} per iteration" in result.stdout
    assert f"{config.max_iters * config.tokens_per_iter:,} tokens" in result.stdout


def test_the_plans_in_the_documentation_are_what_the_program_prints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no train.bin
    files = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    quoted = re.findall(r"^\$ python train\.py (.*--plan.*)\n([^`]*)```", text, re.M)
    assert quoted
    for command, plan in quoted:
        assert run_here(train_script, *shlex.split(command)).stdout == plan
    # The table: card, tokens/s, time, largest micro-batch.
    rows = re.findall(r"^\| (RTX .*?) \| ([\d,]+) \| (\d+h \d+m) \| (\d+) \|", text, re.M)
    assert [name for name, *_ in rows] == [card.name for card in CARDS]
    for name, speed, time, size in rows:
        flags = ["config/train_fineweb_4070_fast.py", f"--plan_card={name}"]
        printed = run_here(train_script, *flags).stdout
        tokens_per_s = int(re.search(r"speed: ([\d,]+)", printed)[1].replace(",", ""))
        assert f"{round(tokens_per_s, -2):,}" == speed
        assert f"time: {time}," in printed
        assert f"--batch_size={size}\n" in printed


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_trains_a_tiny_model(name, bins, finished_run, tmp_path):
    changes = {
        "dataset": bins,
        "out_dir": tmp_path / "out",
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "block_size": 32,
        "bias": False,
        "batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_iters": 2,
        "eval_iters": 1,
        "wandb_log": False,
        "compile": False,
        "device": "cpu",
    }
    if configure(TrainConfig, [f"config/{name}"], "")[0].init_from != "scratch":
        changes["init_from"] = finished_run / "best.pt"
    flags = [f"--{key}={value}" for key, value in changes.items()]
    result = run_here(train_script, f"config/{name}", *flags)
    assert result.returncode == 0, result.stderr
    assert load(tmp_path / "out")["iter_num"] == 2
