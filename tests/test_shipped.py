"""What the project ships: its configs have their values and train, and the README's plan is the program's."""

import dataclasses
import re
import sys

from onenight.train_config import TrainConfig

import pytest
from conftest import ROOT, load, run_here, train_here

import train as train_script
from configurator import configure, read_config_file

FINEWEB_4070 = dict(
    out_dir="out-fineweb-single-parquet", eval_interval=500, eval_iters=200, log_interval=50,
    always_save_checkpoint=True, wandb_log=True, wandb_project="fineweb", wandb_run_name="125M-single-parquet-4070",
    dataset="fineweb", gradient_accumulation_steps=32, batch_size=16, block_size=1024, n_layer=12, n_head=12,
    n_embd=768, dropout=0.0, bias=False, learning_rate=5e-4, max_iters=6000, warmup_iters=500, lr_decay_iters=6000,
    min_lr=5e-5, beta2=0.99, weight_decay=0.1, compile=True,
)  # fmt: skip
SMALL = FINEWEB_4070 | dict(
    out_dir="out-fineweb-single-parquet-small", wandb_run_name="30M-single-parquet-4070", n_layer=6, n_head=6,
    n_embd=384, learning_rate=6e-4, min_lr=6e-5, max_iters=8000, lr_decay_iters=8000,
)  # fmt: skip


@pytest.mark.parametrize("name, values", [("train_fineweb_4070", FINEWEB_4070), ("train_fineweb_4070_small", SMALL)])
def test_the_fineweb_configs_have_the_documented_values(name, values):
    assert read_config_file(str(ROOT / "config" / f"{name}.py")) == values


@pytest.mark.parametrize("file", sorted((ROOT / "config").glob("*.py")), ids=lambda file: file.stem)
def test_every_config_file_of_the_project_is_accepted(file):
    config = configure(TrainConfig, [str(file)], "")
    assert dataclasses.asdict(config) == dataclasses.asdict(TrainConfig()) | read_config_file(str(file))


TINY_SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 2}
CONFIGS = [path.name for path in sorted((ROOT / "config").glob("*.py")) if path.name != "finetune_gpt2.py"]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_trains_a_tiny_model(name, bins, tmp_path):
    """config/finetune_gpt2.py needs weights: test_finetune.py trains it."""
    flags = {**TINY_SHAPE, "dataset": bins, "out_dir": tmp_path, "max_iters": 2, "eval_iters": 1, "device": "cpu"}
    flags |= {"compile": False, "wandb_log": False}
    result = run_here(train_script, f"config/{name}", *(f"--{key}={value}" for key, value in flags.items()))
    assert result.returncode == 0, result.stderr
    assert load(tmp_path)["iter_num"] == 2


def test_the_plan_in_the_readme_is_the_programs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no train.bin
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command, plan = re.search(r"^\$ python train\.py (.*--plan.*)\n([^`]*)```", readme, re.M).groups()
    assert run_here(train_script, *command.split()).stdout == plan


# ---- what the configs ask for beside the model


def saves(bins, out_dir, **changes):
    """How often a run whose val loss never improves has saved its checkpoint."""
    return train_here(bins, out_dir, learning_rate=0.0, min_lr=0.0, **changes).stdout.count("saving checkpoint to")


def test_without_always_save_checkpoint_a_worse_evaluation_does_not_save(bins, tmp_path):
    assert saves(bins, tmp_path / "always") == 4  # at iterations 20, 40 and 45, and at the end
    assert saves(bins, tmp_path / "better", always_save_checkpoint=False) == 1  # at the end


class WithoutNetwork:
    """A wandb with a key, whose server cannot be reached."""

    Settings, url = dict, None

    def login(self, **options):
        return True

    def init(self, mode, **options):
        if mode != "offline":
            raise ConnectionError("no network")
        self.id, self.records = "1", []
        return self

    def log(self, record, step):
        self.records.append((step, record))


def test_wandb_without_a_network_is_offline(bins, tmp_path, monkeypatch):
    wandb = WithoutNetwork()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    result = train_here(bins, tmp_path, wandb_log=True, max_iters=2)
    assert "wandb: offline, because no network; upload" in result.stdout
    assert [step for step, record in wandb.records if "train_loss" in record] == [0, 1]


def test_wandb_that_is_not_installed_is_left_out(bins, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    result = train_here(bins, tmp_path, wandb_log=True, max_iters=2)
    assert result.returncode == 0 and "wandb: off, because" in result.stdout
