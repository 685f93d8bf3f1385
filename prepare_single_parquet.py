"""
Turns FineWeb parquet files into data/fineweb/{train,val}.bin and meta.json.

    python prepare_single_parquet.py data/fineweb/train/000_00000.parquet
    python prepare_single_parquet.py FILE_OR_FOLDER ... --out_dir=data/fineweb --val_fraction=0.005

Each document becomes its GPT-2 tokens and one end-of-text token. Every 200th document goes to
val.bin; it is cut in two if it is longer than 1 % of all text and than 8,192 bytes. The format is
nanoGPT's: little-endian uint16 without a header. If it is interrupted, at any moment, run the same
command again to continue.
"""

try:
    import onenight.startup  # isort: skip  (first: see there)  # noqa: F401
except ModuleNotFoundError as error:
    raise SystemExit(
        f"{error}: keep this script next to onenight/, and run it without -P, -I or PYTHONSAFEPATH"
    ) from None

import contextlib
import math
import os
import shutil
import signal
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from configurator import UserError, configure, setting
from onenight.data.bins import BinsWriter, clear_work, final_paths, is_complete
from onenight.data.encoding import likely_encoding
from onenight.data.parquet import (
    Batch,
    Source,
    find_parquets,
    open_source,
    read_batches,
    without_copies,
)
from onenight.data.report import Progress, epochs_of_configs, find_oddities, summarize
from onenight.data.split import SHORT_BYTES, val_lengths
from onenight.data.token_file import BYTES_PER_TOKEN, SPLITS, check_tokens, read_meta
from onenight.data.tokenizer import EOT, encode_documents, read_ranks
from onenight.system.console import run_script, set_up_output
from onenight.system.limits import cores
from onenight.system.locks import lock_folder

DEFAULT_FOLDER = Path("data/fineweb/train")
CHECKPOINT_S = 2  # seconds of work that a power cut can cost
IN_FLIGHT = 5  # batches per worker that are read but not yet written: about 5 MB of text
TEXT_BYTES_PER_TOKEN = 4  # English has 4.3 or more, so estimates of the tokens err on the safe side
REPORTED_DIFFERENCES = 10  # of token counts; further ones are only counted
COUNTERS = {
    "empty_documents": 0,
    "cut_documents": 0,  # each of them counts twice among the documents of the splits
    "replaced_documents": 0,  # with bytes that are not UTF-8
    "nul_documents": 0,  # with NUL characters
    "likely_encodings": {},  # of these two kinds: how many have each
    "text_bytes": 0,
    "token_counts_compared": 0,
    "token_counts_differing": 0,
}


@dataclass
class PrepareConfig:
    paths: list = field(default_factory=list)  # the arguments without a key: files and folders
    out_dir: str = setting(
        "data/fineweb", "folder for train.bin, val.bin and meta.json", folder=True
    )
    text_column: str = setting("text", "the column to read")
    val_fraction: float = setting(0.005, "fraction of documents for val.bin", above=0, below=1)
    num_workers: int = setting(0, "tokenizer threads; 0: one per core; same result", low=0)
    max_documents: int = setting(0, "stop after this many documents; 0: no limit", low=0)
    max_tokens: int = setting(
        0, "stop after the document that reaches this many tokens; 0: no limit", low=0
    )
    overwrite: bool = setting(False, "replace existing bins in out_dir")
    verify: bool = setting(False, "only check the bins in out_dir against meta.json")


def main(arguments: list[str], checkpoint_s: float = CHECKPOINT_S):
    set_up_output("stdout", "stderr")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config = configure(PrepareConfig, arguments, __doc__)
    out_dir = Path(config.out_dir)
    try:
        if config.verify:
            verify(out_dir)
        else:
            prepare(config, out_dir, checkpoint_s)
    except OSError as error:
        # The line break ends the line of progress.
        raise UserError(
            f"\n{error.filename or out_dir}: {error.strerror}; "
            f"fix that and run the same command again to continue"
        )
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to continue", flush=True)
        os._exit(130)  # without waiting for a thread that is busy with a very long document


def prepare(config: PrepareConfig, out_dir: Path, checkpoint_s: float):
    """Convert the parquet files to token files, and print a summary.

    Saves the state about every `checkpoint_s` seconds. Raises OSError if a disk fails.
    """
    started = time.monotonic()

    # Everything that can be refused is refused before the folder is touched.
    read_ranks()
    paths = find_parquets(config.paths, DEFAULT_FOLDER)
    sources = without_copies([open_source(path, config.text_column) for path in paths])
    job = describe_job(config, sources)

    with lock_folder(out_dir):
        if is_complete(out_dir, job) and not config.overwrite:
            clear_work(out_dir)
            print(
                f"{out_dir} is complete already: nothing to do "
                f"(--overwrite prepares it again, --verify checks it)"
            )
            return

        # The writer starts where an interrupted run for the same job stopped.
        with contextlib.closing(BinsWriter(out_dir, job, COUNTERS, config.overwrite)) as writer:
            check_space(config, sources, writer)
            first_token = writer.tokens
            convert(config, sources, writer, checkpoint_s)
            lengths = finish(writer)

    seconds = time.monotonic() - started
    summary = summarize(writer, lengths, writer.tokens - first_token, seconds)
    epochs = epochs_of_configs(writer.state["train"]["tokens"])
    print()
    for key, text in (summary | epochs).items():
        print(f"{key}: {text}")
    for oddity in find_oddities(writer):
        print(f"warning: {oddity}")


def describe_job(config: PrepareConfig, sources: list[Source]) -> dict:
    """Return what determines the contents of the bins, as JSON.

    Equal jobs give the same bins, bit for bit.
    """
    settings = {
        "text_column": config.text_column,
        "val_fraction": config.val_fraction,
        "max_documents": config.max_documents,
        "max_tokens": config.max_tokens,
    }
    return {"settings": settings, "sources": [source.fingerprint for source in sources]}


def check_space(config: PrepareConfig, sources: list[Source], writer: BinsWriter):
    """Raise UserError if the disk has too little space for what is still to be written."""
    needed = (expected_tokens(config, sources) - writer.tokens) * BYTES_PER_TOKEN
    free = shutil.disk_usage(writer.out_dir).free
    if needed > free:
        if not writer.tokens:
            writer.discard()
        raise UserError(
            f"{writer.out_dir}: needs about {needed / 1e6:,.1f} MB, "
            f"but only {free / 1e6:,.1f} MB are free; "
            f"free some space, choose another --out_dir, or set a lower --max_tokens"
        )


def expected_tokens(config: PrepareConfig, sources: list[Source]) -> float:
    """Estimate how many tokens the bins will have, from the size of the text."""
    rows = sum(source.rows for source in sources)
    text_bytes = sum(source.text_bytes for source in sources)
    tokens = text_bytes / TEXT_BYTES_PER_TOKEN + rows  # one end-of-text per row
    if config.max_documents and config.max_documents < rows:
        tokens *= config.max_documents / rows
    if config.max_tokens:
        tokens = min(tokens, config.max_tokens)
    return tokens


# -----------------------------------------------------------------------------
# From documents to tokens


@dataclass
class TokenizedBatch:
    """The tokens of the rows of a batch. A row that is empty or null has none."""

    ids: np.ndarray  # uint16, shape (tokens,), with end-of-text after each document
    lengths: np.ndarray  # int64, shape (rows,): tokens of each row, with end-of-text
    text_bytes: np.ndarray  # int64, shape (rows,): bytes of each row
    is_replaced: np.ndarray  # bool, shape (rows,): whether a row has bytes that are not UTF-8
    has_nul: np.ndarray  # bool, shape (rows,): whether a row has NUL characters
    encodings: dict[int, str]  # of the rows of these two kinds


def convert(config: PrepareConfig, sources: list[Source], writer: BinsWriter, checkpoint_s: float):
    """Tokenize and write the rows that the writer does not have yet.

    The rows stay in order, so the number of rows done is the position in the input.
    """
    state = writer.state
    if state["rows"]:
        print(f"continuing at row {state['rows']:,}")
    expected_bytes = expected_tokens(config, sources) * TEXT_BYTES_PER_TOKEN
    progress = Progress(writer, fraction_done(config, sources, writer))
    last_checkpoint = time.monotonic()

    batches = read_batches(sources, state["rows"])
    for batch, tokenized in tokenize_in_order(batches, config.num_workers or cores()):
        rows = write_within_limits(config, writer, tokenized, expected_bytes)
        count_odd_documents(state, tokenized, rows)
        compare_token_counts(state, batch, tokenized.lengths[:rows])
        if rows < len(tokenized.lengths):
            break  # a limit is reached

        if time.monotonic() - last_checkpoint > checkpoint_s:
            writer.checkpoint()
            progress.show(fraction_done(config, sources, writer))
            last_checkpoint = time.monotonic()


def tokenize_in_order(
    batches: Iterable[Batch], num_workers: int
) -> Iterator[tuple[Batch, TokenizedBatch]]:
    """Yield each batch with its tokens, in order, while threads tokenize the next ones.

    tiktoken releases Python's lock while it encodes. Processes would be slower
    (benchmarks/results/prepare.json).
    """
    pool = ThreadPoolExecutor(num_workers)
    waiting = deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(tokenize, batch)))
            if len(waiting) > IN_FLIGHT * num_workers:
                first, future = waiting.popleft()
                yield first, future.result()
        for batch, future in waiting:
            yield batch, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def tokenize(batch: Batch) -> TokenizedBatch:
    """Encode the rows of a batch."""
    rows = [document or b"" for document in batch.documents.to_pylist()]
    ids, document_is_replaced = encode_documents([document for document in rows if document])
    text_bytes = np.array([len(document) for document in rows])
    is_document = text_bytes > 0
    lengths = np.zeros_like(text_bytes)
    lengths[is_document] = np.diff(np.flatnonzero(ids == EOT), prepend=-1)

    is_replaced = np.zeros(len(rows), dtype=bool)
    is_replaced[is_document] = document_is_replaced
    has_nul = np.array([b"\0" in document for document in rows], dtype=bool)
    odd_rows = np.flatnonzero(is_replaced | has_nul).tolist()
    encodings = {row: likely_encoding(rows[row]) for row in odd_rows}
    return TokenizedBatch(ids, lengths, text_bytes, is_replaced, has_nul, encodings)


def write_within_limits(
    config: PrepareConfig, writer: BinsWriter, tokenized: TokenizedBatch, expected_bytes: float
) -> int:
    """Write the rows of a batch up to the limits of the config. Return how many rows that are.

    `expected_bytes` is the size of all text, as it was estimated before the first row.
    """
    state = writer.state
    lengths = tokenized.lengths
    sizes = tokenized.text_bytes
    is_document = lengths > 0
    ones = is_document.astype(np.int64)
    documents_before = writer.documents - state["cut_documents"] + np.cumsum(ones) - ones
    bytes_so_far = state["text_bytes"] + np.cumsum(sizes)

    # Which tokens go to val.bin. A cut adds an end-of-text token.
    totals = np.maximum(expected_bytes, bytes_so_far)
    in_val = val_lengths(lengths, sizes, documents_before, totals, config.val_fraction)
    is_cut = (in_val > 0) & (in_val < lengths)
    added = lengths + is_cut
    tokens_before = writer.tokens + np.cumsum(added) - added

    # A row is written if no limit was reached before it. These are the first rows of the batch.
    max_documents = config.max_documents or math.inf
    max_tokens = config.max_tokens or math.inf
    within = (documents_before < max_documents) & (tokens_before < max_tokens)

    rows = int(within.sum())
    write_rows(writer, tokenized.ids, lengths[:rows], in_val[:rows])

    state["rows"] += rows
    state["empty_documents"] += int((within & ~is_document).sum())
    state["cut_documents"] += int((within & is_cut).sum())
    state["text_bytes"] += int(sizes[within].sum())
    return rows


def write_rows(writer: BinsWriter, ids: np.ndarray, lengths: np.ndarray, in_val: np.ndarray):
    """Write the first rows of a batch, the first `in_val` tokens of each to val.bin."""
    ids = ids[: lengths.sum()]
    parts = np.stack([in_val, lengths - in_val], axis=1).ravel()
    is_val = np.repeat(np.tile([True, False], len(lengths)), parts)
    writer.write("train", ids[~is_val])

    is_cut = (in_val > 0) & (in_val < lengths)
    cuts = np.cumsum(in_val)[is_cut]
    writer.write("val", np.insert(ids[is_val], cuts, EOT))


def count_odd_documents(state: dict, tokenized: TokenizedBatch, rows: int):
    """Count, in the first rows of a batch, the documents that are probably not text in UTF-8."""
    state["replaced_documents"] += int(tokenized.is_replaced[:rows].sum())
    state["nul_documents"] += int(tokenized.has_nul[:rows].sum())
    counts = state["likely_encodings"]
    for row, encoding in tokenized.encodings.items():
        if row < rows:
            counts[encoding] = counts.get(encoding, 0) + 1


def compare_token_counts(state: dict, batch: Batch, lengths: np.ndarray):
    """Compare the tokens of the first rows of a batch with the file's own token_count.

    Counts all differences in `state`, and prints the first ones.
    """
    expected = batch.token_counts[: len(lengths)]
    found = np.maximum(lengths - 1, 0)  # token_count does not include end-of-text
    has_count = ~np.isnan(expected)
    for i in np.flatnonzero(has_count & (expected != found)):
        state["token_counts_differing"] += 1
        if state["token_counts_differing"] <= REPORTED_DIFFERENCES:
            print(
                f"{batch.source.path}: row group {batch.row_group}, row {batch.first_row + i}: "
                f"{found[i]} tokens, but token_count is {expected[i]:.15g}"
            )
    state["token_counts_compared"] += int(has_count.sum())


def fraction_done(config: PrepareConfig, sources: list[Source], writer: BinsWriter) -> float:
    """Return how much of the work is done, from 0 to 1, by the limit that is nearest."""
    limits = [
        (writer.state["rows"], sum(source.rows for source in sources)),
        (writer.documents, config.max_documents),
        (writer.tokens, config.max_tokens),
    ]
    fractions = [min(done / limit, 1.0) for done, limit in limits if limit]
    return max(fractions, default=1.0)


# -----------------------------------------------------------------------------
# The finished files


def finish(writer: BinsWriter) -> Counter:
    """Check the bins and give them their final names.

    Returns how many documents have each length, in tokens without end-of-text. If a split would be
    empty, deletes the work and raises UserError.
    """
    empty = [f"{split}.bin" for split in SPLITS if not writer.state[split]["documents"]]
    if empty:
        writer.discard()
        raise UserError(
            f"{' and '.join(empty)} would be empty: the {writer.state['rows']:,} rows contain "
            f"{writer.documents:,} documents with text; "
            f"add some, or a single one of more than {SHORT_BYTES:,} bytes"
        )
    return writer.finish()


def verify(out_dir: Path):
    """Read both bins again and compare them with meta.json. Raises UserError if they differ."""
    meta = read_meta(out_dir)
    for split, path in final_paths(out_dir).items():
        expected = meta.get(split, {})
        if not path.exists() or not {"tokens", "documents", "sha256"} <= expected.keys():
            raise UserError(
                f"{out_dir}: has no {split}.bin with a meta.json to check it against; "
                f"prepare it first"
            )
        check_tokens(path, expected["tokens"], expected["documents"], expected["sha256"])
        print(f"{path}: good, {expected['tokens']:,} tokens in {expected['documents']:,} documents")


if __name__ == "__main__":
    run_script(main)
