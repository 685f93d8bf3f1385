"""dataset.py on a ramp of tokens: token i is i, so that an input tells its position."""

from onenight.dataset import TrainWindows, eval_batches
from onenight.device import Ranks

import numpy as np
import pytest
import torch

from model import IGNORED

CPU = torch.device("cpu")
BLOCK = 8


def ramp(n: int):
    return np.arange(n, dtype=np.uint16)


def take(windows: TrainWindows, position: int, count: int, batch_size: int = 1, stride: int = 1) -> list[int]:
    """The starts of `count` windows from a position on; checks their contents."""
    starts = []
    for i in range(0, count, batch_size):
        x, y = windows.batch(position + i * stride, batch_size, CPU, stride)
        assert x.shape == y.shape == (batch_size, BLOCK)
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(x, x[:, :1] + torch.arange(BLOCK))  # consecutive tokens
        assert torch.equal(y, x + 1)  # and the targets are the tokens after them
        starts += x[:, 0].tolist()
    return starts


def epochs(n: int, count: int, seed: int = 1) -> list[list[int]]:
    """The starts of each of the first epochs over n tokens."""
    windows = TrainWindows(ramp(n), BLOCK, seed)
    return [take(windows, i * windows.windows_per_epoch, windows.windows_per_epoch) for i in range(count)]


# ---- training


@pytest.mark.parametrize("n", [BLOCK + 1, 2 * BLOCK, 3 * BLOCK, 20 * BLOCK, 20 * BLOCK + 1, 21 * BLOCK, 1003])
def test_an_epoch_has_each_window_once(n):
    for starts in epochs(n, 4):
        assert np.array_equal(np.diff(sorted(starts)), np.full(len(starts) - 1, BLOCK))  # side by side, none twice
        assert min(starts) >= 0 and max(starts) + BLOCK + 1 <= n
        assert n - len(starts) * BLOCK <= 2 * BLOCK  # and at most two windows' worth is left out


def test_the_order_is_shuffled_and_changes_with_epoch_and_seed():
    orders = [np.argsort(starts).tolist() for seed in (1, 2) for starts in epochs(1000, 3, seed)]
    orders.append(sorted(orders[0]))
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_the_borders_of_the_windows_change_with_the_epoch():
    assert len({min(starts) % BLOCK for starts in epochs(1000, 20)}) > BLOCK // 2


@pytest.mark.parametrize("n", range(5 * BLOCK, 6 * BLOCK))
def test_every_token_is_used_within_some_epochs(n):
    seen = {start for starts in epochs(n, 200) for start in starts}
    # the last token is only a target
    assert {start + i for start in seen for i in range(BLOCK)} == set(range(n - 1))


def test_the_same_seed_gives_the_same_order():
    assert epochs(1000, 3, seed=7) == epochs(1000, 3, seed=7)


def test_the_batch_size_does_not_change_the_order():
    one, seven = (TrainWindows(ramp(1000), BLOCK, seed=7) for _ in range(2))
    assert take(one, 0, 350) == take(seven, 0, 350, batch_size=7)  # almost three epochs


@pytest.mark.parametrize("position", [1, 100, 122, 123, 124, 300])
def test_reading_can_start_at_any_position(position):
    whole = take(TrainWindows(ramp(1000), BLOCK, seed=7), 0, position + 150)
    assert take(TrainWindows(ramp(1000), BLOCK, seed=7), position, 150) == whole[position:]


def test_a_batch_does_not_depend_on_earlier_ones():
    whole = take(TrainWindows(ramp(1000), BLOCK, seed=7), 0, 400)
    windows = TrainWindows(ramp(1000), BLOCK, seed=7)
    # on, again, with another batch size, back, and across the end of an epoch
    for position, batch_size in [(0, 4), (4, 4), (4, 4), (8, 2), (8, 4), (300, 4), (0, 1), (120, 8), (128, 8)]:
        assert take(windows, position, batch_size, batch_size) == whole[position : position + batch_size]


def test_ranks_share_one_order():
    whole = take(TrainWindows(ramp(1000), BLOCK, seed=7), 0, 150)
    ranks = [take(TrainWindows(ramp(1000), BLOCK, seed=7), rank, 50, batch_size=5, stride=3) for rank in range(3)]
    assert [start for starts in zip(*ranks) for start in starts] == whole


def test_it_reads_a_file_and_the_largest_ids(tmp_path):
    np.full(100, 65535, dtype="<u2").tofile(tmp_path / "train.bin")
    x, y = TrainWindows(np.memmap(tmp_path / "train.bin", "<u2", "r"), BLOCK, seed=1).batch(0, 2, CPU)
    assert (x == 65535).all() and (y == 65535).all()


# ---- evaluation


def eval_rows(n: int, batch_size: int, max_tokens: int):
    """The inputs and targets of all batches, without the padding rows; checks their shapes."""
    batches = list(eval_batches(ramp(n), BLOCK, batch_size, max_tokens, CPU, Ranks()))
    for x, y in batches:
        assert x.shape == y.shape == (batch_size, BLOCK)  # always full: a compiled model knows one shape
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(y[y != IGNORED], x[y != IGNORED] + 1)
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    real = (y != IGNORED).any(dim=1)
    return x[real], y[real]


@pytest.mark.parametrize("n", [2, BLOCK, BLOCK + 1, BLOCK + 2, 10 * BLOCK, 10 * BLOCK + 1, 1003])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_small_split_is_evaluated_whole(n, batch_size):
    _, y = eval_rows(n, batch_size, max_tokens=100_000)
    assert y[y != IGNORED].tolist() == list(range(1, n))  # each token once; nothing comes before the first


@pytest.mark.parametrize("max_tokens", [100_000, 25 * BLOCK])
def test_the_evaluation_does_not_depend_on_the_batch_size(max_tokens):
    one, three, many = (eval_rows(1003, batch_size, max_tokens) for batch_size in (1, 3, 64))
    for other in (three, many):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("taken", [1, 2, 7, 60, 99, 124])
def test_a_large_split_is_evaluated_at_evenly_spread_windows(taken):
    n = 1000  # 125 windows
    x, y = eval_rows(n, 4, max_tokens=taken * BLOCK)
    starts = x[:, 0].numpy()
    assert len(starts) == taken
    assert (y[:-1] != IGNORED).all()
    gaps = np.diff([*starts, n])  # the last is the distance to the end
    assert starts[0] == 0
    assert gaps.max() - gaps.min() <= BLOCK and gaps.min() >= BLOCK


def test_at_least_one_window_is_evaluated():
    assert len(eval_rows(1000, 4, max_tokens=1)[0]) == 1


def test_the_evaluation_draws_no_random_number():
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first = eval_rows(1000, 4, 30 * BLOCK)
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]
    assert all(map(torch.equal, first, eval_rows(1000, 4, 30 * BLOCK)))
