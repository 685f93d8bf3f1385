"""Documents from parquet files, a few at a time: row group by row group, and no column but the text and token_count."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from onenight.files import first_line, where

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configurator import nearest

BATCH_ROWS = 256  # rows tokenized at once: about 1 MB of FineWeb, 30 ms
BATCH_BYTES = 1 << 20  # fewer rows where the texts are so long that they would be more than this

DAMAGED = (pa.ArrowException, OSError, ValueError)  # what pyarrow raises in a damaged file


@dataclass
class Source:
    """A parquet file whose footer has been read and checked."""

    path: Path
    rows: int
    text_bytes: int  # of the text column, uncompressed
    columns: list[str]  # to read: the text, and token_count if there is one


@dataclass
class Batch:
    """Consecutive rows of one row group."""

    source: Source
    row_group: int
    row: int  # of the first one, in its row group
    documents: pa.LargeBinaryArray  # the bytes as they are in the file, or null
    token_counts: np.ndarray  # of each row as the file says, -1 where it does not, int64


def find_parquets(paths: list[str], default: Path) -> list[Path]:
    """The files named, and those in the folders named (sorted), in that order. Raises SystemExit if there are none."""
    found = []
    for path in map(Path, paths or [default]):
        try:
            if path.is_dir():
                inside = sorted(path.glob("*.parquet"))
                if not inside:
                    raise SystemExit(f"{path}: no .parquet file in this folder")
                found += inside
            elif path.exists():
                found.append(path)
            else:
                near = nearest(path.name, [other.name for other in path.parent.glob("*.parquet")])
                raise SystemExit(f"{path}: no such file or folder{where(path)}{near}")
        except OSError as error:
            raise SystemExit(f"{path}: cannot be read ({error.strerror})") from None
    return found


def open_source(path: Path, text_column: str) -> Source:
    """Reads the footer. Raises SystemExit if it is not a whole parquet file, or has no text in `text_column`."""
    try:
        with pq.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
            sizes = [text_bytes(file.metadata.row_group(i), text_column) for i in range(file.num_row_groups)]
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno:
            raise SystemExit(f"{path}: cannot be read ({os.strerror(error.errno)})") from None
        raise SystemExit(f"{path}: not a whole parquet file ({first_line(error)}); download it again?") from None
    if schema.names.count(text_column) != 1:
        raise SystemExit(
            f"{path}: needs one column '{text_column}', but has {', '.join(schema.names) or 'none at all'}; "
            f"name another with --text_column="
        )
    kind = schema.field(text_column).type
    if not is_text(kind):
        raise SystemExit(f"{path}: column '{text_column}' holds {kind}, not text; name another with --text_column=")
    columns = [text_column]
    if schema.names.count("token_count") == 1 and pa.types.is_integer(schema.field("token_count").type):
        columns.append("token_count")
    return Source(path, rows, sum(sizes), columns)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds text, or bytes that can be read as UTF-8."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    texts = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view())
    return kind in texts


def fingerprint(source: Source) -> dict:
    """What distinguishes this file from any other, JSON; the sha256 is the one that Hugging Face shows for it."""
    digest = hashlib.sha256()
    try:
        with open(source.path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
            size = file.tell()
    except OSError as error:
        raise SystemExit(f"{source.path}: cannot be read ({error.strerror})") from None
    return {"file": source.path.name, "bytes": size, "rows": source.rows, "sha256": digest.hexdigest()}


def read_batches(sources: list[Source], first_row: int = 0):
    """Yields Batches from row `first_row` on, counted over all sources. Raises SystemExit where a file is damaged."""
    for source in sources:
        row_group = 0
        try:
            # A small read buffer instead of whole column chunks, so that a large row group does not fill the memory.
            with pq.ParquetFile(source.path, buffer_size=1 << 20, pre_buffer=False) as file:
                for row_group in range(file.num_row_groups):
                    rows = file.metadata.row_group(row_group).num_rows
                    if first_row < rows:
                        yield from read_row_group(file, source, row_group, first_row)
                    first_row = max(first_row - rows, 0)
        except DAMAGED as error:
            raise SystemExit(f"{source.path}: row group {row_group} is damaged ({first_line(error)})") from None


def read_row_group(file: pq.ParquetFile, source: Source, row_group: int, first_row: int):
    """Yields the Batches of one row group, from its row `first_row` on."""
    text_column = source.columns[0]
    group = file.metadata.row_group(row_group)
    step = max(1, min(BATCH_ROWS, BATCH_BYTES * group.num_rows // max(text_bytes(group, text_column), 1)))
    # A dictionary column is read all at once: its rows are indices, and Arrow copies the dictionary for each batch.
    is_dictionary = pa.types.is_dictionary(file.schema_arrow.field(text_column).type)
    read_rows, row = group.num_rows if is_dictionary else step, 0
    for table in file.iter_batches(read_rows, row_groups=[row_group], columns=source.columns, use_threads=False):
        for start in range(max(first_row - row, 0), len(table), step):
            rows = table.slice(start, step)
            documents = rows.column(text_column).cast(pa.large_binary())
            counts = np.full(len(rows), -1)
            if "token_count" in source.columns:
                counts = rows.column("token_count").cast(pa.int64()).fill_null(-1).to_numpy()
            yield Batch(source, row_group, row + start, documents, counts)
        row += len(table)


def text_bytes(group: pq.RowGroupMetaData, text_column: str) -> int:
    """Size of the column in this row group, uncompressed (though repeated texts may count once)."""
    chunks = [group.column(i) for i in range(group.num_columns)]
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == text_column)
