"""The format of the token files train.bin and val.bin, and of the meta.json beside them.

A token file has nanoGPT's format: GPT-2 token ids as little-endian uint16, without a header, and
one end-of-text token after each document. meta.json records the contents and the sources of both
files. nanoGPT's own data folders have no meta.json.
"""

import hashlib
import string
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configurator import UserError
from onenight.data.tokenizer import EOT, VOCAB_SIZE
from onenight.system.json_files import read_json
from onenight.system.wording import looked_in

SPLITS = ("train", "val")
TOKEN_DTYPE = np.dtype("<u2")
BYTES_PER_TOKEN = TOKEN_DTYPE.itemsize
FORMAT = {"encoding": "gpt2", "vocab_size": VOCAB_SIZE, "eot": EOT, "dtype": "uint16"}

# The shapes of the JSON files, as read_json() checks them.
COUNT = range(1 << 60)
ID = range(1 << 16)
SPLIT_SHAPE = {"tokens": COUNT, "documents": COUNT, "sha256": str}
JOB_SHAPE = {"settings": {}, "sources": [{"file": str}]}
META_SHAPE = {
    "vocab_size": range(1, 1 + (1 << 16)),
    "largest_id": dict.fromkeys(SPLITS, ID),
    **dict.fromkeys(SPLITS, SPLIT_SHAPE),
    **JOB_SHAPE,
}

READ_BYTES = 1 << 24  # read at once while a file is checked
PROBE_BYTES = 1 << 16  # of the beginning, by which files of other formats are recognized
PROBE_TOKENS = 10_000  # of the beginning, by which integers of another width are recognized
LLM_C_MAGIC = (20240520).to_bytes(4, "little")
NUMPY_MAGIC = b"\x93NUMPY"
CREATE = "create it with: python prepare_single_parquet.py FILE.parquet --out_dir="


@dataclass
class Contents:
    """What one pass over a token file finds."""

    size: int  # bytes
    sha256: str
    largest_id: int
    document_lengths: Counter  # how many documents have each length, in tokens without end-of-text

    @property
    def documents(self) -> int:
        return self.document_lengths.total()


def read_meta(data_dir: Path) -> dict:
    """Return the contents of meta.json, or {} if there is no such file.

    Raises UserError if the file cannot be read or a field has the wrong type.
    """
    return read_json(data_dir / "meta.json", META_SHAPE)


def token_count(path: Path) -> int:
    """Return the number of tokens in a token file, from its size."""
    return path.stat().st_size // BYTES_PER_TOKEN


def is_whole(path: Path, tokens: int) -> bool:
    """Return whether the file exists and has exactly the size of this many tokens."""
    return path.exists() and path.stat().st_size == tokens * BYTES_PER_TOKEN


# -----------------------------------------------------------------------------
# Opening a file for training


def open_tokens(data_dir: Path, split: str, block_size: int, vocab_size: int) -> np.memmap:
    """Open the tokens of one split: uint16, shape (tokens,), read from the disk on access.

    Prints a warning if train.bin has no end-of-text token. Raises UserError if the file is missing,
    has another format or wider integers, differs from meta.json in size, is too short for one
    window of `block_size` tokens and its targets, or contains an id that is not below `vocab_size`.
    """
    path = data_dir / f"{split}.bin"
    meta = read_meta(data_dir)
    try:
        size = path.stat().st_size
        start = np.fromfile(path, np.uint8, PROBE_BYTES).tobytes()
    except OSError as error:
        reason = f"cannot be read ({error.strerror}){looked_in(path)}"
        raise UserError(f"{path}: {reason}; {CREATE}{data_dir}")

    refuse_other_formats(path, start, meta)
    refuse_wrong_size(path, split, size, meta, block_size)

    tokens = np.memmap(path, TOKEN_DTYPE, "r")
    # The recorded value saves a pass over the whole file.
    largest = recorded_largest_id(path, split, meta)
    if largest is None:
        largest = int(tokens.max())
    if largest >= vocab_size:
        raise UserError(
            f"{path}: contains id {largest}, but the model's vocab_size is {vocab_size}; "
            f"choose another --dataset, or prepare it again"
        )
    if meta.get("vocab_size", VOCAB_SIZE) == VOCAB_SIZE:
        refuse_wider_integers(path, tokens)
        if split == "train":
            warn_about_no_ends(path, largest)
    return tokens


def refuse_other_formats(path: Path, start: bytes, meta: dict):
    """Raise UserError if the file, whose first bytes are `start`, cannot hold GPT-2 token ids."""
    create = f"{CREATE}{path.parent}"
    encoding = meta.get("encoding", "gpt2")
    if encoding != "gpt2":
        raise UserError(
            f"{path}: contains ids of {encoding!r} (see meta.json), not of GPT-2; {create}"
        )
    if not meta and path.with_name("meta.pkl").exists():
        raise UserError(
            f"{path}: contains ids of another vocabulary (see meta.pkl), not of GPT-2; {create}"
        )

    unprintable = len(start.translate(None, string.printable.encode()))
    if unprintable < 0.05 * len(start):
        raise UserError(f"{path}: is a text file, not token ids; {create}")
    if start.startswith(LLM_C_MAGIC):
        raise UserError(f"{path}: has llm.c's header; remove it with: tail -c +1025 OLD > NEW")
    if start.startswith(NUMPY_MAGIC):
        raise UserError(
            f"{path}: was written by np.save; convert it with: "
            f"np.load(OLD).astype('<u2').tofile(NEW)"
        )


def refuse_wrong_size(path: Path, split: str, size: int, meta: dict, block_size: int):
    """Raise UserError if a file of `size` bytes is damaged or too short for one window."""
    if size % BYTES_PER_TOKEN:
        raise UserError(
            f"{path}: {size} bytes is not a whole number of uint16 tokens; prepare it again"
        )
    tokens = size // BYTES_PER_TOKEN
    expected = meta.get(split, {}).get("tokens", tokens)
    if tokens != expected:
        raise UserError(
            f"{path}: {tokens:,} tokens, but meta.json says {expected:,}; prepare it again"
        )
    if tokens <= block_size:
        remedy = "prepare more documents"
        if split == "val":
            remedy += ", use a larger val_fraction"
        raise UserError(
            f"{path}: {tokens:,} tokens are too few for one window of block_size={block_size}; "
            f"{remedy}, or lower block_size"
        )


def recorded_largest_id(path: Path, split: str, meta: dict) -> int | None:
    """Return the largest id of a split as meta.json records it, without reading the file.

    Returns None if meta.json does not record it, or does not record the number of tokens, with
    which refuse_wrong_size() compares the file, or if the file was modified after meta.json was
    written.
    """
    largest = meta.get("largest_id", {}).get(split)
    tokens = meta.get(split, {}).get("tokens")
    if largest is None or tokens is None:
        return None
    modified_ns = path.stat().st_mtime_ns
    recorded_ns = path.with_name("meta.json").stat().st_mtime_ns
    return largest if modified_ns <= recorded_ns else None


def refuse_wider_integers(path: Path, tokens: np.ndarray):
    """Raise UserError, with the line that converts it, if a file has 32-bit or 64-bit integers.

    Read as uint16, every second id is then 0, or three of four are. No GPT-2 text is like that.
    """
    start = tokens[:PROBE_TOKENS]
    if start[1::2].any():
        return
    name, dtype = ("uint32", "<u4") if start[2::4].any() else ("int64", "<i8")
    raise UserError(
        f"{path}: contains {name} ids, not uint16; convert it with: "
        f"np.fromfile(OLD, '{dtype}').astype('<u2').tofile(NEW)"
    )


def warn_about_no_ends(path: Path, largest: int):
    """Print a line if `largest`, the largest id, is below end-of-text, so that no text ends."""
    if largest < EOT:
        print(
            f"{path}: contains no end-of-text token ({EOT}), and the largest id is {largest:,}; "
            f"are these GPT-2 ids?"
        )


# -----------------------------------------------------------------------------
# Checking a whole file


def check_tokens(path: Path, tokens: int, documents: int, sha256: str | None = None) -> Contents:
    """Read a whole token file, compare it with what is expected, and return its contents.

    Raises UserError unless it holds exactly `tokens` GPT-2 ids in `documents` documents and, if
    given, has this checksum.
    """
    found = read_contents(path)
    problems = []
    if found.size != tokens * BYTES_PER_TOKEN:
        problems.append(f"bytes {found.size} instead of {tokens * BYTES_PER_TOKEN}")
    if found.documents != documents:
        problems.append(f"end-of-text tokens {found.documents} instead of {documents}")
    if found.largest_id >= VOCAB_SIZE:
        problems.append(f"largest id {found.largest_id} instead of at most {VOCAB_SIZE - 1}")
    if sha256 is not None and found.sha256 != sha256:
        problems.append(f"sha256 {found.sha256} instead of {sha256}")
    if problems:
        raise UserError(
            f"{path}: damaged ({', '.join(problems)}); prepare it again with --overwrite"
        )
    return found


def read_contents(path: Path) -> Contents:
    """Read a whole token file once, a few megabytes at a time."""
    digest = hashlib.sha256()
    lengths = Counter()
    largest = 0
    last_end = -1  # the position of the latest end-of-text token
    with open(path, "rb") as file:
        while raw := file.read(READ_BYTES):
            position = (file.tell() - len(raw)) // BYTES_PER_TOKEN
            digest.update(raw)
            # Only a damaged file ends in the middle of a token.
            ids = np.frombuffer(raw, TOKEN_DTYPE, len(raw) // BYTES_PER_TOKEN)
            largest = max(largest, int(ids.max(initial=0)))
            ends = np.flatnonzero(ids == EOT) + position
            lengths.update((np.diff(ends, prepend=last_end) - 1).tolist())
            if len(ends):
                last_end = ends[-1]
        size = file.tell()
    return Contents(size, digest.hexdigest(), largest, lengths)
