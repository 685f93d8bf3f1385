"""Documents from parquet, JSON lines and text files, read in small batches."""

import codecs
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from onenight.errors import UserError, first_line
from onenight.tokenizer import EOT_TEXT

KINDS = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt")
CODECS = {".gz": "gzip", ".zst": "zstd"}
COMPRESSED_TO_TEXT = 3  # about how many bytes of JSON are in one of a compressed file
BATCH_ROWS = 256  # rows in a batch: about 1 MB of FineWeb, which takes 30 ms to tokenize
BATCH_BYTES = 1 << 20  # a batch has fewer rows if their text would exceed this
# The words in the names of files and folders by which a folder's splits are told apart.
TRAIN_WORDS = {"train", "training"}
HELD_OUT_WORDS = {"validation", "valid", "val", "dev", "test"}
# What reading a damaged file raises.
DAMAGED = (pa.ArrowException, OSError, ValueError, RecursionError)


@dataclass
class Batch:
    """The documents of consecutive rows of one file."""

    documents: list[bytes]  # of the rows that are not empty
    token_counts: np.ndarray  # float64 (documents,): as the file says, NaN where it does not
    rows: int  # with the empty ones
    file_done: float  # the part of the file up to here, from 0 to 1


# -----------------------------------------------------------------------------
# Files


def find_files(names: list[str]) -> list[Path]:
    """Return the files that are named, each once. A folder stands for the files of our kinds in and
    below it, sorted, without names that begin with . or _. Raises UserError."""
    found = {}
    for name in names:
        path = Path(name)
        if path.is_dir():
            paths = files_below(path)
        elif path.exists() and kind_of(path):
            paths = [path]
        else:
            reason = "is another kind of file" if path.exists() else "there is no such file"
            raise UserError(
                f"{path}: {reason}; give .parquet, .jsonl (also .jsonl.gz, .jsonl.zst) or .txt "
                "files, or folders of them"
            )
        for path in paths:
            found.setdefault(path.resolve(), path)
    return list(found.values())


def kind_of(path: Path) -> str | None:
    """Return the one of KINDS that the name of a file ends with."""
    for kind in KINDS:
        if path.name.lower().endswith(kind):
            return kind
    return None


def files_below(folder: Path) -> list[Path]:
    """Return the files of our kinds in and below a folder, only those for training if the names
    tell them from others. Raises UserError if there are none."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        found += [Path(parent, name) for name in names if not name.startswith((".", "_"))]
    found = sorted(path for path in found if kind_of(path))
    if not found:
        raise UserError(f"{folder}: has no {', '.join(KINDS)} file")

    splits = {path: split_of(path.relative_to(folder)) for path in found}
    held_out = [path for path in found if splits[path] == "held out"]
    if not held_out or "train" not in splits.values():
        return found
    names = ", ".join(str(path) for path in held_out)
    print(f"{folder}: has files for training and others; these are left out: {names}")
    return [path for path in found if path not in held_out]


def split_of(path: Path) -> str | None:
    """Return "train" or "held out" if a file's name says so, or else that of its folder."""
    for name in reversed(path.parts):
        words = set(re.split("[^a-z]+", name.lower()))
        if words & TRAIN_WORDS:
            return "train"
        if words & HELD_OUT_WORDS:
            return "held out"
    return None


def text_size(path: Path, text_column: str) -> int:
    """Return about how many bytes of text a file has. Raises UserError if it is not a whole parquet
    file."""
    kind = kind_of(path)
    size = path.stat().st_size
    if kind != ".parquet":
        return size if kind in (".jsonl", ".txt") else COMPRESSED_TO_TEXT * size
    try:
        with open_parquet(path) as file:
            column = find_text_column(path, file, text_column)
            groups = range(file.num_row_groups)
            sizes = [column_bytes(file, group, column) for group in groups]
            return sum(sizes) + 4 * file.metadata.num_rows
    except DAMAGED as error:
        raise UserError(f"{path}: is not a whole parquet file ({first_line(error)})")


# -----------------------------------------------------------------------------
# Batches


def read_batches(path: Path, text_column: str) -> Iterator[Batch]:
    """Yield the batches of a file. Raises UserError if it is damaged."""
    kind = kind_of(path)
    if kind == ".parquet":
        return read_parquet(path, text_column)
    if kind == ".txt":
        return read_txt(path)
    return read_json_lines(path, text_column)


def make_batch(rows: list[bytes | None], file_done: float, token_counts=None) -> Batch:
    """Return the batch of some rows; token_counts: float64 (rows,)."""
    if token_counts is None:
        token_counts = np.full(len(rows), np.nan)
    has_text = np.array([bool(row) for row in rows], dtype=bool)
    documents = [row for row in rows if row]
    return Batch(documents, token_counts[has_text], len(rows), file_done)


# -----------------------------------------------------------------------------
# Parquet


def open_parquet(path: Path) -> pq.ParquetFile:
    # By default pyarrow buffers whole column chunks, and a large row group would fill the memory.
    return pq.ParquetFile(
        path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
    )


def find_text_column(path: Path, file: pq.ParquetFile, text_column: str) -> int:
    """Return the number of the column of text. Raises UserError unless there is one of that
    name."""
    names = file.schema_arrow.names
    if names.count(text_column) == 1:
        for number in range(len(file.schema)):
            column = file.schema.column(number)
            if column.path == text_column and column.physical_type == "BYTE_ARRAY":
                return number
    raise UserError(
        f"{path}: has no single column of text named {text_column!r}, only {', '.join(names)}; "
        "choose one with --text_column"
    )


def column_bytes(file: pq.ParquetFile, row_group: int, column: int) -> int:
    """Return the uncompressed bytes of a column in one row group."""
    return file.metadata.row_group(row_group).column(column).total_uncompressed_size


def read_parquet(path: Path, text_column: str) -> Iterator[Batch]:
    row = 0
    try:
        with open_parquet(path) as file:
            column = find_text_column(path, file, text_column)
            for row_group in range(file.num_row_groups):
                for rows in read_row_group(file, row_group, column):
                    texts = rows.column(text_column).cast(pa.large_binary()).to_pylist()
                    row += len(texts)
                    yield make_batch(texts, row / file.metadata.num_rows, token_counts(rows))
            # pyarrow skips a page whose damaged header says that it is of another kind.
            if row != file.metadata.num_rows:
                raise ValueError(f"but should have {file.metadata.num_rows:,} rows")
    except DAMAGED as error:
        raise UserError(f"{path}: cannot be read after row {row:,} ({first_line(error)})")


def read_row_group(file: pq.ParquetFile, row_group: int, column: int) -> Iterator[pa.RecordBatch]:
    """Yield the text and the token counts of one row group."""
    num_rows = file.metadata.row_group(row_group).num_rows
    size = max(1, column_bytes(file, row_group, column))
    return file.iter_batches(
        max(1, min(BATCH_ROWS, BATCH_BYTES * num_rows // size)),
        row_groups=[row_group],
        columns=[file.schema.column(column).path, "token_count"],  # the second, if there is one
        use_threads=False,
    )


def token_counts(batch: pa.RecordBatch) -> np.ndarray | None:
    """Return the file's own token counts, float64 (rows,), NaN where it has none."""
    if batch.schema.names.count("token_count") != 1:
        return None
    counts = batch.column("token_count")
    if not (pa.types.is_integer(counts.type) or pa.types.is_floating(counts.type)):
        return None
    return counts.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)


# -----------------------------------------------------------------------------
# .txt and JSON lines


def read_txt(path: Path) -> Iterator[Batch]:
    """Yield a file as one document, or as those that <|endoftext|> separates in it."""
    text = path.read_bytes()
    if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # as Windows' programs write
        text = text.decode("utf-16", "replace").encode()
    text = text.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n")
    documents = text.split(EOT_TEXT.encode())
    size = max(1, min(BATCH_ROWS, BATCH_BYTES * len(documents) // max(1, len(text))))
    for first in range(0, len(documents), size):
        rows = documents[first : first + size]
        if len(documents) > 1:
            rows = [row.strip() for row in rows]
        yield make_batch(rows, (first + len(rows)) / len(documents))


def read_json_lines(path: Path, text_key: str) -> Iterator[Batch]:
    number = 0
    rows = []
    size = 0
    try:
        with open(path, "rb") as raw:
            total = max(1, os.fstat(raw.fileno()).st_size)
            for line in decompressed(raw, path):
                rows.append(text_of_line(line, text_key))
                number += 1
                size += len(line)
                if len(rows) == BATCH_ROWS or size > BATCH_BYTES:
                    yield make_batch(rows, raw.tell() / total)
                    rows = []
                    size = 0
    except DAMAGED as error:
        raise UserError(f"{path}: cannot be read after line {number:,} ({first_line(error)})")
    if rows:
        yield make_batch(rows, file_done=1.0)


def decompressed(raw, path: Path) -> io.BufferedReader:
    """Return the content of an open file, decompressed if its name says that it is compressed."""
    codec = CODECS.get(path.suffix.lower())
    if codec is None:
        return raw
    return io.BufferedReader(pa.CompressedInputStream(raw, codec), 1 << 20)


def text_of_line(line: bytes, text_key: str) -> bytes | None:
    """Return the text of a JSON object, None if it is null. Raises ValueError if there is none."""
    if not line.strip():
        return None
    record = json.loads(line)
    if not isinstance(record, dict) or text_key not in record:
        raise ValueError(f"the next one is no JSON object with a key {text_key!r}")
    text = record[text_key]
    if text is None:
        return None
    if not isinstance(text, str):
        raise ValueError(f"the {text_key!r} of the next one is not text")
    return text.encode("utf-8", "surrogatepass")
