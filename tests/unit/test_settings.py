"""settings.py: settings that contradict one another, and what a run will really use."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from configurator import UserError, configure
from onenight.training.settings import TrainConfig, micro_batch_size, resolve

MUON = {"optimizer": "muon", "embedding_lr": 0.3}


def test_muon_needs_the_learning_rates_of_what_adamw_updates():
    with pytest.raises(ValueError, match="'muon' also needs embedding_lr and head_lr, for"):
        TrainConfig(architecture="qwen3", optimizer="muon")
    with pytest.raises(ValueError, match="'muon' also needs head_lr, for"):
        TrainConfig(architecture="qwen3", **MUON)
    TrainConfig(architecture="qwen3", **MUON, head_lr=0.01)
    TrainConfig(architecture="gpt2", **MUON)  # its head is the embedding


def test_an_impossible_shape_is_refused_with_the_flags():
    with pytest.raises(UserError, match="n_embd=512 is not divisible by n_head=12"):
        configure(TrainConfig, ["--n_embd=512"], "")


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
    "dataset, existing, write",
    [
        ("data/t/train.bin", [], "data/t"),
        ("t/train.bin", ["data/t/train.bin"], "data/t"),
        ("t/val.bin", [], "data/t"),
        ("data/t/meta.json", ["data/t/meta.json", "data/t/train.bin"], "data/t"),
        ("elsewhere/train.bin", ["elsewhere/train.bin"], "HERE/elsewhere"),
        ("train.bin", ["train.bin"], "HERE"),
        ("/somewhere/t/train.bin", [], "/somewhere/t"),
        ("a/mine.parquet", [], "mine"),
        ("input.txt", ["input.txt"], "NAME"),
    ],
)
def test_a_file_as_dataset_is_refused_with_the_folder_to_write(
    dataset, existing, write, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for file in existing:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()
    with pytest.raises(UserError, match="dataset takes the folder of train.bin") as refusal:
        configure(TrainConfig, [f"--dataset={dataset}"], "")
    message = str(refusal.value)
    write = write.replace("HERE", str(tmp_path))
    assert message.endswith(f"write --dataset={write}")
    if dataset.endswith(".parquet"):
        assert f"python prepare_single_parquet.py {dataset} --out_dir=data/mine, then" in message


@pytest.mark.parametrize("dataset", ["mine.bin", "data/mine.bin"])
def test_a_folder_may_have_any_name(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data/mine.bin").mkdir(parents=True)
    assert TrainConfig(dataset=dataset).data_dir == Path("data/mine.bin")


def test_resolving_replaces_auto_by_what_the_run_will_use(monkeypatch):
    monkeypatch.setattr("onenight.training.settings.compile_works", lambda device: False)
    config = TrainConfig(dtype="auto", compile=True)
    resolved = resolve(config, "cpu")
    assert resolved == replace(config, device="cpu", dtype="float32", compile=False)
    assert config == TrainConfig(dtype="auto", compile=True)  # unchanged


@pytest.mark.parametrize("card", [{"plan_vram_gb": 12}, {"plan_card": "RTX 4070"}])
def test_a_plan_for_another_card_is_resolved_as_if_that_supported_everything(card, monkeypatch):
    monkeypatch.setattr("onenight.training.settings.compile_works", lambda device: 1 / 0)
    resolved = resolve(TrainConfig(**card, plan=True), "cpu")
    assert resolved.dtype == "bfloat16"
    assert resolved.compile
    narrow = resolve(TrainConfig(**card, plan=True, dtype="float16"), "cpu")
    assert narrow.dtype == "float16"


@pytest.mark.parametrize("flag", ["--plan_vram_gb=12", "--plan_card=RTX 4070"])
def test_a_run_is_not_planned_for_another_card_than_its_own(flag):
    with pytest.raises(UserError, match="are for a plan: add --plan"):
        configure(TrainConfig, [flag], "")


def test_the_shape_of_a_checkpoint_is_taken_over_except_for_a_smaller_block_size():
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "dropout": 0.1, "bias": True}
    model_args = {**shape, "block_size": 64, "vocab_size": 256, "architecture": "gpt2"}
    config = TrainConfig(block_size=1024, seed=7).with_shape_of(model_args)
    assert config == TrainConfig(**shape, block_size=64, seed=7)
    config = TrainConfig(block_size=32).with_shape_of(model_args)
    assert asdict(config)["block_size"] == 32


@pytest.mark.parametrize(
    "windows, world_size, limit, size",
    [(16, 1, 8, 8), (16, 1, 7, 4), (16, 4, 8, 4), (18, 1, 5, 3), (7, 1, 5, 1), (12, 4, 12, 3)],
)
def test_the_micro_batch_is_the_largest_that_divides_a_processes_windows(
    windows, world_size, limit, size
):
    assert micro_batch_size(windows, world_size, limit) == size


@pytest.mark.parametrize("windows, world_size", [(16, 3), (2, 4)])
def test_an_iteration_that_cannot_be_shared_equally_is_refused(windows, world_size):
    words = f"{windows} windows .* cannot be shared by {world_size} processes"
    with pytest.raises(UserError, match=words):
        micro_batch_size(windows, world_size, limit=8)
