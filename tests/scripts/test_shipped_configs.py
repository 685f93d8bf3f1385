"""What the project ships: its configs have their values and train, and README's plan is true."""

import re
import shlex
import time
from dataclasses import asdict

import pytest

import train as train_script
from configurator import configure, read_config_file
from helpers import ROOT, load, run_here, train_by_clock
from onenight.system.cards import CARDS
from onenight.training.settings import TrainConfig

CONFIGS = sorted((ROOT / "config").glob("*.py"))

FINEWEB_4070 = {
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
SMALL = {
    **FINEWEB_4070,
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
    "name, values", [("train_fineweb_4070", FINEWEB_4070), ("train_fineweb_4070_small", SMALL)]
)
def test_the_fineweb_configs_have_the_documented_values(name, values):
    assert read_config_file(str(ROOT / "config" / f"{name}.py")) == values


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_accepted_and_changes_what_it_assigns(path):
    config = configure(TrainConfig, [str(path)], "")
    assert asdict(config) == {**asdict(TrainConfig()), **read_config_file(str(path))}


# test_train_init_from.py trains config/finetune_gpt2.py, which needs weights to start from.
@pytest.mark.parametrize("name", [path.name for path in CONFIGS if path.stem != "finetune_gpt2"])
def test_every_config_trains_a_tiny_model(name, bins, tmp_path):
    changes = {
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 32,
        "block_size": 32,
        "batch_size": 2,
        "dataset": bins,
        "out_dir": tmp_path,
        "max_iters": 2,
        "eval_iters": 1,
        "device": "cpu",
        "compile": False,
        "wandb_log": False,
    }
    flags = [f"--{key}={value}" for key, value in changes.items()]
    result = train_by_clock(time.monotonic, f"config/{name}", *flags)
    assert result.returncode == 0, result.stderr
    assert load(tmp_path)["iter_num"] == 2


def test_the_plan_in_the_readme_is_what_the_program_prints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no train.bin
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pattern = r"^\$ python train\.py (.*--plan.*)\n([^`]*)```"
    command, plan = re.search(pattern, readme, re.M).groups()
    assert run_here(train_script, *shlex.split(command)).stdout == plan


def test_the_times_in_the_readme_are_those_of_the_plans():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (RTX .*) \| (\d+h \d+m) \| (\d+) \|$", readme, re.M)
    assert [name for name, _, _ in rows] == [card.name for card in CARDS]
    for name, duration, size in rows:
        flags = ["config/train_fineweb_4070_fast.py", "--plan", f"--plan_card={name}"]
        printed = train_by_clock(time.monotonic, *flags).stdout
        assert f"time: {duration} at " in printed
        assert f"; at most --batch_size={size} " in printed
