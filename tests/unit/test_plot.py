"""onenight/training/plot.py: what is drawn into loss.png."""

import pytest
from matplotlib.axes import Axes

from onenight.training.plot import MAX_POINTS, draw_losses


def steps(n):
    return [
        {"iter": i, "tokens": 512 * i, "train_loss": 5.0 - i / n, "lr": 1e-3 * i / n}
        for i in range(n)
    ]


def evaluations(n):
    return [{"iter": i, "tokens": 512 * i, "val_loss": 5.1, "lr": 1e-3} for i in (0, n)]


@pytest.fixture
def curves(monkeypatch):
    """Record the x and y values of each curve that is drawn."""
    curves = []
    plot = Axes.plot

    def record_and_plot(axes, x, y, **style):
        curves.append((x, y))
        return plot(axes, x, y, **style)

    monkeypatch.setattr(Axes, "plot", record_and_plot)
    return curves


def test_the_losses_and_the_learning_rate_are_drawn_against_tokens(curves, tmp_path):
    draw_losses(steps(30) + evaluations(30), tmp_path / "loss.png")
    train, val, lr = curves
    assert train == ([512 * i for i in range(30)], [5.0 - i / 30 for i in range(30)])
    assert val == ([0, 512 * 30], [5.1, 5.1])
    assert lr == (train[0], [1e-3 * i / 30 for i in range(30)])
    picture = (tmp_path / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_a_long_run_is_drawn_with_fewer_points(curves, tmp_path):
    n = 20 * MAX_POINTS
    draw_losses(steps(n), tmp_path / "loss.png")
    tokens, _ = curves[0]
    assert MAX_POINTS / 2 < len(tokens) <= MAX_POINTS
    assert tokens[0] == 0
    assert tokens[-1] > 0.99 * 512 * n


def test_a_run_without_records_is_drawn(tmp_path):
    draw_losses([], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
