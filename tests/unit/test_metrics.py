"""onenight/training/metrics.py: the records of a run, and what a resumed run keeps of them."""

import json
import math
from types import SimpleNamespace

import pytest

from helpers import metrics, train_here
from onenight.training.metrics import Metrics, is_before, read_metrics, write_samples

STEP = {"iter": 20, "tokens": 10_240, "train_loss": 2.0, "lr": 1e-3}
EVALUATION = {"iter": 20, "tokens": 10_240, "val_loss": 2.1, "lr": 1e-3}


def test_a_record_is_a_line_and_is_sent_to_wandb(tmp_path):
    sent = []
    wandb_run = SimpleNamespace(log=lambda record, step: sent.append((step, record)))
    written = Metrics(tmp_path, wandb_run)
    written.write(EVALUATION)
    written.write(STEP)
    written.sync()
    assert read_metrics(tmp_path / "metrics.jsonl") == [EVALUATION, STEP]
    assert sent == [(20, EVALUATION), (20, STEP)]


@pytest.mark.parametrize(
    "record, iter_num, evaluated_iter, expected",
    [
        (STEP, 21, 20, True),
        (STEP, 20, 20, False),  # iteration 20 is done again
        (EVALUATION, 20, 20, True),  # and its evaluation is not
        (EVALUATION, 20, 0, False),
        (EVALUATION, 19, 20, False),
    ],
)
def test_a_resumed_run_keeps_what_it_will_not_write_again(
    record, iter_num, evaluated_iter, expected
):
    assert is_before(record, iter_num, evaluated_iter) == expected


def test_truncating_keeps_the_earlier_records(tmp_path):
    written = Metrics(tmp_path)
    for iter_num in range(3):
        written.write({**STEP, "iter": iter_num})
    written.truncate(iter_num=2, evaluated_iter=-1)
    assert [record["iter"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1]


def test_malformed_lines_are_skipped_with_a_message(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(STEP), json.dumps({"note": 1}), "text", "[]", json.dumps(STEP), '{"iter": ']
    path.write_text("\n".join(lines))
    assert read_metrics(path) == [STEP, STEP]
    assert capsys.readouterr().out == f"{path}: 4 malformed lines, skipped\n"


def test_malformed_lines_are_skipped_when_resuming(bins, tmp_path):
    assert train_here(bins, tmp_path, max_iters=20).returncode == 0
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:5], "text", *lines[5:], '{"iter": ']))
    resumed = train_here(bins, tmp_path, init_from="resume")
    assert resumed.returncode == 0, resumed.stderr
    assert f"{path}: 2 malformed lines, skipped" in resumed.stdout
    iters = [record["iter"] for record in metrics(tmp_path) if "train_loss" in record]
    assert iters == list(range(45))


def test_errors_never_end_the_run_and_are_reported_once_for_each_output(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").mkdir()
    wandb_run = SimpleNamespace(log=lambda record, step: 1 / 0)
    written = Metrics(tmp_path, wandb_run)
    for _ in range(2):
        written.write(STEP)
        written.sync()
        written.truncate(0, 0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"{tmp_path / 'metrics.jsonl'}: cannot be written (")
    assert lines[1] == "wandb: cannot be written (division by zero); the run goes on without it"


@pytest.mark.parametrize(
    "function, failed, written",
    [
        ("draw_losses", "loss.png", "samples.txt"),
        ("write_samples", "samples.txt", "loss.png"),
    ],
)
def test_an_output_that_fails_is_reported_and_the_other_one_is_written(
    function, failed, written, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(f"onenight.training.metrics.{function}", lambda *arguments: 1 / 0)
    metrics = Metrics(tmp_path)
    metrics.write({**EVALUATION, "sample": "text"})
    metrics.draw()
    assert capsys.readouterr().out.startswith(f"{failed}: cannot be written (division by zero)")
    assert (tmp_path / written).exists()
    assert not (tmp_path / failed).exists()


def test_samples_are_written_one_to_a_line(tmp_path):
    records = [STEP, {**EVALUATION, "sample": "Grüße 😀"}, EVALUATION]
    write_samples(records, tmp_path / "samples.txt")
    text = (tmp_path / "samples.txt").read_text(encoding="utf-8")
    assert text == "iter 20, val loss 2.1000: Grüße 😀\n"


def test_numbers_that_are_not_finite_are_left_out_because_json_has_none(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.write({"iter": 3, "train_loss": math.nan, "grad_norm": math.inf, "lr": 0.1})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line) == {"iter": 3, "lr": 0.1}
