"""The record of a run: metrics.jsonl, Weights & Biases, loss.png and samples.txt."""

import json
import math
import multiprocessing
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

from helpers import load, metrics, train_here
from onenight.records import MAX_POINTS, Records, draw_losses, smoothed
from onenight.settings import TrainConfig

STEP = {"iter": 20, "tokens": 10_240, "train_loss": 2.0, "lr": 1e-3}
EVALUATION = {"iter": 20, "tokens": 10_240, "val_loss": 2.1, "train_loss_eval": 2.0}


def make_records(out_dir, **settings):
    return Records(TrainConfig(out_dir=str(out_dir), **settings), wandb_id="")


# -----------------------------------------------------------------------------
# metrics.jsonl and samples.txt


def test_a_record_is_a_line_without_the_numbers_that_json_does_not_have(tmp_path):
    records = make_records(tmp_path)
    records.write({**STEP, "train_loss": math.nan, "grad_norm": math.inf})
    records.write(EVALUATION)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"iter": 20, "tokens": 10_240, "lr": 1e-3},
        EVALUATION,
    ]


def test_lines_that_are_no_records_are_left_out(tmp_path):
    """A power cut may leave half of a line."""
    lines = [json.dumps(STEP), '{"note": 1}', "text", "[]", '{"iter": "1"}', '{"iter": 2']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    make_records(tmp_path).truncate(iter_num=30, evaluated_iter=20)
    assert metrics(tmp_path) == [STEP]


def test_outputs_that_fail_are_reported_once_and_the_others_are_written(
    tmp_path, capsys, monkeypatch
):
    (tmp_path / "loss.png.partial").mkdir()
    records = make_records(tmp_path)
    records.wandb_run = SimpleNamespace(log=lambda record, step: 1 / 0)
    for _ in range(2):
        records.write({**EVALUATION, "sample": "text"})
        records.draw()
        records.flush()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["wandb", "loss.png"]
    assert len(metrics(tmp_path)) == 2
    assert len((tmp_path / "samples.txt").read_text().splitlines()) == 2


# -----------------------------------------------------------------------------
# The picture


def steps(n):
    return [
        {"iter": i, "tokens": 512 * i, "train_loss": 5.0 - i / n, "lr": 1e-3 * i / n}
        for i in range(n)
    ]


def evaluations(*losses):
    return [
        {"iter": 20 * i, "tokens": 10_240 * i, "val_loss": loss} for i, loss in enumerate(losses)
    ]


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Return draw(records, ...), which returns the two axes of the picture that draw_losses() has
    written."""
    figures = []
    savefig = Figure.savefig

    def save(figure, file, **options):
        figures.append(figure)
        savefig(figure, file, **options)

    def draw(records, *reference):
        draw_losses(records, tmp_path / "loss.png", *reference)
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
        return figures[-1].axes

    monkeypatch.setattr(Figure, "savefig", save)
    return draw


def curve(axes, number):
    x, y = axes.lines[number].get_data()
    return list(x), list(y)


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_the_losses_and_the_learning_rate_are_drawn_against_tokens(draw):
    losses, rates = draw(steps(40) + evaluations(5.1, 4.5))
    millions = [512 * i / 1e6 for i in range(40)]
    assert curve(losses, 0) == (millions, [5.0 - i / 40 for i in range(40)])
    assert curve(losses, 2) == ([0, 0.01024], [5.1, 4.5])
    assert curve(rates, 0) == (millions, [1e-3 * i / 40 for i in range(40)])
    assert labels(losses) == ["train", "val"]
    assert "4.500" in losses.get_title()


def test_a_run_of_billions_of_tokens_is_drawn_in_billions(draw):
    losses, rates = draw([{**STEP, "tokens": 2 * 10**9}])
    assert curve(losses, 0)[0] == [2.0]
    assert "(B)" in rates.get_xlabel()


def test_the_loss_axis_does_not_show_the_steep_beginning(draw):
    losses, _ = draw([{**STEP, "tokens": 0, "train_loss": 11.0}, *steps(40)[2:]])
    low, high = losses.get_ylim()
    assert low < 4.0 + 1 / 40 < 5.0 - 2 / 40 < high < 5.1


@pytest.mark.parametrize("loss, is_drawn", [(4.3, False), (4.2, True)])
def test_the_reference_is_drawn_once_the_losses_are_near(loss, is_drawn, draw):
    losses, _ = draw(evaluations(11.0, loss), 3.28, "GPT-2")
    assert ("GPT-2: 3.28" in labels(losses)) == is_drawn
    low, _ = losses.get_ylim()
    assert (low < 3.28) == is_drawn


@pytest.mark.parametrize("loss, is_drawn", [(2.2, False), (2.4, True)])
def test_the_reference_is_drawn_while_the_losses_are_near(loss, is_drawn, draw):
    """For a run that begins with a lower loss."""
    losses, _ = draw(evaluations(loss, loss), 3.28, "GPT-2")
    assert ("GPT-2: 3.28" in labels(losses)) == is_drawn
    _, high = losses.get_ylim()
    assert (high > 3.28) == is_drawn


@pytest.mark.parametrize("records", [[STEP], evaluations(2.0)])
def test_a_single_record_is_drawn(records, draw):
    losses, _ = draw(records)
    low, high = losses.get_ylim()
    assert low < 2.0 < high


def test_a_long_run_is_drawn_with_fewer_points(draw):
    n = 20 * MAX_POINTS
    losses, _ = draw(steps(n))
    tokens, _ = curve(losses, 0)
    assert MAX_POINTS / 2 < len(tokens) <= MAX_POINTS
    assert tokens[-1] > 0.99 * 512e-6 * n


def test_the_smoothed_curve_has_less_noise_and_the_same_trend():
    noise = np.random.default_rng(0).normal(size=1000)
    assert np.std(smoothed(list(noise))[50:-50]) < 0.2  # means of 81 have 1 / sqrt(81)
    line = [5.0 - i / 1000 for i in range(1000)]
    assert smoothed(line)[40:-40] == pytest.approx(line[40:-40])


# -----------------------------------------------------------------------------
# Weights & Biases


@pytest.fixture
def wandb(monkeypatch):
    """A package that answers as wandb does with a key and without a network: the options with which
    runs were to start, and what was logged."""
    package = SimpleNamespace(Settings=dict, login=lambda **options: True, options=[], records=[])

    def log(record, step):
        package.records.append((step, record))

    def init(**options):
        package.options.append(options)
        if options["mode"] == "online":
            raise ConnectionError("no network")
        return SimpleNamespace(id=options["id"] or "new", log=log)

    package.init = init
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return package


def test_without_a_network_a_run_logs_offline_and_continues_its_wandb_run(wandb, bins, tmp_path):
    settings = {"wandb_log": True, "wandb_project": "mine", "eval_tokens": 512}
    for changes in ({"max_iters": 2}, {"max_iters": 4, "init_from": "resume"}):
        result = train_here(bins, tmp_path, **settings, **changes)
        assert result.returncode == 0, result.stderr
    assert [options["mode"] for options in wandb.options] == ["online", "offline"] * 2
    assert [options["id"] for options in wandb.options] == [None, None, "new", "new"]
    for options in wandb.options:
        assert options["project"] == "mine"
        assert options["resume"] == "allow"
        assert options["config"]["dtype"] == "float32"  # what the run uses, not "auto"
    assert wandb.records == [(record["iter"], record) for record in metrics(tmp_path)]


def test_the_environment_can_disable_wandb(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    make_records(tmp_path, wandb_log=True)
    assert [options["mode"] for options in wandb.options] == ["disabled"]


def test_a_run_without_the_package_trains_without_it(bins, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    result = train_here(bins, tmp_path, wandb_log=True, max_iters=2, eval_tokens=512)
    assert result.returncode == 0, result.stderr
    assert "wandb" in result.stdout
    assert len(metrics(tmp_path)) == 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process, which saves six seconds")
def test_without_a_key_the_real_package_is_offline_under_the_id_in_the_checkpoint(
    bins, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    out_dir = tmp_path / "out"
    settings = {"wandb_log": True, "max_iters": 1, "eval_tokens": 512}
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=train_here, args=(bins, out_dir), kwargs=settings)
    process.start()
    process.join()
    (run,) = (out_dir / "wandb").glob("offline-run-*/*.wandb")
    assert load(out_dir)["wandb_id"] == run.stem.removeprefix("run-")
