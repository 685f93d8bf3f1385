"""Reading train.bin and val.bin: windows of block_size tokens, for training in a seeded order that takes each window
once per epoch, for evaluation in one fixed pass."""

import string
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from onenight.bins import read_meta
from onenight.device import Ranks
from onenight.files import where
from onenight.tokenizer import EOT, VOCAB_SIZE

import numpy as np
import torch

from model import IGNORED

MAKE = "make it: python prepare_single_parquet.py FILE.parquet --out_dir="


def open_bin(data_dir: Path, split: str, block_size: int, vocab_size: int) -> np.memmap:
    """The tokens of one split, uint16 (tokens,), read from the disk as they are used. Raises SystemExit if the file is
    missing, of another format or size, too short for a window, or has ids that the model's vocabulary lacks."""
    path, meta = data_dir / f"{split}.bin", read_meta(data_dir)
    try:
        size, start = path.stat().st_size, np.fromfile(path, np.uint8, 1 << 16).tobytes()
    except OSError as error:
        raise SystemExit(f"{path}: cannot be read ({error.strerror}){where(path)}; {MAKE}{data_dir}")
    refuse_other_formats(path, start, meta)
    if size % 2:
        raise SystemExit(f"{path}: {size} bytes is not a whole number of uint16 tokens; prepare it again")
    expected = meta.get(split, {}).get("tokens", size // 2)
    if expected != size // 2:
        raise SystemExit(f"{path}: {size // 2:,} tokens, but meta.json says {expected:,}; prepare it again")
    if expected <= block_size:
        raise SystemExit(
            f"{path}: {expected:,} tokens are too few for one window of block_size={block_size}; "
            f"prepare more documents{', or a larger val_fraction' if split == 'val' else ''}, or lower block_size"
        )
    tokens = np.memmap(path, "<u2", "r")
    largest = int(tokens.max())
    if largest >= vocab_size:
        raise SystemExit(f"{path}: holds id {largest}, but the model's vocab_size is {vocab_size}; wrong file?")
    if split == "train" and meta.get("vocab_size", VOCAB_SIZE) == VOCAB_SIZE:
        if not tokens[1:10_000:2].any():
            print(f"{path}: every second id is 0: uint32? Then np.fromfile(OLD, '<u4').astype('<u2').tofile(NEW) helps")
        elif largest < EOT:
            print(f"{path}: no end-of-text ({EOT}), and the largest id is {largest:,}: are these GPT-2's ids?")
    return tokens


def refuse_other_formats(path: Path, start: bytes, meta: dict):
    """Raises SystemExit if the file, which starts so, certainly holds no ids of GPT-2."""
    encoding, again = meta.get("encoding", "gpt2"), f"{MAKE}{path.parent}"
    unprintable = len(start.translate(None, string.printable.encode()))
    for is_so, what in (
        (encoding != "gpt2", f"holds ids of {encoding!r}, as meta.json says, not GPT-2's; {again}"),
        (not meta and path.with_name("meta.pkl").exists(), f"holds ids of meta.pkl, not GPT-2's; {again}"),
        (unprintable < 0.05 * len(start), f"holds text, not ids; {again}"),
        (start[:4] == (20240520).to_bytes(4, "little"), "has llm.c's header; cut it off: tail -c +1025 OLD > NEW"),
        (start[:6] == b"\x93NUMPY", "was written by np.save; np.load(OLD).astype('<u2').tofile(NEW) helps"),
    ):
        if is_so:
            raise SystemExit(f"{path}: {what}")


class TrainWindows:
    """The windows of the training tokens in the order of training. An epoch is a permutation, seeded by (seed, epoch),
    of the windows of the tokens shifted by a random phase, so that window borders differ from epoch to epoch. A
    position counts windows from the start of the run, and determines the window."""

    def __init__(self, tokens, block_size: int, seed: int):
        self.tokens, self.block_size, self.seed = tokens, block_size, seed
        # One window fewer than fit leaves room for any phase.
        self.windows_per_epoch = max(1, (len(tokens) - 1) // block_size - 1)
        self._epoch = None  # whose windows self._starts lists
        self._reader, self._ahead = ThreadPoolExecutor(1), {}

    def batch(self, position: int, batch_size: int, device: torch.device, stride: int = 1):
        """Inputs and targets, int64, each (batch_size, block_size), on the device: the windows at `position` and each
        stride-th after it. The following batch is read meanwhile, so that the next call does not wait for it."""
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
            phase = random.randint(len(self.tokens) - self.windows_per_epoch * self.block_size)
            order = random.permutation(self.windows_per_epoch).astype(np.int64)  # int32 on Windows
            self._epoch, self._starts = epoch, phase + self.block_size * order
        return int(self._starts[index])


def eval_batches(tokens, block_size: int, batch_size: int, max_tokens: int, device: torch.device, ranks: Ranks):
    """The fixed evaluation pass: yields (inputs, targets) as TrainWindows.batch does, over every token of a small split
    and over windows spread evenly in a large one, about max_tokens in all, shared by the ranks. It draws no random
    number, and takes the same tokens for every batch_size: a last batch is filled up with IGNORED targets."""
    n_windows = -(-(len(tokens) - 1) // block_size)
    n_taken = min(n_windows, max(1, max_tokens // block_size))
    starts = [i * n_windows // n_taken * block_size for i in range(ranks.rank, n_taken, ranks.world_size)]
    starts += [len(tokens)] * (-len(starts) % batch_size)  # windows past the end: nothing but IGNORED
    for first in range(0, len(starts), batch_size):
        x, y = window_batch(tokens, starts[first : first + batch_size], block_size, device)
        yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def window_batch(tokens, starts: list[int], block_size: int, device: torch.device):
    """Inputs and targets, int64 (len(starts), block_size), in the CPU's memory, pinned if the device is a GPU, so that
    the copy to it is asynchronous. Past the last token the inputs are 0 and the targets IGNORED."""
    x = np.zeros((len(starts), block_size), dtype=np.int64)
    y = np.full((len(starts), block_size), IGNORED, dtype=np.int64)
    for row, start in enumerate(starts):
        window = tokens[start : start + block_size + 1]
        x[row, : len(window[:-1])] = window[:-1]
        y[row, : len(window[1:])] = window[1:]
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    return (x.pin_memory(), y.pin_memory()) if device.type == "cuda" else (x, y)
