"""train.py: its output, its files, what it refuses, and its arithmetic."""

import math
import re

from onenight.dataset import TrainWindows

import numpy as np
import pytest
import torch
from conftest import assert_one_sentence, gpt2_of, load, make_bins, make_trainer, metrics, train, train_here


@pytest.fixture(scope="session")
def finished(bins, tmp_path_factory):
    """A whole compiled run, and what it printed."""
    out_dir = tmp_path_factory.mktemp("out") / "new"
    return out_dir, train(bins, out_dir, compile=True)


def test_a_run_learns_and_prints_nanogpts_lines(finished):
    out_dir, result = finished
    assert result.returncode == 0, result.stderr
    losses = [float(x) for x in re.findall(r"^iter \d+: loss ([\d.]+), time [\d.]+ms", result.stdout, re.M)]
    evals = re.findall(r"^step (\d+): train loss ([\d.]+), val loss ([\d.]+)$", result.stdout, re.M)
    assert len(losses) == 45
    assert losses[0] == pytest.approx(math.log(256), abs=0.1)  # an untrained model is about uniform
    assert losses[-1] < 2.5  # the noise of the walk alone costs 0.9
    assert [int(step) for step, *_ in evals] == [0, 20, 40, 45]  # the last iteration too
    assert result.stdout.startswith("device: cpu, float32, compiled\n")
    assert re.search(r"^iter 2: .* tokens/s, mfu .*, ETA ", result.stdout, re.M)  # from the third iteration on


def test_the_checkpoint_is_nanogpts(finished):
    checkpoint = load(finished[0])
    assert checkpoint.keys() >= {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"}
    assert checkpoint["iter_num"] == 45
    assert checkpoint["model_args"] == {
        "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "bias": False, "dropout": 0.0, "vocab_size": 256,
    }  # fmt: skip
    names = set(gpt2_of(checkpoint).state_dict())
    assert {name for name in names if not name.endswith(".bias")} == set(checkpoint["model"])


def test_metrics_and_picture(finished):
    out_dir, result = finished
    records = metrics(out_dir)
    steps, evals = [r for r in records if "train_loss" in r], [r for r in records if "val_loss" in r]
    assert [r["iter"] for r in steps] == list(range(45))
    assert [r["iter"] for r in evals] == [0, 20, 40, 45]
    assert all(r["tokens"] == r["iter"] * 2 * 8 * 32 for r in records)
    assert steps[-1]["tokens_per_s"] > 0
    assert [r["elapsed_s"] for r in records] == sorted(r["elapsed_s"] for r in records)
    learning_rates = [r["lr"] for r in steps]
    assert learning_rates[0] == pytest.approx(1e-2 / 6)
    assert learning_rates[5] == pytest.approx(1e-2)  # the peak, after five iterations of warmup
    assert learning_rates[25] == pytest.approx(1e-3 + 9e-3 / 2)  # half way down the cosine
    assert evals[-1]["lr"] == pytest.approx(1e-3)
    picture = (out_dir / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    assert str(out_dir / "loss.png") in result.stdout


def test_val_loss_is_that_of_another_gpt2_on_every_token(finished, bins):
    """The printed val loss against transformers' model over all of val.bin, window by window."""
    checkpoint, ids = load(finished[0]), np.fromfile(bins / "val.bin", "<u2").astype(np.int64)
    model, total = gpt2_of(checkpoint).eval(), 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 32):
            window = torch.from_numpy(ids[start : start + 33])
            logits = model(window[None, :-1]).logits[0]
            total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    printed = float(re.findall(r"val loss ([\d.]+)$", finished[1].stdout, re.M)[-1])
    assert printed == pytest.approx(total / (len(ids) - 1), abs=1e-4)  # four digits are printed


def test_a_step_is_that_of_a_plain_loop(bins):
    """Three iterations against transformers' GPT-2 with torch's AdamW, the micro-batches taken as one batch."""
    trainer = make_trainer(bins, weight_decay=0.3, grad_clip=0.5)
    # The trainer's own weights as a start, three times larger, so that the gradients pass the clipping.
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(3)
    reference = gpt2_of({"model_args": trainer.model_args, "model": trainer.model.state_dict()}).train()
    trained = [p for name, p in reference.named_parameters() if not name.endswith(".bias")]
    groups = [{"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.3}]
    groups += [{"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    windows = TrainWindows(trainer.train_tokens, 32, seed=1337)
    for i, lr in enumerate((1e-2, 5e-3, 2e-3)):
        x, y = windows.batch(16 * i, 16, torch.device("cpu"))
        expected = torch.nn.functional.cross_entropy(reference(x).logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        expected.backward()
        assert torch.nn.utils.clip_grad_norm_(trained, 0.5) > 0.5  # else the clipping is not tested
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        assert trainer.step(lr / 1e-2) == pytest.approx(expected.item(), rel=1e-5)  # float32 sums in another order
    for name, value in reference.state_dict().items():
        ours = trainer.model.state_dict().get(name)
        if ours is not None:
            value = value if value.shape == ours.shape and "c_" not in name else value.T
            # Adam divides by the gradient's own size: rounding can move a weight by a fraction of the rate 1e-2
            torch.testing.assert_close(ours, value, rtol=0, atol=2e-4)


def test_resume_continues_and_reports_a_finished_run(bins, tmp_path):
    first = train_here(bins, tmp_path, max_iters=20)
    assert first.returncode == 0, first.stderr
    again = train_here(bins, tmp_path)
    assert again.returncode != 0 and "--init_from=resume" in again.stderr  # scratch must not overwrite it
    resumed = train_here(bins, tmp_path, init_from="resume")
    assert resumed.returncode == 0, resumed.stderr
    assert re.findall(r"^iter (\d+):", resumed.stdout, re.M) == [str(i) for i in range(20, 45)]
    steps = [r for r in metrics(tmp_path) if "train_loss" in r]
    assert [r["iter"] for r in steps] == list(range(45))
    finished = train_here(bins, tmp_path, init_from="resume")
    assert finished.returncode == 0 and "finished" in finished.stdout
    assert load(tmp_path)["iter_num"] == 45


def test_resume_with_another_shape_is_refused(finished, bins):
    result = train_here(bins, finished[0], init_from="resume", n_layer=3, max_iters=90)
    assert_one_sentence(result, "n_layer=2")


def test_eval_only_writes_nothing(finished, bins, tmp_path):
    before = {path.name: path.stat().st_mtime_ns for path in finished[0].iterdir()}
    result = train_here(bins, finished[0], init_from="resume", eval_only=True)
    assert {path.name: path.stat().st_mtime_ns for path in finished[0].iterdir()} == before
    assert result.stdout.splitlines()[-1] == [x for x in finished[1].stdout.splitlines() if x.startswith("step")][-1]
    assert train_here(bins, tmp_path / "none", eval_only=True).returncode == 0
    assert not (tmp_path / "none").exists()


def test_formats(bins, tmp_path):
    result = train_here(bins, tmp_path / "bfloat16", dtype="bfloat16", max_iters=20)
    assert result.returncode == 0, result.stderr
    assert metrics(tmp_path / "bfloat16")[-1]["val_loss"] < 5
    result = train_here(bins, tmp_path / "float16", dtype="float16", max_iters=1)
    assert result.returncode == 0 and "float16 needs a GPU: using float32" in result.stdout


def set_id(folder, value):
    ids = np.fromfile(folder / "val.bin", "<u2")
    ids[1000] = value
    ids.tofile(folder / "val.bin")


# what is done to a folder of bins that is also the out_dir, the keys, and what the sentence must say
BAD_INPUT = {
    "no bins": (lambda folder: (folder / "train.bin").unlink(), {}, "prepare_single_parquet.py"),
    "val.bin shorter than a window": (lambda folder: make_bins(folder, val_tokens=32), {}, "too few"),
    "odd length": (lambda folder: (folder / "train.bin").open("ab").write(b"x"), {}, "uint16"),
    "not the size in meta.json": (
        lambda folder: (folder / "meta.json").write_text('{"vocab_size": 250, "train": {"tokens": 9}}'), {}, "says 9",
    ),
    "ids over the vocabulary": (lambda folder: set_id(folder, 256), {}, "256"),
    "damaged meta.json": (lambda folder: (folder / "meta.json").write_text("{"), {}, "meta.json"),
    "corrupt checkpoint": (
        lambda folder: (folder / "ckpt.pt").write_bytes(b"PK not a checkpoint"), {"init_from": "resume"}, "ckpt.pt",
    ),
    "no checkpoint": (lambda folder: None, {"init_from": "resume"}, "no such checkpoint"),
    "no such device": (lambda folder: None, {"device": "cuda:77"}, "device=cuda:77"),
    "impossible shape": (lambda folder: None, {"n_head": 5}, "n_head=4 or 8 would do"),
}  # fmt: skip


@pytest.mark.parametrize("damage, changes, words", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_sentence(damage, changes, words, tmp_path):
    damage(make_bins(tmp_path))
    before = sorted(path.name for path in tmp_path.iterdir())
    assert_one_sentence(train_here(tmp_path, tmp_path, **changes), words)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_out_dir_that_cannot_be_created_is_one_sentence(bins, tmp_path):
    (tmp_path / "file").write_text("")
    assert_one_sentence(train(bins, tmp_path / "file"), "cannot be written")


def test_accumulation_and_batch_size_do_not_change_the_losses(bins, tmp_path):
    """The same 16 windows an iteration, as 2 x 8 and as 1 x 16: the same losses, evaluations included."""
    for out_dir, sizes in (("a", (2, 8)), ("b", (1, 16))):
        result = train_here(bins, tmp_path / out_dir, gradient_accumulation_steps=sizes[0], batch_size=sizes[1])
        assert result.returncode == 0, result.stderr
    for one, other in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        for key in ("train_loss", "val_loss"):
            # float32 rounding, grown over 45 iterations at a high learning rate
            assert one.get(key, 0) == pytest.approx(other.get(key, 0), rel=1e-3)
