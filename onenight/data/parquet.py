"""Documents from parquet files, read in small batches.

Only the text column and, if there is one, the token_count column are read, row group by row group.
"""

import functools
import glob
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configurator import UserError, did_you_mean
from onenight.data.foreign import explain_file, explain_folder
from onenight.system.wording import first_line, looked_in

BATCH_ROWS = 256  # rows in a batch: about 1 MB of FineWeb, which takes 30 ms to tokenize
BATCH_BYTES = 1 << 20  # a batch has fewer rows if their text would exceed this
# The column types that hold text, or bytes that can be read as UTF-8.
TEXT_TYPES = (
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
)
SKIPPED = (".", "_")  # what the names begin with that are left out of a folder
DAMAGED = (pa.ArrowException, OSError, ValueError)  # what pyarrow raises for a damaged file


@dataclass
class Source:
    """A parquet file whose footer has been read and checked."""

    path: Path
    rows: int
    text_bytes: int  # of the text column, uncompressed
    columns: list[str]  # to read: the text and, if there is one, token_count
    first_text: str  # the sha256 of the first row's text

    @functools.cached_property
    def fingerprint(self) -> dict:
        """What identifies the content of the file, as meta.json records it.

        The sha256 is the one that Hugging Face shows for the file.
        """
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
            size = file.tell()
        return {
            "file": self.path.name,
            "bytes": size,
            "rows": self.rows,
            "sha256": digest.hexdigest(),
        }


@dataclass
class Batch:
    """Consecutive rows of one row group."""

    source: Source
    row_group: int
    first_row: int  # its index within the row group
    documents: pa.LargeBinaryArray  # the bytes as they are in the file, or null
    token_counts: np.ndarray  # float64, shape (rows,): as the file says, NaN where it does not


# -----------------------------------------------------------------------------
# Finding files


def find_parquets(names: list[str], default: Path) -> list[Path]:
    """Return the parquet files that are named, in that order.

    A name is a file, a pattern, or a folder, which stands for all parquet files in and below it,
    sorted. Without names, `default` is used. Raises UserError if nothing is found for a name.
    """
    found = []
    for name in names or [str(default)]:
        refuse_url(name, default)
        try:
            for path in expand_pattern(name):
                if path.is_dir():
                    found += parquets_below(path)
                elif path.exists():
                    found.append(path)
                else:
                    raise UserError(f"{path}: no such file or folder{hint_for_missing(path)}")
        except OSError as error:
            raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    return found


def refuse_url(name: str, folder: Path):
    """Raise UserError, with the command that downloads it into the folder, if the name is a URL."""
    if not re.match(r"\w\w+://", name):
        return
    hugging_face = r"https://huggingface.co/\1/resolve/main"
    url = re.sub("^hf://(datasets/[^/]+/[^/]+)", hugging_face, name)
    target = folder / url.split("?")[0].split("/")[-1]
    raise UserError(
        f"{name}: is not a local file; "
        f"download it first: curl -L -C - --create-dirs -o {target} {url}"
    )


def expand_pattern(name: str) -> list[Path]:
    """Return the paths that match a pattern, sorted, or the name itself if there are none.

    Shells do this too, except on Windows.
    """
    if os.path.lexists(name):
        return [Path(name)]
    return [Path(match) for match in sorted(glob.glob(name)) or [name]]


def parquets_below(folder: Path) -> list[Path]:
    """Return the parquet files in and below a folder, sorted. Raises UserError if there are none.

    Links are followed, but each folder and each file is taken once, by its first name: links can
    form a loop. Names that begin with . or _ are skipped, such as the .cache folders of downloads,
    macOS's ._* files, and Spark's _temporary, which holds unfinished files.
    """
    files = files_below(folder)
    seen = set()
    found = []
    for path in files:
        if path.suffix.lower() == ".parquet" and is_new(path, seen):
            found.append(path)
    if not found:
        raise UserError(f"{folder}: no .parquet file in this folder{explain_folder(folder, files)}")
    return found


def files_below(folder: Path) -> list[Path]:
    """Return the files in and below a folder, sorted, as parquets_below() describes."""
    found = []
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if not is_new(parent, seen):
            folders.clear()  # which ends this branch of the walk
            continue
        folders[:] = sorted(name for name in folders if not name.startswith(SKIPPED))
        found += [Path(parent, name) for name in names if not name.startswith(SKIPPED)]
    return sorted(found)


def is_new(path: str | Path, seen: set[str]) -> bool:
    """Return whether the real path of a file or folder is not in `seen` yet, and add it."""
    real_path = os.path.realpath(path)
    if real_path in seen:
        return False
    seen.add(real_path)
    return True


def hint_for_missing(path: Path) -> str:
    """Return where a missing file was looked for, and the file that may have been meant."""
    others = [other.name for other in path.parent.glob("*.parquet") if other.exists()]
    return looked_in(path) + did_you_mean(path.name, others)


# -----------------------------------------------------------------------------
# Opening files


def open_source(path: Path, text_column: str) -> Source:
    """Read the footer of a parquet file.

    Raises UserError if the file is not a complete parquet file, is encrypted, or has no column of
    text named `text_column`.
    """
    try:
        with open_parquet(path) as file:
            schema = file.schema_arrow
            rows = file.metadata.num_rows
            # If a column is encrypted, reading a row raises, but asking for its size would abort
            # the process.
            first_row = next(file.iter_batches(1, columns=[text_column, "token_count"]), None)
            groups = range(file.num_row_groups)
            sizes = [text_bytes(file, row_group, text_column) for row_group in groups]
    except DAMAGED as error:
        raise UserError(f"{path}: {why_unreadable(path, error)}") from None

    refuse_other_columns(path, schema, text_column)
    columns = [text_column]
    if has_token_counts(schema):
        columns.append("token_count")
    first_text = b""
    if first_row:
        first_text = as_bytes(first_row.column(text_column))[0].as_py() or b""
    return Source(path, rows, sum(sizes), columns, hashlib.sha256(first_text).hexdigest())


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a parquet file with a small read buffer.

    By default pyarrow buffers whole column chunks, and a large row group would fill the memory.
    """
    return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)


def why_unreadable(path: Path, error: Exception) -> str:
    """Return, in words, why reading a footer failed, and what to do."""
    if isinstance(error, OSError) and error.errno:
        return f"cannot be read ({os.strerror(error.errno)})"
    if re.search("Cannot decrypt|encrypted metadata", str(error)):
        return f"is encrypted ({first_line(error)}); write it again without encryption"
    explanation = explain_file(path)
    if explanation:
        return explanation
    return f"is not a complete parquet file ({first_line(error)}); download it again?"


def refuse_other_columns(path: Path, schema: pa.Schema, text_column: str):
    """Raise UserError unless there is exactly one column of that name and it holds text."""
    if schema.names.count(text_column) != 1:
        names = ", ".join(schema.names) or "no columns"
        raise UserError(
            f"{path}: needs one column '{text_column}', but has {names}; "
            f"choose another with --text_column="
        )
    column_type = schema.field(text_column).type
    value_type = column_type
    if pa.types.is_dictionary(column_type):
        value_type = column_type.value_type
    if value_type not in TEXT_TYPES:
        raise UserError(
            f"{path}: column '{text_column}' holds {column_type}, not text; "
            f"choose another with --text_column="
        )


def has_token_counts(schema: pa.Schema) -> bool:
    """Return whether there is exactly one column token_count and it holds numbers.

    pandas writes a column of integers as floats if one of them is missing.
    """
    if schema.names.count("token_count") != 1:
        return False
    column_type = schema.field("token_count").type
    return pa.types.is_integer(column_type) or pa.types.is_floating(column_type)


def text_bytes(file: pq.ParquetFile, row_group: int, text_column: str) -> int:
    """Return the uncompressed bytes of a column in one row group.

    Repeated texts may be counted once.
    """
    group = file.metadata.row_group(row_group)
    size = 0
    for i in range(len(file.schema)):
        if file.schema.column(i).path == text_column:
            size += group.column(i).total_uncompressed_size
    return size


def without_copies(sources: list[Source]) -> list[Source]:
    """Return the sources without those whose content occurred before.

    A copy would put the documents of val.bin into train.bin as well. It may be compressed in
    another way. Raises UserError if a file that looks like a copy is damaged.
    """
    by_content = {}
    by_beginning = {}
    distinct = []
    for source in sources:
        first = by_content.setdefault(source.fingerprint["sha256"], source)
        if first is not source:
            print(f"{source.path}: skipped, because it has the same content as {first.path}")
            continue

        # Most files differ in the number of rows or the first text, and are not read for this.
        similar = by_beginning.setdefault((source.rows, source.first_text), [])
        first = next((other for other in similar if have_same_texts(source, other)), None)
        if first:
            print(f"{source.path}: skipped, because it has the same texts as {first.path}")
            continue
        similar.append(source)
        distinct.append(source)
    return distinct


def have_same_texts(source: Source, other: Source) -> bool:
    """Return whether two files with as many rows have the same texts, in the same order.

    Reads both of them up to the first difference.
    """
    pairs = zip(read_documents(source), read_documents(other))
    return all(document == its_copy for document, its_copy in pairs)


def read_documents(source: Source) -> Iterator[bytes]:
    """Yield the documents of a file as bytes, b"" for a row without text."""
    for batch in read_batches([source]):
        for document in batch.documents.to_pylist():
            yield document or b""


# -----------------------------------------------------------------------------
# Reading documents


def read_batches(sources: list[Source], first_row: int = 0) -> Iterator[Batch]:
    """Yield the batches from row `first_row` on, counted over all sources.

    Raises UserError if a file is damaged.
    """
    skip = first_row
    for source in sources:
        try:
            with open_parquet(source.path) as file:
                for row_group in range(file.num_row_groups):
                    rows = file.metadata.row_group(row_group).num_rows
                    if skip < rows:
                        yield from read_row_group(file, source, row_group, skip)
                    skip = max(skip - rows, 0)
        except DAMAGED as error:
            reason = first_line(error)
            raise UserError(f"{source.path}: is damaged ({reason}); download it again?") from None


def read_row_group(
    file: pq.ParquetFile, source: Source, row_group: int, first_row: int
) -> Iterator[Batch]:
    """Yield the batches of one row group, from its row `first_row` on."""
    text_column = source.columns[0]
    num_rows = file.metadata.row_group(row_group).num_rows
    size = text_bytes(file, row_group, text_column)
    batch_rows = max(1, min(BATCH_ROWS, BATCH_BYTES * num_rows // max(size, 1)))

    # A dictionary column is read at once: its rows are indices, and Arrow copies the dictionary
    # into every table.
    is_dictionary = pa.types.is_dictionary(file.schema_arrow.field(text_column).type)
    table_rows = num_rows if is_dictionary else batch_rows
    tables = file.iter_batches(
        table_rows, row_groups=[row_group], columns=source.columns, use_threads=False
    )

    table_start = 0
    for table in tables:
        for start in range(max(first_row - table_start, 0), len(table), batch_rows):
            rows = table.slice(start, batch_rows)
            documents = as_bytes(rows.column(text_column))
            yield Batch(source, row_group, table_start + start, documents, token_counts(rows))
        table_start += len(table)


def as_bytes(column: pa.Array) -> pa.LargeBinaryArray:
    """Return a column of text as the bytes that are in the file, or null."""
    return column.cast(pa.large_binary())


def token_counts(rows: pa.RecordBatch) -> np.ndarray:
    """Return the token_count column as float64, shape (rows,), NaN where there is no value."""
    if "token_count" not in rows.schema.names:
        return np.full(len(rows), np.nan)
    counts = rows.column("token_count").cast(pa.float64(), safe=False)
    return counts.to_numpy(zero_copy_only=False)
