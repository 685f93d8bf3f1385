"""The token files train.bin and val.bin, and meta.json beside them: writing and opening them.

The format is nanoGPT's: GPT-2 token ids as little-endian uint16, without a header, and one
end-of-text token after each document. While they are being written, the names end in .partial and
prepare.json records how much of them is valid, so that an interrupted preparation can continue.
nanoGPT's own data folders have no meta.json.
"""

import hashlib
import json
from fractions import Fraction
from pathlib import Path

import numpy as np

from onenight.errors import UserError
from onenight.process import PARTIAL, flush, rename, replacing
from onenight.tokenizer import EOT, VOCAB_SIZE

SPLITS = ("train", "val")
TOKEN_DTYPE = np.dtype("<u2")
FORMAT = {"encoding": "gpt2", "vocab_size": VOCAB_SIZE, "eot": EOT, "dtype": "uint16"}
# A document that is not longer is never cut in two, and a cut leaves this much in val.bin unless
# that is more than half of all text. It is about 2,000 tokens of English: one window of
# block_size=1024 and some more.
SHORT_BYTES = 8192
PROBE_TOKENS = 10_000  # by which integers of another width are recognized


# -----------------------------------------------------------------------------
# Writing


class BinsWriter:
    """Writes both splits, and continues unfinished work for the same job.

    `job` determines the contents, as JSON; `expected_bytes` is about how much text there is.
    `state` has the input rows done, and counts of what was written; it goes into prepare.json, and
    most of it into meta.json. Raises UserError if the folder has the files of another job, unless
    `overwrite` is set.
    """

    def __init__(self, out_dir: Path, job: dict, expected_bytes: int, overwrite: bool):
        self.out_dir = out_dir
        self.job = job
        self.expected_bytes = expected_bytes
        self.val_fraction = Fraction(str(job["val_fraction"]))  # 0.005 is exactly 1/200
        self.journal = out_dir / "prepare.json"
        self.paths = {split: out_dir / f"{split}.bin{PARTIAL}" for split in SPLITS}

        earlier = read_json(self.journal)
        is_same_job = earlier.get("job") == job
        if is_same_job and self.has_all_tokens(earlier["state"]):
            self.state = earlier["state"]
        else:
            if not (is_same_job or overwrite):
                refuse_to_replace(out_dir)
            self.journal.unlink(missing_ok=True)
            self.state = {
                "file": 0,  # that is being read
                "rows": 0,  # of it that are done
                "documents": 0,
                "empty_documents": 0,
                "cut_documents": 0,  # each of them is a document of both splits
                "replaced_documents": 0,  # with bytes that are not UTF-8
                "text_bytes": 0,
                "token_counts_compared": 0,
                "token_counts_differing": 0,
                **{split: {"tokens": 0, "documents": 0} for split in SPLITS},
            }

        # What was written after the last checkpoint is cut off.
        self.files = {}
        for split, path in self.paths.items():
            file = open(path, "ab")
            file.truncate(self.state[split]["tokens"] * TOKEN_DTYPE.itemsize)
            self.files[split] = file

    def has_all_tokens(self, state: dict) -> bool:
        """Return whether the files have all tokens of a state: a power cut may lose the last
        ones."""
        return all(
            path.exists() and path.stat().st_size >= state[split]["tokens"] * TOKEN_DTYPE.itemsize
            for split, path in self.paths.items()
        )

    @property
    def tokens(self) -> int:
        """The tokens of both splits."""
        return sum(self.state[split]["tokens"] for split in SPLITS)

    def write(self, ids: np.ndarray, lengths: np.ndarray, sizes: np.ndarray, max_tokens: float):
        """Write documents until there are max_tokens. Return how many documents were written.

        ids: uint16 (tokens,), with end-of-text after each document; lengths and sizes: int64
        (documents,), the tokens and the bytes of each.
        """
        in_val = self.val_lengths(lengths, sizes)
        is_cut = (in_val > 0) & (in_val < lengths)
        written = lengths + is_cut  # a cut adds an end-of-text token
        n = int((self.tokens + np.cumsum(written) - written < max_tokens).sum())
        in_val = in_val[:n]
        is_cut = is_cut[:n]

        # The first tokens of each document are for val.bin, the others for train.bin.
        parts = np.stack([in_val, lengths[:n] - in_val], axis=1).ravel()
        is_val = np.repeat(np.tile([True, False], n), parts)
        ids = ids[: len(is_val)]
        val_ids = np.insert(ids[is_val], np.cumsum(in_val)[is_cut], EOT)
        for split, split_ids in (("train", ids[~is_val]), ("val", val_ids)):
            self.files[split].write(split_ids.astype(TOKEN_DTYPE, copy=False).data)
            self.state[split]["tokens"] += len(split_ids)
            self.state[split]["documents"] += int((split_ids == EOT).sum())
        self.state["documents"] += n
        self.state["cut_documents"] += int(is_cut.sum())
        self.state["text_bytes"] += int(sizes[:n].sum())
        return n

    def val_lengths(self, lengths: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Return how many of a document's first tokens go to val.bin: int64 (documents,).

        That is every k-th document: those at which number * val_fraction reaches a new whole
        number. But one that is longer than twice val_fraction of all text would leave too little
        for train.bin: of it, val.bin takes val_fraction of all text.
        """
        step = self.val_fraction
        first = self.state["documents"]
        # In Python's integers, because NumPy's overflow with a val_fraction of many digits.
        is_val = np.array(
            [
                number * step.numerator % step.denominator < step.numerator
                for number in range(first, first + len(lengths))
            ],
            dtype=bool,
        )
        in_val = np.where(is_val, lengths, 0)

        totals = np.maximum(self.expected_bytes, self.state["text_bytes"] + np.cumsum(sizes))
        limits = min(2 * float(step), 0.5) * totals
        for i in np.flatnonzero(is_val & (sizes > SHORT_BYTES) & (sizes > limits)):
            val_bytes = min(max(float(step) * totals[i], SHORT_BYTES), totals[i] / 2)
            # Both parts have at least one token besides end-of-text.
            text_tokens = int(lengths[i]) - 1
            if text_tokens > 1:
                cut = int(text_tokens * val_bytes / sizes[i])
                in_val[i] = min(max(cut, 1), text_tokens - 1)
        return in_val

    def checkpoint(self):
        """Make everything written so far survive a kill and a power cut."""
        for file in self.files.values():
            flush(file)
        write_json(self.journal, {"job": self.job, "state": self.state})

    def close(self):
        for file in self.files.values():
            file.close()

    def finish(self):
        """Give both files their final names, and write meta.json. Raises UserError if one of them
        would be empty."""
        if not all(self.state[split]["tokens"] for split in SPLITS):
            raise UserError(
                f"too little text: {self.state['documents']:,} documents, and at least 2 are "
                f"needed, or one of more than {SHORT_BYTES:,} bytes"
            )
        self.checkpoint()
        self.close()
        meta = {**FORMAT, **self.job, **self.state, "largest_id": dict.fromkeys(SPLITS, EOT)}
        for split, path in self.paths.items():
            meta[split]["sha256"] = sha256(path)
        del meta["file"], meta["rows"]

        # In this order a file is never beside the meta.json, or the other split, of another job.
        (self.out_dir / "meta.json").unlink(missing_ok=True)
        (self.out_dir / "val.bin").unlink(missing_ok=True)
        for split, path in self.paths.items():
            rename(path, self.out_dir / f"{split}.bin")
        write_json(self.out_dir / "meta.json", meta)
        self.journal.unlink()


def refuse_to_replace(out_dir: Path):
    """Raise UserError if the folder has token files, finished or not."""
    for name in ("meta.json", "train.bin", "val.bin", "prepare.json"):
        if (out_dir / name).exists():
            raise UserError(
                f"{out_dir}: has the token files of other text or settings; choose another "
                "--out_dir, or replace them with --overwrite"
            )


def is_complete(out_dir: Path, job: dict) -> bool:
    """Return whether the finished files of exactly this job exist."""
    meta = read_meta(out_dir)
    is_same_job = {**meta, **job} == meta
    return is_same_job and all((out_dir / f"{split}.bin").exists() for split in SPLITS)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# -----------------------------------------------------------------------------
# JSON


def read_meta(data_dir: Path) -> dict:
    """Return the contents of meta.json, or {} if there is no such file. Raises UserError."""
    return read_json(data_dir / "meta.json")


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it, and prepare again")


def write_json(path: Path, content: dict):
    """Write a JSON object to a file, which it replaces atomically. Raises OSError."""
    with replacing(path, "w") as file:
        file.write(json.dumps(content, indent=1) + "\n")


# -----------------------------------------------------------------------------
# Opening


def token_count(path: Path) -> int:
    """Return the number of tokens in a token file, from its size."""
    return path.stat().st_size // TOKEN_DTYPE.itemsize


def open_tokens(data_dir: Path, split: str, block_size: int, vocab_size: int) -> np.memmap:
    """Open the tokens of one split: uint16 (tokens,), read from the disk on access.

    Raises UserError if the file is missing, too short for one window and its targets, or would
    spoil a training in silence: cut off, with ids of another vocabulary or another width.
    """
    path = data_dir / f"{split}.bin"
    if not path.is_file():
        raise UserError(
            f"{path}: there is no such file; make it with: "
            f"python prepare_single_parquet.py PATH --out_dir={data_dir}"
        )
    meta = read_meta(data_dir)
    tokens = token_count(path)
    expected = meta.get(split, {}).get("tokens", tokens)
    if tokens != expected or path.stat().st_size % TOKEN_DTYPE.itemsize:
        raise UserError(
            f"{path}: is damaged: {path.stat().st_size:,} bytes, but meta.json says "
            f"{expected:,} tokens of 2 bytes; prepare it again with --overwrite"
        )
    if tokens <= block_size:
        raise UserError(
            f"{path}: {tokens:,} tokens are too few for one window of block_size={block_size}"
        )

    ids = np.memmap(path, TOKEN_DTYPE, "r")
    is_other = meta.get("encoding", "gpt2") != "gpt2"
    if not meta:
        is_other = (data_dir / "meta.pkl").exists()  # nanoGPT's, of characters
    largest = meta.get("largest_id", {}).get(split)
    if largest is None:  # a pass over the file
        largest = int(ids.max())
    # GPT-2's text has no such zeros; uint32 and int64 ids have them.
    is_wider = meta.get("vocab_size", VOCAB_SIZE) == VOCAB_SIZE and not ids[1:PROBE_TOKENS:2].any()
    if is_other or is_wider or largest >= vocab_size:
        raise UserError(
            f"{path}: these are not GPT-2's ids as uint16, below vocab_size={vocab_size} (the "
            f"largest is {largest}); prepare the text again"
        )
    return ids
