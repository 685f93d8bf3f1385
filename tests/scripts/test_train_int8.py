"""train.py --int8: what it changes, and that the rest is as without it."""

import pytest

from helpers import MUON, load, losses, train_here


@pytest.fixture(scope="module")
def int8_run(bins, tmp_path_factory):
    """The folder of a whole run with --int8, and what it printed."""
    out_dir = tmp_path_factory.mktemp("int8")
    result = train_here(bins, out_dir, **MUON, int8=True)
    assert result.returncode == 0, result.stderr
    return out_dir, result.stdout


def test_it_learns_as_much_as_without(int8_run, bins, tmp_path):
    out_dir, printed = int8_run
    assert "cpu (torch finds no GPU: see README), float32, int8\n" in printed
    train_here(bins, tmp_path, **MUON)
    rounded = losses(out_dir)[-1]["val_loss"]
    exact = losses(tmp_path)[-1]["val_loss"]
    assert rounded != exact
    # The loss falls from 5.5 to 3.2.
    assert abs(rounded - exact) < 0.01


def test_it_resumes_exactly(int8_run, bins, tmp_path):
    out_dir, _ = int8_run
    train_here(bins, tmp_path, **MUON, int8=True, max_iters=20)
    train_here(bins, tmp_path, **MUON, int8=True, init_from="resume")
    assert losses(tmp_path)[-1] == losses(out_dir)[-1]


def test_its_checkpoint_is_an_ordinary_one(int8_run, bins, tmp_path):
    out_dir, _ = int8_run
    train_here(bins, tmp_path / "plain", **MUON, max_iters=20)
    shapes = []
    for folder in (out_dir, tmp_path / "plain"):
        weights = load(folder)["model"]
        shapes.append({name: (w.shape, w.dtype) for name, w in weights.items()})
    assert shapes[0] == shapes[1]

    # A run without it continues with it, and a new one starts from its weights.
    result = train_here(bins, tmp_path / "plain", **MUON, init_from="resume", int8=True)
    assert "changed since: int8 False -> True" in result.stdout
    start = out_dir / "ckpt.pt"
    result = train_here(bins, tmp_path / "next", **MUON, init_from=start, max_iters=5)
    assert result.returncode == 0, result.stderr
