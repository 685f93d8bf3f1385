"""onenight/windows.py on a ramp: token i is i, so that an input shows its own position."""

import numpy as np
import pytest
import torch

from model import IGNORED
from onenight.distributed import Ranks
from onenight.windows import TrainWindows, eval_batches

CPU = torch.device("cpu")
ALONE = Ranks()
BLOCK = 8


def ramp(n):
    return np.arange(n, dtype=np.uint16)


def take(windows, position, count, batch_size=1, stride=1):
    """Return the starts of `count` windows from a position on, after checking their contents."""
    starts = []
    for i in range(0, count, batch_size):
        x, y = windows.batch(position + i * stride, batch_size, CPU, stride)
        assert x.shape == y.shape == (batch_size, BLOCK)
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(x, x[:, :1] + torch.arange(BLOCK))  # consecutive tokens
        assert torch.equal(y, x + 1)  # the targets are the tokens that follow
        starts += x[:, 0].tolist()
    return starts


def epochs(n, count, seed=1):
    """Return the starts of the windows in each of the first epochs over n tokens."""
    windows = TrainWindows(ramp(n), BLOCK, seed)
    size = windows.windows_per_epoch
    return [take(windows, epoch * size, size) for epoch in range(count)]


# -----------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("n", [9, 24, 160, 161, 1003])
def test_an_epoch_has_each_window_once(n):
    for starts in epochs(n, 4):
        gaps = np.diff(sorted(starts))
        assert np.array_equal(gaps, np.full(len(starts) - 1, BLOCK))  # side by side, none twice
        assert min(starts) >= 0
        assert max(starts) + BLOCK + 1 <= n
        assert n - len(starts) * BLOCK <= 2 * BLOCK  # at most two windows are left out


def test_the_order_is_shuffled_and_changes_with_the_epoch_and_the_seed():
    orders = [np.argsort(starts).tolist() for seed in (1, 2) for starts in epochs(1000, 3, seed)]
    orders.append(sorted(orders[0]))
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


@pytest.mark.parametrize("n", [40, 47])
def test_every_token_is_used_within_some_epochs(n):
    seen = {start for starts in epochs(n, 200) for start in starts}
    inputs = {start + i for start in seen for i in range(BLOCK)}
    assert inputs == set(range(n - 1))  # the last token is only a target


def test_the_order_is_that_of_earlier_versions():
    """Otherwise a run that is resumed after an update would train on other windows."""
    starts = take(TrainWindows(ramp(1000), BLOCK, seed=1337), 0, 250)  # into the third epoch
    assert starts[:5] == [47, 703, 215, 39, 543]
    assert starts[-5:] == [222, 436, 52, 788, 684]


@pytest.mark.parametrize("position", [1, 123, 300])
def test_the_order_depends_on_the_position_and_not_on_the_batch_size(position):
    whole = take(TrainWindows(ramp(1000), BLOCK, seed=7), 0, position + 154)  # over an epoch
    windows = TrainWindows(ramp(1000), BLOCK, seed=7)
    assert take(windows, position, 154, batch_size=7) == whole[position:]
    assert take(windows, 2, 7, 7) == whole[2:9]  # nor on the batches before


def test_ranks_share_one_order():
    whole = take(TrainWindows(ramp(1000), BLOCK, seed=7), 0, 150)
    by_rank = []
    for rank in range(3):
        windows = TrainWindows(ramp(1000), BLOCK, seed=7)
        by_rank.append(take(windows, rank, 50, batch_size=5, stride=3))
    assert [start for starts in zip(*by_rank) for start in starts] == whole


# -----------------------------------------------------------------------------
# Evaluation


def eval_rows(n, batch_size, max_tokens, ranks=ALONE):
    """Return the inputs and targets of all batches, without padding rows. Checks their shapes."""
    batches = list(eval_batches(ramp(n), BLOCK, batch_size, max_tokens, CPU, ranks))
    for x, y in batches:
        # A compiled model knows one shape, so every batch is full.
        assert x.shape == y.shape == (batch_size, BLOCK)
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(y[y != IGNORED], x[y != IGNORED] + 1)
    x = torch.cat([x for x, _ in batches])
    y = torch.cat([y for _, y in batches])
    is_padding = (y == IGNORED).all(dim=1)
    return x[~is_padding], y[~is_padding]


@pytest.mark.parametrize("n", [2, BLOCK, BLOCK + 1, BLOCK + 2, 1003])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_a_small_split_is_evaluated_completely(n, batch_size):
    _, y = eval_rows(n, batch_size, max_tokens=100_000)
    targets = y[y != IGNORED].tolist()
    assert targets == list(range(1, n))  # each token once, but nothing precedes the first


@pytest.mark.parametrize("taken", [1, 7, 99])
def test_a_large_split_is_evaluated_at_evenly_spread_windows(taken):
    n = 1000  # 125 windows
    x, y = eval_rows(n, 4, max_tokens=taken * BLOCK)
    starts = x[:, 0].tolist()
    assert len(starts) == taken
    assert (y[:-1] != IGNORED).all()
    gaps = np.diff([*starts, n])  # the last one is the distance to the end
    assert starts[0] == 0
    assert gaps.min() >= BLOCK
    assert gaps.max() - gaps.min() <= BLOCK


def test_the_ranks_evaluate_the_same_windows_as_one_process():
    whole = eval_rows(1003, 4, 25 * BLOCK)[0][:, 0].tolist()
    by_rank = [eval_rows(1003, 4, 25 * BLOCK, Ranks(rank, 3))[0][:, 0] for rank in range(3)]
    assert sorted(torch.cat(by_rank).tolist()) == whole
