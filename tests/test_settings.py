"""settings.py: settings that contradict one another, what a run really uses, and the configs."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train as train_script
from configurator import configure
from helpers import ROOT, flags_of, load, metrics, run_here
from onenight.errors import UserError
from onenight.plan import CARDS
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
        ("--architecture=qwen3 --optimizer=muon --head_lr=0.01", "embedding_lr"),
        ("--architecture=qwen3 --optimizer=muon --embedding_lr=0.3", "head_lr"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(flags, word):
    with pytest.raises(UserError, match=word):
        resolved(*flags.split())


# -----------------------------------------------------------------------------
# What a run really uses


def test_the_folder_of_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert TrainConfig(dataset="t").data_dir == Path("data/t")
    assert TrainConfig(dataset="/somewhere/t").data_dir == Path("/somewhere/t")
    assert TrainConfig(dataset="data/t").data_dir == Path("data/t")
    Path("data/data/t").mkdir(parents=True)
    assert TrainConfig(dataset="data/t").data_dir == Path("data/data/t")


@pytest.mark.parametrize(
    "tokens_per_iter, batch_size, world_size, micro_batches",
    [
        (524_288, 16, 4, 32),  # of all processes
        (524_288, 12, 1, 43),  # the nearest: 528,384 tokens
        (524_288, 12, 4, 44),  # that the processes can share equally
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


def test_an_iteration_that_the_processes_cannot_share_equally_is_refused():
    with pytest.raises(UserError, match="3"):
        resolved("--gradient_accumulation_steps=2", "--batch_size=2", world_size=3)


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


def test_a_config_of_nanogpt_runs_as_nanogpt_means_it(bins, tmp_path):
    file = tmp_path / "nanogpt.py"
    file.write_text(NANOGPT)
    flags = [f"--dataset={bins}", f"--out_dir={tmp_path / 'out'}"]
    result = run_here(train_script, file, *flags)
    assert result.returncode == 0, result.stderr
    steps = [record for record in metrics(tmp_path / "out") if "train_loss" in record]
    assert len(steps) == 25
    assert steps[-1]["tokens"] == 24 * 3 * 4 * 32
    rates = [record["lr"] for record in steps]
    # Warmup, peak, and after lr_decay_iters; test_schedule.py compares the whole curve.
    assert [rates[i] for i in (0, 5, 20, 24)] == pytest.approx([1e-2 / 6, 1e-2, 1e-3, 1e-3])

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
    "gradient_accumulation_steps": 32,
    "batch_size": 16,
    "block_size": 1024,
    "eval_tokens": 200 * 16 * 1024,  # eval_iters=200
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "dropout": 0.0,
    "bias": False,
    "learning_rate": 5e-4,
    "max_iters": 6000,
    "warmup_iters": 500,
    "min_lr": 5e-5,
    "beta2": 0.99,
    "weight_decay": 0.1,
}


def test_the_long_night_is_the_circulating_config():
    ours = resolved("config/train_fineweb_4070.py")
    assert {key: getattr(ours, key) for key in CIRCULATING} == CIRCULATING


@pytest.mark.parametrize("name", CONFIGS)
def test_a_smaller_micro_batch_changes_nothing_but_the_number_of_them(name):
    whole = resolved(ROOT / "config" / name)
    size = whole.batch_size // 2
    half = resolved(ROOT / "config" / name, f"--batch_size={size}")
    steps = 2 * whole.gradient_accumulation_steps
    assert half == replace(whole, batch_size=size, gradient_accumulation_steps=steps)


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
def test_every_config_trains_a_tiny_model(name, bins, finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr("onenight.records.draw_losses", lambda *arguments: None)
    changes = {"max_iters": 2, "eval_iters": 1, "wandb_log": False}
    if configure(TrainConfig, [f"config/{name}"], "")[0].init_from != "scratch":
        changes["init_from"] = finished_run / "best.pt"
    result = run_here(train_script, f"config/{name}", *flags_of(bins, tmp_path, changes))
    assert result.returncode == 0, result.stderr
    assert load(tmp_path)["iter_num"] == 2
