"""Faults of a long run: signals, kills, damaged files, a full disk, NaN, changed settings, several processes."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from onenight.device import Ranks
from onenight.metrics import Metrics, Pace
from onenight.train_config import TrainConfig
from onenight.trainer import Trainer

import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    assert_one_sentence,
    flags_of,
    load,
    losses,
    make_bins,
    make_trainer,
    metrics,
    start_training,
    stop,
    train,
    train_here,
    wait_for_iter,
    wait_for_line,
)

import train as train_script


def assert_same_run(one, other):
    """Bit for bit the same weights, optimizer and metrics."""
    first, second = load(one), load(other)
    assert first["iter_num"] == second["iter_num"] and first["position"] == second["position"]
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    for number, state in first["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, second["optimizer"]["state"][number][name]), (number, name)
    assert losses(one) == losses(other)
    assert torch.equal(
        load(one, "best.pt")["model"]["lm_head.weight"], load(other, "best.pt")["model"]["lm_head.weight"]
    )


@pytest.fixture(scope="session")
def undisturbed(bins, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("undisturbed")
    assert train(bins, out_dir).returncode == 0
    return out_dir


@pytest.mark.parametrize(
    "changes, number",
    [
        ({"dropout": 0.2}, signal.SIGINT),
        ({"dtype": "bfloat16", "gradient_accumulation_steps": 1}, signal.SIGTERM),
        ({"dropout": 0.2, "dtype": "bfloat16", "compile": True, "n_layer": 1, "max_iters": 25}, signal.SIGINT),
    ],
    ids=["dropout", "bfloat16", "compiled, dropout, bfloat16"],
)
def test_stopped_and_resumed_is_the_same_run(bins, tmp_path, changes, number):
    changes = {**changes, "eval_interval": 10**6}  # so that only the signal can have saved it
    assert train(bins, tmp_path / "whole", **changes).returncode == 0
    process = start_training(bins, tmp_path / "parts", **changes)
    wait_for_line(process, "iter 12:")
    stdout, _ = stop(process, number)
    assert "--init_from=resume" in stdout
    assert 13 <= load(tmp_path / "parts")["iter_num"] < TINY["max_iters"]
    resumed = train(bins, tmp_path / "parts", init_from="resume", **changes)
    assert resumed.returncode == 0, resumed.stderr
    assert "changed since" not in resumed.stdout
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_second_ctrl_c_stops_at_once(bins, tmp_path):
    process = start_training(bins, tmp_path, batch_size=20_000, max_iters=10**6, lr_decay_iters=10**6)
    wait_for_line(process, "step 0:")  # in a micro-batch that takes seconds
    process.send_signal(signal.SIGINT)
    for line in process.stderr:
        if "Ctrl-C again" in line:
            break
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in stderr


def test_killed_at_random_moments_it_is_the_same_run(bins, tmp_path):
    """kill -9, three times in a run that saves every 10 iterations; tests/torture/train.py does it more often."""
    changes = {"max_iters": 90, "eval_interval": 10, "dropout": 0.1}
    assert train(bins, tmp_path / "whole", **changes).returncode == 0
    out_dir = tmp_path / "parts"
    random.seed(5)
    for iteration in sorted(random.sample(range(11, 80), 3)):
        process = start_training(
            bins, out_dir, init_from="resume" if (out_dir / "ckpt.pt").exists() else "scratch", **changes
        )
        wait_for_iter(process, iteration)
        time.sleep(random.random() / 20)
        process.kill()
        process.communicate()
    assert load(out_dir)["iter_num"] < 90
    finished = train(bins, out_dir, init_from="resume", **changes)
    assert finished.returncode == 0, finished.stderr
    assert_same_run(tmp_path / "whole", out_dir)
    assert not list(out_dir.glob("*.partial"))


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(bins, undisturbed, tmp_path, damage):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    whole = (tmp_path / "ckpt.pt").read_bytes()
    (tmp_path / "ckpt.pt").unlink()
    if damage == "truncated":
        (tmp_path / "ckpt.pt").write_bytes(whole[: len(whole) // 2])
    result = train(bins, tmp_path, init_from="resume")
    assert result.returncode == 0, result.stderr
    assert f"going back to {tmp_path / 'ckpt-previous.pt'}" in result.stdout
    assert_same_run(undisturbed, tmp_path)


def test_a_disk_that_fills_keeps_the_checkpoint(bins, tmp_path):
    """A real file system of 4 MB, filled while the run goes on; then with room again the run goes on."""
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path]).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        process = start_training(bins, tmp_path / "out", max_iters=10**6, lr_decay_iters=10**6)
        wait_for_line(process, "iter 25:")
        good = load(tmp_path / "out")["iter_num"]
        with open(tmp_path / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 4096)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode not in (0, None)
        assert len(stderr.strip().splitlines()) == 1 and "resume" in stderr, stderr
        (tmp_path / "filler").unlink()
        names = [name for name in ("ckpt.pt", "ckpt-previous.pt") if (tmp_path / "out" / name).exists()]
        assert load(tmp_path / "out", names[0])["iter_num"] >= good
        assert train(bins, tmp_path / "out", init_from="resume", max_iters=good + 40).returncode == 0
        (tmp_path / "filler").write_bytes(bytes(shutil.disk_usage(tmp_path).free - 300_000))
        assert_one_sentence(train(bins, tmp_path / "other"), "make room")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


class Poisoned:
    """A forward pass whose loss is NaN in chosen iterations."""

    def __init__(self, trainer, is_poisoned):
        self.trainer, self.is_poisoned = trainer, is_poisoned

    def __call__(self, x, y):
        _, loss = self.trainer.model(x, y)
        poisoned = torch.is_grad_enabled() and self.is_poisoned(self.trainer)
        return None, loss * float("nan") if poisoned else loss


def run_poisoned(bins, out_dir, is_poisoned, **changes):
    trainer = make_trainer(bins, out_dir=str(out_dir), **changes)
    trainer.compiled_model = Poisoned(trainer, is_poisoned)
    out_dir.mkdir(exist_ok=True)
    train_script.train(trainer, Metrics(out_dir), Pace(trainer, 1.0, time.monotonic()), out_dir)
    return trainer


def test_an_iteration_with_a_nan_loss_makes_no_update(bins, tmp_path, capsys):
    trainer = run_poisoned(bins, tmp_path, lambda trainer: trainer.progress.iter_num in (7, 8, 30))
    assert trainer.progress.iter_num == 45 and trainer.progress.skipped_iters == 3
    assert load(tmp_path)["skipped_iters"] == 3
    assert trainer.progress.best_val_loss < 3  # and it learns as ever
    assert len(re.findall("not finite, no update", capsys.readouterr().out)) == 3


def test_bad_data_is_skipped_after_going_back(bins, tmp_path, capsys):
    """The windows of iterations 25 to 34 give NaN: five of them lead back to iteration 20, with the data continuing."""
    poison = range(25 * 16, 35 * 16)
    trainer = run_poisoned(bins, tmp_path, lambda trainer: trainer.progress.position in poison)
    assert trainer.progress.iter_num == 45 and trainer.progress.skipped_iters == 10
    assert trainer.progress.position == (25 + 5 + 5 + 25) * 16  # from 30 and 25 back to 20, with the data going on
    assert "back to iter 20, with other data ahead" in capsys.readouterr().out
    assert [r["iter"] for r in metrics(tmp_path) if "train_loss" in r] == list(range(45))
    assert all(torch.isfinite(value).all() for value in load(tmp_path)["model"].values())


def test_a_loss_that_stays_nan_ends_the_run_with_a_good_checkpoint(bins, tmp_path):
    with pytest.raises(SystemExit, match="learning_rate.*ckpt.pt is good"):
        run_poisoned(bins, tmp_path, lambda trainer: trainer.progress.iter_num >= 25)
    assert load(tmp_path)["iter_num"] == 20
    with pytest.raises(SystemExit, match="before any checkpoint"):
        run_poisoned(bins, tmp_path / "other", lambda trainer: True)


def test_weights_that_are_not_finite_are_never_saved(bins, tmp_path):
    """They become infinite in the iteration before a checkpoint is due, once."""
    done = []

    def break_weights(trainer):
        if trainer.progress.iter_num == 40 and not done:  # asked during iteration 40; the next evaluation is at 45
            done.append(True)
            trainer.optimizers["optimizer"].register_step_post_hook(
                lambda *_: break_one(trainer) if len(done) < 2 else None
            )
        return False

    def break_one(trainer):
        done.append(True)
        with torch.no_grad():
            trainer.model.transformer.wpe.weight[31] = float("inf")  # of the last position

    trainer = run_poisoned(bins, tmp_path, break_weights, max_iters=41)
    assert trainer.progress.iter_num == 41 and len(done) == 2
    for name in ("ckpt.pt", "ckpt-previous.pt", "best.pt"):
        assert all(torch.isfinite(value).all() for value in load(tmp_path, name)["model"].values())


def test_a_plateau_ends_the_run(bins, tmp_path):
    """With a learning rate of 0 no evaluation is better than the first."""
    changes = {"learning_rate": 0.0, "min_lr": 0.0, "eval_interval": 5, "early_stop_patience": 3}
    result = train_here(bins, tmp_path, **changes)
    assert result.returncode == 0, result.stderr
    assert "no better val loss in 3 evaluations" in result.stdout
    assert load(tmp_path)["iter_num"] == 15
    impatient = train_here(bins, tmp_path / "other", eval_interval=5, early_stop_patience=1, early_stop_min_delta=9.0)
    assert load(tmp_path / "other")["iter_num"] == 5, impatient.stderr  # it learns, but never by 9 nats at once


def test_resume_reports_changed_settings(bins, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    result = train_here(bins, tmp_path, init_from="resume", max_iters=50, weight_decay=0.2)
    assert result.returncode == 0, result.stderr
    assert re.findall("^changed since: .*", result.stdout, re.M) == [
        "changed since: max_iters 45 -> 50",
        "changed since: weight_decay 0.1 -> 0.2",
    ]
    assert [r["iter"] for r in metrics(tmp_path) if "train_loss" in r] == list(range(50))


def test_other_data_are_refused_unless_allowed(undisturbed, tmp_path):
    data, out_dir = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    make_bins(data)
    (data / "meta.json").write_text(json.dumps({"vocab_size": 250, "train": {"sha256": "other"}}))
    shutil.copytree(undisturbed, out_dir)
    assert_one_sentence(train_here(data, out_dir, init_from="resume", max_iters=50), "--allow_new_data")
    assert train_here(data, out_dir, init_from="resume", max_iters=50, allow_new_data=True).returncode == 0


def test_wandb_without_a_key_is_offline_and_continues_the_same_run(bins, tmp_path):
    out_dir, env = tmp_path / "out", {"HOME": str(tmp_path), "WANDB_API_KEY": None, "WANDB_MODE": None}
    for changes in ({"max_iters": 2}, {"max_iters": 4, "init_from": "resume"}):
        result = train(bins, out_dir, wandb_log=True, env=env, **changes)
        assert result.returncode == 0, result.stderr
        assert "wandb: offline, because there is no API key" in result.stdout
    assert len(list((out_dir / "wandb").glob("offline-run-*/*.wandb"))) == 2
    runs = [path.name for path in (out_dir / "wandb").glob("offline-run-*")]
    assert len(runs) == 2 and len({name.rsplit("-")[-1] for name in runs}) == 1


def test_the_summary_matches_the_run(bins, tmp_path):
    result = train_here(bins, tmp_path, max_iters=45)
    lines = dict(line.split(": ", 1) for line in result.stdout.splitlines() if re.match("[a-z_ ]+: ", line))
    assert lines["iterations"] == "45" and lines["tokens"] == f"{45 * 512:,}" and lines["skipped_iterations"] == "0"
    assert float(lines["epochs"]) == pytest.approx(45 * 16 / (19_999 // 32 - 1), abs=0.01)
    evals = {r["iter"]: r["val_loss"] for r in metrics(tmp_path) if "val_loss" in r}
    best = min(evals, key=evals.get)
    assert lines["best_val_loss"] == f"{evals[best]:.4f} at iter {best}"
    assert load(tmp_path, "best.pt")["iter_num"] == best


def torchrun(processes, bins, out_dir, script=ROOT / "train.py", **changes):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [script, *flags_of(bins, out_dir, changes)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_many_processes_train_as_one(bins, undisturbed, tmp_path):
    """Resumed with another number of processes: the losses of a single process, to the rounding of float32."""
    result = torchrun(4, bins, tmp_path, max_iters=20)
    assert result.returncode == 0, result.stderr
    assert len(re.findall("^iter 5:", result.stdout, re.M)) == 1  # one process prints
    assert torchrun(2, bins, tmp_path, init_from="resume").returncode == 0
    for one, other in zip(losses(undisturbed), losses(tmp_path), strict=True):
        assert one["iter"] == other["iter"]
        for key in ("train_loss", "val_loss", "train_loss_eval"):
            assert one.get(key, 0) == pytest.approx(other.get(key, 0), rel=1e-3)  # grows over 45 iterations


def test_processes_sum_in_a_few_messages(monkeypatch):
    """Tensors of several shapes and types, with messages of 400 bytes: each is added to its like, here to itself."""
    sent, shapes = [], [(3, 30), (7,), (), (20, 20), (50,), (2, 3, 4)]
    monkeypatch.setattr("onenight.device.MESSAGE", 400)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: sent.append(tensor.numel()) or tensor.mul_(2))
    tensors = [torch.rand(shape, dtype=dtype) for shape in shapes for dtype in (torch.float32, torch.float64)]
    expected = [2 * tensor for tensor in tensors]
    Ranks(world_size=2).sum(tensors)
    assert all(torch.equal(tensor, double) for tensor, double in zip(tensors, expected))
    assert len(sent) < len(tensors) and sum(sent) == sum(tensor.numel() for tensor in tensors)


def test_a_batch_that_cannot_be_shared_is_refused(bins):
    config = TrainConfig(**{**TINY, "dataset": str(bins)})
    with pytest.raises(SystemExit, match="16 windows .* cannot be shared by 3 processes"):
        Trainer(config, torch.device("cpu"), "float32", Ranks(world_size=3))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the names of threads are read from Linux's /proc")
def test_no_thread_of_the_group_outlives_the_run(bins, tmp_path):
    """A thread that frees a tensor while Python shuts down aborts the process: seen once in many runs."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import pathlib, sys; sys.path.insert(0, {str(ROOT)!r}); import train\n"
        "threads = lambda: [path.read_text() for path in pathlib.Path('/proc/self/task').glob('*/comm')]\n"
        "during, save = [], train.save\n"
        "train.save = lambda *arguments: (during.extend(threads()), save(*arguments))\n"
        "train.main(sys.argv[1:])\n"
        "print('threads', 'gloo' in str(during), 'gloo' in str(threads()), file=sys.stderr)\n"
    )
    result = torchrun(2, bins, tmp_path / "out", script, hours=3 / 3600)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("hours:") == 1  # decided once, and for both
    assert result.stderr.count("threads True False") == 2, result.stderr


def test_an_overflow_under_loss_scaling_skips_all_optimizers_and_is_no_bad_iteration(bins):
    """With Muon and AdamW: an infinite gradient in one of them must leave the weights of both as they are."""
    muon = {"architecture": "qwen3", "optimizer": "muon", "embedding_lr": 0.1, "head_lr": 0.01, "vector_lr": 0.01}
    trainer = make_trainer(bins, **muon)
    for _ in range(3):  # head and outputs begin at zero, and pass no gradient on before they have changed
        trainer.step(1.0)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    overflow = trainer.model.lm_head.weight.register_hook(lambda grad: grad * torch.inf)
    trainer.step(1.0)
    assert trainer.scaler.get_scale() == 2.0**15
    assert trainer.skipped_in_row == trainer.progress.skipped_iters == 0
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    overflow.remove()
    trainer.step(1.0)
    after = trainer.model.state_dict()
    assert all(value.isfinite().all() and not torch.equal(value, before[name]) for name, value in after.items())
