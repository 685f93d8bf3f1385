"""Windows of block_size tokens, cut from the token files.

Training takes them in a seeded order in which each window occurs once per epoch. Evaluation is one
fixed pass.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from model import IGNORED
from onenight.distributed import Ranks


class TrainWindows:
    """The windows of the training tokens, in the order of training.

    For each epoch the tokens are cut into windows, beginning at a random phase, so that the borders
    between windows differ from epoch to epoch; then the windows are permuted. Phase and permutation
    depend on the seed and the epoch alone. A position counts windows from the start of the run and
    determines the window.
    """

    def __init__(self, tokens: np.ndarray, block_size: int, seed: int):
        self.tokens = tokens
        self.block_size = block_size
        self.seed = seed
        # One window fewer than fit leaves room for any phase.
        self.windows_per_epoch = max(1, (len(tokens) - 1) // block_size - 1)
        # The epoch whose windows begin at self._starts.
        self._epoch = None
        self._starts = None
        # The batch that is being read in advance, by its position, size and stride.
        self._reader = ThreadPoolExecutor(1)
        self._reader.submit(int)  # starts its thread now: later there may be no memory for one
        self._ahead = {}

    def batch(self, position: int, batch_size: int, device: torch.device, stride: int = 1):
        """Return inputs and targets, int64, each (batch_size, block_size), on the device.

        These are the windows at `position` and at each stride-th position after it. Meanwhile the
        following batch is read in the background, so that the next call does not wait for it.
        """
        key = (position, batch_size, stride)
        reading = self._ahead.pop(key, None)
        if reading is None:
            reading = self._reader.submit(self._read, *key, device)
        next_key = (position + batch_size * stride, batch_size, stride)
        self._ahead = {next_key: self._reader.submit(self._read, *next_key, device)}
        x, y = reading.result()
        return move(x, y, device)

    def _read(self, position: int, batch_size: int, stride: int, device: torch.device):
        starts = [self._start(position + i * stride) for i in range(batch_size)]
        return read_windows(self.tokens, starts, self.block_size, device)

    def _start(self, position: int) -> int:
        """Return the index of the first token of the window at a position."""
        epoch, index = divmod(position, self.windows_per_epoch)
        if epoch != self._epoch:
            # numpy promises that the stream of a RandomState never changes.
            random = np.random.RandomState([self.seed, epoch])
            phase = random.randint(len(self.tokens) - self.windows_per_epoch * self.block_size)
            order = random.permutation(self.windows_per_epoch).astype(np.int64)  # int32 on Windows
            self._starts = phase + self.block_size * order
            self._epoch = epoch
        return int(self._starts[index])


def eval_batches(
    tokens: np.ndarray,
    block_size: int,
    batch_size: int,
    max_tokens: int,
    device: torch.device,
    ranks: Ranks,
):
    """Yield the batches of the fixed evaluation pass, as TrainWindows.batch() returns them.

    The pass covers every token of a small split, and windows spread evenly over a large one, about
    `max_tokens` tokens in all, divided among the ranks. It draws no random number and covers the
    same tokens for every batch size: the last batch is padded with IGNORED targets.
    """
    n_windows = -(-(len(tokens) - 1) // block_size)
    n_taken = min(n_windows, max(1, max_tokens // block_size))
    taken = range(ranks.rank, n_taken, ranks.world_size)
    starts = [i * n_windows // n_taken * block_size for i in taken]
    # Windows past the end pad the last batch: all of their targets are IGNORED.
    n_padding = -len(starts) % batch_size
    starts += [len(tokens)] * n_padding
    for first in range(0, len(starts), batch_size):
        x, y = read_windows(tokens, starts[first : first + batch_size], block_size, device)
        yield move(x, y, device)


def read_windows(tokens: np.ndarray, starts: list[int], block_size: int, device: torch.device):
    """Return inputs and targets, int64, each (len(starts), block_size), in the CPU's memory.

    The memory is pinned if the device is a GPU, so that the copy to it is asynchronous. Past the
    last token the inputs are 0 and the targets IGNORED.
    """
    x = np.zeros((len(starts), block_size), dtype=np.int64)
    y = np.full((len(starts), block_size), IGNORED, dtype=np.int64)
    for row, start in enumerate(starts):
        window = tokens[start : start + block_size + 1]
        inputs = window[:-1]
        targets = window[1:]
        x[row, : len(inputs)] = inputs
        y[row, : len(targets)] = targets
    x = torch.from_numpy(x)
    y = torch.from_numpy(y)
    if device.type == "cuda":
        return x.pin_memory(), y.pin_memory()
    return x, y


def move(x: torch.Tensor, y: torch.Tensor, device: torch.device):
    """Return both on the device. Only from pinned memory is an asynchronous copy safe: other memory
    may be used anew before it is done, as on MPS."""
    is_pinned = device.type == "cuda"
    return x.to(device, non_blocking=is_pinned), y.to(device, non_blocking=is_pinned)
