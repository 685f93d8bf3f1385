"""
Turns text into data/fineweb/{train,val}.bin and meta.json.

    python prepare_single_parquet.py data/fineweb/train/000_00000.parquet
    python prepare_single_parquet.py FILE_OR_FOLDER ... --out_dir=data/mine --val_fraction=0.01

Reads parquet, JSON lines (.jsonl, .jsonl.gz, .jsonl.zst) and .txt files, and folders of them. A
.txt file is one document, or several if <|endoftext|> separates them. Each document becomes its
GPT-2 tokens and one end-of-text token. Every 200th document goes to val.bin, or --val_fraction of
them; of a very long one only a part. The format is nanoGPT's: little-endian uint16 without a
header. If it is interrupted, at any moment, run the same command again to continue.
"""

from onenight.startup import run_script

import contextlib
import itertools
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from configurator import configure, setting
from onenight.bins import BinsWriter, is_complete
from onenight.errors import UserError
from onenight.process import lock_folder
from onenight.text import Batch, find_files, read_batches, text_size
from onenight.tokenizer import EOT, encode_documents, read_ranks
from onenight.wording import duration

DEFAULT_FOLDER = "data/fineweb/train"
CHECKPOINT_S = 2  # seconds of work that a power cut can cost
IN_FLIGHT = 5  # batches per worker that are read but not yet written: about 5 MB of text


@dataclass
class PrepareConfig:
    paths: list = field(default_factory=list)  # the arguments without a key: files and folders
    out_dir: str = setting("data/fineweb", "folder for train.bin, val.bin and meta.json", path=True)
    text_column: str = setting("text", "the column of a parquet file, or the key of JSON lines")
    val_fraction: float = setting(0.005, "fraction of documents for val.bin", above=0, below=1)
    num_workers: int = setting(0, "tokenizer threads; 0: one per core; same result", low=0)
    max_tokens: int = setting(
        0, "stop after the document that reaches this many tokens; 0: no limit", low=0
    )
    overwrite: bool = setting(False, "replace existing bins in out_dir")


def main(arguments: list[str], checkpoint_s: float = CHECKPOINT_S):
    config, _ = configure(PrepareConfig, arguments, __doc__)
    out_dir = Path(config.out_dir)
    try:
        prepare(config, out_dir, checkpoint_s)
    except OSError as error:
        raise UserError(
            f"{error.filename or out_dir}: {error.strerror}; "
            "fix that and run the same command again to continue"
        )
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to continue", flush=True)
        # Without waiting for the threads: one may be busy with a very long document, or wait for a
        # lock that the interrupted main thread holds.
        os._exit(130)


def prepare(config: PrepareConfig, out_dir: Path, checkpoint_s: float):
    started = time.monotonic()

    # What is read
    read_ranks()
    paths = find_files(config.paths or [DEFAULT_FOLDER])
    print(f"reading {len(paths):,} files: {', '.join(map(str, paths))}")
    expected_bytes = sum(text_size(path, config.text_column) for path in paths)

    # The tokens, from where an interrupted preparation of the same text has stopped
    job = describe_job(config, paths)
    with lock_folder(out_dir):
        if is_complete(out_dir, job) and not config.overwrite:
            print(f"{out_dir} is complete already: nothing to do (--overwrite prepares it again)")
            return
        writer = BinsWriter(out_dir, job, expected_bytes, config.overwrite)
        with contextlib.closing(writer):
            first_token = writer.tokens
            convert(config, paths, writer, checkpoint_s)
            writer.finish()

    # The summary
    print_summary(writer, first_token, time.monotonic() - started)


def describe_job(config: PrepareConfig, paths: list[Path]) -> dict:
    """Return what determines the contents of the bins, as JSON."""
    sources = []
    for path in paths:
        status = path.stat()
        source = {"file": path.name, "bytes": status.st_size, "modified_ns": status.st_mtime_ns}
        sources.append(source)
    return {
        "text_column": config.text_column,
        "val_fraction": config.val_fraction,
        "max_tokens": config.max_tokens,
        "sources": sources,
    }


# -----------------------------------------------------------------------------
# From documents to tokens


@dataclass
class TokenizedBatch:
    ids: np.ndarray  # uint16 (tokens,), with end-of-text after each document
    lengths: np.ndarray  # int64 (documents,): tokens of each, with end-of-text
    sizes: np.ndarray  # int64 (documents,): bytes of each
    is_replaced: np.ndarray  # bool (documents,): whether one has bytes that are not UTF-8


def convert(config: PrepareConfig, paths: list[Path], writer: BinsWriter, checkpoint_s: float):
    """Tokenize and write the documents that the writer does not have yet. They stay in order, so
    the number of rows done is the position in the input."""
    state = writer.state
    if state["rows"]:
        print(f"continuing in {paths[state['file']]} after row {state['rows']:,}")
    sizes = [path.stat().st_size for path in paths]
    starts = list(itertools.accumulate(sizes, initial=0))  # the last one is the size of all files
    progress = Progress(writer)
    last_checkpoint = time.monotonic()

    max_tokens = config.max_tokens or math.inf
    batches = read_all(paths, config.text_column, state["file"], state["rows"])
    for number, batch, tokenized in tokenize_in_order(batches, config.num_workers or cores()):
        if writer.tokens >= max_tokens:
            break
        lengths = tokenized.lengths
        written = writer.write(tokenized.ids, lengths, tokenized.sizes, max_tokens)
        if number > state["file"]:
            state["file"] = number
            state["rows"] = 0
        state["rows"] += batch.rows
        state["empty_documents"] += batch.rows - len(batch.documents)
        state["replaced_documents"] += int(tokenized.is_replaced[:written].sum())
        compare_token_counts(state, batch.token_counts[:written], lengths[:written])

        bytes_read = starts[number] + batch.file_done * sizes[number]
        progress.show(max(bytes_read / max(1, starts[-1]), writer.tokens / max_tokens))
        if time.monotonic() - last_checkpoint > checkpoint_s:
            writer.checkpoint()
            last_checkpoint = time.monotonic()


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_all(
    paths: list[Path], text_column: str, first_file: int, first_row: int
) -> Iterator[tuple[int, Batch]]:
    """Yield the batches of the files with the number of their file, from a row of a file on."""
    for number in range(first_file, len(paths)):
        row = 0
        for batch in read_batches(paths[number], text_column):
            row += batch.rows
            if number > first_file or row > first_row:
                yield number, batch


def tokenize_in_order(
    batches: Iterable[tuple[int, Batch]], num_workers: int
) -> Iterator[tuple[int, Batch, TokenizedBatch]]:
    """Yield each batch with its tokens, in order, while threads tokenize the next ones.

    tiktoken releases Python's lock while it encodes. Processes would be slower
    (benchmarks/results/prepare.json).
    """
    pool = ThreadPoolExecutor(num_workers)
    waiting = deque()
    try:
        for number, batch in batches:
            waiting.append((number, batch, pool.submit(tokenize, batch.documents)))
            if len(waiting) > IN_FLIGHT * num_workers:
                yield take_first(waiting)
        while waiting:
            yield take_first(waiting)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def take_first(waiting: deque) -> tuple[int, Batch, TokenizedBatch]:
    """Remove the first batch that was read, wait for its tokens, and return both."""
    number, batch, future = waiting.popleft()
    return number, batch, future.result()


def tokenize(documents: list[bytes]) -> TokenizedBatch:
    ids, is_replaced = encode_documents(documents)
    lengths = np.diff(np.flatnonzero(ids == EOT), prepend=-1)
    sizes = np.array([len(document) for document in documents], dtype=np.int64)
    return TokenizedBatch(ids, lengths, sizes, is_replaced)


def compare_token_counts(state: dict, expected: np.ndarray, lengths: np.ndarray):
    """Count in how many documents the file's own token_count, which does not include end-of-text,
    differs from ours."""
    has_count = ~np.isnan(expected)
    state["token_counts_compared"] += int(has_count.sum())
    state["token_counts_differing"] += int((expected != lengths - 1)[has_count].sum())


# -----------------------------------------------------------------------------
# What it prints


class Progress:
    """Prints how far the work is, with the speed and the remaining time, about every second."""

    def __init__(self, writer: BinsWriter):
        self.writer = writer
        self.first_tokens = writer.tokens
        self.started = time.monotonic()
        self.first_done = None
        self.shown = -math.inf

    def show(self, done: float):
        """Print one line, if it is time. `done` is the part of the work, from 0 to 1. On a terminal
        the next line overwrites it."""
        now = time.monotonic()
        if self.first_done is None:
            self.first_done = done
        if now - self.shown < 1:
            return
        self.shown = now
        seconds = now - self.started
        tokens = self.writer.tokens
        line = f"{done:.1%} done, {tokens:,} tokens"
        if done > self.first_done:
            speed = (tokens - self.first_tokens) / seconds
            left_s = seconds * (1 - done) / (done - self.first_done)
            line += f", {speed / 1e6:.2f} M tokens/s, ETA {duration(left_s)}"
        print(f"{line:70}", end="\r" if sys.stdout.isatty() else "\n", flush=True)


def print_summary(writer: BinsWriter, first_token: int, seconds: float):
    """Print what was prepared as `key: value` lines. An earlier run may have made the tokens up to
    first_token."""
    state = writer.state
    text_tokens = writer.tokens - state["documents"] - state["cut_documents"]
    compared = state["token_counts_compared"]
    differing = state["token_counts_differing"]
    token_count = f"equal in all {compared:,} documents"
    if differing:
        token_count = f"different in {differing:,} of {compared:,} documents"
    elif not compared:
        token_count = "not in the files"
    summary = {
        "documents": f"{state['documents']:,} ({state['cut_documents']:,} cut in two for val.bin)",
        "empty_documents_skipped": f"{state['empty_documents']:,}",
        "documents_not_utf8": f"{state['replaced_documents']:,}",
        "tokens": f"{writer.tokens:,} (including one end-of-text per document)",
        "train_tokens": f"{state['train']['tokens']:,}",
        "val_tokens": f"{state['val']['tokens']:,}",
        "token_count_column": token_count,
        "bytes_per_token": f"{state['text_bytes'] / text_tokens:.2f}",
        "seconds": f"{seconds:.1f}",
        "tokens_per_s": f"{(writer.tokens - first_token) / seconds:,.0f}",
    }
    print()
    for key, text in summary.items():
        print(f"{key}: {text}")


if __name__ == "__main__":
    run_script(main)
