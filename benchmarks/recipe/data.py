"""
Makes the data of the recipe proxy: parquet files as ids of a vocabulary of 4,096.

    python benchmarks/recipe/data.py --train=FILE.parquet --val=FILE.parquet --out_dir=FOLDER

The vocabulary consists of GPT-2's first 4,095 ranks and end-of-text. The first ranks of a byte pair
encoding are themselves one. With so few ids, the embeddings do not outweigh the blocks of a small
model, and a CPU can train it to completion.

In train.bin every fourth block of 64 tokens occurs twice in a row. So every model learns early, and
at about the same time, to copy text that it has just read. In ordinary text such a small model
learns that sooner or later by chance, and then the seed matters more than the recipe.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import tiktoken
from pyarrow import parquet

import common  # noqa: F401  (puts the project on the path)
from configurator import configure, setting
from onenight.data.tokenizer import PATTERN, read_ranks
from onenight.system.console import run_script

VOCAB_SIZE = 4096
END_OF_TEXT = VOCAB_SIZE - 1
BLOCK = 64  # tokens
BLOCKS_PER_REPETITION = 4


@dataclass
class DataConfig:
    train: str = setting("", "parquet file to train on", path=True)
    val: str = setting("", "parquet file to validate on", path=True)
    out_dir: str = setting("", "folder for train.bin, val.bin and meta.json", path=True)


def main(arguments: list[str]):
    config = configure(DataConfig, arguments, __doc__)
    out_dir = Path(config.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    for split, source in (("train", config.train), ("val", config.val)):
        documents = parquet.read_table(source, columns=["text"]).column(0).to_pylist()
        ids = encode(documents)
        if split == "train":
            ids = repeat_blocks(ids)
        path = out_dir / f"{split}.bin"
        ids.tofile(path)
        print(f"{path}: {len(ids):,} tokens")
    (out_dir / "meta.json").write_text(json.dumps({"vocab_size": VOCAB_SIZE}) + "\n")


def encode(documents: list[str]) -> np.ndarray:
    """Return the ids of all documents, each followed by end-of-text: little-endian uint16, shape
    (tokens,)."""
    ranks = {token: rank for token, rank in read_ranks().items() if rank < END_OF_TEXT}
    encoding = tiktoken.Encoding(
        "gpt2-4096", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
    )

    def encode_one(text: str) -> np.ndarray:
        return np.append(encoding.encode_to_numpy(text), END_OF_TEXT).astype("<u2")

    texts = [text for text in documents if text]
    with ThreadPoolExecutor(2) as pool:
        return np.concatenate(list(pool.map(encode_one, texts)))


def repeat_blocks(ids: np.ndarray) -> np.ndarray:
    """Return the ids, shape (tokens,), with the last of every BLOCKS_PER_REPETITION blocks written
    twice. An incomplete group of blocks at the end is left out."""
    group = BLOCKS_PER_REPETITION * BLOCK
    n_groups = len(ids) // group
    blocks = ids[: n_groups * group].reshape(n_groups, BLOCKS_PER_REPETITION, BLOCK)
    return np.concatenate([blocks, blocks[:, -1:]], axis=1).reshape(-1)


if __name__ == "__main__":
    run_script(main)
