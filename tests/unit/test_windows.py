"""The windows of a ramp of tokens: token i is i, so that an input shows its own position."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from model import IGNORED
from onenight.data.token_file import open_tokens
from onenight.data.windows import TrainWindows, eval_batches
from onenight.system.distributed import Ranks

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


@pytest.mark.parametrize("n", [9, 16, 24, 160, 161, 168, 1003])
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


def test_the_borders_between_windows_change_with_the_epoch():
    assert len({min(starts) % BLOCK for starts in epochs(1000, 20)}) > BLOCK // 2


@pytest.mark.parametrize("n", range(5 * BLOCK, 6 * BLOCK))
def test_every_token_is_used_within_some_epochs(n):
    seen = {start for starts in epochs(n, 200) for start in starts}
    inputs = {start + i for start in seen for i in range(BLOCK)}
    assert inputs == set(range(n - 1))  # the last token is only a target


def test_the_same_seed_gives_the_same_order():
    assert epochs(1000, 3, seed=7) == epochs(1000, 3, seed=7)


def test_the_order_is_that_of_earlier_versions():
    """Otherwise a run that is resumed after an update would train on other windows."""
    starts = take(TrainWindows(ramp(1000), BLOCK, seed=1337), 0, 250)  # into the third epoch
    assert starts[:5] == [47, 703, 215, 39, 543]
    assert starts[-5:] == [222, 436, 52, 788, 684]


def test_the_batch_size_does_not_change_the_order():
    one = take(TrainWindows(ramp(1000), BLOCK, seed=7), 0, 350)  # almost three epochs
    seven = take(TrainWindows(ramp(1000), BLOCK, seed=7), 0, 350, batch_size=7)
    assert one == seven


@pytest.mark.parametrize("position", [1, 100, 122, 123, 124, 300])
def test_reading_can_start_at_any_position(position):
    whole = take(TrainWindows(ramp(1000), BLOCK, seed=7), 0, position + 150)
    assert take(TrainWindows(ramp(1000), BLOCK, seed=7), position, 150) == whole[position:]


def test_a_batch_does_not_depend_on_earlier_ones():
    whole = take(TrainWindows(ramp(1000), BLOCK, seed=7), 0, 400)
    windows = TrainWindows(ramp(1000), BLOCK, seed=7)
    in_order = [(0, 4), (4, 4)]
    again = [(4, 4)]
    other_batch_size = [(8, 2), (8, 4)]
    jumps = [(300, 4), (0, 1)]
    across_epochs = [(120, 8), (128, 8)]
    for position, size in in_order + again + other_batch_size + jumps + across_epochs:
        assert take(windows, position, size, size) == whole[position : position + size]


def test_ranks_share_one_order():
    whole = take(TrainWindows(ramp(1000), BLOCK, seed=7), 0, 150)
    by_rank = []
    for rank in range(3):
        windows = TrainWindows(ramp(1000), BLOCK, seed=7)
        by_rank.append(take(windows, rank, 50, batch_size=5, stride=3))
    assert [start for starts in zip(*by_rank) for start in starts] == whole


def test_a_file_with_the_largest_uint16_is_read(tmp_path):
    np.full(100, 65535, dtype="<u2").tofile(tmp_path / "train.bin")
    tokens = np.memmap(tmp_path / "train.bin", "<u2", "r")
    x, y = TrainWindows(tokens, BLOCK, seed=1).batch(0, 2, CPU)
    assert (x == 65535).all()
    assert (y == 65535).all()


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


@pytest.mark.parametrize("n", [2, BLOCK, BLOCK + 1, BLOCK + 2, 10 * BLOCK, 10 * BLOCK + 1, 1003])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_small_split_is_evaluated_completely(n, batch_size):
    _, y = eval_rows(n, batch_size, max_tokens=100_000)
    targets = y[y != IGNORED].tolist()
    assert targets == list(range(1, n))  # each token once, but nothing precedes the first


@pytest.mark.parametrize("max_tokens", [100_000, 25 * BLOCK])
def test_the_evaluation_does_not_depend_on_the_batch_size(max_tokens):
    one, three, many = (eval_rows(1003, batch_size, max_tokens) for batch_size in (1, 3, 64))
    for other in (three, many):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


@pytest.mark.parametrize("taken", [1, 2, 7, 60, 99, 124])
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


def test_at_least_one_window_is_evaluated():
    assert len(eval_rows(1000, 4, max_tokens=1)[0]) == 1


@pytest.mark.parametrize("max_tokens", [100_000, 25 * BLOCK])
def test_the_ranks_evaluate_the_same_windows_as_one_process(max_tokens):
    whole = eval_rows(1003, 4, max_tokens)[0][:, 0].tolist()
    by_rank = [eval_rows(1003, 4, max_tokens, Ranks(rank, 3))[0][:, 0] for rank in range(3)]
    assert sorted(torch.cat(by_rank).tolist()) == whole


def test_the_evaluation_draws_no_random_number():
    torch.manual_seed(1)
    np.random.seed(1)
    torch_state = torch.get_rng_state()
    numpy_state = np.random.get_state()[1].tolist()
    first = eval_rows(1000, 4, 30 * BLOCK)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.random.get_state()[1].tolist() == numpy_state
    again = eval_rows(1000, 4, 30 * BLOCK)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


# -----------------------------------------------------------------------------
# Memory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory from /proc")
def test_reading_a_large_file_does_not_use_more_memory(tmp_path):
    """The mapped pages of the file do not count, because the system can drop them."""

    def anonymous_mb():
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024 / 1e6

    np.arange(60_000_000, dtype="<u4").astype("<u2").tofile(tmp_path / "train.bin")  # 120 MB
    tokens = open_tokens(tmp_path, "train", 256, 65536)
    before = anonymous_mb()
    windows = TrainWindows(tokens, 256, seed=1)
    for batch in range(10_000):
        windows.batch(batch * 8, 8, CPU)
    # The order of the windows takes 2 MB; the rest is slack of the allocator.
    assert anonymous_mb() - before < 40
