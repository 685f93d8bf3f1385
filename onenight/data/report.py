"""What a preparation prints: a line of progress while it runs, and a summary at the end."""

import contextlib
import re
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

from configurator import read_config_file
from onenight.data.bins import BinsWriter
from onenight.data.encoding import COMPRESSED
from onenight.system.wording import duration

# The configs for which the summary says how long an epoch is.
CONFIG_FILES = ("config/train_fineweb_4070_fast.py", "config/train_fineweb_4070.py")
MANY_REPLACED = 0.02  # of the documents; fewer are usual in text from the web
COMPRESSED_DATA = {f"{codec} data" for codec in COMPRESSED.values()}


class Progress:
    """Prints how far a preparation is, with the speed and the remaining time since it began.

    `fraction` is the part of the work that is done, from 0 to 1.
    """

    def __init__(self, writer: BinsWriter, fraction: float):
        self.writer = writer
        self.started = time.monotonic()
        self.first_tokens = writer.tokens
        self.first_fraction = fraction

    def show(self, fraction: float):
        """Print one line. On a terminal the next line overwrites it."""
        seconds = time.monotonic() - self.started
        speed = (self.writer.tokens - self.first_tokens) / seconds
        fraction_per_s = max(fraction - self.first_fraction, 1e-9) / seconds
        remaining_s = (1 - fraction) / fraction_per_s
        line = (
            f"{self.writer.state['rows']:,} rows, {fraction:.1%} done, "
            f"{speed / 1e6:.2f} M tokens/s, ETA {duration(remaining_s)}   "
        )
        print(line, end="\r" if sys.stdout.isatty() else "\n", flush=True)


def summarize(writer: BinsWriter, lengths: Counter, new_tokens: int, seconds: float) -> dict:
    """Return the summary of a finished preparation: texts by key.

    Args:
        writer: the writer of the finished bins.
        lengths: how many documents have each length, in tokens without end-of-text.
        new_tokens: the tokens that this run wrote, which may have continued an earlier one.
        seconds: the time that this run took.
    """
    state = writer.state
    text_tokens = writer.tokens - writer.documents
    documents = writer.documents - state["cut_documents"]
    cut = f" ({state['cut_documents']:,} cut in two for val.bin)" if state["cut_documents"] else ""
    sizes, counts = zip(*lengths.items())
    quantiles = np.quantile(sizes, (0.5, 0.9), weights=counts, method="inverted_cdf")
    median, p90 = quantiles.tolist()
    return {
        "documents": f"{documents:,}{cut}",
        "empty_documents_skipped": f"{state['empty_documents']:,}",
        "documents_not_utf8": f"{state['replaced_documents']:,}",
        "tokens": f"{writer.tokens:,} (including one end-of-text per document)",
        "train_tokens": f"{state['train']['tokens']:,}",
        "val_tokens": f"{state['val']['tokens']:,}",
        "token_count_column": token_count_verdict(state),
        "tokens_per_document": f"median {median:,}, p90 {p90:,}, max {max(sizes):,}",
        "bytes_per_token": f"{state['text_bytes'] / text_tokens:.2f}",
        "seconds": f"{seconds:.1f}",
        "tokens_per_s": f"{new_tokens / seconds:,.0f}",
        "peak_memory_mb": peak_memory_mb(),
    }


def find_oddities(writer: BinsWriter) -> list[str]:
    """Return a sentence for each thing in a finished preparation that is probably not wanted."""
    state = writer.state
    oddities = []

    documents = writer.documents - state["cut_documents"]
    replaced = state["replaced_documents"]
    encodings = state["likely_encodings"]
    is_odd = replaced > MANY_REPLACED * documents or state["nul_documents"]
    if is_odd or COMPRESSED_DATA & encodings.keys():
        by_count = sorted(encodings.items(), key=lambda item: (-item[1], item[0]))
        names = ", ".join(f"{encoding} in {count:,}" for encoding, count in by_count)
        found = []
        if replaced:
            found.append(f"bytes that are not UTF-8, which became U+FFFD, in {replaced:,}")
        if state["nul_documents"]:
            found.append(f"NUL characters in {state['nul_documents']:,}")
        oddities.append(
            f"of {documents:,} documents: {' and '.join(found)}; they look like: {names}; "
            "convert them to text in UTF-8 and prepare again with --overwrite"
        )

    val_fraction = writer.job["settings"]["val_fraction"]
    val_share = state["val"]["tokens"] / writer.tokens
    if val_share > 2 * val_fraction:
        oddities.append(
            f"val.bin has {val_share:.1%} of the tokens, over twice --val_fraction={val_fraction}: "
            f"there are too few documents, or some are very long: split those into shorter ones"
        )
    return oddities


def token_count_verdict(state: dict) -> str:
    """Return in words how the file's own token counts compare with ours."""
    compared = state["token_counts_compared"]
    differing = state["token_counts_differing"]
    if not compared:
        return "none to compare with"
    if differing:
        return f"{differing:,} of {compared:,} documents differ"
    return f"equal in all {compared:,} documents"


def peak_memory_mb() -> str:
    """Return the largest resident memory of this process so far, in MB."""
    status = Path("/proc/self/status")  # getrusage() would include the parent's memory at the fork
    if status.exists():
        peak_kb = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if peak_kb:
            return f"{int(peak_kb[1]) * 1024 / 1e6:,.0f}"
    return "unknown on this system"


def epochs_of_configs(train_tokens: int) -> dict:
    """Return, for each of CONFIG_FILES, how many epochs of `train_tokens` it trains, in words."""
    epochs = {}
    for config_file in CONFIG_FILES:
        # A config file that the user edited may lack a key, or fail.
        with contextlib.suppress(ValueError, KeyError, TypeError):
            config = read_config_file(config_file)
            epochs[config_file] = epochs_of_config(config, train_tokens)
    return epochs


def epochs_of_config(config: dict, train_tokens: int) -> str:
    """Return in words how many epochs of `train_tokens` a config trains."""
    windows_per_iter = config["batch_size"] * config["gradient_accumulation_steps"]
    tokens_per_iter = windows_per_iter * config["block_size"]
    iters_per_epoch = train_tokens / tokens_per_iter
    iters = config["max_iters"]
    return (
        f"{tokens_per_iter:,} tokens per iteration, {iters_per_epoch:,.1f} iterations per epoch; "
        f"its {iters:,} iterations are {iters * tokens_per_iter / 1e9:.2f} billion tokens, "
        f"{iters / iters_per_epoch:.2f} epochs"
    )
