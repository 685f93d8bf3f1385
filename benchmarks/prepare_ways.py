"""
Other ways to turn a parquet file into tokens; benchmarks/prepare.py runs and measures them.

    python benchmarks/prepare_ways.py nanogpt FILE.parquet OUT_DIR WORKERS
    python benchmarks/prepare_ways.py tiktoken FILE.parquet apart|shared|pattern WORKERS
    python benchmarks/prepare_ways.py processes ARGUMENTS OF prepare_single_parquet.py

The project must be on PYTHONPATH. This file does not import common.py, which changes settings of
the process that would change these measurements.
"""

import concurrent.futures
import sys
import threading
import time

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from onenight.data import tokenizer
from onenight.data.tokenizer import EOT, EOT_TEXT

ROWS_PER_TASK = 64


def new_encoding() -> tiktoken.Encoding:
    """Return tiktoken.get_encoding("gpt2"), without its download."""
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=tokenizer.read_ranks(),
        special_tokens={EOT_TEXT: EOT},
    )


def nanogpt(file: str, out_dir: str, num_workers: str):
    """nanoGPT's method, data/openwebtext/prepare.py.

    It is datasets.map() with a Python list of ids per document, then a memmap that is filled shard
    by shard. `datasets` is only needed here.
    """
    import datasets
    import numpy as np

    encoding = new_encoding()

    def process(row):
        ids = [*encoding.encode_ordinary(row["text"]), EOT]
        return {"ids": ids, "len": len(ids)}

    texts = datasets.load_dataset(
        "parquet", data_files=file, columns=["text"], split="train", cache_dir=out_dir
    )
    splits = texts.train_test_split(test_size=0.005, seed=1, shuffle=True)
    tokenized = splits.map(process, remove_columns=["text"], num_proc=int(num_workers))
    for name, split in tokenized.items():
        total = int(np.sum(split["len"], dtype=np.uint64))
        path = f"{out_dir}/{name}.bin"
        tokens = np.memmap(path, dtype=np.uint16, mode="w+", shape=(total,))
        position = 0
        shards = min(1024, len(split))
        for index in range(shards):
            shard = split.shard(num_shards=shards, index=index, contiguous=True)
            ids = np.concatenate(shard.with_format("numpy")["ids"])
            tokens[position : position + len(ids)] = ids
            position += len(ids)
        tokens.flush()


def tiktoken_alone(file: str, way: str, num_workers: str):
    """tiktoken in threads, on text that is already in memory. Prints the seconds.

    Each thread has an encoding of its own ("apart", the fastest), or all share one ("shared"), or
    each has its own with this project's form of the pattern ("pattern").
    """
    import pyarrow.parquet

    texts = pyarrow.parquet.read_table(file, columns=["text"]).column(0).to_pylist()
    shared = new_encoding()
    make_encoding = {
        "apart": new_encoding,
        "shared": lambda: shared,
        "pattern": tokenizer.get_encoding,
    }[way]
    of_this_thread = threading.local()

    def count_tokens(start):
        if not hasattr(of_this_thread, "encoding"):
            of_this_thread.encoding = make_encoding()
        encode = of_this_thread.encoding.encode_to_numpy
        rows = texts[start : start + ROWS_PER_TASK]
        return sum(len(encode(text, disallowed_special=())) for text in rows)

    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(int(num_workers)) as pool:
        sum(pool.map(count_tokens, range(0, len(texts), ROWS_PER_TASK)))
    print(time.monotonic() - started)


def processes(*arguments: str):
    """prepare_single_parquet.py with processes in place of threads."""
    import prepare_single_parquet

    prepare_single_parquet.ThreadPoolExecutor = concurrent.futures.ProcessPoolExecutor
    prepare_single_parquet.main(list(arguments))


WAYS = {"nanogpt": nanogpt, "tiktoken": tiktoken_alone, "processes": processes}

if __name__ == "__main__":
    WAYS[sys.argv[1]](*sys.argv[2:])
