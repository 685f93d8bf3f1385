"""
Turns FineWeb parquet files into data/fineweb/{train,val}.bin and meta.json.

    python prepare_single_parquet.py data/fineweb/train/000_00000.parquet
    python prepare_single_parquet.py FILE_OR_FOLDER ... --out_dir=data/fineweb --val_fraction=0.005

Each document becomes its GPT-2 ids and one end-of-text token; every 200th goes to val.bin. The bins are nanoGPT's:
little-endian uint16 without a header. After an interruption at any moment, the same command continues.
"""

import collections
import contextlib
import math
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from onenight.bins import SPLITS, BinsWriter, check_bin, clear_work, is_complete, read_meta
from onenight.console import set_up_output
from onenight.files import lock_folder
from onenight.parquet import Batch, Source, find_parquets, open_source, read_batches, without_copies
from onenight.tokenizer import EOT, VOCAB_SIZE, encode_documents, read_ranks

import numpy as np

from configurator import configure, read_config_file, setting

DEFAULT_FOLDER = Path("data/fineweb/train")
CONFIG_FILES = ("config/train_fineweb_4070_fast.py", "config/train_fineweb_4070.py")
CHECKPOINT_S = 2  # seconds of work that a power cut can cost
IN_FLIGHT = 4 << 20  # bytes of text per worker that are read and not yet written: about five batches
BYTES_PER_TOKEN = 4  # English has 4.3 and more, so this errs on the safe side
COUNTERS = {"empty_documents": 0, "text_bytes": 0, "token_counts_compared": 0, "token_counts_differing": 0}


@dataclass
class PrepareConfig:
    paths: list = field(default_factory=list)  # the arguments without a key: files and folders
    out_dir: str = setting("data/fineweb", "folder for train.bin, val.bin and meta.json", path=True)
    text_column: str = setting("text", "the column to read")
    val_fraction: float = setting(0.005, "share of the documents that go to val.bin", above=0, below=1)
    num_workers: int = setting(0, "threads that tokenize; 0: one per core. The result is the same", low=0)
    max_documents: int = setting(0, "stop after so many documents; 0: take all", low=0)
    max_tokens: int = setting(0, "stop after the document that reaches so many tokens; 0: take all", low=0)
    overwrite: bool = setting(False, "replace other bins in out_dir")
    verify: bool = setting(False, "only check the bins in out_dir against meta.json")


@dataclass
class Tokenized:
    """A batch as ids, uint16, with end-of-text after each document; and the numbers of ids and bytes of each row."""

    ids: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray


def main(arguments: list[str], checkpoint_s: float = CHECKPOINT_S):
    set_up_output("stdout", "stderr")
    config = configure(PrepareConfig, arguments, __doc__)
    out_dir, started = Path(config.out_dir), time.monotonic()
    if config.verify:
        verify(out_dir)
        return
    read_ranks()  # fails here if the rank file is damaged
    paths = find_parquets(config.paths, DEFAULT_FOLDER)
    sources = without_copies([open_source(path, config.text_column) for path in paths])
    # What determines the contents of the bins, JSON: equal jobs give the same bins bit for bit.
    settings = {key: getattr(config, key) for key in ("text_column", "val_fraction", "max_documents", "max_tokens")}
    job = {"settings": settings, "sources": [source.fingerprint for source in sources]}
    if is_complete(out_dir, job) and not config.overwrite:
        with lock_folder(out_dir):
            clear_work(out_dir)
        print(f"{out_dir} is complete already: nothing to do (--overwrite prepares it again, --verify checks it)")
        return
    try:
        with lock_folder(out_dir), contextlib.closing(BinsWriter(out_dir, job, COUNTERS, config.overwrite)) as writer:
            check_space(config, sources, writer)
            first_token = writer.tokens
            convert(config, sources, writer, checkpoint_s)
            lengths = finish(writer)
    except OSError as error:
        problem = f"\n{out_dir}: {error.strerror}; once that is solved, the same command continues from here"
        raise SystemExit(problem) from None
    report(writer.state, lengths, writer.tokens - first_token, time.monotonic() - started)


def check_space(config: PrepareConfig, sources: list[Source], writer: BinsWriter):
    """Raises SystemExit if the disk has too little room for what is expected still to be written."""
    rows = sum(source.rows for source in sources)
    tokens = sum(source.text_bytes for source in sources) / BYTES_PER_TOKEN + rows  # one end-of-text each
    tokens *= min(1, (config.max_documents or rows) / max(rows, 1))
    tokens = min(tokens, config.max_tokens or tokens)
    needed, free = 2 * (tokens - writer.tokens), shutil.disk_usage(writer.out_dir).free
    if needed > free:
        if not writer.tokens:
            writer.discard()
        raise SystemExit(
            f"{writer.out_dir}: about {needed / 1e6:,.1f} MB are to be written, but only {free / 1e6:,.1f} are free; "
            f"make room, or choose another --out_dir or a smaller --max_tokens"
        )


def convert(config: PrepareConfig, sources: list[Source], writer: BinsWriter, checkpoint_s: float):
    """Tokenizes what the writer does not have yet. Documents stay in order, so the rows done are the position."""
    state, progress = writer.state, Progress(config, sources, writer)
    if state["rows"]:
        print(f"continuing at row {state['rows']:,}")
    batches = read_batches(sources, state["rows"])
    for batch, tokenized in tokenize_in_order(batches, config.num_workers or cores()):
        rows = write_within_limits(config, writer, tokenized)
        compare_counts(state, batch, tokenized.lengths[:rows])
        if rows < len(tokenized.lengths):
            break
        if time.monotonic() - progress.shown > checkpoint_s:
            writer.checkpoint()
            progress.show()
    progress.show()


def tokenize_in_order(batches, num_workers: int):
    """Yields (batch, Tokenized) in order. Threads do the work, because tiktoken releases Python's lock meanwhile;
    processes are slower (benchmarks/results/prepare.json)."""
    pool, waiting, in_flight = ThreadPoolExecutor(num_workers), collections.deque(), 0
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(tokenize, batch)))
            in_flight += batch.documents.nbytes
            while in_flight > IN_FLIGHT * num_workers:
                batch, future = waiting.popleft()
                in_flight -= batch.documents.nbytes
                yield batch, future.result()
        for batch, future in waiting:
            yield batch, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def tokenize(batch: Batch) -> Tokenized:
    """The ids of a batch; a row that is empty or null has none."""
    rows = [document or b"" for document in batch.documents.to_pylist()]
    ids = encode_documents([document for document in rows if document])
    sizes = np.array([len(document) for document in rows])
    lengths = np.zeros_like(sizes)
    lengths[sizes > 0] = np.diff(np.flatnonzero(ids == EOT), prepend=-1)
    return Tokenized(ids, lengths, sizes)


def write_within_limits(config: PrepareConfig, writer: BinsWriter, tokenized: Tokenized) -> int:
    """Writes the rows up to the limits of the settings, and returns how many they are. A document goes to val.bin if
    its number * val_fraction reaches a new whole number: 0, 200, 400, ..."""
    is_document = tokenized.lengths > 0
    documents = writer.documents + np.cumsum(is_document) - is_document
    tokens = writer.tokens + np.cumsum(tokenized.lengths) - tokenized.lengths
    within = (documents < (config.max_documents or math.inf)) & (tokens < (config.max_tokens or math.inf))
    rows = int(within.sum())
    lengths, is_document = tokenized.lengths[:rows], is_document[:rows]
    share, whole = Fraction(str(config.val_fraction)).as_integer_ratio()  # exactly as written: 0.005 is 1, 200
    is_val = np.array([number * share % whole < share for number in documents[:rows].tolist()], dtype=bool)
    id_is_val = np.repeat(is_val, lengths)
    ids = tokenized.ids[: len(id_is_val)]
    writer.write("train", ids[~id_is_val], documents=int((is_document & ~is_val).sum()))
    writer.write("val", ids[id_is_val], documents=int((is_document & is_val).sum()))
    writer.state["rows"] += rows
    writer.state["empty_documents"] += int((~is_document).sum())
    writer.state["text_bytes"] += int(tokenized.sizes[:rows].sum())
    return rows


def compare_counts(state: dict, batch: Batch, lengths: np.ndarray):
    """Compares with the file's own token_count: prints the first ten differences, counts all."""
    expected, found = batch.token_counts[: len(lengths)], np.maximum(lengths - 1, 0)  # without end-of-text
    compared = ~np.isnan(expected)
    for i in np.flatnonzero(compared & (expected != found)):
        state["token_counts_differing"] += 1
        if state["token_counts_differing"] <= 10:
            where = f"{batch.source.path}: row group {batch.row_group}, row {batch.row + i}"
            print(f"{where}: {found[i]} tokens, but token_count is {expected[i]:.15g}")
    state["token_counts_compared"] += int(compared.sum())


class Progress:
    """The progress line; a terminal shows one line, which is overwritten."""

    def __init__(self, config: PrepareConfig, sources: list[Source], writer: BinsWriter):
        self.config, self.writer, self.total_rows = config, writer, sum(source.rows for source in sources)
        self.first_rows, self.first_tokens, self.first_done = writer.state["rows"], writer.tokens, self._done()
        self.started = self.shown = time.monotonic()

    def _done(self) -> float:
        """The share of the work that is done, 0 to 1, by the nearest limit."""
        writer, config = self.writer, self.config
        parts = [(writer.state["rows"], self.total_rows)]
        parts += [(writer.documents, config.max_documents), (writer.tokens, config.max_tokens)]
        return max(done / total for done, total in parts if total) if self.total_rows else 1.0

    def show(self):
        """Prints the progress, and notes when."""
        self.shown = time.monotonic()
        seconds, done, rows = max(self.shown - self.started, 1e-3), min(self._done(), 1.0), self.writer.state["rows"]
        eta = seconds * (1 - done) / max(done - self.first_done, 1e-9)
        print(
            f"{rows:,} of {self.total_rows:,} documents, {(rows - self.first_rows) / seconds:,.0f} documents/s, "
            f"{(self.writer.tokens - self.first_tokens) / seconds / 1e6:.2f} M tokens/s, ETA {eta:.0f} s   ",
            end="\r" if sys.stdout.isatty() else "\n",
            flush=True,
        )


def finish(writer: BinsWriter) -> collections.Counter:
    """Renames the finished bins. Raises SystemExit, and deletes the work, if a split would be empty."""
    state = writer.state
    empty = [split for split in SPLITS if not state[split]["documents"]]
    if empty:
        writer.discard()
        raise SystemExit(
            f"nothing for {' and '.join(f'{split}.bin' for split in empty)}: the {state['rows']:,} rows hold "
            f"{writer.documents:,} documents with text; give more, or another --val_fraction"
        )
    about = {"encoding": "gpt2", "vocab_size": VOCAB_SIZE, "eot": EOT, "dtype": "uint16"}
    return writer.finish(about | {key: state[key] for key in COUNTERS})


def report(state: dict, lengths: collections.Counter, new_tokens: int, seconds: float):
    """Prints the summary, one `key: value` per line, and the epochs that the shipped configs train on these bins."""
    tokens, documents = (sum(state[split][what] for split in SPLITS) for what in ("tokens", "documents"))
    compared, differing = state["token_counts_compared"], state["token_counts_differing"]
    verdict = f"{differing:,} of {compared:,} documents differ" if differing else f"equal in all {compared:,} documents"
    sizes, counts = zip(*lengths.items())
    median, p90 = np.quantile(sizes, (0.5, 0.9), weights=counts, method="inverted_cdf").tolist()
    spread = f"median {median:,}, p90 {p90:,}, max {max(sizes):,}"
    print(
        f"\ndocuments: {documents:,}\n"
        f"empty_documents_skipped: {state['empty_documents']:,}\n"
        f"tokens: {tokens:,} (with one end-of-text for each document)\n"
        f"train_tokens: {state['train']['tokens']:,}\n"
        f"val_tokens: {state['val']['tokens']:,}\n"
        f"token_count_column: {verdict if compared else 'none to compare with'}\n"
        f"tokens_per_document: {spread}\n"
        f"bytes_per_token: {state['text_bytes'] / (tokens - documents):.2f}\n"
        f"seconds: {seconds:.1f}\n"
        f"tokens_per_s: {new_tokens / seconds:,.0f}\n"
        f"peak_memory_mb: {peak_memory_mb()}"
    )
    for config_file in CONFIG_FILES:
        print(epochs_line(config_file, state["train"]["tokens"]))


def epochs_line(config_file: str, tokens: int) -> str:
    """How many epochs of so many tokens a config file trains, as a line."""
    try:
        config = read_config_file(str(Path(__file__).parent / config_file))
        per_iter = config["batch_size"] * config["gradient_accumulation_steps"] * config["block_size"]
        seen = per_iter * config["max_iters"]
    except (ValueError, KeyError, TypeError) as problem:
        return f"{config_file}: the length of its training is unknown ({problem})"
    return (
        f"{config_file}: {per_iter:,} tokens per iteration, one epoch is {tokens / per_iter:,.1f} "
        f"iterations, its {config['max_iters']:,} are {seen / 1e9:.2f} billion tokens or {seen / tokens:.2f} epochs"
    )


def verify(out_dir: Path):
    """Reads both bins again and compares them with meta.json. Raises SystemExit if they differ."""
    meta = read_meta(out_dir)
    for split in SPLITS:
        path, expected = out_dir / f"{split}.bin", meta.get(split)
        if not path.exists() or not isinstance(expected, dict) or set(expected) != {"tokens", "documents", "sha256"}:
            raise SystemExit(f"{out_dir}: has no {split}.bin with a meta.json to check it against; prepare it first")
        check_bin(path, **expected)
        print(f"{path}: good, {expected['tokens']:,} tokens in {expected['documents']:,} documents")


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory_mb() -> str:
    """The largest memory this process ever held, in MB."""
    try:  # getrusage would count the memory of the parent at the fork
        status = Path("/proc/self/status").read_text().splitlines()
        return f"{sum(int(line.split()[1]) for line in status if line.startswith('VmHWM')) * 1024 / 1e6:,.0f}"
    except OSError:
        return "unknown on this system"


def run_interruptibly(job, *arguments, **options):
    """Calls job(); Ctrl-C and SIGTERM end the process at once, with a message, exit status 130."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        job(*arguments, **options)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues from here", flush=True)
        os._exit(130)  # does not wait for a thread that is busy with a very long document


if __name__ == "__main__":
    run_interruptibly(main, sys.argv[1:])
