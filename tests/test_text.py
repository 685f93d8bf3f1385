"""onenight/text.py: which files are found, and that every kind gives the same documents."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from helpers import ROOT, write_texts
from onenight.errors import UserError
from onenight.text import BATCH_ROWS, find_files, read_batches, text_size
from reference import PARAGRAPHS, TEXTS

KINDS = ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst"]


def read(path, text_column="text"):
    """Return the documents of a file, after checking its batches."""
    batches = list(read_batches(path, text_column))
    for batch in batches:
        assert len(batch.documents) == len(batch.token_counts) <= batch.rows <= BATCH_ROWS
    done = [batch.file_done for batch in batches]
    assert done == sorted(done)
    assert not done or 0 < done[-1] <= 1
    return [document for batch in batches for document in batch.documents]


def encode(texts):
    return [text.encode("utf-8", "surrogatepass") for text in texts if text]


# -----------------------------------------------------------------------------
# Finding files


def find(folder, *names):
    """Return what find_files() finds for names in a folder, relative to it."""
    found = find_files([str(folder / name) for name in names])
    return [path.relative_to(folder).as_posix() for path in found]


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).touch()


def test_a_folder_stands_for_the_files_in_and_below_it(tmp_path):
    touch(tmp_path, ".cache/d.parquet", "._a.parquet", "_temporary/0/e.txt", "_f.jsonl")
    touch(tmp_path, "README.md", "b/a.csv", "a.json", "a.gz")
    everything = ["a.jsonl.zst", "b/C.JSONL", "b/c.jsonl.gz", "x.parquet/part.txt", "z.parquet"]
    touch(tmp_path, *everything)
    assert find(tmp_path, "") == everything
    # Names come in the given order, each file once, and hidden ones if they are named.
    assert find(tmp_path, "z.parquet", "b", "") == ["z.parquet", *everything[1:3], *everything[::3]]
    assert find(tmp_path, ".cache", "_f.jsonl") == [".cache/d.parquet", "_f.jsonl"]


def test_each_file_is_taken_once_however_many_links_lead_to_it(tmp_path):
    touch(tmp_path, "a/one.parquet", "0_blob")
    (tmp_path / "a" / "two.parquet").symlink_to("one.parquet")
    (tmp_path / "a" / "up").symlink_to("..")
    (tmp_path / "c.parquet").symlink_to("0_blob")  # as in the cache of Hugging Face's hub
    assert find(tmp_path, "") == ["a/one.parquet", "c.parquet"]


@pytest.mark.parametrize(
    "names, found",
    [
        (["train-00000-of-00001.parquet", "validation-0.parquet", "test-0.parquet"], [0]),
        (["train/0.jsonl", "val/0.jsonl", "dev/0.jsonl", "valid/0.jsonl", "more.jsonl"], [4, 0]),
        (["en/Train/0.txt", "en/test/0.txt"], [0]),
        (["train/validation.txt", "train/0.txt"], [1]),
        (["test.txt", "dev.txt"], [1, 0]),  # nothing says train
        (["train.txt", "latest.txt"], [1, 0]),
    ],
)
def test_only_the_training_split_of_a_folder_is_read(names, found, tmp_path, capsys):
    touch(tmp_path / "test", *names)  # the names above the folder say nothing
    assert find(tmp_path / "test", "") == [names[i] for i in found]
    printed = capsys.readouterr().out
    assert all((name in printed) == (i not in found) for i, name in enumerate(names))
    assert find(tmp_path / "test", *names) == names  # all that are named


# -----------------------------------------------------------------------------
# Parquet

# Large and small strings, bytes, and dictionaries of them.
COLUMN_TYPES = [pa.string(), pa.large_string(), pa.string_view()]
COLUMN_TYPES += [pa.binary(), pa.large_binary(), pa.binary_view()]
COLUMN_TYPES += [pa.dictionary(pa.int32(), value) for value in (pa.string(), pa.binary())]
BINARY_TYPES = {
    pa.string(): pa.binary(),
    pa.large_string(): pa.large_binary(),
    pa.string_view(): pa.binary_view(),
}
ANY_TEXT = st.text(st.characters(), max_size=30)
SURROGATES = st.text(st.characters(categories=["Cs", "Lu", "Zs"]), max_size=5)
ROW_GROUPS = st.lists(st.lists(st.none() | ANY_TEXT | SURROGATES, max_size=8), max_size=4)


def make_column(texts, column_type):
    """Return an Arrow array. As in some real files, strings may hold encoded lone surrogates."""
    value_type = getattr(column_type, "value_type", column_type)
    raw = [None if text is None else text.encode("utf-8", "surrogatepass") for text in texts]
    array = pa.array(raw, BINARY_TYPES.get(value_type, value_type)).view(value_type)
    return array.dictionary_encode() if pa.types.is_dictionary(column_type) else array


@settings(max_examples=80, deadline=None)
@given(ROW_GROUPS, st.sampled_from(COLUMN_TYPES))
def test_any_text_in_any_column_type_is_read(tmp_path_factory, row_groups, column_type):
    path = tmp_path_factory.getbasetemp() / "any.parquet"
    with parquet.ParquetWriter(path, pa.schema({"text": column_type})) as writer:
        for group in row_groups:  # some without rows
            writer.write_table(pa.table({"text": make_column(group, column_type)}))
    assert read(path) == encode(text for group in row_groups for text in group)


PEAK = """
import re, sys
from pathlib import Path
from onenight.text import read_batches

for name in sys.argv[1:]:
    rows = sum(batch.rows for batch in read_batches(Path(name), "text"))
    peak_kb = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
    print(int(peak_kb) / 1e3)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory from /proc")
def test_memory_does_not_grow_with_the_row_group(tmp_path):
    text = "English prose, of which this file has very much. " * 200
    names = ("small.parquet", "large.parquet")
    for name, count in zip(names, (500, 15_000)):  # 5 MB and 150 MB
        table = pa.table({"text": [f"{i} {text}" for i in range(count)]})
        parquet.write_table(table, tmp_path / name, compression="none", use_dictionary=False)
        assert parquet.read_metadata(tmp_path / name).num_row_groups == 1
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PEAK, *(tmp_path / name for name in names)]
    printed = subprocess.check_output(command, env=environment, text=True)
    small_mb, large_mb = map(float, printed.split())
    assert large_mb - small_mb < 80


# -----------------------------------------------------------------------------
# .txt and JSON lines


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_documents(name, tmp_path):
    path = write_texts(tmp_path / name, TEXTS)
    assert read(path) == encode(TEXTS)
    assert sum(batch.rows for batch in read_batches(path, "text")) == len(TEXTS)


@pytest.mark.parametrize("name", KINDS)
def test_the_size_of_the_text_is_estimated(name, tmp_path):
    texts = sorted(set(PARAGRAPHS))
    size = text_size(write_texts(tmp_path / name, texts), "text")
    assert 0.5 < size / sum(map(len, encode(texts))) < 2


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_another_column_or_key_can_be_read(name, tmp_path):
    path = write_texts(tmp_path / name, ["one", "two"], key="content")
    assert read(path, "content") == [b"one", b"two"]


def test_unusual_json_lines_are_read(tmp_path):
    lines = ['\ufeff{"text": "first"}', "", '{"text": null}\r', "  ", '{"text": ""}']
    lines += ['{"id": [1, {}], "text": "\\ud83d\\ude00 \\ud83d"}', '{"text": "no end of line"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8", newline="")
    assert read(tmp_path / "a.jsonl") == encode(["first", "😀 \ud83d", "no end of line"])


def test_a_compressed_file_may_have_several_parts(tmp_path):
    halves = [b'{"text": "one"}\n{"te', b'xt": "two"}\n']
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, halves)))
    parts = [pa.compress(half, "zstd", asbytes=True) for half in halves]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(parts))
    assert read(tmp_path / "a.jsonl.gz") == read(tmp_path / "a.jsonl.zst") == [b"one", b"two"]


def test_a_txt_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo \xff\n")
    assert read(path) == [b"one\n\ntwo \xff\n"]
    path.write_text("")
    assert read(path) == []


def test_a_txt_file_is_several_documents_if_end_of_text_separates_them(tmp_path):
    """As in the .txt files of TinyStories."""
    path = tmp_path / "a.txt"
    stories = [f"story {i}\n\nwith two paragraphs" for i in range(1000)]
    path.write_text("\n<|endoftext|>\n".join([*stories, ""]))
    assert read(path) == encode(stories)
    assert sum(batch.rows for batch in read_batches(path, "text")) == 1001


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
def test_a_txt_file_of_windows_is_read(codec, tmp_path):
    text = "one\r\nzwei ü\r\n"
    (tmp_path / "a.txt").write_bytes(f"\ufeff{text}".encode(codec))
    assert read(tmp_path / "a.txt") == encode(["one\nzwei ü\n"])


# -----------------------------------------------------------------------------
# Damaged files


def write_pages(path, use_dictionary=False):
    """Write a parquet file of several pages with checksums. Return its bytes, and where its first
    page of data begins and where its last one ends."""
    texts = [f"text {i % 50} that fills some pages" for i in range(5000)]
    parquet.write_table(
        pa.table({"text": texts}),
        path,
        use_dictionary=use_dictionary,
        compression="none",
        write_page_checksum=True,
        data_page_size=1000,
        write_batch_size=100,
    )
    column = parquet.read_metadata(path).row_group(0).column(0)
    first = column.dictionary_page_offset if use_dictionary else column.data_page_offset
    end = first + column.total_compressed_size
    return bytearray(path.read_bytes()), column.data_page_offset, end


@pytest.mark.parametrize("page", ["text", "indices", "dictionary"])
def test_a_bit_that_differs_from_the_checksum_of_its_page_is_noticed(page, tmp_path):
    path = tmp_path / "a.parquet"
    raw, data, end = write_pages(path, use_dictionary=page != "text")
    read(path)
    raw[data - 1 if page == "dictionary" else end - 1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"a\.parquet"):
        read(path)


def test_a_page_that_pyarrow_skips_is_noticed(tmp_path):
    """The second byte of a page says what kind of page it is; others are skipped."""
    path = tmp_path / "a.parquet"
    raw, data, _ = write_pages(path)
    raw[data + 1] ^= 16
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"a\.parquet.* should have 5,000 rows"):
        read(path)
