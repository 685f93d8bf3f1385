"""train.py at its door: what a run prints and leaves, how it is resumed, what it refuses."""

import errno
import functools
import json
import math
import os
import re
import shutil
import signal
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

import train as train_script
from helpers import (
    MUON,
    TINY,
    assert_one_sentence,
    gpt2_of,
    load,
    losses,
    make_random_bins,
    metrics,
    run_here,
    train_here,
)
from onenight.device import supports_bfloat16
from onenight.schedule import RETRY_S, Clock
from onenight.trainer import Trainer

NANOGPT_FIELDS = {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"}
SHORT = {"max_iters": 8, "eval_interval": 4, "eval_tokens": 512}


@pytest.fixture(autouse=True, scope="module")
def no_pictures(finished_run):
    """Draw no loss.png from here on, which takes longer than all else in short runs."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("onenight.records.draw_losses", lambda *arguments: None)
        yield


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of a finished run's folder, to be resumed and changed."""
    return shutil.copytree(finished_run, tmp_path / "run")


def train_well(bins, out_dir, **changes):
    """Train with TINY and `changes`, which must succeed. Return what was printed."""
    result = train_here(bins, out_dir, **changes)
    assert result.returncode == 0, result.stderr
    return result.stdout


def steps_of(out_dir):
    """Return the records of single iterations."""
    return [record for record in metrics(out_dir) if "train_loss" in record]


def evaluations_of(out_dir):
    """Return the records of evaluations."""
    return [record for record in metrics(out_dir) if "val_loss" in record]


def plain(value):
    """Return a part of a checkpoint with its tensors as lists, which == compares to the bit."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return value


@torch.no_grad()
def loss_of(model, bins):
    """Return the mean loss of transformers' model over every token of val.bin, in windows of 32."""
    ids = torch.from_numpy(np.fromfile(bins / "val.bin", "<u2").astype(np.int64))
    total = 0.0
    for start in range(0, len(ids) - 1, 32):
        window = ids[start : start + 33]
        logits = model(window[None, :-1]).logits[0]
        total += F.cross_entropy(logits, window[1:], reduction="sum").item()
    return total / (len(ids) - 1)


# -----------------------------------------------------------------------------
# A whole run


def test_compiled_or_not_a_run_learns_the_same_and_prints_the_lines_of_nanogpt(bins, tmp_path):
    torch._dynamo.reset()  # forget what other tests have compiled
    printed = train_well(bins, tmp_path / "compiled", n_layer=1, compile=True)
    train_well(bins, tmp_path / "eager", n_layer=1)
    assert re.match(r"device: cpu, float32, compiled\n", printed)
    lines = re.findall(r"^iter (\d+): loss ([\d.]+), time [\d.]+ms", printed, re.M)
    assert [int(iter_num) for iter_num, _ in lines] == list(range(45))
    assert float(lines[0][1]) == pytest.approx(math.log(256), abs=0.1)  # nearly uniform at first
    assert float(lines[-1][1]) < 2.5  # of which the noise in the data costs 0.9
    evaluations = re.findall(r"^step (\d+): train loss [\d.]+, val loss [\d.]+$", printed, re.M)
    assert [int(iter_num) for iter_num in evaluations] == [0, 20, 40, 45]
    for compiled, eager in zip(
        losses(tmp_path / "compiled"), losses(tmp_path / "eager"), strict=True
    ):
        # But for float32 rounding, which grows over 45 iterations with a high learning rate.
        assert compiled == pytest.approx(eager, rel=1e-3)


def test_the_checkpoint_is_that_of_nanogpt(finished_run):
    checkpoint = load(finished_run)
    assert checkpoint.keys() >= NANOGPT_FIELDS
    assert checkpoint["iter_num"] == 45
    shape = {key: TINY[key] for key in ("n_layer", "n_head", "n_embd", "block_size")}
    others = {"bias": False, "dropout": 0.0, "vocab_size": 256}
    assert checkpoint["model_args"] == {**shape, **others}
    names = set(gpt2_of(checkpoint).state_dict())
    assert {name for name in names if not name.endswith(".bias")} == set(checkpoint["model"])
    assert load(finished_run, "best.pt").keys() == NANOGPT_FIELDS - {"optimizer"} | {"tokens"}


def test_the_val_loss_is_that_of_transformers_on_every_token(finished_run, bins):
    model = gpt2_of(load(finished_run)).eval()
    found = evaluations_of(finished_run)[-1]["val_loss"]
    assert found == pytest.approx(loss_of(model, bins), rel=1e-5)  # float32


def test_the_files_and_the_metrics_of_a_run(finished_run):
    files = {"ckpt.pt", "best.pt", "metrics.jsonl", "loss.png", "samples.txt", "index.html"}
    assert {path.name for path in finished_run.iterdir()} == files
    steps = steps_of(finished_run)
    evaluations = evaluations_of(finished_run)
    assert [record["iter"] for record in steps] == list(range(45))
    assert [record["iter"] for record in evaluations] == [0, 20, 40, 45]
    for record in [*steps, *evaluations]:
        assert record["tokens"] == record["iter"] * 2 * 8 * 32
    elapsed = [record["elapsed_s"] for record in metrics(finished_run)]
    assert elapsed == sorted(elapsed)
    # Warmup, peak, half way along the cosine.
    rates = [record["lr"] for record in steps]
    assert [rates[i] for i in (0, 5, 25)] == pytest.approx([1e-2 / 6, 1e-2, 1e-3 + 9e-3 / 2])


def test_a_checkpoint_is_saved_every_ten_minutes_and_tried_again_after_one(
    bins, tmp_path, monkeypatch
):
    seconds = []  # each reading of the clock is five seconds later
    attempts = []

    def now():
        seconds.append(5.0 * len(seconds))
        return seconds[-1]

    def replace(source, target, real=os.replace):
        if target.name == "ckpt.pt":
            attempts.append(seconds[-1])
            if len(attempts) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(train_script, "Clock", functools.partial(Clock, now=now))
    monkeypatch.setattr(os, "replace", replace)
    printed = train_well(bins, tmp_path, eval_interval=10**6, max_iters=80, eval_tokens=512)
    assert os.strerror(errno.ENOSPC) in printed
    # An iteration reads the clock up to ten times.
    gaps = [after - before for before, after in pairwise(attempts[:4])]
    assert gaps == [pytest.approx(seconds + 25, abs=25) for seconds in (600, RETRY_S, 600)]


def test_best_weights_that_could_not_be_saved_are_not_counted_and_the_next_are(
    bins, tmp_path, monkeypatch
):
    """At the evaluations of iterations 2 and 6, of 2, 4 and 6."""
    attempts = []

    def replace(source, target, real=os.replace):
        if target.name == "best.pt":
            attempts.append(target.exists() and load(tmp_path, "best.pt")["iter_num"])
            if len(attempts) != 2:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    printed = train_well(bins, tmp_path, max_iters=6, eval_interval=2, eval_tokens=512)
    assert printed.count(str(tmp_path / "best.pt")) == 2
    assert attempts == [False, False, 4]
    assert load(tmp_path, "best.pt")["iter_num"] == load(tmp_path)["best_iter"] == 4
    val_losses = {record["iter"]: record["val_loss"] for record in evaluations_of(tmp_path)}
    assert load(tmp_path)["best_val_loss"] == val_losses[4] > val_losses[6]


# -----------------------------------------------------------------------------
# Settings that change how it is computed


def test_bfloat16_learns(bins, tmp_path):
    if not supports_bfloat16(torch.device("cpu")):
        pytest.skip("this CPU has no bfloat16 instructions")
    train_well(bins, tmp_path, dtype="bfloat16", max_iters=20, eval_tokens=512)
    assert load(tmp_path)["config"]["dtype"] == "bfloat16"
    assert metrics(tmp_path)[-1]["val_loss"] < 5


@pytest.fixture
def float16_on_cpu(monkeypatch):
    """Let runs compute in float16, and begin with a loss scale that is too large."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**29)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    monkeypatch.setattr("onenight.device.choose_dtype", lambda dtype, device: dtype)


def test_float16_begins_with_overflows_until_its_scale_fits(bins, tmp_path, float16_on_cpu):
    """More of them in a row than another run may skip."""
    train_well(bins, tmp_path, dtype="float16", max_iters=20, eval_tokens=512)
    assert 5 < load(tmp_path)["skipped_iters"] < 20
    assert metrics(tmp_path)[-1]["val_loss"] < 5


def test_muon_learns_and_the_rate_of_each_group_is_recorded(bins, tmp_path):
    train_well(bins, tmp_path, **MUON, eval_tokens=512)
    assert load(tmp_path)["model_args"]["architecture"] == "qwen3"
    last = steps_of(tmp_path)[-1]
    assert last["lr_embedding"] == pytest.approx(15 * last["lr"])
    assert last["train_loss"] < 4  # the uniform distribution has 5.5


# -----------------------------------------------------------------------------
# When a run saves and stops

CONSTANT = {"learning_rate": 0.0, "eval_tokens": 512}  # val loss never improves


def test_a_learning_rate_below_min_lr_is_never_raised(bins, tmp_path):
    train_well(bins, tmp_path, **{**SHORT, "learning_rate": 3e-5, "min_lr": 6e-5})
    rates = [record["lr"] for record in metrics(tmp_path) if "lr" in record]
    assert max(rates) == rates[-1] == 3e-5


def test_without_always_save_checkpoint_only_a_better_evaluation_saves(bins, tmp_path):
    settings = {**SHORT, "always_save_checkpoint": False}
    better = train_well(bins, tmp_path / "better", **settings)
    assert better.count("saving checkpoint to") == 3  # at 4 and 8, and at the end
    never_better = train_well(bins, tmp_path / "never", **{**settings, **CONSTANT})
    assert never_better.count("saving checkpoint to") == 1  # at the end


def test_a_plateau_ends_the_run_also_when_it_is_resumed(bins, tmp_path):
    changes = {**CONSTANT, "eval_interval": 5, "early_stop_patience": 3}
    for init_from in ("scratch", "resume"):
        train_well(bins, tmp_path, **changes, init_from=init_from)
        assert load(tmp_path)["iter_num"] == 15


def test_a_better_evaluation_ends_the_patience_anew(bins, tmp_path):
    train_well(bins, tmp_path, **SHORT, early_stop_patience=1)
    assert load(tmp_path)["iter_num"] == 8


# -----------------------------------------------------------------------------
# --eval_only


def test_eval_only_prints_the_losses_and_writes_nothing(finished_run, bins):
    """Without dropout, and in the shape of the checkpoint."""
    before = {path.name: path.stat().st_mtime_ns for path in finished_run.iterdir()}
    for init_from, n_layer in (("resume", 2), (finished_run / "best.pt", 3)):
        changes = {"init_from": init_from, "n_layer": n_layer, "dropout": 0.5}
        printed = train_well(bins, finished_run, **changes, eval_only=True)
        (val_loss,) = re.findall(r"^step .* val loss ([\d.]+)$", printed, re.M)
        expected = evaluations_of(finished_run)[-1]["val_loss"]
        assert float(val_loss) == pytest.approx(expected, abs=1e-4)  # as printed
    assert {path.name: path.stat().st_mtime_ns for path in finished_run.iterdir()} == before


# -----------------------------------------------------------------------------
# Resuming


@pytest.fixture
def stop_at(monkeypatch):
    """Return stop_at(iter_num), which makes a run get SIGTERM in that iteration."""
    accumulate = Trainer.accumulate

    def stop_at(iter_num):
        def accumulate_and_stop(trainer):
            if trainer.progress.iter_num == iter_num:
                signal.raise_signal(signal.SIGTERM)
            return accumulate(trainer)

        monkeypatch.setattr(Trainer, "accumulate", accumulate_and_stop)

    return stop_at


@pytest.mark.parametrize(
    "settings",
    [{}, {**MUON, "warmdown": 0.5}, {"dtype": "float16"}, {**MUON, "int8": True}],
    ids=["adamw", "muon", "float16", "int8"],
)
def test_a_run_that_is_stopped_and_resumed_is_that_of_an_undisturbed_one_to_the_bit(
    bins, tmp_path, stop_at, float16_on_cpu, settings
):
    settings = {**SHORT, "dtype": "float32", "dropout": 0.1, "max_iters": 10, **settings}
    train_well(bins, tmp_path / "whole", **settings)
    out_dir = tmp_path / "parts"
    for iter_num in (1, 4, 7, 8):  # 4 and 8 are evaluated
        stop_at(iter_num)
        stopped = train_here(bins, out_dir, **settings, init_from="auto")
        assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
        assert load(out_dir)["iter_num"] == iter_num
    stop_at(None)
    train_well(bins, out_dir, **settings, init_from="auto")

    assert losses(out_dir) == losses(tmp_path / "whole")
    ignored = {"config", "elapsed_s", "begun_s"}
    for name in ("ckpt.pt", "best.pt"):
        whole = load(tmp_path / "whole", name)
        parts = load(out_dir, name)
        assert whole.keys() == parts.keys()
        for key in whole.keys() - ignored:
            assert plain(parts[key]) == plain(whole[key]), (name, key)


def test_a_run_is_finished_once_and_can_be_extended(run, bins):
    before = (run / "ckpt.pt").read_bytes()
    printed = train_well(bins, run, init_from="resume")
    assert "--max_iters" in printed
    assert "iter 45:" not in printed
    assert (run / "ckpt.pt").read_bytes() == before
    printed = train_well(bins, run, init_from="auto", max_iters=48, weight_decay=0.2)
    assert re.findall("^changed since: (.*)", printed, re.M) == [
        "max_iters 45 -> 48",
        "weight_decay 0.1 -> 0.2",
    ]
    assert re.findall(r"^iter (\d+):", printed, re.M) == ["45", "46", "47"]
    assert [record["iter"] for record in steps_of(run)] == list(range(48))


def test_settings_have_priority_over_the_checkpoint(run, bins):
    before = load(run)["model"]
    changes = {"learning_rate": 1e-9, "weight_decay": 1e8, "max_iters": 46, "decay_lr": False}
    train_well(bins, run, init_from="resume", **changes)
    name = "transformer.h.0.mlp.c_fc.weight"
    # The learning rate itself moves nothing, and weight decay takes away 1e-9 * 1e8 of the weights.
    expected = 0.9 * before[name]
    torch.testing.assert_close(load(run)["model"][name], expected, rtol=1e-4, atol=1e-6)


def test_the_tokens_are_true_after_a_resume_with_another_batch_size(run, bins):
    train_well(bins, run, init_from="resume", gradient_accumulation_steps=4, max_iters=50)
    tokens = [record["tokens"] for record in steps_of(run)]
    assert tokens == [*range(0, 45 * 512, 512), *range(45 * 512, 45 * 512 + 5 * 1024, 1024)]
    assert load(run)["position"] == 45 * 16 + 5 * 32


def test_other_data_are_refused_unless_they_are_allowed(run, bins, tmp_path):
    data = shutil.copytree(bins, tmp_path / "data")
    (data / "meta.json").write_text(json.dumps({"vocab_size": 250, "train": {"sha256": "other"}}))
    changes = {"init_from": "resume", "max_iters": 50}
    before = (run / "ckpt.pt").read_bytes()
    assert_one_sentence(train_here(data, run, **changes), "--allow_new_data")
    assert (run / "ckpt.pt").read_bytes() == before
    train_well(data, run, **changes, allow_new_data=True)
    assert load(run)["position"] == 5 * 16  # the new data are read from their beginning


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"block_size": 16}, "block_size=32"),
        (MUON, "architecture=gpt2"),
        ({"optimizer": "muon", "embedding_lr": 0.01}, "--init_from=FILE.pt"),
        ({"embedding_lr": 0.01}, "--init_from=FILE.pt"),
    ],
    ids=["windows", "architecture", "optimizer", "groups"],
)
def test_other_shapes_and_optimizers_are_not_resumed(changes, word, run, bins):
    before = (run / "ckpt.pt").read_bytes()
    refused = train_here(bins, run, init_from="resume", max_iters=50, **changes)
    assert_one_sentence(refused, word)
    assert (run / "ckpt.pt").read_bytes() == before


@pytest.mark.parametrize("init_from", ["scratch", "best.pt"])
def test_an_earlier_run_is_not_overwritten(init_from, run, bins):
    before = (run / "ckpt.pt").read_bytes()
    init_from = run / init_from if init_from.endswith(".pt") else init_from
    assert_one_sentence(train_here(bins, run, init_from=init_from), "--init_from=resume")
    assert (run / "ckpt.pt").read_bytes() == before


@pytest.mark.parametrize("init_from", ["resume", "auto"])
def test_a_damaged_checkpoint_is_refused_and_kept(init_from, bins, tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(b"a night's work")
    assert_one_sentence(train_here(bins, tmp_path, init_from=init_from), "ckpt.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]
    assert (tmp_path / "ckpt.pt").read_bytes() == b"a night's work"


# -----------------------------------------------------------------------------
# Weights to start from


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


def test_auto_begins_with_what_the_config_file_names_and_then_resumes(gpt2, bins, tmp_path):
    folder, model = gpt2
    config = tmp_path / "config.py"
    settings = {**TINY, "bias": True, "init_from": str(folder), "learning_rate": 1e-3}
    settings["n_layer"] = 3  # the folder's 2 count, also when the run is resumed
    config.write_text("\n".join(f"{key} = {value!r}" for key, value in settings.items()))
    out_dir = tmp_path / "out"
    arguments = [config, f"--dataset={bins}", f"--out_dir={out_dir}", "--init_from=auto"]
    first = run_here(train_script, *arguments, "--decay_lr=False")
    assert first.returncode == 0, first.stderr
    assert f"init_from=auto: {folder}" in first.stdout
    before, *_, after = evaluations_of(out_dir)
    # GELU and its approximation by tanh, which transformers' GPT-2 has, differ by 0.0005 at most.
    assert before["val_loss"] == pytest.approx(loss_of(model, bins), abs=2e-3)
    assert after["val_loss"] < before["val_loss"] - 1
    assert load(out_dir)["model_args"]["vocab_size"] == 300
    assert load(out_dir)["model_args"]["block_size"] == 32  # of the 48 positions
    assert load(out_dir)["model_args"]["n_layer"] == 2

    second = run_here(train_script, *arguments, "--max_iters=47")
    assert second.returncode == 0, second.stderr
    assert "init_from=auto: resume" in second.stdout
    assert re.findall(r"^iter (\d+):", second.stdout, re.M) == ["45", "46"]


def test_a_checkpoint_of_nanogpt_is_trained_further_but_not_resumed(bins, tmp_path):
    """With torch.compile's prefix, a tensor as loss, and an optimizer whose groups have no
    names."""
    train_well(bins, tmp_path / "ours", **SHORT, bias=True)
    ours = load(tmp_path / "ours")
    for group in ours["optimizer"]["param_groups"]:
        del group["name"]
    nanogpt = {key: ours[key] for key in NANOGPT_FIELDS}
    nanogpt["model"] = {f"_orig_mod.{name}": value for name, value in ours["model"].items()}
    nanogpt["best_val_loss"] = torch.tensor(ours["best_val_loss"])
    (tmp_path / "nanogpt").mkdir()
    source = tmp_path / "nanogpt" / "ckpt.pt"
    torch.save(nanogpt, source)

    val_loss = evaluations_of(tmp_path / "ours")[-1]["val_loss"]
    train_well(bins, tmp_path / "new", init_from=source, **SHORT)
    first, *_, last = evaluations_of(tmp_path / "new")
    assert first["iter"] == 0
    assert first["val_loss"] == val_loss > last["val_loss"]
    changes = {"init_from": "resume", "bias": True, "max_iters": 20}
    refused = train_here(bins, tmp_path / "nanogpt", **changes)
    assert_one_sentence(refused, "--init_from=FILE.pt")


def test_weights_that_are_not_finite_are_never_a_start(run, bins, tmp_path):
    checkpoint = load(run)
    checkpoint["model"]["transformer.h.1.attn.c_attn.weight"][5, 7] = math.nan
    torch.save(checkpoint, run / "ckpt.pt")
    out_dir = tmp_path / "new"
    for folder, changes in (
        (run, {"init_from": "resume", "max_iters": 50}),
        (run, {"init_from": "resume", "eval_only": True}),
        (out_dir, {"init_from": run / "ckpt.pt"}),
    ):
        refused = train_here(bins, folder, **changes)
        assert_one_sentence(refused, "transformer.h.1.attn.c_attn.weight")
    assert not list(out_dir.glob("*"))


def test_a_new_run_takes_the_shape_of_its_weights(gpt2, bins, tmp_path):
    """But its own dropout."""
    changes = {"n_layer": 3, "n_head": 4, "block_size": 64, "dropout": 0.2}
    train_well(bins, tmp_path, **SHORT, init_from=gpt2[0], **changes)
    shape = {"n_layer": 2, "n_head": 2, "bias": True, "block_size": 48, "dropout": 0.2}
    assert load(tmp_path)["model_args"].items() >= shape.items()
    assert load(tmp_path)["config"].items() >= shape.items()


# -----------------------------------------------------------------------------
# Samples

SMALL = {
    "n_layer": 1,
    "n_embd": 8,
    "batch_size": 2,
    "dropout": 0.1,
    "max_iters": 5,
    "eval_tokens": 64,
}


@pytest.fixture(scope="module")
def text_bins(tmp_path_factory):
    """Bins with random ids of GPT-2's vocabulary, which samples need."""
    return make_random_bins(tmp_path_factory.mktemp("text"), vocab_size=50257, n_tokens=400)


def test_each_evaluation_writes_a_sample_also_in_a_resumed_run(text_bins, tmp_path, stop_at):
    printed = train_well(text_bins, tmp_path / "whole", **SMALL, eval_interval=2)
    assert load(tmp_path / "whole")["model_args"]["vocab_size"] == 50304  # padded
    evaluations = evaluations_of(tmp_path / "whole")
    assert [record["iter"] for record in evaluations] == [0, 2, 4, 5]
    text = (tmp_path / "whole" / "samples.txt").read_text(encoding="utf-8")
    for line, record in zip(text.splitlines(), evaluations, strict=True):
        assert line == "iter {iter}, val loss {val_loss:.4f}: {sample}".format(**record)
        assert f"sample: {record['sample']}\n" in printed
        assert len(record["sample"]) > 20

    stop_at(3)
    train_here(text_bins, tmp_path / "parts", **SMALL, eval_interval=2)
    stop_at(None)
    train_well(text_bins, tmp_path / "parts", **SMALL, eval_interval=2, init_from="resume")
    assert (tmp_path / "parts" / "samples.txt").read_text(encoding="utf-8") == text


def test_neither_evaluations_nor_samples_nor_one_that_fails_change_the_training(
    text_bins, tmp_path, monkeypatch
):
    train_well(text_bins, tmp_path / "rare", **SMALL, eval_interval=100)
    train_well(text_bins, tmp_path / "often", **SMALL, eval_interval=2)
    monkeypatch.setattr("onenight.trainer.begin_document", lambda *arguments: 1 / 0)
    printed = train_well(text_bins, tmp_path / "failed", **SMALL, eval_interval=2)
    assert printed.count("division by zero") == 6  # the plan's two and the evaluations'
    expected = load(tmp_path / "rare")["model"]
    for name in ("often", "failed"):
        weights = load(tmp_path / name)["model"]
        assert all(torch.equal(weights[key], expected[key]) for key in expected), name


# -----------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"dataset": "no/such/data"}, "train.bin"),
        ({"init_from": "resume"}, "ckpt.pt"),
        ({"init_from": "no/such/folder"}, "no/such/folder"),
        ({"device": "cuda:77"}, "cuda:77"),
        ({"n_head": 5}, "n_head=5"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_leaves_no_files(changes, word, bins, tmp_path):
    assert_one_sentence(train_here(bins, tmp_path, **changes), word)
    assert not list(tmp_path.iterdir())
