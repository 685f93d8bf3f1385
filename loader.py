"""
The data path: windows of block_size tokens out of train.bin and val.bin, for training in a seeded order
that sees each window once per epoch, and for evaluation in one fixed pass.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from loss import IGNORED
from ranks import Ranks


class TrainWindows:
    """
    The windows of the training tokens in the order of training. An epoch is a permutation, seeded by (seed, epoch), of
    the windows of the tokens shifted by a random phase, so that window borders differ from epoch to epoch. A position
    in the order counts windows from the start of the run; it determines the window.
    """

    def __init__(self, tokens, block_size: int, seed: int):
        self.tokens, self.block_size, self.seed = tokens, block_size, seed
        # One window fewer than fit leaves room for any phase.
        self.windows_per_epoch = max(1, (len(tokens) - 1) // block_size - 1)
        self._epoch = None  # whose starts are in self._starts
        self._reader, self._ahead = ThreadPoolExecutor(1), {}

    def batch(self, position: int, batch_size: int, device: torch.device, stride: int = 1):
        """
        Inputs and targets, int64, each (batch_size, block_size), on the device: the windows at `position` and each
        stride-th after it. The batch that follows is read meanwhile, so that asking for it next costs no time.
        """
        wanted = (position, batch_size, stride)
        reading = self._ahead.pop(wanted, None) or self._reader.submit(self._read, *wanted, device)
        following = (position + batch_size * stride, batch_size, stride)
        self._ahead = {following: self._reader.submit(self._read, *following, device)}
        return tuple(part.to(device, non_blocking=True) for part in reading.result())

    def _read(self, position: int, batch_size: int, stride: int, device: torch.device):
        starts = [self._start(position + i * stride) for i in range(batch_size)]
        return window_batch(self.tokens, starts, self.block_size, device)

    def _start(self, position: int) -> int:
        epoch, index = divmod(position, self.windows_per_epoch)
        if epoch != self._epoch:
            random = np.random.RandomState([self.seed, epoch])  # numpy promises that this stream never changes
            spare = len(self.tokens) - 1 - self.windows_per_epoch * self.block_size
            phase = random.randint(spare + 1)
            order = random.permutation(self.windows_per_epoch).astype(np.int64)  # Windows gives int32
            self._starts = phase + self.block_size * order
            self._epoch = epoch
        return int(self._starts[index])


def eval_batches(tokens, block_size: int, batch_size: int, max_tokens: int, device: torch.device, ranks: Ranks):
    """
    The fixed evaluation pass: yields (inputs, targets) as TrainWindows.batch does, over every token of a small split
    and over windows spread evenly in a large one, about max_tokens in all, shared by the ranks. No randomness, and the
    same tokens for every batch_size: what is left over is filled with IGNORED targets.
    """
    n_windows = -(-(len(tokens) - 1) // block_size)
    n_taken = min(n_windows, max(1, max_tokens // block_size))
    starts = [i * n_windows // n_taken * block_size for i in range(n_taken)]
    starts = starts[ranks.rank :: ranks.world_size]
    starts += [len(tokens)] * (-len(starts) % batch_size)  # windows past the end: nothing but IGNORED
    for first in range(0, len(starts), batch_size):
        x, y = window_batch(tokens, starts[first : first + batch_size], block_size, device)
        yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def window_batch(tokens, starts: list[int], block_size: int, device: torch.device):
    """
    Inputs and targets, int64 (len(starts), block_size), in the CPU's memory, pinned if the device is a GPU, so that
    the copy need not be waited for. Past the last token the inputs are 0 and the targets IGNORED.
    """
    x = np.zeros((len(starts), block_size), dtype=np.int64)
    y = np.full((len(starts), block_size), IGNORED, dtype=np.int64)
    for row, start in enumerate(starts):
        window = tokens[start : start + block_size + 1]
        x[row, : len(window[:-1])] = window[:-1]
        y[row, : len(window[1:])] = window[1:]
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    return (x.pin_memory(), y.pin_memory()) if device.type == "cuda" else (x, y)
