"""Says what a file is that is not parquet, and how to make a parquet file of it."""

import codecs
import csv
import glob
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from onenight.data.encoding import (
    DAMAGED_UTF8,
    PYTHON_NAMES,
    UNKNOWN,
    compression,
    has_controls,
    likely_encoding,
    starts_with,
)

PROBE_BYTES = 1 << 16  # of the beginning, by which a file is recognized
PYARROW_CODECS = ("gzip", "bz2", "zstd", "lz4")  # which pa.input_stream() can read
ARROW_STREAM = b"\xff\xff\xff\xff"
PARQUET = (b"PAR1", b"PARE")  # the second has an encrypted footer
# Files that are refused with a sentence alone.
NAMES = {
    b"version https://git-lfs": "is a Git LFS pointer, not the file; get it with: git lfs pull",
    b"<!doctype html": "is a web page, not the file; download it again",
    b"<html": "is a web page, not the file; download it again",
    b"%pdf": "is a PDF; extract its text first",
    b"sqlite format 3": "is an SQLite database; export its text first",
    b"obj\x01": "is an Avro file; convert it to parquet first",
    b"\x89hdf": "is an HDF5 file; export its text first",
    b"7z\xbc\xaf": "is a 7-Zip archive; unpack it first",
}
PROBED_FILES = 20  # of a folder without parquet files


@dataclass
class Recipe:
    """How to make a parquet file of a file: two lines of Python."""

    what: str  # the file, in words
    modules: str  # to import, besides pyarrow.parquet
    table: str  # the expression of the Arrow table


# -----------------------------------------------------------------------------
# What to tell the user


def explain_file(path: Path) -> str | None:
    """Return in words what a file is, with the lines that convert it, or None if it is unknown."""
    with open(path, "rb") as file:
        start = file.read(PROBE_BYTES)
    if start.startswith(PARQUET):
        return None
    sentence = starts_with(start[:64].lstrip().lower(), NAMES)
    if sentence:
        return sentence
    if start[257:262] == b"ustar":
        return "is a tar archive; unpack it first"

    codec = compression(start)
    if codec in PYARROW_CODECS:
        start = decompressed_start(path, codec)
    recipe = find_recipe(path, start, codec)
    if recipe:
        return explain_recipe(path, recipe)
    if codec:
        return f"is {codec} data; unpack it first"
    if text_encoding(start) == UNKNOWN:
        return "is text in an unknown encoding; convert it to UTF-8 first"
    return None


def explain_folder(folder: Path, files: list[Path]) -> str:
    """Return in words what a folder without parquet files contains, or "" if that is unknown."""
    arrow_files = [path for path in files if path.suffix == ".arrow"]
    if arrow_files:
        return f"; it {explain_recipe(folder, dataset_recipe(arrow_files[0].parent))}"
    for path in files[:PROBED_FILES]:
        explanation = explain_file(path)
        if explanation:
            return f"; {path} {explanation}"
    return ""


def dataset_recipe(split: Path) -> Recipe:
    """Return how a split that Hugging Face's save_to_disk() wrote becomes parquet."""
    # The other .arrow files in such a folder are caches.
    pattern = "data-*.arrow" if any(split.glob("data-*.arrow")) else "*.arrow"
    names = f"sorted(glob.glob({os.path.join(glob.escape(str(split)), pattern)!r}))"
    tables = f"pa.ipc.open_stream(pa.memory_map(name)).read_all() for name in {names}"
    return Recipe("is a Hugging Face dataset", "glob, pyarrow as pa", f"pa.concat_tables({tables})")


def explain_recipe(path: Path, recipe: Recipe) -> str:
    """Return a sentence and the two lines of Python that make a parquet file beside `path`."""
    named = path if path.name not in ("", "..") else path.absolute().resolve()
    target = named.with_suffix(".parquet")
    if target.exists():
        target = named.with_name(f"{named.stem}-new.parquet")
    return (
        f"{recipe.what}, not parquet; convert it with these two lines of Python, "
        f"and prepare the result (see docs/use_your_model.md, Your own text):\n"
        f"import {recipe.modules}, pyarrow.parquet as pq\n"
        f"pq.write_table({recipe.table}, {str(target)!r})"
    )


# -----------------------------------------------------------------------------
# Recognizing a file


def decompressed_start(path: Path, codec: str) -> bytes:
    """Return the beginning of a compressed file's content, or b"" if it is damaged."""
    try:
        with pa.input_stream(str(path), compression=codec) as stream:
            return stream.read(PROBE_BYTES)
    except (pa.ArrowException, OSError):
        return b""


def find_recipe(path: Path, start: bytes, codec: str | None) -> Recipe | None:
    """Return how a file whose (decompressed) content begins with `start` becomes parquet."""
    name = repr(str(path))
    stream = f"pa.input_stream({name}, compression={codec!r})"
    packed = f", compressed with {codec}" if codec else ""
    if start.startswith((b"ARROW1", b"FEA1")) and not codec:
        table = f"pyarrow.feather.read_table({name})"
        return Recipe("is a Feather file", "pyarrow.feather", table)
    if start.startswith(b"ORC") and not codec:
        return Recipe("is an ORC file", "pyarrow.orc", f"pyarrow.orc.read_table({name})")
    if start.startswith(ARROW_STREAM):
        table = f"pa.ipc.open_stream({stream}).read_all()"
        return Recipe(f"is an Arrow stream{packed}", "pyarrow as pa", table)
    encoding = text_encoding(start)
    if encoding in (None, UNKNOWN):
        return None

    text = f"io.TextIOWrapper({stream}, encoding={encoding!r}, errors='replace')"
    beginning = start.decode(encoding, "ignore").lstrip("\ufeff \t\r\n")
    recipe = json_recipe(beginning, text) or csv_recipe(path, beginning, stream, encoding)
    if recipe is None:
        table = f"pa.table({{'text': [{text}.read()]}})"
        recipe = Recipe("is plain text", "io, pyarrow as pa", table)
    recipe.what += packed
    if encoding != "utf-8-sig":
        recipe.what += f" in {encoding}"
    return recipe


def text_encoding(start: bytes) -> str | None:
    """Return Python's name of the encoding of a text, UNKNOWN, or None if it is not a text."""
    if not start:
        return None
    try:
        # The last bytes may be the first half of a character.
        codecs.getincrementaldecoder("utf-8")().decode(start)
        is_utf8 = b"\0" not in start
    except UnicodeDecodeError:
        is_utf8 = False
    if is_utf8:
        return None if has_controls(start) else "utf-8-sig"

    encoding = likely_encoding(start)
    if encoding == DAMAGED_UTF8:
        return "utf-8-sig"
    return encoding if encoding == UNKNOWN or encoding in PYTHON_NAMES else None


def json_recipe(beginning: str, text: str) -> Recipe | None:
    """Return how JSON lines or a JSON array become parquet, or None if it is neither."""
    modules = "io, json, pyarrow as pa"
    if re.match(r"\[\s*\"", beginning):
        return Recipe("is a JSON array", modules, f"pa.table({{'text': json.load({text})}})")
    if re.match(r"\[\s*{", beginning):
        key = text_key(beginning[1:].lstrip())
        rows = f"[row.get({key!r}) for row in json.load({text})]"
        return Recipe("is a JSON array", modules, f"pa.table({{'text': {rows}}})")
    if re.match(r"{\s*\"", beginning) and starts_with_json_line(beginning):
        key = text_key(beginning)
        rows = f"[json.loads(line).get({key!r}) for line in {text} if line.strip()]"
        return Recipe("is JSON lines", modules, f"pa.table({{'text': {rows}}})")
    return None


def starts_with_json_line(beginning: str) -> bool:
    """Return whether the first line is JSON by itself, or may be, being longer than `beginning`."""
    line, line_break, _ = beginning.partition("\n")
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return not line_break
    return True


def text_key(beginning: str) -> str:
    """Return the key of the text in the first JSON object: "text", or that of the longest one."""
    try:
        record, _ = json.JSONDecoder().raw_decode(beginning)
    except (ValueError, RecursionError):  # longer than what was read, or nested too deeply
        return "text"
    lengths = {key: len(value) for key, value in record.items() if isinstance(value, str)}
    if "text" in lengths or not lengths:
        return "text"
    return max(lengths, key=lengths.get)


def csv_recipe(path: Path, beginning: str, stream: str, encoding: str) -> Recipe | None:
    """Return how the rows of a CSV file become parquet, or None if it is not a CSV file.

    It is one if its name says so, or if its first line names several columns, one of them "text".
    """
    lines = beginning.splitlines() or [""]
    delimiter = max(",;\t", key=lines[0].count)
    header = next(csv.reader(lines, delimiter=delimiter), [])
    is_named = {".csv", ".tsv"} & {suffix.lower() for suffix in path.suffixes}
    if not is_named and not (len(header) > 1 and "text" in header):
        return None
    # A row must fit into a block.
    reading = f"csv.ReadOptions(block_size=2**28, encoding={encoding.removesuffix('-sig')!r})"
    parsing = f"csv.ParseOptions(delimiter={delimiter!r}, newlines_in_values=True)"
    table = f"csv.read_csv({stream}, {reading}, {parsing})"
    return Recipe("is a CSV file", "pyarrow as pa, pyarrow.csv as csv", table)
