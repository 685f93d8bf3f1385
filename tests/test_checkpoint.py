"""Checkpoint files, the models in them, and where a run starts."""

import math
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from model import GPT, GPTConfig
from onenight.checkpoint import (
    build_model,
    check_space,
    choose_start,
    load_checkpoint,
    load_optimizers,
    load_start,
    load_weights,
)
from onenight.errors import UserError
from onenight.settings import TrainConfig

SHAPE = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 16,
    "vocab_size": 256,
    "bias": True,
    "dropout": 0.1,
}
WEIGHTS = GPT(GPTConfig(**SHAPE)).state_dict()


def refuse(word, function, *arguments):
    """Assert that the function raises a UserError of one line that has this word."""
    with pytest.raises(UserError) as refusal:
        function(*arguments)
    assert word in str(refusal.value)
    assert "\n" not in str(refusal.value)


def save(path, **changes):
    """Save a checkpoint as nanoGPT's train.py does: of GPT-2, without an architecture."""
    content = {"model": WEIGHTS, "model_args": SHAPE, "iter_num": 9, **changes}
    torch.save(content, path)
    return path


# -----------------------------------------------------------------------------
# Files


def test_a_checkpoint_of_nanogpt_is_read(tmp_path):
    """torch.compile and DistributedDataParallel add prefixes to the names. Early versions saved
    causal masks, and had no setting `bias`: their models had biases."""
    prefix = "_orig_mod.module."
    weights = {prefix + name: value for name, value in WEIGHTS.items()}
    for layer in range(2):
        weights[f"{prefix}transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
        weights[f"{prefix}transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    model_args = {key: value for key, value in SHAPE.items() if key != "bias"}
    loaded = load_checkpoint(save(tmp_path / "ckpt.pt", model=weights, model_args=model_args))
    assert loaded["model_args"] == {**SHAPE, "architecture": "gpt2"}
    assert loaded["model"].keys() == WEIGHTS.keys()
    assert all(torch.equal(loaded["model"][name], WEIGHTS[name]) for name in WEIGHTS)


@pytest.mark.parametrize("model_args", [{**SHAPE, "n_head": 5}, {**SHAPE, "flash": True}, None])
def test_impossible_model_args_are_refused(model_args, tmp_path):
    path = save(tmp_path / "ckpt.pt", model_args=model_args)
    refuse(str(path), load_checkpoint, path)


class Malicious:
    """Makes a file when it is read from a pickle."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    path = save(tmp_path / "ckpt.pt", best_val_loss=Malicious(tmp_path / "made"))
    refuse("ckpt.pt", load_checkpoint, path)
    assert not (tmp_path / "made").exists()


def test_space_is_needed_for_both_checkpoints_while_they_are_replaced(tmp_path, monkeypatch):
    """Two of ckpt.pt, with the optimizer's state, and two of best.pt: with 1 GB of weights and
    2 GB of state, 8 GB."""
    # What will be replaced, and what a crash while saving left.
    (tmp_path / "ckpt.pt").write_bytes(bytes(600))
    (tmp_path / "ckpt.pt.partial").write_bytes(bytes(400))
    usage = namedtuple("usage", "total free")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(10**12, 8 * 10**9 - 1000))
    check_space(tmp_path, 250_000_000, 500_000_000)
    refuse("8.0 GB", check_space, tmp_path, 250_000_001, 500_000_000)


# -----------------------------------------------------------------------------
# Where a run starts


def test_numbers_that_are_not_finite_are_refused_in_the_state_of_the_optimizer_too(tmp_path):
    state = {"exp_avg": torch.zeros(3), "exp_avg_sq": torch.tensor([1.0, math.inf, 1.0])}
    save(tmp_path / "ckpt.pt", optimizer={"state": {0: state}, "param_groups": []})
    refuse("optimizer.state.0.exp_avg_sq", load_start, "resume", tmp_path)


@pytest.mark.parametrize("first_has_one, expected", [(True, "resume"), (False, "scratch")])
def test_with_auto_the_first_process_decides_for_all(tmp_path, first_has_one, expected):
    """Another machine may not see its folder."""
    if not first_has_one:
        (tmp_path / "ckpt.pt").touch()
    second = SimpleNamespace(is_first=False, any=lambda flag: flag or first_has_one)
    config = TrainConfig(init_from="auto", out_dir=str(tmp_path))
    assert choose_start(config, {}, second).init_from == expected


# -----------------------------------------------------------------------------
# Models and optimizers


def test_weights_of_another_model_are_refused():
    model = GPT(GPTConfig(**SHAPE))
    name = "transformer.ln_f.weight"
    missing = {key: value for key, value in WEIGHTS.items() if key != name}
    refuse(name, load_weights, model, missing, "best.pt")
    refuse("other", load_weights, model, {**WEIGHTS, "other": torch.zeros(32)}, "best.pt")


def test_a_vocabulary_smaller_than_gpt2s_is_refused():
    refuse("50257", build_model, {"model": WEIGHTS, "model_args": SHAPE}, "best.pt")


def test_only_linear_layers_are_in_the_number_format_of_generation():
    shape = {**SHAPE, "bias": False, "architecture": "qwen3", "vocab_size": 50304}
    weights = GPT(GPTConfig(**shape)).state_dict()
    model = build_model({"model": weights, "model_args": shape}, "best.pt", "bfloat16")
    assert not model.training
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.transformer.h[0].mlp.c_fc.weight.dtype == torch.bfloat16
    assert model.transformer.ln_f.weight.dtype == torch.float32
    assert model.transformer.wte.weight.dtype == torch.float32


def test_without_the_state_of_the_optimizer_nothing_is_resumed():
    """As from best.pt."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    refuse("--init_from=FILE.pt", load_optimizers, {"optimizer": optimizer}, {}, "best.pt")
