"""train.py: its output and files, what it refuses, and its arithmetic from end to end."""

import json
import math
import re
import shutil
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import train as train_script
from helpers import (
    MUON,
    assert_one_sentence,
    flags_of,
    gpt2_of,
    load,
    losses,
    make_bins,
    make_run,
    make_trainer,
    metrics,
    train,
    train_by_clock,
    train_here,
)
from onenight.system.device import supports_bfloat16

NANOGPT_FIELDS = {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"}


@pytest.fixture(scope="session")
def compiled_run(bins, tmp_path_factory):
    """A whole run with torch.compile, in a process of its own: its folder, and what it printed."""
    out_dir = tmp_path_factory.mktemp("compiled") / "new"
    result = train(bins, out_dir, compile=True)
    assert result.returncode == 0, result.stderr
    return out_dir, result.stdout


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of a finished run's folder, to be resumed and changed."""
    return shutil.copytree(finished_run, tmp_path / "run")


def steps_of(out_dir):
    """Return the records of single iterations."""
    return [record for record in metrics(out_dir) if "train_loss" in record]


def evaluations_of(out_dir):
    """Return the records of evaluations."""
    return [record for record in metrics(out_dir) if "val_loss" in record]


def summary_of(stdout):
    """Return the `key: value` lines that end a run."""
    lines = [line for line in stdout.splitlines() if re.match("[a-z_ ]+: ", line)]
    return dict(line.split(": ", 1) for line in lines)


# -----------------------------------------------------------------------------
# A whole run


def test_a_run_learns_and_prints_the_lines_of_nanogpt(compiled_run):
    _, stdout = compiled_run
    printed = re.findall(r"^iter \d+: loss ([\d.]+), time [\d.]+ms, grad norm ", stdout, re.M)
    train_losses = [float(loss) for loss in printed]
    assert len(train_losses) == 45
    assert train_losses[0] == pytest.approx(math.log(256), abs=0.1)  # nearly uniform at first
    assert train_losses[-1] < 2.5  # of which the noise in the data costs 0.9
    evaluations = re.findall(r"^step (\d+): train loss [\d.]+, val loss [\d.]+$", stdout, re.M)
    assert [int(iter_num) for iter_num in evaluations] == [0, 20, 40, 45]


def test_a_run_prints_its_device_its_speed_and_its_picture(compiled_run):
    out_dir, stdout = compiled_run
    assert re.match(r"device: cpu.*, float32, compiled\n", stdout)
    # From the third iteration on, the speed is known.
    assert re.search(r"^iter 2: .* tokens/s, mfu .*, ETA .*, done at \d\d:\d\d", stdout, re.M)
    assert not re.search(r"^iter [01]: .*ETA", stdout, re.M)
    assert f"loss picture: {out_dir / 'loss.png'}\n" in stdout


def test_the_checkpoint_is_that_of_nanogpt(compiled_run):
    checkpoint = load(compiled_run[0])
    assert checkpoint.keys() >= NANOGPT_FIELDS
    assert checkpoint["iter_num"] == 45
    assert checkpoint["model_args"] == {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "block_size": 32,
        "bias": False,
        "dropout": 0.0,
        "vocab_size": 256,
    }
    names = set(gpt2_of(checkpoint).state_dict())
    assert {name for name in names if not name.endswith(".bias")} == set(checkpoint["model"])


def test_the_metrics_of_a_run(compiled_run):
    out_dir, _ = compiled_run
    records = metrics(out_dir)
    steps = steps_of(out_dir)
    assert [record["iter"] for record in steps] == list(range(45))
    assert [record["iter"] for record in evaluations_of(out_dir)] == [0, 20, 40, 45]
    assert all(record["tokens"] == record["iter"] * 2 * 8 * 32 for record in records)
    assert steps[-1]["tokens_per_s"] > 0
    elapsed = [record["elapsed_s"] for record in records]
    assert elapsed == sorted(elapsed)


def test_the_learning_rate_is_warmed_up_and_decays_along_a_cosine(compiled_run):
    out_dir, _ = compiled_run
    rates = [record["lr"] for record in steps_of(out_dir)]
    assert rates[0] == pytest.approx(1e-2 / 6)
    assert rates[5] == pytest.approx(1e-2)  # the peak, after five iterations of warmup
    assert rates[25] == pytest.approx(1e-3 + 9e-3 / 2)  # half way
    assert evaluations_of(out_dir)[-1]["lr"] == pytest.approx(1e-3)


def test_the_val_loss_is_that_of_transformers_on_every_token(compiled_run, bins):
    out_dir, stdout = compiled_run
    model = gpt2_of(load(out_dir)).eval()
    ids = torch.from_numpy(np.fromfile(bins / "val.bin", "<u2").astype(np.int64))
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 32):
            window = ids[start : start + 33]
            logits = model(window[None, :-1]).logits[0]
            total += F.cross_entropy(logits, window[1:], reduction="sum").item()
    printed = float(re.findall(r"val loss ([\d.]+)$", stdout, re.M)[-1])
    assert printed == pytest.approx(total / (len(ids) - 1), abs=1e-4)  # of the four digits printed


def test_the_gradient_norm_is_printed_and_recorded(bins, tmp_path):
    result = train_here(bins, tmp_path, max_iters=1)
    trainer = make_trainer(bins)
    for x, y in trainer.micro_batches():
        _, loss = trainer.model(x, y)
        (loss / 2).backward()
    squares = [parameter.grad.double().square().sum() for parameter in trainer.model.parameters()]
    expected = math.sqrt(sum(squares))
    (record,) = steps_of(tmp_path)
    assert record["grad_norm"] == pytest.approx(expected, rel=1e-5)
    assert f", grad norm {expected:.2f}" in result.stdout


def test_a_gradient_norm_that_is_not_finite_is_not_recorded(bins, tmp_path, monkeypatch):
    """JSON has no NaN."""
    monkeypatch.setattr("train.clip_and_update", lambda trainer, loss: math.nan)
    assert train_here(bins, tmp_path, max_iters=1).returncode == 0
    (record,) = steps_of(tmp_path)
    assert "grad_norm" not in record


def test_the_summary_is_that_of_the_run(bins, tmp_path):
    summary = summary_of(train_here(bins, tmp_path).stdout)
    assert summary["iterations"] == "45"
    assert summary["tokens"] == f"{45 * 512:,}"
    assert summary["skipped_iterations"] == "0"
    assert float(summary["epochs"]) == pytest.approx(45 * 16 / (19_999 // 32 - 1), abs=0.01)
    val_losses = {record["iter"]: record["val_loss"] for record in evaluations_of(tmp_path)}
    best = min(val_losses, key=val_losses.get)
    assert summary["best_val_loss"] == f"{val_losses[best]:.4f} at iter {best}"
    assert load(tmp_path, "best.pt")["iter_num"] == best


class SlowClock:
    """A clock that advances by so many seconds at each reading."""

    def __init__(self, seconds):
        self.step = seconds
        self.seconds = 0.0

    def now(self):
        self.seconds += self.step
        return self.seconds


def test_a_line_is_printed_after_thirty_seconds_whatever_log_interval_is(bins, tmp_path):
    flags = flags_of(bins, tmp_path, {"log_interval": 10**6})
    result = train_by_clock(SlowClock(1.0).now, *flags)
    assert result.returncode == 0, result.stderr
    iters = [record["iter"] for record in steps_of(tmp_path)]
    assert iters[0] == 0
    assert 2 < len(iters) < 30
    times = [record["elapsed_s"] for record in steps_of(tmp_path)]
    gaps = [after - before for before, after in pairwise(times)]
    assert all(30 <= gap < 60 for gap in gaps)


def test_a_checkpoint_is_saved_every_ten_minutes(bins, tmp_path):
    flags = flags_of(bins, tmp_path, {"eval_interval": 10**6})
    result = train_by_clock(SlowClock(60.0).now, *flags)
    assert result.returncode == 0, result.stderr
    minutes = load(tmp_path)["elapsed_s"] / 60
    saves = result.stdout.count("saving checkpoint to")
    assert minutes / 20 < saves < minutes / 10 + 2
    before = load(tmp_path, "ckpt-previous.pt")
    assert 20 < before["iter_num"] <= 45


def test_the_sleep_of_the_machine_is_reported_and_does_not_count(bins, tmp_path, capsys):
    run = make_run(make_trainer(bins, max_iters=20), tmp_path)

    def time_of_day():
        return time.time() + (7200 if run.progress.iter_num > 10 else 0)

    run.clock.wall = time_of_day
    train_script.train(run)
    printed = capsys.readouterr().out
    assert printed.count("the machine slept for 2h 00m, which does not count") == 1
    assert load(tmp_path)["elapsed_s"] < 3600


# -----------------------------------------------------------------------------
# Settings that change how it is computed


def test_accumulation_and_batch_size_do_not_change_the_losses(bins, tmp_path):
    """The same 16 windows in an iteration, as 2 x 8 and as 1 x 16."""
    shapes = {
        "a": {"gradient_accumulation_steps": 2, "batch_size": 8},
        "b": {"gradient_accumulation_steps": 1, "batch_size": 16},
    }
    for name, changes in shapes.items():
        result = train_here(bins, tmp_path / name, **changes)
        assert result.returncode == 0, result.stderr
    for one, other in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        for key in ("train_loss", "val_loss"):
            # float32 rounding, which grows over 45 iterations with a high learning rate
            assert one.get(key, 0) == pytest.approx(other.get(key, 0), rel=1e-3)


def test_bfloat16_learns(bins, tmp_path):
    if not supports_bfloat16(torch.device("cpu")):
        pytest.skip("this CPU has no bfloat16 instructions")
    result = train_here(bins, tmp_path, dtype="bfloat16", max_iters=20)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0].endswith(", bfloat16")
    assert load(tmp_path)["config"]["dtype"] == "bfloat16"
    assert metrics(tmp_path)[-1]["val_loss"] < 5


def test_float16_without_a_gpu_is_replaced_by_float32_and_recorded_so(bins, tmp_path):
    result = train_here(bins, tmp_path, dtype="float16", max_iters=1)
    assert result.returncode == 0, result.stderr
    assert "float16 needs a GPU: using float32" in result.stdout
    assert load(tmp_path)["config"]["dtype"] == "float32"


# -----------------------------------------------------------------------------
# Muon

MUON_RUN = {**MUON, "warmdown_iters": 30, "min_lr": 0.0}


@pytest.fixture(scope="module")
def muon_run(bins, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("muon")
    result = train_here(bins, out_dir, **MUON_RUN)
    assert result.returncode == 0, result.stderr
    return out_dir


def test_muon_learns_and_the_rate_of_each_group_is_recorded(muon_run):
    assert steps_of(muon_run)[-1]["train_loss"] < 4  # the uniform distribution has 5.5
    for record in metrics(muon_run):
        assert record["lr_embedding"] == pytest.approx(15 * record["lr"])
        assert record["lr_head"] == pytest.approx(0.2 * record["lr"])
        assert record["lr_vectors"] == pytest.approx(0.5 * record["lr"])
    assert steps_of(muon_run)[10]["lr"] == pytest.approx(0.02)
    assert metrics(muon_run)[-1]["lr"] == 0


def test_muon_resumes_bit_for_bit(muon_run, bins, tmp_path):
    assert train_here(bins, tmp_path, **MUON_RUN, max_iters=20).returncode == 0
    resumed = train_here(bins, tmp_path, **MUON_RUN, init_from="resume")
    assert resumed.returncode == 0, resumed.stderr
    first = load(muon_run)
    second = load(tmp_path)
    assert first["model_args"]["architecture"] == "qwen3"
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    for optimizer in ("optimizer", "muon"):
        for number, state in first[optimizer]["state"].items():
            for name, value in state.items():
                assert torch.equal(value, second[optimizer]["state"][number][name]), (number, name)
    assert losses(muon_run) == losses(tmp_path)


def test_a_run_that_began_with_torchs_muon_is_resumed_with_its_momentum(bins, tmp_path):
    """As earlier versions of this project saved it."""
    assert train_here(bins, tmp_path, **MUON_RUN, max_iters=20).returncode == 0
    checkpoint = load(tmp_path)
    for state in checkpoint["muon"]["state"].values():
        del state["row_moment"], state["displacement"], state["slow_momentum"]
    del checkpoint["config"]["matrix_warmdown_iters"]
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    resumed = train_here(bins, tmp_path, **MUON_RUN, matrix_warmdown_iters=40, init_from="resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "changed since: matrix_warmdown_iters 0 -> 40\n" in resumed.stdout
    assert "changed since: Muon, which now has improvements" in resumed.stdout
    assert load(tmp_path)["iter_num"] == 45
    assert steps_of(tmp_path)[-1]["train_loss"] < 4


def test_another_architecture_is_not_resumed(muon_run, bins):
    assert_one_sentence(train_here(bins, muon_run, init_from="resume"), "architecture=qwen3")


def test_muon_without_the_rates_of_the_other_groups_is_one_sentence(bins, tmp_path):
    refused = train_here(bins, tmp_path, architecture="qwen3", optimizer="muon", embedding_lr=0.3)
    assert_one_sentence(refused, "optimizer='muon' also needs head_lr")


# -----------------------------------------------------------------------------
# When a run evaluates, saves and stops


def count_saves(bins, out_dir, **changes):
    """Return how often a run whose val loss never improves saves its checkpoint."""
    result = train_here(bins, out_dir, learning_rate=0.0, min_lr=0.0, **changes)
    assert result.returncode == 0, result.stderr
    return result.stdout.count("saving checkpoint to")


def test_without_always_save_checkpoint_a_worse_evaluation_does_not_save(bins, tmp_path):
    assert count_saves(bins, tmp_path / "always") == 4  # at 20, 40 and 45, and at the end
    assert count_saves(bins, tmp_path / "better", always_save_checkpoint=False) == 1  # at the end


def test_without_always_save_checkpoint_a_better_evaluation_saves(bins, tmp_path):
    result = train_here(bins, tmp_path, always_save_checkpoint=False)
    assert result.stdout.count("saving checkpoint to") == 4
    assert load(tmp_path, "ckpt-previous.pt")["evaluated_iter"] == 45


def test_a_plateau_ends_the_run(bins, tmp_path):
    changes = {"learning_rate": 0.0, "min_lr": 0.0, "eval_interval": 5, "early_stop_patience": 3}
    result = train_here(bins, tmp_path, **changes)
    assert result.returncode == 0, result.stderr
    assert "stopped: no better val loss in 3 evaluations" in result.stdout
    assert load(tmp_path)["iter_num"] == 15


def test_an_improvement_of_less_than_the_minimum_does_not_prevent_a_plateau(bins, tmp_path):
    changes = {"eval_interval": 5, "early_stop_patience": 1, "early_stop_min_delta": 9.0}
    result = train_here(bins, tmp_path, **changes)
    assert result.returncode == 0, result.stderr
    assert load(tmp_path)["iter_num"] == 5


def test_eval_only_prints_the_losses_and_writes_nothing(compiled_run, bins):
    out_dir, stdout = compiled_run
    before = {path.name: path.stat().st_mtime_ns for path in out_dir.iterdir()}
    result = train_here(bins, out_dir, init_from="resume", eval_only=True)
    assert {path.name: path.stat().st_mtime_ns for path in out_dir.iterdir()} == before
    last_evaluation = [line for line in stdout.splitlines() if line.startswith("step")][-1]
    assert result.stdout.splitlines()[-1] == last_evaluation


def test_eval_only_of_new_weights_makes_no_folder(bins, tmp_path):
    assert train_here(bins, tmp_path / "none", eval_only=True).returncode == 0
    assert not (tmp_path / "none").exists()


# -----------------------------------------------------------------------------
# Resuming


def test_a_run_is_resumed_to_its_end_and_then_reported_as_finished(bins, tmp_path):
    first = train_here(bins, tmp_path, max_iters=20)
    assert first.returncode == 0, first.stderr
    refused = train_here(bins, tmp_path)
    assert_one_sentence(refused, f"{tmp_path} contains the checkpoint of an earlier run")
    assert "--init_from=resume" in refused.stderr

    resumed = train_here(bins, tmp_path, init_from="resume")
    assert resumed.returncode == 0, resumed.stderr
    rate = re.search(
        r"^resuming at iter 20, best val loss [\d.]+, learning rate at (\d+)% of its peak$",
        resumed.stdout,
        re.M,
    )
    assert int(rate[1]) == round(100 * steps_of(tmp_path)[20]["lr"] / 1e-2)
    iters = re.findall(r"^iter (\d+):", resumed.stdout, re.M)
    assert [int(iter_num) for iter_num in iters] == list(range(20, 45))
    assert [record["iter"] for record in steps_of(tmp_path)] == list(range(45))

    finished = train_here(bins, tmp_path, init_from="resume")
    assert finished.returncode == 0, finished.stderr
    assert (
        "this run is finished (iter 45); to extend it, resume with --max_iters above 45"
        in finished.stdout
    )
    assert load(tmp_path)["iter_num"] == 45


def test_another_shape_is_not_resumed(compiled_run, bins):
    refused = train_here(bins, compiled_run[0], init_from="resume", n_layer=3, max_iters=90)
    assert_one_sentence(refused, "n_layer=2")


def test_changed_settings_are_listed_when_resuming(run, bins):
    result = train_here(bins, run, init_from="resume", max_iters=50, weight_decay=0.2)
    assert result.returncode == 0, result.stderr
    assert re.findall("^changed since: .*", result.stdout, re.M) == [
        "changed since: max_iters 45 -> 50",
        "changed since: weight_decay 0.1 -> 0.2",
    ]
    assert [record["iter"] for record in steps_of(run)] == list(range(50))


def test_settings_have_priority_over_the_checkpoint(bins, tmp_path):
    assert train_here(bins, tmp_path, max_iters=20, weight_decay=0.0).returncode == 0
    before = load(tmp_path)["model"]
    changes = {
        "learning_rate": 1e-9,
        "min_lr": 0.0,
        "weight_decay": 1e8,
        "max_iters": 21,
        "decay_lr": False,
    }
    resumed = train_here(bins, tmp_path, init_from="resume", **changes)
    assert "changed since: weight_decay 0.0 -> 100000000.0" in resumed.stdout
    after = load(tmp_path)["model"]
    name = "transformer.h.0.mlp.c_fc.weight"
    # The learning rate itself moves nothing, and weight decay takes away 1e-9 * 1e8 of the weights.
    torch.testing.assert_close(after[name], 0.9 * before[name], rtol=1e-4, atol=1e-6)


def test_the_tokens_are_true_after_a_resume_with_another_batch_size(bins, tmp_path):
    assert train_here(bins, tmp_path, max_iters=20).returncode == 0
    resumed = train_here(bins, tmp_path, init_from="resume", gradient_accumulation_steps=4)
    assert resumed.returncode == 0, resumed.stderr
    for record in metrics(tmp_path):
        before = min(record["iter"], 20) * 512
        after = max(record["iter"] - 20, 0) * 1024
        assert record["tokens"] == before + after
    summary = summary_of(resumed.stdout)
    assert summary["tokens"] == f"{20 * 512 + 25 * 1024:,}"
    windows = 20 * 16 + 25 * 32
    assert float(summary["epochs"]) == pytest.approx(windows / (19_999 // 32 - 1), abs=0.01)
    assert load(tmp_path)["position"] == windows


def test_other_data_are_refused_unless_they_are_allowed(run, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    make_bins(data)
    (data / "meta.json").write_text(json.dumps({"vocab_size": 250, "train": {"sha256": "other"}}))
    changes = {"init_from": "resume", "max_iters": 50}
    assert_one_sentence(train_here(data, run, **changes), "--allow_new_data")
    allowed = train_here(data, run, **changes, allow_new_data=True)
    assert allowed.returncode == 0, allowed.stderr
    assert load(run)["position"] == 5 * 16  # the new data are read from their beginning


# -----------------------------------------------------------------------------
# Refusals


def remove_train_bin(folder):
    (folder / "train.bin").unlink()


def shorten_val_bin(folder):
    make_bins(folder, val_tokens=32)


def append_a_byte(folder):
    with (folder / "train.bin").open("ab") as file:
        file.write(b"x")


def record_another_size(folder):
    (folder / "meta.json").write_text('{"vocab_size": 250, "train": {"tokens": 9}}')


def add_a_large_id(folder):
    ids = np.fromfile(folder / "val.bin", "<u2")
    ids[1000] = 256
    ids.tofile(folder / "val.bin")


def damage_meta(folder):
    (folder / "meta.json").write_text("{")


def write_a_damaged_checkpoint(folder):
    (folder / "ckpt.pt").write_bytes(b"PK not a checkpoint")


def change_nothing(folder):
    pass


# What is done to a folder of bins that is also the out_dir, the settings, words of the message.
BAD_INPUT = {
    "no bins": (remove_train_bin, {}, "prepare_single_parquet.py"),
    "val.bin shorter than a window": (shorten_val_bin, {}, "too few"),
    "odd length": (append_a_byte, {}, "uint16"),
    "not the size in meta.json": (record_another_size, {}, "says 9"),
    "ids over the vocabulary": (add_a_large_id, {}, "256"),
    "damaged meta.json": (damage_meta, {}, "meta.json"),
    "damaged checkpoint": (write_a_damaged_checkpoint, {"init_from": "resume"}, "ckpt.pt"),
    "no checkpoint": (change_nothing, {"init_from": "resume"}, "no such checkpoint"),
    "no such device": (change_nothing, {"device": "cuda:77"}, "device=cuda:77"),
    "impossible shape": (change_nothing, {"n_head": 5}, "use n_head=4 or 8"),
}


@pytest.mark.parametrize("damage, changes, words", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_refused_with_one_sentence_and_no_files(damage, changes, words, tmp_path):
    damage(make_bins(tmp_path))
    before = sorted(path.name for path in tmp_path.iterdir())
    assert_one_sentence(train_here(tmp_path, tmp_path, **changes), words)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_out_dir_that_cannot_be_created_is_one_sentence(bins, tmp_path):
    (tmp_path / "file").write_text("")
    assert_one_sentence(train_here(bins, tmp_path / "file" / "out"), "cannot be written")
