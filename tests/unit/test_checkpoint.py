"""onenight/models/checkpoint.py."""

import errno
import os
import re
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from configurator import UserError
from helpers import read_files
from model import GPT, GPTConfig
from onenight.models.checkpoint import (
    build_model,
    check_shape,
    check_space,
    has_checkpoint,
    load_checkpoint,
    load_latest,
    load_optimizers,
    load_weights,
    newest_run,
    save_checkpoint,
)

SHAPE = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 16,
    "vocab_size": 256,
    "bias": True,
    "dropout": 0.1,
}
QWEN3 = {**SHAPE, "bias": False, "architecture": "qwen3"}
GPT2 = {**SHAPE, "architecture": "gpt2"}
WEIGHTS = GPT(GPTConfig(**SHAPE)).state_dict()


def assert_refused(words, function, *arguments):
    """The function raises UserError with one line that has these words (a pattern)."""
    with pytest.raises(UserError, match=words) as refusal:
        function(*arguments)
    assert str(refusal.value).isprintable()


def save(path, model_args=SHAPE, **more):
    torch.save({"model": WEIGHTS, "model_args": model_args, **more}, path)
    return path


# ---- model_args


def test_a_gpt2_file_has_the_model_args_of_nanogpt(tmp_path):
    """nanoGPT's GPTConfig, to which its sample.py passes all of them, has no architecture."""
    save_checkpoint(tmp_path / "ckpt.pt", {"model": WEIGHTS, "model_args": GPT2})
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["model_args"] == SHAPE
    assert load_checkpoint(tmp_path / "ckpt.pt")["model_args"] == GPT2


def test_another_architecture_is_saved(tmp_path):
    save_checkpoint(tmp_path / "ckpt.pt", {"model": {}, "model_args": QWEN3})
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["model_args"] == QWEN3
    assert load_checkpoint(tmp_path / "ckpt.pt")["model_args"] == QWEN3


def test_saving_does_not_change_the_checkpoint_in_memory(tmp_path):
    checkpoint = {"model": WEIGHTS, "model_args": dict(GPT2)}
    save_checkpoint(tmp_path / "ckpt.pt", checkpoint)
    assert checkpoint["model_args"] == GPT2


# ---- files that cannot be used


def test_a_missing_checkpoint_is_refused_with_the_folder_it_was_looked_for_in(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = rf"ckpt.pt: no such checkpoint in {re.escape(str(tmp_path))}; .*--out_dir"
    assert_refused(words, load_checkpoint, Path("out/ckpt.pt"))


def test_a_damaged_checkpoint_is_refused(tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(b"PK rubbish")
    assert_refused("ckpt.pt: damaged, or not a checkpoint", load_checkpoint, tmp_path / "ckpt.pt")


@pytest.mark.parametrize(
    "content",
    [
        {"model": {}},
        {"model": WEIGHTS, "model_args": [2, 2, 32]},
        {"model": torch.zeros(3), "model_args": SHAPE},
        torch.zeros(3),
    ],
    ids=["no model_args", "model_args are a list", "model is a tensor", "a tensor"],
)
def test_a_file_with_something_else_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "ckpt.pt")
    assert_refused("no dicts model and model_args", load_checkpoint, tmp_path / "ckpt.pt")


def test_objects_other_than_values_and_tensors_are_refused_with_a_remedy(tmp_path):
    path = save(tmp_path / "ckpt.pt", best_val_loss=np.float64(3.5))
    assert_refused(
        r"other than plain values.*numpy.*float\(x\)",
        load_checkpoint,
        path,
    )


def test_sizes_that_are_not_whole_numbers_are_refused(tmp_path):
    sizes = {"n_layer": 2, "n_head": 2.0, "n_embd": 32, "block_size": 48}
    path = save(tmp_path / "ckpt.pt", sizes)
    assert_refused("no whole number for n_head, vocab_size", load_checkpoint, path)


def test_without_an_earlier_checkpoint_resuming_is_not_proposed(tmp_path):
    checkpoint = {"model": WEIGHTS, "model_args": GPT2}
    words = f"ckpt.pt: cannot be written .*; there is no checkpoint in {tmp_path / 'out'} to resume"
    assert_refused(words, save_checkpoint, tmp_path / "out" / "ckpt.pt", checkpoint)


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    checkpoint = {"model": WEIGHTS, "model_args": GPT2}
    save_checkpoint(tmp_path / "ckpt.pt", checkpoint)
    before = (tmp_path / "ckpt.pt").read_bytes()

    def fail(content, file):
        file.write(b"a part")
        raise RuntimeError("PytorchStreamWriter failed writing file data/7: file write failed")

    monkeypatch.setattr(torch, "save", fail)
    words = "ckpt.pt: cannot be written .*file write failed.*--init_from=resume"
    assert_refused(words, save_checkpoint, tmp_path / "ckpt.pt", checkpoint)
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.pt"]


# ---- which checkpoint of a run


def save_two_checkpoints(folder):
    """Save the previous checkpoint, of iteration 1, and the latest, of iteration 2."""
    save(folder / "ckpt-previous.pt", iter_num=1)
    save(folder / "ckpt.pt", iter_num=2)


def test_the_latest_checkpoint_is_loaded(tmp_path, capsys):
    save_two_checkpoints(tmp_path)
    assert load_latest(tmp_path)["iter_num"] == 2
    assert capsys.readouterr().out == ""


def test_the_previous_checkpoint_replaces_a_damaged_one(tmp_path, capsys):
    """The damaged file gets another name, so that the next save does not keep it as the previous
    checkpoint."""
    save_two_checkpoints(tmp_path)
    (tmp_path / "ckpt.pt").write_bytes(b"PK rubbish")
    assert load_latest(tmp_path, set_aside=True)["iter_num"] == 1
    assert f"loading {tmp_path / 'ckpt-previous.pt'} instead" in capsys.readouterr().out
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["ckpt-damaged.pt", "ckpt-previous.pt"]


def test_a_reader_changes_nothing_in_the_folder(tmp_path):
    """sample.py may read while a run writes."""
    save_two_checkpoints(tmp_path)
    (tmp_path / "ckpt.pt").write_bytes(b"PK rubbish")
    before = read_files(tmp_path)
    assert load_latest(tmp_path)["iter_num"] == 1
    assert read_files(tmp_path) == before


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
    ids=["permission", "memory"],
)
def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_a_damaged_one(
    error, tmp_path, monkeypatch
):
    save_two_checkpoints(tmp_path)
    before = read_files(tmp_path)
    load_file = torch.load

    def load_previous_only(path, **options):
        if path.name == "ckpt.pt":
            raise error
        return load_file(path, **options)

    monkeypatch.setattr(torch, "load", load_previous_only)
    with pytest.raises((UserError, RuntimeError), match="allocate memory|Permission denied"):
        load_latest(tmp_path, set_aside=True)
    assert read_files(tmp_path) == before


def test_a_run_with_only_the_previous_checkpoint_can_be_resumed(tmp_path):
    """A process that is killed while it saves may leave this."""
    save_two_checkpoints(tmp_path)
    (tmp_path / "ckpt.pt").unlink()
    assert has_checkpoint(tmp_path)
    assert load_latest(tmp_path)["iter_num"] == 1


def test_a_run_without_a_good_checkpoint_is_refused(tmp_path):
    assert not has_checkpoint(tmp_path)
    assert_refused("ckpt.pt: no such checkpoint", load_latest, tmp_path)
    (tmp_path / "ckpt-previous.pt").write_bytes(b"PK rubbish")
    with pytest.raises(UserError, match="ckpt-previous.pt: damaged"):
        load_latest(tmp_path)


# ---- which run


def test_the_newest_run_is_the_one_with_the_newest_checkpoint(tmp_path, monkeypatch, capsys):
    """Not the newest folder, and only folders called out*."""
    times = {
        "other/ckpt.pt": 3000,
        "out-b/ckpt-previous.pt": 2000,
        "out-c/ckpt.pt": 1000,
    }
    for name, time in times.items():
        path = tmp_path / name
        path.parent.mkdir()
        path.touch()
        os.utime(path, (time, time))
    (tmp_path / "out-without-checkpoint").mkdir()
    monkeypatch.chdir(tmp_path)
    assert newest_run() == "out-b"
    assert capsys.readouterr().out == "out_dir=out-b, the newest run here\n"


def test_without_any_run_the_user_is_asked_for_out_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused("has a checkpoint; .*--out_dir", newest_run)


# ---- models


def test_weights_that_do_not_match_the_shape_are_named():
    weights = dict(WEIGHTS)
    del weights["transformer.h.1.ln_1.weight"]
    weights["transformer.h.2.ln_1.weight"] = torch.zeros(32)
    weights["transformer.ln_f.weight"] = torch.zeros(31)
    faults = (
        "no transformer.h.1.ln_1.weight, an unknown transformer.h.2.ln_1.weight, "
        "transformer.ln_f.weight of shape (31,)"
    )
    words = f"best.pt: its weights do not match its shape ({faults})"
    assert_refused(
        f"^{re.escape(words)}$", load_weights, GPT(GPTConfig(**SHAPE)), weights, "best.pt"
    )


def test_only_the_first_three_faults_of_the_weights_are_named():
    words = r"\(no lm_head.weight, no transformer.h.0.attn.c_attn.bias, .* and 26 more\)"
    assert_refused(words, load_weights, GPT(GPTConfig(**SHAPE)), {}, "best.pt")


def test_a_model_with_a_smaller_context_takes_the_first_position_embeddings():
    model = GPT(GPTConfig(**{**SHAPE, "block_size": 5}))
    load_weights(model, WEIGHTS, "ckpt.pt")
    positions = model.transformer.wpe.weight
    assert torch.equal(positions, WEIGHTS["transformer.wpe.weight"][:5])


@pytest.mark.parametrize("prefix", ["_orig_mod.module.", "module._orig_mod.", ""])
def test_prefixes_and_masks_of_other_programs_are_left_out(prefix, tmp_path):
    """DistributedDataParallel and torch.compile add prefixes; nanoGPT's first versions saved causal
    masks."""
    weights = {prefix + name: value for name, value in WEIGHTS.items()}
    for layer in range(2):
        attention = f"{prefix}transformer.h.{layer}.attn"
        weights[f"{attention}.bias"] = torch.ones(1, 1, 32, 32)
        weights[f"{attention}.masked_bias"] = torch.tensor(-1e4)
    torch.save({"model": weights, "model_args": SHAPE}, tmp_path / "ckpt.pt")
    loaded = load_checkpoint(tmp_path / "ckpt.pt")["model"]
    assert loaded.keys() == WEIGHTS.keys()
    assert all(torch.equal(loaded[name], WEIGHTS[name]) for name in loaded)


@pytest.mark.parametrize(
    "model_args, words",
    [
        ({**SHAPE, "n_head": 5}, "n_embd=32 is not divisible by n_head=5"),
        ({**SHAPE, "flash": True}, "flash"),
        ({**SHAPE, "architecture": "bert"}, "architecture must be gpt2 or qwen3, not bert"),
    ],
    ids=["heads", "an unknown key", "an unknown architecture"],
)
def test_impossible_model_args_are_refused(model_args, words):
    checkpoint = {"model": WEIGHTS, "model_args": model_args}
    assert_refused(
        f"best.pt: its model_args are invalid .*{words}", build_model, checkpoint, "best.pt"
    )


def test_a_vocabulary_smaller_than_gpt2s_is_refused():
    checkpoint = {"model": WEIGHTS, "model_args": SHAPE}
    assert_refused("its vocabulary has 256 ids", build_model, checkpoint, "best.pt")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_linear_layers_are_in_the_number_format_of_generation(dtype):
    shape = {**QWEN3, "vocab_size": 50304}
    weights = GPT(GPTConfig(**shape)).state_dict()
    model = build_model({"model": weights, "model_args": shape}, "best.pt", dtype)
    assert not model.training
    assert model.lm_head.weight.dtype == getattr(torch, dtype)
    assert model.transformer.h[0].mlp.c_fc.weight.dtype == getattr(torch, dtype)
    assert model.transformer.ln_f.weight.dtype == torch.float32
    assert model.transformer.wte.weight.dtype == torch.float32


# ---- does it fit?


@pytest.mark.parametrize("resumes", [True, False])
def test_another_shape_is_named(resumes):
    shape = {**GPT2, "n_layer": 3, "bias": False, "dropout": 0.0}
    words = "out: the checkpoint has n_layer=2, bias=True; set the same values"
    assert_refused(words, check_shape, shape, GPT2, "out", resumes)


def test_another_architecture_is_named():
    words = "the checkpoint has bias=True, architecture=gpt2;"
    assert_refused(words, check_shape, QWEN3, GPT2, "out", True)


def test_only_a_new_run_may_use_shorter_windows():
    shorter = {**GPT2, "block_size": 8}
    check_shape(shorter, GPT2, "ckpt.pt", False)
    assert_refused("block_size=16", check_shape, shorter, GPT2, "out", True)
    longer = {**GPT2, "block_size": 32}
    assert_refused("block_size=16", check_shape, longer, GPT2, "ckpt.pt", False)


@pytest.mark.parametrize("state_per_weight, gigabytes", [(2, 11), (1, 8), (0.5, 6.5)])
def test_space_is_needed_for_three_checkpoints_and_two_sets_of_weights(
    state_per_weight, gigabytes, tmp_path, monkeypatch
):
    parameters = 250_000_000  # 1 GB of weights
    (tmp_path / "ckpt.pt").write_bytes(bytes(1000))  # will be replaced
    usage = namedtuple("usage", "free")
    for missing, fits in ((1000, True), (1001, False)):
        free = int(gigabytes * 1e9) - missing
        monkeypatch.setattr("shutil.disk_usage", lambda folder, free=free: usage(free))
        if fits:
            check_space(tmp_path, parameters, state_per_weight)
        else:
            words = f"the checkpoints need {gigabytes:.1f} GB"
            assert_refused(words, check_space, tmp_path, parameters, state_per_weight)


# ---- optimizers


def make_optimizer(*names):
    """Return AdamW after one step, with one group for each name."""
    torch.manual_seed(0)
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


def test_the_groups_of_nanogpt_have_no_names():
    saved = make_optimizer("matrices", "vectors").state_dict()
    for group in saved["param_groups"]:
        del group["name"]
    load_optimizers(
        {"optimizer": make_optimizer("matrices", "vectors")}, {"optimizer": saved}, "out"
    )


@pytest.mark.parametrize(
    "names", [("matrices",), ("matrices", "vectors", "head"), ("matrices", "head")]
)
def test_other_groups_than_the_saved_ones_are_refused(names):
    saved = make_optimizer("matrices", "vectors").state_dict()
    words = (
        "ckpt.pt: its optimizer state belongs to other settings; "
        "change --optimizer, --embedding_lr and --head_lr back"
    )
    optimizers = {"optimizer": make_optimizer(*names)}
    assert_refused(words, load_optimizers, optimizers, {"optimizer": saved}, "out")


def test_a_checkpoint_without_an_optimizer_cannot_be_resumed():
    words = (
        "ckpt.pt: cannot be resumed, because it has no optimizer state; "
        "start a new run from its weights: --init_from=.*ckpt.pt --out_dir=NEW"
    )
    assert_refused(words, load_optimizers, {"optimizer": make_optimizer("matrices")}, {}, "out")
