"""Parquet files as people have them: folders, links, copies, encrypted files, odd columns."""

import base64
import re
import shutil

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from pyarrow.parquet import encryption

from configurator import UserError
from helpers import write_parquet
from onenight.data.parquet import (
    BATCH_BYTES,
    BATCH_ROWS,
    find_parquets,
    open_source,
    read_batches,
    without_copies,
)


def read_texts(path, first_row=0, text_column="text"):
    """Return the documents of a file from a row on, as bytes."""
    batches = read_batches([open_source(path, text_column)], first_row)
    return [text for batch in batches for text in batch.documents.to_pylist()]


# -----------------------------------------------------------------------------
# Finding files


def find(folder, *names):
    """Return what find_parquets() finds for names in a folder, relative to it."""
    found = find_parquets([str(folder / name) for name in names], folder)
    return [str(path.relative_to(folder)) for path in found]


def test_folders_as_downloads_leave_them(tmp_path):
    for name in (
        "b/c.parquet",
        "b/._c.parquet",
        ".cache/d.parquet",
        "a.PARQUET",
        "z.parquet",
        "x.parquet/part.parquet",
        "b/README.md",
        "q[1].parquet",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    everything = ["a.PARQUET", "b/c.parquet", "q[1].parquet", "x.parquet/part.parquet", "z.parquet"]
    assert find(tmp_path, "") == find(tmp_path, "./") == everything
    assert find(tmp_path, "z.parquet", "b") == ["z.parquet", "b/c.parquet"]
    # Patterns that the shell has not expanded, and a name that looks like one.
    unexpanded = ["q[1].parquet", "x.parquet/part.parquet", "z.parquet"]
    assert find(tmp_path, "*.parquet") == unexpanded
    assert find(tmp_path, "q[1].parquet", "[z]*") == ["q[1].parquet", "z.parquet"]
    # A hidden folder is used if it is named.
    shutil.copytree(tmp_path / "b", tmp_path / ".hidden")
    assert find(tmp_path, ".hidden") == [".hidden/c.parquet"]


def test_unfinished_and_internal_files_are_left_out_of_a_folder(tmp_path):
    names = ["_temporary/0/part.parquet", "_a.parquet", ".b.parquet", "x/_started/c.parquet"]
    for name in [*names, "x/part.parquet"]:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    assert find(tmp_path, "") == ["x/part.parquet"]
    for name in names:  # used if they are named
        assert find(tmp_path, name) == [name]
    assert find(tmp_path, "_temporary") == ["_temporary/0/part.parquet"]


def test_each_file_is_taken_once_however_many_links_lead_to_it(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.parquet").touch()
    (tmp_path / "a" / "two.parquet").symlink_to("one.parquet")
    (tmp_path / "a" / "up").symlink_to("..")
    (tmp_path / "a" / "self").symlink_to(".")
    (tmp_path / "b").symlink_to("a")
    # As in the cache of Hugging Face's hub: the file itself has another name.
    (tmp_path / "0_blob").touch()
    (tmp_path / "c.parquet").symlink_to("0_blob")
    assert find(tmp_path, "") == ["a/one.parquet", "c.parquet"]


def test_the_default_folder_is_used_without_names(tmp_path):
    (tmp_path / "a.parquet").touch()
    assert find_parquets([], tmp_path) == [tmp_path / "a.parquet"]


URL = "https://huggingface.co/datasets/HuggingFaceFW/fineweb/resolve/main/data/x/000.parquet"
NOT_FILES = {
    "hf://datasets/HuggingFaceFW/fineweb/data/x/000.parquet": rf"-o \S+/000.parquet {URL}$",
    f"{URL}?download=true": rf"-o \S+/000.parquet {URL}\?download=true$",
    "link.parquet": "link.parquet: no such file or folder$",
    "*.parque": r"/\*.parque: no such file or folder$",
    "x" * 300: r"cannot be read \(File name too long\)$",
    "empty": "empty: no .parquet file in this folder$",
    "a_long_nam.parquet": "no such file or folder; did you mean a_long_name_of_a_file.parquet[?]$",
}


@pytest.mark.parametrize("name, words", NOT_FILES.items(), ids=[name[:40] for name in NOT_FILES])
def test_names_that_are_not_files_are_refused(name, words, tmp_path):
    (tmp_path / "link.parquet").symlink_to("gone.parquet")
    (tmp_path / "a_long_name_of_a_file.parquet").touch()
    (tmp_path / "empty").mkdir()
    path = name if "://" in name else str(tmp_path / name)
    with pytest.raises(UserError, match=words):
        find_parquets([path], tmp_path)


# -----------------------------------------------------------------------------
# Opening files


class KeyService(encryption.KmsClient):
    """Keeps keys in the open."""

    def __init__(self, _config):
        encryption.KmsClient.__init__(self)

    def wrap_key(self, key, _name):
        return base64.b64encode(key)

    def unwrap_key(self, wrapped, _name):
        return base64.b64decode(wrapped)


def write_encrypted(path, column, plaintext_footer=True):
    """Write a file whose footer may be encrypted and one of whose columns is. Return its texts."""
    configuration = encryption.EncryptionConfiguration(
        footer_key="f", column_keys={"k": [column]}, plaintext_footer=plaintext_footer
    )
    properties = encryption.CryptoFactory(KeyService).file_encryption_properties(
        encryption.KmsConnectionConfig(), configuration
    )
    texts = [f"text {i}" for i in range(300)]
    table = pa.table({"secret": texts, "text": texts})
    with parquet.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    return texts


def test_another_column_may_be_encrypted(tmp_path):
    texts = write_encrypted(tmp_path / "a.parquet", "secret")
    assert read_texts(tmp_path / "a.parquet") == [text.encode() for text in texts]


@pytest.mark.parametrize("column, plaintext_footer", [("text", True), ("secret", False)])
def test_encrypted_text_is_refused(column, plaintext_footer, tmp_path):
    write_encrypted(tmp_path / "a.parquet", column, plaintext_footer)
    with pytest.raises(UserError, match=r"a.parquet: is encrypted \("):
        open_source(tmp_path / "a.parquet", "text")


BAD_COLUMNS = {
    "another name": (
        pa.table({"content": ["a"], "id": ["b"]}),
        "needs one column 'text', but has content, id; choose another with --text_column=",
    ),
    "twice": (
        pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]),
        "needs one column 'text', but has text, text; choose another",
    ),
    "no columns": (pa.table({}), "needs one column 'text', but has no columns; choose another"),
    "numbers": (
        pa.table({"text": [1, 2]}),
        "column 'text' holds int64, not text; choose another with --text_column=",
    ),
    "a dictionary of numbers": (
        pa.table({"text": pa.array([1, 2]).dictionary_encode()}),
        "not text; choose another with --text_column=",
    ),
}


@pytest.mark.parametrize("table, words", BAD_COLUMNS.values(), ids=BAD_COLUMNS)
def test_a_file_without_a_column_of_text_is_refused(table, words, tmp_path):
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=re.escape(words)):
        open_source(tmp_path / "a.parquet", "text")


def test_another_column_can_be_read_as_the_text(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["no", "no"], content=["yes", "yes"])
    assert read_texts(tmp_path / "a.parquet", text_column="content") == [b"yes", b"yes"]


def test_a_file_that_is_incomplete_or_not_parquet_is_refused(tmp_path):
    whole = write_parquet(tmp_path / "whole.parquet", ["some text"] * 300).read_bytes()
    contents = {"cut": whole[:-100], "binary": bytes(range(256)) * 10, "empty": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}: is not a complete parquet file \(.*\); do"):
            open_source(tmp_path / name, "text")


def test_a_link_without_a_target_is_refused(tmp_path):
    """A folder is searched for names, so a broken link is noticed when it is opened."""
    (tmp_path / "link.parquet").symlink_to("gone.parquet")
    (path,) = find_parquets([str(tmp_path)], tmp_path)
    with pytest.raises(UserError, match=r"link.parquet: cannot be read \(No such file"):
        open_source(path, "text")


def test_copies_are_skipped(tmp_path, capsys):
    first = write_parquet(tmp_path / "a.parquet", ["a", "b"])
    other = write_parquet(tmp_path / "b.parquet", ["b", "a"])
    copy = shutil.copy(first, tmp_path / "c.parquet")
    sources = [open_source(path, "text") for path in (first, other, copy, first)]
    assert [source.path for source in without_copies(sources)] == [first, other]
    assert capsys.readouterr().out == (
        f"{copy}: skipped, because it has the same content as {first}\n"
        f"{first}: skipped, because it has the same content as {first}\n"
    )


def write_table(path, texts, **options):
    parquet.write_table(pa.table({"text": texts}), path, **options)
    return path


def test_the_same_texts_in_another_file_are_skipped(tmp_path, capsys):
    texts = [f"text {i}" for i in range(1000)]
    paths = [
        write_table(tmp_path / "a.parquet", texts, compression="snappy"),
        write_table(tmp_path / "b.parquet", [*texts[:-1], "another last text"]),
        write_table(tmp_path / "c.parquet", [texts[1], texts[0], *texts[2:]]),
        write_table(tmp_path / "d.parquet", texts[:-1]),
        write_table(tmp_path / "e.parquet", texts, compression="zstd", row_group_size=300),
        write_table(tmp_path / "f.parquet", pa.array(texts).dictionary_encode()),
    ]
    sources = [open_source(path, "text") for path in paths]
    assert [source.path for source in without_copies(sources)] == paths[:4]
    first = "skipped, because it has the same texts as"
    assert capsys.readouterr().out == (
        f"{paths[4]}: {first} {paths[0]}\n{paths[5]}: {first} {paths[0]}\n"
    )


def test_a_file_with_other_rows_or_another_first_text_is_not_read_to_compare_it(
    tmp_path, monkeypatch
):
    texts = [["a", "b"], ["a", "b", "c"], ["c", "b"], [None, "b"]]
    paths = [write_table(tmp_path / f"{i}.parquet", rows) for i, rows in enumerate(texts)]
    sources = [open_source(path, "text") for path in paths]
    monkeypatch.setattr("onenight.data.parquet.read_batches", None)
    assert without_copies(sources) == sources


# -----------------------------------------------------------------------------
# Reading documents


@pytest.mark.parametrize("first_row", [0, 1, 399, 400, 401, 999, 1000, 1001, 1999, 2000])
def test_reading_can_start_at_any_row(first_row, tmp_path):
    texts = [f"text {i}" for i in range(2000)]
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    write_parquet(paths[0], texts[:1000], row_group_size=400)
    write_parquet(paths[1], texts[1000:], row_group_size=300)
    sources = [open_source(path, "text") for path in paths]
    found = []
    for batch in read_batches(sources, first_row):
        assert len(batch.documents) <= BATCH_ROWS
        # The place of the batch, as it is reported, is where its first text is.
        group_rows = 400 if batch.source is sources[0] else 300
        start = 1000 * sources.index(batch.source) + group_rows * batch.row_group + batch.first_row
        assert batch.documents[0].as_py().decode() == texts[start]
        found += batch.documents.to_pylist()
    assert [text.decode() for text in found] == texts[first_row:]


def test_batches_of_long_texts_have_fewer_rows(tmp_path):
    texts = [f"{i} " + "long " * 20_000 for i in range(100)]
    parquet.write_table(
        pa.table({"text": texts}), tmp_path / "a.parquet", use_dictionary=False, compression="none"
    )
    batches = list(read_batches([open_source(tmp_path / "a.parquet", "text")]))
    assert max(len(batch.documents) for batch in batches) <= BATCH_BYTES // 100_000
    found = [text.decode() for batch in batches for text in batch.documents.to_pylist()]
    assert found == texts


NUMBER_TYPES = [pa.float64(), pa.float32(), pa.float16(), pa.int64(), pa.int8(), pa.uint64()]


@pytest.mark.parametrize("number_type", NUMBER_TYPES, ids=str)
def test_token_counts_may_be_numbers_of_any_type(number_type, tmp_path):
    counts = [np.float16(2), np.float16(3), None] if number_type == pa.float16() else [2, 3, None]
    column = pa.array(counts, number_type)
    write_parquet(tmp_path / "a.parquet", ["a", "b", "c"], token_count=column)
    (batch,) = read_batches([open_source(tmp_path / "a.parquet", "text")])
    assert batch.token_counts.dtype == np.float64
    assert np.array_equal(batch.token_counts, [2, 3, np.nan], equal_nan=True)


def test_token_counts_that_are_not_numbers_are_not_read(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["a", "b"], token_count=["2", "3"])
    source = open_source(tmp_path / "a.parquet", "text")
    assert source.columns == ["text"]
    (batch,) = read_batches([source])
    assert np.isnan(batch.token_counts).all()


def test_a_file_that_is_damaged_in_the_middle_is_refused_when_it_is_read(tmp_path):
    texts = [f"text {i}" for i in range(10_000)]
    raw = bytearray(write_parquet(tmp_path / "a.parquet", texts).read_bytes())
    middle = len(raw) // 2
    raw[middle : middle + 5000] = b"\xa5" * 5000
    (tmp_path / "a.parquet").write_bytes(raw)
    with pytest.raises(UserError, match=r"a.parquet: is damaged \(.*\); download it again\?"):
        read_texts(tmp_path / "a.parquet")
