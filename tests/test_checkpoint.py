"""Checkpoint files, the models in them, and where a run starts."""

import math
import os
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from model import GPT, GPTConfig
from onenight.checkpoint import (
    build_model,
    changed_settings,
    check_shape,
    check_space,
    choose_start,
    load_checkpoint,
    load_optimizers,
    load_start,
    load_weights,
    newest_run,
    save_checkpoint,
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
GPT2 = {**SHAPE, "architecture": "gpt2"}
QWEN3 = {**SHAPE, "bias": False, "architecture": "qwen3"}
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


@pytest.mark.parametrize("model_args, saved", [(GPT2, SHAPE), (QWEN3, QWEN3)])
def test_a_file_of_gpt2_has_only_the_model_args_that_nanogpts_programs_accept(
    model_args, saved, tmp_path
):
    checkpoint = {"model": WEIGHTS, "model_args": dict(model_args)}
    save_checkpoint(tmp_path / "ckpt.pt", checkpoint)
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["model_args"] == saved
    assert load_checkpoint(tmp_path / "ckpt.pt")["model_args"] == model_args
    assert checkpoint["model_args"] == model_args


def test_a_disk_that_is_full_is_named_and_the_old_file_stays(tmp_path):
    """torch's own error would not say why."""
    resource = pytest.importorskip("resource")  # of POSIX
    save_checkpoint(tmp_path / "ckpt.pt", {"model": {}, "model_args": GPT2, "iter_num": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(tmp_path / "ckpt.pt", {"model": WEIGHTS, "model_args": GPT2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_checkpoint(tmp_path / "ckpt.pt")["iter_num"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.pt"]


@pytest.mark.parametrize("prefix", ["_orig_mod.module.", "module._orig_mod.", ""])
def test_a_checkpoint_of_nanogpt_is_read(prefix, tmp_path):
    """torch.compile and DistributedDataParallel add prefixes to the names. Early versions saved
    causal masks, and had no setting `bias`: their models had biases."""
    weights = {prefix + name: value for name, value in WEIGHTS.items()}
    for layer in range(2):
        weights[f"{prefix}transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
        weights[f"{prefix}transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    model_args = {key: value for key, value in SHAPE.items() if key != "bias"}
    loaded = load_checkpoint(save(tmp_path / "ckpt.pt", model=weights, model_args=model_args))
    assert loaded["model_args"] == GPT2
    assert loaded["model"].keys() == WEIGHTS.keys()
    assert all(torch.equal(loaded["model"][name], WEIGHTS[name]) for name in WEIGHTS)


def damage(path):
    path.write_bytes(b"PK rubbish")


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-1000])


def remove(path):
    path.unlink()


def save_a_list(path):
    torch.save([1, 2, 3], path)


def save_without_model_args(path):
    torch.save({"model": WEIGHTS}, path)


@pytest.mark.parametrize("spoil", [damage, cut_off, remove, save_a_list, save_without_model_args])
def test_a_file_that_is_no_checkpoint_is_refused_with_its_name(spoil, tmp_path):
    path = save(tmp_path / "ckpt.pt")
    spoil(path)
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


def test_the_newest_run_is_the_one_with_the_newest_checkpoint(tmp_path, monkeypatch, capsys):
    """Not the newest folder, and only folders called out*."""
    monkeypatch.chdir(tmp_path)
    refuse("--out_dir", newest_run)
    for name, time in {"out-b": 2000, "out-c": 1000, "other": 3000}.items():
        path = tmp_path / name / "ckpt.pt"
        path.parent.mkdir()
        path.touch()
        os.utime(path, (time, time))
    (tmp_path / "out-without-checkpoint").mkdir()
    assert newest_run() == "out-b"
    assert "out-b" in capsys.readouterr().out


@pytest.mark.parametrize("state_per_weight, gigabytes", [(2, 8), (3, 10)])
def test_space_is_needed_for_both_checkpoints_while_they_are_replaced(
    state_per_weight, gigabytes, tmp_path, monkeypatch
):
    """Two of ckpt.pt, with the optimizer's state, and two of best.pt."""
    parameters = 250_000_000  # 1 GB
    (tmp_path / "ckpt.pt").write_bytes(bytes(1000))  # will be replaced
    usage = namedtuple("usage", "total free")
    free = int(gigabytes * 1e9) - 1000
    arguments = (tmp_path, parameters, state_per_weight * parameters)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(10**12, free))
    check_space(*arguments)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(10**12, free - 1))
    refuse(f"{gigabytes:.1f} GB", check_space, *arguments)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(0, 0))  # reports no size
    check_space(*arguments)


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


def test_settings_that_differ_are_listed_with_both_values():
    before = {"max_iters": 45, "weight_decay": 0.1, "out_dir": "out", "seed": 1337}
    config = TrainConfig(max_iters=50, weight_decay=0.1, out_dir="moved", dropout=0.2)
    lines = changed_settings(config, {"config": before})
    # A setting that is newer than the run, such as dropout here, had its default.
    assert [line.split(": ")[1] for line in lines] == ["dropout 0.0 -> 0.2", "max_iters 45 -> 50"]


def config_of(model_args, **changes):
    shape = {key: value for key, value in model_args.items() if key != "vocab_size"}
    return TrainConfig(**{**shape, **changes})


def test_the_differences_to_the_shape_of_a_run_are_named():
    config = config_of(GPT2, n_layer=3, bias=False, dropout=0.5)
    refuse("n_layer=2, bias=True;", check_shape, config, GPT2)
    refuse("block_size=16;", check_shape, config_of(GPT2, block_size=8), GPT2)
    refuse("bias=True, architecture=gpt2;", check_shape, config_of(QWEN3), GPT2)
    check_shape(config_of(GPT2, dropout=0.5), GPT2)


# -----------------------------------------------------------------------------
# Models


def test_a_model_with_a_smaller_context_takes_the_first_position_embeddings():
    model = GPT(GPTConfig(**{**SHAPE, "block_size": 5}))
    load_weights(model, WEIGHTS, "ckpt.pt")
    positions = model.transformer.wpe.weight
    assert torch.equal(positions, WEIGHTS["transformer.wpe.weight"][:5])


def test_weights_of_another_model_are_named():
    model = GPT(GPTConfig(**SHAPE))
    name = "transformer.ln_f.weight"
    missing = {key: value for key, value in WEIGHTS.items() if key != name}
    refuse(name, load_weights, model, missing, "best.pt")
    refuse(name, load_weights, model, {**WEIGHTS, name: torch.zeros(31)}, "best.pt")
    refuse("best.pt", load_weights, model, {**WEIGHTS, "other": torch.zeros(31)}, "best.pt")


@pytest.mark.parametrize(
    "model_args, word",
    [
        ({**SHAPE, "n_head": 5}, "n_head=5"),
        ({**SHAPE, "flash": True}, "flash"),
        ({**SHAPE, "architecture": "bert"}, "bert"),
        (None, "best.pt"),
    ],
)
def test_impossible_model_args_are_refused(model_args, word, tmp_path):
    torch.save({"model": WEIGHTS, "model_args": model_args}, tmp_path / "best.pt")
    refuse(word, load_checkpoint, tmp_path / "best.pt")


def test_a_vocabulary_smaller_than_gpt2s_is_refused():
    refuse("50257", build_model, {"model": WEIGHTS, "model_args": SHAPE}, "best.pt")


def test_only_linear_layers_are_in_the_number_format_of_generation():
    shape = {**QWEN3, "vocab_size": 50304}
    weights = GPT(GPTConfig(**shape)).state_dict()
    model = build_model({"model": weights, "model_args": shape}, "best.pt", "bfloat16")
    assert not model.training
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.transformer.h[0].mlp.c_fc.weight.dtype == torch.bfloat16
    assert model.transformer.ln_f.weight.dtype == torch.float32
    assert model.transformer.wte.weight.dtype == torch.float32


# -----------------------------------------------------------------------------
# Optimizers


def make_optimizer(*names):
    """Return AdamW after one step, with one group for each name."""
    groups = [{"params": [torch.nn.Parameter(torch.randn(3))], "name": name} for name in names]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for group in groups:
        group["params"][0].grad = torch.randn(3)
    optimizer.step()
    return optimizer


def test_the_state_is_loaded_and_the_current_options_are_kept():
    saved = make_optimizer("matrices", "vectors").state_dict()
    optimizer = make_optimizer("matrices", "vectors")
    optimizer.param_groups[0]["weight_decay"] = 0.7
    optimizer.step()
    load_optimizers({"optimizer": optimizer}, {"optimizer": saved}, "out")
    loaded = optimizer.state_dict()
    assert loaded["param_groups"][0]["weight_decay"] == 0.7
    for number, state in saved["state"].items():
        for key, value in state.items():
            assert torch.equal(loaded["state"][number][key], value)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": make_optimizer("matrices").state_dict()},
        {"optimizer": make_optimizer("matrices", "head").state_dict()},
        {"optimizer": None},  # as in best.pt
    ],
    ids=["fewer groups", "other groups", "no state"],
)
def test_what_cannot_be_resumed_is_refused_with_the_way_out(changes):
    checkpoint = {
        "optimizer": make_optimizer("matrices", "vectors").state_dict(),
        **changes,
    }
    checkpoint = {key: value for key, value in checkpoint.items() if value is not None}
    optimizers = {"optimizer": make_optimizer("matrices", "vectors")}
    refuse("--init_from=FILE.pt", load_optimizers, optimizers, checkpoint, "out")
