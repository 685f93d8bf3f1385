"""Documents from parquet files, a few at a time: row group by row group, and no column but the text and token_count."""

import functools
import glob
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from onenight.files import first_line, where

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configurator import nearest

BATCH_ROWS = 256  # rows tokenized at once: about 1 MB of FineWeb, 30 ms
BATCH_BYTES = 1 << 20  # fewer rows where the texts are so long that they would be more than this
# A text column holds text, or bytes that can be read as UTF-8.
TEXTS = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view())
DAMAGED = (pa.ArrowException, OSError, ValueError)  # what pyarrow raises in a damaged file


@dataclass
class Source:
    """A parquet file whose footer has been read and checked."""

    path: Path
    rows: int
    text_bytes: int  # of the text column, uncompressed
    columns: list[str]  # to read: the text, and token_count if there is one

    @functools.cached_property
    def fingerprint(self) -> dict:
        """What distinguishes this file from any other, JSON; the sha256 is the one that Hugging Face shows for it."""
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
            return {"file": self.path.name, "bytes": file.tell(), "rows": self.rows, "sha256": digest.hexdigest()}


@dataclass
class Batch:
    """Consecutive rows of one row group."""

    source: Source
    row_group: int
    row: int  # of the first one, in its row group
    documents: pa.LargeBinaryArray  # the bytes as they are in the file, or null
    token_counts: np.ndarray  # of each row as the file says, nan where it does not, float64


def find_parquets(names: list[str], default: Path) -> list[Path]:
    """The files named or matching a pattern, and those in or below the folders named (sorted), in that order. Raises
    SystemExit if there are none, or one is missing."""
    found = []
    for name in names or [str(default)]:
        if re.match(r"\w\w+://", name):
            url = re.sub("^hf://(datasets/[^/]+/[^/]+)", r"https://huggingface.co/\1/resolve/main", name)
            target = default / url.split("?")[0].split("/")[-1]
            raise SystemExit(f"{name}: no file; download it first: curl -L -C - --create-dirs -o {target} {url}")
        try:
            matching = [] if os.path.lexists(name) else sorted(glob.glob(name))  # Windows leaves patterns to us
            for path in map(Path, matching or [name]):
                if path.is_dir():  # glob passes over what begins with a dot: downloads' .cache, macOS's ._companions
                    below = map(Path, glob.glob(os.path.join(glob.escape(str(path)), "**", "*"), recursive=True))
                    inside = sorted(file for file in below if file.suffix.lower() == ".parquet" and not file.is_dir())
                    if not inside:
                        raise SystemExit(f"{path}: no .parquet file in this folder")
                    found += inside
                elif path.exists():
                    found.append(path)
                else:
                    near = nearest(path.name, [other.name for other in path.parent.glob("*.parquet") if other.exists()])
                    raise SystemExit(f"{path}: no such file or folder{where(path)}{near}")
        except OSError as error:
            raise SystemExit(f"{name}: cannot be read ({error.strerror})") from None
    return found


def open_source(path: Path, text_column: str) -> Source:
    """Reads the footer. Raises SystemExit if it is not a whole parquet file, or has no text in `text_column`."""
    try:
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
            # Of an encrypted column, reading a row raises; asking for the size would end the process.
            next(file.iter_batches(1, columns=[text_column, "token_count"]), None)
            sizes = [text_bytes(file, row_group, text_column) for row_group in range(file.num_row_groups)]
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno:
            raise SystemExit(f"{path}: cannot be read ({os.strerror(error.errno)})") from None
        if re.search("Cannot decrypt|encrypted metadata", str(error)):
            raise SystemExit(f"{path}: encrypted ({first_line(error)}); write it again without encryption") from None
        raise SystemExit(f"{path}: not a whole parquet file ({first_line(error)}); download it again?") from None
    if schema.names.count(text_column) != 1:
        raise SystemExit(
            f"{path}: needs one column '{text_column}', but has {', '.join(schema.names) or 'none at all'}; "
            f"name another with --text_column="
        )
    kind = schema.field(text_column).type
    if (kind.value_type if pa.types.is_dictionary(kind) else kind) not in TEXTS:
        raise SystemExit(f"{path}: column '{text_column}' holds {kind}, not text; name another with --text_column=")
    columns, kind = [text_column], schema.field("token_count").type if schema.names.count("token_count") == 1 else None
    if kind and (pa.types.is_integer(kind) or pa.types.is_floating(kind)):  # pandas makes it a float if one is missing
        columns.append("token_count")
    return Source(path, rows, sum(sizes), columns)


def without_copies(sources: list[Source]) -> list[Source]:
    """Each content once, because a copy would put the documents of val.bin into train.bin as well."""
    first = {}
    for source in sources:
        same = first.setdefault(source.fingerprint["sha256"], source)
        if same is not source:
            print(f"{source.path}: skipped, because it has the same content as {same.path}")
    return list(first.values())


def read_batches(sources: list[Source], first_row: int = 0):
    """Yields Batches from row `first_row` on, counted over all sources. Raises SystemExit where a file is damaged."""
    for source in sources:
        try:
            # A small read buffer instead of whole column chunks, so that a large row group does not fill the memory.
            with pq.ParquetFile(source.path, buffer_size=1 << 20, pre_buffer=False) as file:
                for row_group in range(file.num_row_groups):
                    rows = file.metadata.row_group(row_group).num_rows
                    if first_row < rows:
                        yield from read_row_group(file, source, row_group, first_row)
                    first_row = max(first_row - rows, 0)
        except DAMAGED as error:
            raise SystemExit(f"{source.path}: is damaged ({first_line(error)}); download it again?") from None


def read_row_group(file: pq.ParquetFile, source: Source, row_group: int, first_row: int):
    """Yields the Batches of one row group, from its row `first_row` on."""
    text_column = source.columns[0]
    num_rows, size = file.metadata.row_group(row_group).num_rows, text_bytes(file, row_group, text_column)
    step = max(1, min(BATCH_ROWS, BATCH_BYTES * num_rows // max(size, 1)))
    # A dictionary column is read all at once: its rows are indices, and Arrow copies the dictionary for each batch.
    is_dictionary = pa.types.is_dictionary(file.schema_arrow.field(text_column).type)
    read_rows, row = num_rows if is_dictionary else step, 0
    for table in file.iter_batches(read_rows, row_groups=[row_group], columns=source.columns, use_threads=False):
        for start in range(max(first_row - row, 0), len(table), step):
            rows = table.slice(start, step)
            documents = rows.column(text_column).cast(pa.large_binary())
            counts = np.full(len(rows), np.nan)
            if "token_count" in source.columns:
                counts = rows.column("token_count").cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
            yield Batch(source, row_group, row + start, documents, counts)
        row += len(table)


def text_bytes(file: pq.ParquetFile, row_group: int, text_column: str) -> int:
    """Size of the column in this row group, uncompressed (though repeated texts may count once)."""
    group, leaves = file.metadata.row_group(row_group), [file.schema.column(i).path for i in range(len(file.schema))]
    return sum(group.column(i).total_uncompressed_size for i, leaf in enumerate(leaves) if leaf == text_column)
