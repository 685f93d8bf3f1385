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
import re
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
from onenight.files import duration, lock_folder
from onenight.parquet import Batch, Source, find_parquets, open_source, read_batches, without_copies
from onenight.tokenizer import EOT, VOCAB_SIZE, encode_documents, read_ranks

import numpy as np

from configurator import configure, read_config_file, setting

DEFAULT_FOLDER = Path("data/fineweb/train")
CONFIG_FILES = ("config/train_fineweb_4070_fast.py", "config/train_fineweb_4070.py")
CHECKPOINT_S = 2  # seconds of work that a power cut can cost
IN_FLIGHT = 5  # batches per worker that are read and not yet written: about 5 MB of text
BYTES_PER_TOKEN = 4  # English has 4.3 and more, so this errs on the safe side
COUNTERS = {"empty_documents": 0, "text_bytes": 0, "token_counts_compared": 0, "token_counts_differing": 0}


@dataclass
class PrepareConfig:
    paths: list = field(default_factory=list)  # the arguments without a key: files and folders
    out_dir: str = setting("data/fineweb", "folder for train.bin, val.bin and meta.json", path=True)
    text_column: str = setting("text", "the column to read")
    val_fraction: float = setting(0.005, "share of the documents that go to val.bin", above=0, below=1)
    num_workers: int = setting(0, "threads that tokenize; 0: one per core. The result is the same", low=0)
    max_documents: int = setting(0, "stop after this many documents; 0: take all", low=0)
    max_tokens: int = setting(0, "stop after the document that reaches this many tokens; 0: take all", low=0)
    overwrite: bool = setting(False, "replace other bins in out_dir")
    verify: bool = setting(False, "only check the bins in out_dir against meta.json")


def main(arguments: list[str], checkpoint_s: float = CHECKPOINT_S):
    set_up_output("stdout", "stderr")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config = configure(PrepareConfig, arguments, __doc__)
    try:
        if config.verify:
            verify(Path(config.out_dir))
        else:
            prepare(config, Path(config.out_dir), checkpoint_s)
    except OSError as error:
        where = error.filename or config.out_dir
        raise SystemExit(f"\n{where}: {error.strerror}; once that is solved, the same command continues from here")
    except KeyboardInterrupt:
        print("\nstopped; the same command continues from here", flush=True)
        os._exit(130)  # does not wait for a thread that is busy with a very long document


def prepare(config: PrepareConfig, out_dir: Path, checkpoint_s: float):
    """From the parquet files to the finished bins and their summary. Raises OSError if a disk fails."""
    started = time.monotonic()
    read_ranks()  # fails here if the rank file is damaged
    paths = find_parquets(config.paths, DEFAULT_FOLDER)
    sources = without_copies([open_source(path, config.text_column) for path in paths])
    # What determines the contents of the bins, JSON: equal jobs give the same bins bit for bit.
    settings = {key: getattr(config, key) for key in ("text_column", "val_fraction", "max_documents", "max_tokens")}
    job = {"settings": settings, "sources": [source.fingerprint for source in sources]}
    with lock_folder(out_dir):
        if is_complete(out_dir, job) and not config.overwrite:
            clear_work(out_dir)
            print(f"{out_dir} is complete already: nothing to do (--overwrite prepares it again, --verify checks it)")
            return
        with contextlib.closing(BinsWriter(out_dir, job, COUNTERS, config.overwrite)) as writer:
            check_space(config, sources, writer)
            first_token = writer.tokens
            convert(config, sources, writer, checkpoint_s)
            lengths = finish(writer)
    report(writer, lengths, writer.tokens - first_token, time.monotonic() - started)


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
    state = writer.state
    if state["rows"]:
        print(f"continuing at row {state['rows']:,}")
    start = time.monotonic(), writer.tokens, share_done(config, sources, writer)
    saved = start[0]
    batches = read_batches(sources, state["rows"])
    for batch, (ids, lengths, sizes) in tokenize_in_order(batches, config.num_workers or cores()):
        rows = write_within_limits(config, writer, ids, lengths, sizes)
        compare_counts(state, batch, lengths[:rows])
        if rows < len(lengths):
            break
        if time.monotonic() - saved > checkpoint_s:
            writer.checkpoint()
            show_progress(writer, share_done(config, sources, writer), *start)
            saved = time.monotonic()


def tokenize_in_order(batches, num_workers: int):
    """Yields (batch, its tokenize()) in order. Threads do the work, because tiktoken releases Python's lock meanwhile;
    processes are slower (benchmarks/results/prepare.json)."""
    pool, waiting = ThreadPoolExecutor(num_workers), collections.deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(tokenize, batch)))
            if len(waiting) > IN_FLIGHT * num_workers:
                batch, future = waiting.popleft()
                yield batch, future.result()
        for batch, future in waiting:
            yield batch, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def tokenize(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ids of a batch, uint16, with end-of-text after each document; and the numbers of ids and bytes of each row.
    A row that is empty or null has none."""
    rows = [document or b"" for document in batch.documents.to_pylist()]
    ids = encode_documents([document for document in rows if document])
    sizes = np.array([len(document) for document in rows])
    lengths = np.zeros_like(sizes)
    lengths[sizes > 0] = np.diff(np.flatnonzero(ids == EOT), prepend=-1)
    return ids, lengths, sizes


def write_within_limits(config: PrepareConfig, writer: BinsWriter, ids, lengths, sizes) -> int:
    """Writes the rows, as tokenize() returns them, up to the limits of the settings, and returns how many they are. A
    document goes to val.bin if its number * val_fraction reaches a new whole number: 0, 200, 400, ..."""
    is_document = lengths > 0
    documents = writer.documents + np.cumsum(is_document) - is_document
    tokens = writer.tokens + np.cumsum(lengths) - lengths
    within = (documents < (config.max_documents or math.inf)) & (tokens < (config.max_tokens or math.inf))
    rows = int(within.sum())
    share, whole = Fraction(str(config.val_fraction)).as_integer_ratio()  # exactly as written: 0.005 is 1, 200
    is_val = np.array([number * share % whole < share for number in documents.tolist()], dtype=bool)
    for split, chosen in (("train", within & ~is_val), ("val", within & is_val)):
        writer.write(split, ids[np.repeat(chosen, lengths)])
    writer.state["rows"] += rows
    writer.state["empty_documents"] += int((~is_document & within).sum())
    writer.state["text_bytes"] += int(sizes[within].sum())
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


def share_done(config: PrepareConfig, sources: list[Source], writer: BinsWriter) -> float:
    """How much of the work is done, 0 to 1, by the nearest limit."""
    parts = [(writer.state["rows"], sum(source.rows for source in sources))]
    parts += [(writer.documents, config.max_documents), (writer.tokens, config.max_tokens)]
    return max([min(done / limit, 1.0) for done, limit in parts if limit], default=1.0)


def show_progress(writer: BinsWriter, share: float, started: float, first_tokens: int, first_share: float):
    """Prints the progress since the start; on a terminal the next line overwrites it."""
    seconds = time.monotonic() - started
    speed = (writer.tokens - first_tokens) / seconds / 1e6
    eta = seconds * (1 - share) / max(share - first_share, 1e-9)
    line = f"{writer.state['rows']:,} documents, {share:.1%} done, {speed:.2f} M tokens/s, ETA {duration(eta)}   "
    print(line, end="\r" if sys.stdout.isatty() else "\n", flush=True)


def finish(writer: BinsWriter) -> collections.Counter:
    """Renames the finished bins. Raises SystemExit, and deletes the work, if a split would be empty."""
    empty = [f"{split}.bin" for split in SPLITS if not writer.state[split]["documents"]]
    if empty:
        writer.discard()
        raise SystemExit(
            f"nothing for {' and '.join(empty)}: the {writer.state['rows']:,} rows hold "
            f"{writer.documents:,} documents with text; give more, or another --val_fraction"
        )
    about = {"encoding": "gpt2", "vocab_size": VOCAB_SIZE, "eot": EOT, "dtype": "uint16"}
    return writer.finish(about | {key: writer.state[key] for key in COUNTERS})


def report(writer: BinsWriter, lengths: collections.Counter, new_tokens: int, seconds: float):
    """Prints the summary, one `key: value` per line, and the epochs that the shipped configs train on these bins."""
    state, tokens, documents = writer.state, writer.tokens, writer.documents
    compared, differing = state["token_counts_compared"], state["token_counts_differing"]
    verdict = f"{differing:,} of {compared:,} documents differ" if differing else f"equal in all {compared:,} documents"
    sizes, counts = zip(*lengths.items())
    median, p90 = np.quantile(sizes, (0.5, 0.9), weights=counts, method="inverted_cdf").tolist()
    print(
        f"\ndocuments: {documents:,}\n"
        f"empty_documents_skipped: {state['empty_documents']:,}\n"
        f"tokens: {tokens:,} (with one end-of-text for each document)\n"
        f"train_tokens: {state['train']['tokens']:,}\n"
        f"val_tokens: {state['val']['tokens']:,}\n"
        f"token_count_column: {verdict if compared else 'none to compare with'}\n"
        f"tokens_per_document: median {median:,}, p90 {p90:,}, max {max(sizes):,}\n"
        f"bytes_per_token: {state['text_bytes'] / (tokens - documents):.2f}\n"
        f"seconds: {seconds:.1f}\n"
        f"tokens_per_s: {new_tokens / seconds:,.0f}\n"
        f"peak_memory_mb: {peak_memory_mb()}"
    )
    for config_file in CONFIG_FILES:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # of a config file that was edited
            config = read_config_file(config_file)
            per_iter = config["batch_size"] * config["gradient_accumulation_steps"] * config["block_size"]
            iters, epoch = config["max_iters"], state["train"]["tokens"] / per_iter
            print(
                f"{config_file}: {per_iter:,} tokens per iteration, one epoch is {epoch:,.1f} iterations, "
                f"its {iters:,} are {iters * per_iter / 1e9:.2f} billion tokens or {iters / epoch:.2f} epochs"
            )


def verify(out_dir: Path):
    """Reads both bins again and compares them with meta.json. Raises SystemExit if they differ."""
    meta = read_meta(out_dir)
    for split in SPLITS:
        path, expected = out_dir / f"{split}.bin", meta.get(split, {})
        if not path.exists() or expected.keys() != {"tokens", "documents", "sha256"}:
            raise SystemExit(f"{out_dir}: has no {split}.bin with a meta.json to check it against; prepare it first")
        check_bin(path, **expected)
        print(f"{path}: good, {expected['tokens']:,} tokens in {expected['documents']:,} documents")


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory_mb() -> str:
    """The largest memory this process ever held, in MB."""
    status = Path("/proc/self/status")  # getrusage would count the memory of the parent at the fork
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text() if status.exists() else "")
    return f"{int(found[1]) * 1024 / 1e6:,.0f}" if found else "unknown on this system"


if __name__ == "__main__":
    main(sys.argv[1:])
