"""prepare_single_parquet.py against a reference of tiktoken and numpy, and what it refuses."""

import ast
import bz2
import csv
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.orc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

import prepare_single_parquet as script
from configurator import UserError
from helpers import ROOT, assert_one_sentence, make_bins, run, run_here, train_here, write_parquet
from onenight.data import tokenizer
from reference import TEXTS, count_tokens, read_bins, reference_bins

PREPARE = "prepare_single_parquet.py"
DOCUMENTS = [text for text in TEXTS if text]


def prepare(*arguments, out_dir):
    """Run the script in this process."""
    return run_here(script, *arguments, f"--out_dir={out_dir}")


def read_summary(result):
    """Return the `key: value` lines of a run's output."""
    return dict(re.findall(r"^(\w+): (.*)$", result.stdout, re.MULTILINE))


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "source.parquet"
    return write_parquet(path, TEXTS, token_count=[count_tokens(text) for text in TEXTS])


@pytest.fixture(scope="session")
def prepared(source, tmp_path_factory):
    """The finished folder, to be copied and not changed, and the run that made it."""
    out_dir = tmp_path_factory.mktemp("prepared") / "new" / "out"
    return out_dir, run(PREPARE, source, f"--out_dir={out_dir}", "--num_workers=2")


# -----------------------------------------------------------------------------
# What it writes and prints


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_bins_and_meta_json_are_those_of_the_reference(num_workers, source, tmp_path):
    result = prepare(source, f"--num_workers={num_workers}", out_dir=tmp_path)
    assert result.returncode == 0, result.stderr
    train_bin, val_bin = reference_bins(TEXTS)
    assert read_bins(tmp_path) == (train_bin, val_bin)
    val_documents = DOCUMENTS[::200]
    assert json.loads((tmp_path / "meta.json").read_text()) == {
        "encoding": "gpt2",
        "vocab_size": 50257,
        "eot": 50256,
        "dtype": "uint16",
        "empty_documents": len(TEXTS) - len(DOCUMENTS),
        "cut_documents": 0,
        "replaced_documents": 0,
        "nul_documents": DOCUMENTS.count("a\x00b\r\n"),
        "likely_encodings": {"text with NULs": DOCUMENTS.count("a\x00b\r\n")},
        "text_bytes": sum(len(text.encode()) for text in DOCUMENTS),
        "token_counts_compared": len(TEXTS),
        "token_counts_differing": 0,
        "train": {
            "tokens": len(train_bin) // 2,
            "documents": len(DOCUMENTS) - len(val_documents),
            "sha256": sha256(train_bin),
        },
        "val": {
            "tokens": len(val_bin) // 2,
            "documents": len(val_documents),
            "sha256": sha256(val_bin),
        },
        "largest_id": {"train": 50256, "val": 50256},
        "settings": {
            "text_column": "text",
            "val_fraction": 0.005,
            "max_documents": 0,
            "max_tokens": 0,
        },
        "sources": [
            {
                "file": "source.parquet",
                "bytes": source.stat().st_size,
                "rows": len(TEXTS),
                "sha256": sha256(source.read_bytes()),
            }
        ],
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_the_summary_is_printed_as_key_value_lines(prepared):
    _, result = prepared
    summary = read_summary(result)
    lengths = sorted(count_tokens(text) for text in DOCUMENTS)
    total = sum(lengths)
    median = lengths[-(-len(lengths) * 5 // 10) - 1]
    p90 = lengths[-(-len(lengths) * 9 // 10) - 1]
    text_bytes = sum(len(text.encode()) for text in DOCUMENTS)
    assert summary["documents"] == f"{len(DOCUMENTS):,}"
    assert summary["empty_documents_skipped"] == f"{len(TEXTS) - len(DOCUMENTS):,}"
    assert summary["tokens"].startswith(f"{total + len(DOCUMENTS):,} ")
    assert summary["token_count_column"] == f"equal in all {len(TEXTS):,} documents"
    assert summary["tokens_per_document"] == f"median {median:,}, p90 {p90:,}, max {lengths[-1]:,}"
    assert summary["bytes_per_token"] == f"{text_bytes / total:.2f}"
    assert float(summary["seconds"]) > 0
    assert int(summary["tokens_per_s"].replace(",", "")) > 0
    if Path("/proc/self/status").exists():
        assert 50 < int(summary["peak_memory_mb"]) < 800
    for config, per_iter, total in (
        ("train_fineweb_4070.py", "524,288", "3.15"),
        ("train_fineweb_4070_fast.py", "524,288", "1.70"),
    ):
        line = f"{config}: {per_iter} tokens per iteration, .* are {total} billion tokens, "
        assert re.search(line, result.stdout)


def test_files_and_folders_are_taken_in_the_given_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    write_parquet("b.parquet", ["b1", "b2"])
    write_parquet("folder/c.parquet", ["c1"])
    write_parquet("folder/a.parquet", ["a1", None, "a2"])
    prepare("b.parquet", "folder", "--val_fraction=0.5", out_dir="out")
    assert read_bins(Path("out")) == reference_bins(["b1", "b2", "a1", "a2", "c1"], val_every=2)

    # Without a path it takes every file of data/fineweb/train and writes to data/fineweb.
    Path("data/fineweb").mkdir(parents=True)
    Path("folder").rename("data/fineweb/train")
    assert run_here(script, "--val_fraction=0.5").returncode == 0
    assert read_bins(Path("data/fineweb")) == reference_bins(["a1", "a2", "c1"], val_every=2)


def test_max_documents_and_max_tokens_end_a_preparation(source, tmp_path):
    prepare(source, "--max_documents=1234", out_dir=tmp_path / "documents")
    assert read_bins(tmp_path / "documents") == reference_bins(DOCUMENTS[:1234])
    prepare(source, "--max_tokens=50000", out_dir=tmp_path / "tokens")
    ends = np.cumsum([count_tokens(text) + 1 for text in DOCUMENTS])
    last = np.searchsorted(ends, 50000)
    assert read_bins(tmp_path / "tokens") == reference_bins(DOCUMENTS[: last + 1])


def test_wrong_token_counts_are_reported_with_row_group_and_row(tmp_path):
    counts = [count_tokens(text) for text in TEXTS[:900]]
    correct = counts[750]
    counts[750] = correct + 1
    counts[7] = None
    path = write_parquet(
        tmp_path / "a.parquet", TEXTS[:900], row_group_size=400, token_count=counts
    )
    result = prepare(path, out_dir=tmp_path / "out")
    line = f"row group 1, row 350: {correct} tokens, but token_count is {correct + 1}\n"
    assert line in result.stdout
    assert read_summary(result)["token_count_column"] == "1 of 899 documents differ"
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert (meta["token_counts_compared"], meta["token_counts_differing"]) == (899, 1)
    assert read_bins(tmp_path / "out") == reference_bins(TEXTS[:900])


def test_only_the_first_ten_wrong_token_counts_are_printed(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["one two"] * 200, token_count=[3] * 200)
    result = prepare(path, out_dir=tmp_path / "out")
    assert result.stdout.count("2 tokens, but token_count is 3\n") == 10
    assert read_summary(result)["token_count_column"] == "200 of 200 documents differ"


@pytest.mark.parametrize(
    "number_type, wrong",
    [
        (pa.float64(), [-1.0, 2.5, 1e300, float("inf"), 3.0]),
        (pa.float32(), [2.5]),
        (pa.float16(), [2.5]),
        (pa.int64(), [-1, 2**62]),
        (pa.uint64(), [2**64 - 1]),
    ],
    ids=str,
)
def test_token_counts_of_any_number_type_are_compared(number_type, wrong, tmp_path):
    missing = [None, float("nan")] if pa.types.is_floating(number_type) else [None]
    correct = [2] * (200 - len(wrong) - len(missing))
    counts = [*wrong, *missing, *correct]
    if number_type == pa.float16():
        counts = [None if count is None else np.float16(count) for count in counts]
    column = pa.array(counts, number_type)
    write_parquet(tmp_path / "a.parquet", ["one two"] * 200, token_count=column)
    result = prepare(tmp_path / "a.parquet", out_dir=tmp_path / "out")
    assert result.returncode == 0, result.stderr
    verdict = f"{len(wrong)} of {200 - len(missing)} documents differ"
    assert read_summary(result)["token_count_column"] == verdict
    assert result.stdout.count(": 2 tokens, but token_count is ") == len(wrong)


def test_a_file_without_token_counts_has_none_to_compare_with(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["one", "two"])
    summary = read_summary(prepare(path, out_dir=tmp_path / "out"))
    assert summary["token_count_column"] == "none to compare with"


def test_a_copy_of_a_file_is_skipped(tmp_path):
    texts = [f"text {i}" for i in range(300)]
    original = write_parquet(tmp_path / "a.parquet", texts)
    shutil.copy(original, tmp_path / "a (1).parquet")
    result = prepare(original, original, tmp_path, out_dir=tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("skipped, because it has the same content as ") == 3
    assert read_bins(tmp_path / "out") == reference_bins(texts)
    assert "is complete already" in prepare(original, out_dir=tmp_path / "out").stdout


def test_a_copy_with_another_compression_is_skipped(tmp_path):
    texts = [f"text {i}" for i in range(300)]
    original = write_parquet(tmp_path / "a.parquet", texts)
    parquet.write_table(pa.table({"text": texts}), tmp_path / "b.parquet", compression="zstd")
    result = prepare(tmp_path, out_dir=tmp_path / "out")
    assert result.stdout.count(f"skipped, because it has the same texts as {original}") == 1
    assert read_bins(tmp_path / "out") == reference_bins(texts)


def test_links_in_a_loop_and_unfinished_files_are_left_out(tmp_path):
    texts = [f"text {i}" for i in range(300)]
    data = tmp_path / "data"
    (data / "_temporary").mkdir(parents=True)
    (data / "loop").symlink_to(data)
    write_parquet(data / "a.parquet", texts)
    (data / "_temporary" / "part.parquet").write_bytes(b"PAR1 unfinished")
    result = prepare(data, out_dir=tmp_path / "out")
    assert "skipped, because" not in result.stdout
    assert read_bins(tmp_path / "out") == reference_bins(texts)


def test_a_few_documents_are_enough(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["", "first", None, "second", "third"])
    assert prepare(path, out_dir=tmp_path / "out").returncode == 0
    assert read_bins(tmp_path / "out") == reference_bins(["first", "second", "third"])


COLUMN_TYPES = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
    pa.dictionary(pa.int32(), pa.string()),
    pa.dictionary(pa.int32(), pa.large_string()),
    pa.dictionary(pa.int32(), pa.binary()),
]
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
    binary_type = BINARY_TYPES.get(value_type, value_type)
    raw = [None if text is None else text.encode("utf-8", "surrogatepass") for text in texts]
    array = pa.array(raw, binary_type).view(value_type)
    return array.dictionary_encode() if pa.types.is_dictionary(column_type) else array


@settings(max_examples=80, deadline=None)
@given(ROW_GROUPS, st.sampled_from(COLUMN_TYPES), st.integers(1, 3), st.integers(0, 4))
def test_any_text_in_any_column_type(row_groups, column_type, num_workers, max_documents):
    documents = [text for group in row_groups for text in group if text]
    expected = documents[: max_documents or None]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.parquet"
        with parquet.ParquetWriter(path, pa.schema({"text": column_type})) as writer:
            for group in row_groups:  # some without rows
                writer.write_table(pa.table({"text": make_column(group, column_type)}))
        arguments = [
            str(path),
            f"--out_dir={folder}",
            "--val_fraction=0.5",
            f"--num_workers={num_workers}",
            f"--max_documents={max_documents}",
        ]
        if len(expected) < 2:
            with pytest.raises(UserError, match="would be empty"):
                script.main(arguments)
        else:
            script.main(arguments)
            assert read_bins(Path(folder)) == reference_bins(expected, val_every=2)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory in /proc")
def test_memory_does_not_grow_with_the_row_group(tmp_path):
    """A row group of 200 MB is read in parts, so the peak is about that of one of 5 MB."""
    text = "English prose, of which this file has very much. " * 200

    def peak_mb(paragraphs):
        path = tmp_path / "a.parquet"
        table = pa.table({"text": [f"{i} {text}" for i in range(paragraphs)]})
        parquet.write_table(table, path, compression="none", use_dictionary=False)
        assert parquet.read_metadata(path).num_row_groups == 1
        limits = ("--max_tokens=300000", "--num_workers=2", "--overwrite")
        result = run(PREPARE, path, f"--out_dir={tmp_path / 'out'}", *limits)
        return int(read_summary(result)["peak_memory_mb"])

    small = peak_mb(500)
    large = peak_mb(20_000)
    assert large < small + 60  # runs of the same file differ by about 10 MB


# -----------------------------------------------------------------------------
# One document, or a very long one


def read_documents(path):
    """Return the documents of a token file as texts."""
    text = tokenizer.get_encoding().decode(np.fromfile(path, "<u2").tolist())
    *documents, rest = text.split(tokenizer.EOT_TEXT)
    assert rest == ""
    return documents


def test_a_file_with_one_document_is_prepared(tmp_path):
    text = "".join(f"This is sentence {i} of a book. " for i in range(10_000))
    path = write_parquet(tmp_path / "a.parquet", [text])
    result = prepare(path, "--val_fraction=0.05", out_dir=tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stdout
    assert read_summary(result)["documents"] == "1 (1 cut in two for val.bin)"
    (train_text,) = read_documents(tmp_path / "out" / "train.bin")
    (val_text,) = read_documents(tmp_path / "out" / "val.bin")
    assert val_text + train_text == text
    assert 0.045 < len(val_text) / len(text) < 0.055
    assert prepare("--verify", out_dir=tmp_path / "out").returncode == 0


def test_a_giant_among_small_documents_does_not_leave_train_bin_empty(tmp_path):
    giant = "".join(f"This is sentence {i} of a book. " for i in range(10_000))
    texts = [giant, *["And this is short."] * 399]
    path = write_parquet(tmp_path / "a.parquet", texts)
    result = prepare(path, out_dir=tmp_path / "out")
    train = read_documents(tmp_path / "out" / "train.bin")
    val = read_documents(tmp_path / "out" / "val.bin")
    assert val[0] + train[0] == giant
    assert [train[1:], val[1:]] == [texts[2:], texts[200:201]]
    assert len(val[0]) == pytest.approx(8192, rel=0.1)
    assert "warning: val.bin has " in result.stdout  # 8,192 bytes are over 1 %
    # The limits count documents of the input, and the end-of-text token that the cut added.
    tokens = np.fromfile(tmp_path / "out" / "val.bin", "<u2").tolist().index(50256) + 1
    tokens += np.fromfile(tmp_path / "out" / "train.bin", "<u2").tolist().index(50256) + 1
    prepare(path, "--max_documents=3", out_dir=tmp_path / "three")
    prepare(path, f"--max_tokens={tokens}", out_dir=tmp_path / "one")
    prepare(path, f"--max_tokens={tokens + 1}", out_dir=tmp_path / "two")
    for name, documents in (("three", 3), ("one", 1), ("two", 2)):
        assert len(read_documents(tmp_path / name / "train.bin")) == documents


def test_the_size_of_repeated_texts_is_seen_as_they_are_read(tmp_path):
    """A dictionary column stores them once, so that the estimate of all text is far too low."""
    texts = pa.array(["some text " * 2000] * 40).dictionary_encode()
    path = write_parquet(tmp_path / "a.parquet", texts)
    result = prepare(path, "--val_fraction=0.1", out_dir=tmp_path / "out")
    assert read_summary(result)["documents"] == "40 (1 cut in two for val.bin)"


@pytest.mark.parametrize("num_workers", [1, 3])
def test_cuts_do_not_depend_on_batches_and_workers(num_workers, tmp_path, monkeypatch):
    texts = [f"{i} " + "some text " * (20_000 if i % 10 == 0 else 100) for i in range(40)]
    path = write_parquet(tmp_path / "a.parquet", texts, row_group_size=7)
    arguments = [path, "--val_fraction=0.1", f"--num_workers={num_workers}"]
    expected = prepare(*arguments, out_dir=tmp_path / "expected")
    assert read_summary(expected)["documents"] == "40 (4 cut in two for val.bin)"
    monkeypatch.setattr("onenight.data.parquet.BATCH_ROWS", 1)
    prepare(*arguments, out_dir=tmp_path / "found")
    assert read_bins(tmp_path / "found") == read_bins(tmp_path / "expected")
    val = read_documents(tmp_path / "found" / "val.bin")
    train = read_documents(tmp_path / "found" / "train.bin")
    assert sum(map(len, val + train)) == sum(map(len, texts))
    assert len(val[0]) == pytest.approx(0.1 * sum(map(len, texts)), rel=0.1)


def test_a_preparation_that_was_interrupted_after_a_cut_continues(tmp_path, monkeypatch):
    texts = [f"{i} " + "some text " * (20_000 if i % 10 == 0 else 100) for i in range(40)]
    rows = [text.encode() for text in texts]
    rows[3] = rows[17] = b"caf\xe9"
    path = write_parquet(tmp_path / "a.parquet", rows, row_group_size=2)
    expected = tmp_path / "expected"
    prepare(path, "--val_fraction=0.1", out_dir=expected)

    count_odd_documents = script.count_odd_documents

    def fail_at_row_30(state, *arguments):
        if state["rows"] >= 30:
            raise UserError("stopped")
        count_odd_documents(state, *arguments)

    arguments = [path, "--val_fraction=0.1", f"--out_dir={tmp_path / 'out'}"]
    with monkeypatch.context() as patch:
        patch.setattr(script, "count_odd_documents", fail_at_row_30)
        assert run_here(script, *arguments, checkpoint_s=0).stderr == "stopped\n"
    assert "continuing at row 28" in run_here(script, *arguments).stdout
    assert read_bins(tmp_path / "out") == read_bins(expected)
    metas = [(folder / "meta.json").read_text() for folder in (expected, tmp_path / "out")]
    assert metas[0] == metas[1]
    assert json.loads(metas[0])["replaced_documents"] == 2


# -----------------------------------------------------------------------------
# Bytes that are not text in UTF-8


GOOD = ["good text, in UTF-8: déjà vu"] * 300
NOT_UTF8 = {
    "Latin-1": ("Où est passée la forêt ?".encode("latin-1"), 7, "they look like: Latin-1 in 7; "),
    "UTF-16": ("English in two bytes".encode("utf-16-le"), 1, "they look like: UTF-16LE in 1; "),
    "gzip": (gzip.compress(b"text " * 50), 1, "they look like: gzip data in 1; convert them"),
    "few": ("Où est passée la forêt ?".encode("latin-1"), 6, None),
}


@pytest.mark.parametrize("document, count, words", NOT_UTF8.values(), ids=NOT_UTF8)
def test_documents_that_are_not_utf8_are_counted_and_named(document, count, words, tmp_path):
    rows = [text.encode() for text in GOOD]
    rows[-count:] = [document] * count
    path = write_parquet(tmp_path / "a.parquet", rows)
    result = prepare(path, out_dir=tmp_path / "out")
    replaced = 0 if b"\0E" in document or document.startswith(b"E\0") else count
    assert read_summary(result)["documents_not_utf8"] == f"{replaced}"
    warnings = [line for line in result.stdout.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == (words is not None)
    assert all(words in line for line in warnings)
    # Documents behind a limit do not count.
    result = prepare(path, f"--max_documents={300 - count}", out_dir=tmp_path / "limited")
    assert read_summary(result)["documents_not_utf8"] == "0"
    assert json.loads((tmp_path / "limited" / "meta.json").read_text())["likely_encodings"] == {}


# -----------------------------------------------------------------------------
# Files that are not parquet


BOOK = "\n".join(f"Line {i} of a book that is long enough." for i in range(2000)) + "\n"
LINES = "".join(json.dumps({"id": str(i), "content": text}) + "\n" for i, text in enumerate(TEXTS))
JSON_TEXTS = [{"text": text} for text in TEXTS]


def arrow_stream(texts):
    """Return the bytes of a file as Hugging Face's datasets writes it."""
    table = pa.table({"text": texts})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def arrow_file(texts, write=pyarrow.feather.write_feather):
    sink = pa.BufferOutputStream()
    write(pa.table({"text": texts}), sink)
    return sink.getvalue().to_pybytes()


def csv_of(texts, delimiter):
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=delimiter)
    writer.writerows([["id", "text"], *enumerate(texts)])
    return stream.getvalue().encode()


PLAIN = [text for text in DOCUMENTS if "\x00" not in text][:500]
FOREIGN = {
    "a.txt": (BOOK.encode(), "is plain text, not parquet", [BOOK]),
    "it's [a] b.txt": (BOOK.encode(), "is plain text, not parquet", [BOOK]),
    "windows.txt": (
        b"\xef\xbb\xbf" + BOOK.replace("\n", "\r\n").encode(),
        "is plain text, not parquet",
        [BOOK],
    ),
    "french.txt": (
        ("Où est passée la forêt ?\n" * 800).encode("latin-1"),
        "is plain text in Latin-1, not parquet",
        ["Où est passée la forêt ?\n" * 800],
    ),
    "utf16.txt": (BOOK.encode("utf-16"), "is plain text in UTF-16, not parquet", [BOOK]),
    "a.txt.gz": (gzip.compress(BOOK.encode()), "plain text, compressed with gzip, not", [BOOK]),
    "a.bz2": (bz2.compress(BOOK.encode()), "plain text, compressed with bz2, not", [BOOK]),
    "a.parquet": (BOOK.encode(), "is plain text, not parquet", [BOOK]),
    "a.jsonl": (LINES.encode(), "is JSON lines, not parquet", TEXTS),
    "a.jsonl.zst": (
        pa.compress(LINES.encode(), "zstd", asbytes=True),
        "is JSON lines, compressed with zstd, not parquet",
        TEXTS,
    ),
    "objects.json": (json.dumps(JSON_TEXTS).encode(), "is a JSON array, not parquet", TEXTS),
    "long.jsonl": (
        (json.dumps({"text": BOOK * 2}) + "\n\n" + json.dumps({"text": BOOK})).encode(),
        "is JSON lines, not parquet",
        [BOOK * 2, BOOK],
    ),
    "object.json": (
        json.dumps({"book": BOOK}, indent=1).encode(),
        "is plain text",
        [json.dumps({"book": BOOK}, indent=1)],
    ),
    "strings.json": (json.dumps(PLAIN, indent=1).encode(), "is a JSON array", PLAIN),
    "a.csv": (csv_of(PLAIN, ","), "is a CSV file, not parquet", PLAIN),
    "long.csv": (csv_of([BOOK * 30, "short"], ","), "is a CSV file", [BOOK * 30, "short"]),
    "semicolons.csv": (
        csv_of(["Où est la forêt ?"] * 500, ";").decode().encode("latin-1"),
        "is a CSV file in Latin-1, not parquet",
        ["Où est la forêt ?"] * 500,
    ),
    "a.dat": (csv_of(PLAIN, ","), "is a CSV file, not parquet", PLAIN),
    "a.tsv.gz": (gzip.compress(csv_of(PLAIN, "\t")), "CSV file, compressed with gzip", PLAIN),
    "a.feather": (arrow_file(TEXTS), "is a Feather file, not parquet", TEXTS),
    "a.arrow": (arrow_stream(TEXTS), "is an Arrow stream, not parquet", TEXTS),
    "a.orc": (arrow_file(TEXTS, pyarrow.orc.write_table), "is an ORC file, not parquet", TEXTS),
}


def run_recipe(result):
    """Run the two lines of Python of an error message. Return the parquet file that they write."""
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    *_, imports, line = result.stderr.splitlines()
    exec(f"{imports}\n{line}", {})
    return Path(ast.literal_eval(line[line.rindex(", ") + 2 : -1]))


def reference_texts(path):
    return [text or None for text in parquet.read_table(path).column(-1).to_pylist()]


@pytest.mark.parametrize("name, case", FOREIGN.items(), ids=FOREIGN)
def test_a_file_that_is_not_parquet_becomes_one_with_two_lines(name, case, tmp_path):
    content, words, texts = case
    (tmp_path / name).write_bytes(content)
    result = prepare(tmp_path / name, out_dir=tmp_path / "out")
    assert f"{tmp_path / name}: " in result.stderr
    assert words in result.stderr
    path = run_recipe(result)
    assert path.parent == tmp_path
    assert (tmp_path / name).read_bytes() == content
    assert reference_texts(path) == [text or None for text in texts]
    assert prepare(path, out_dir=tmp_path / "out").returncode == 0


def test_a_folder_of_save_to_disk_becomes_parquet_with_two_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    split = tmp_path / "mine [1]" / "train"
    split.mkdir(parents=True)
    (split.parent / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (split / "dataset_info.json").write_text("{}")
    (split / "data-00000-of-00002.arrow").write_bytes(arrow_stream(TEXTS[:3000]))
    (split / "data-00001-of-00002.arrow").write_bytes(arrow_stream(TEXTS[3000:]))
    (split / "cache-1234.arrow").write_bytes(arrow_stream(["an older version"]))
    result = prepare("mine [1]", out_dir=tmp_path / "out")
    assert "no .parquet file in this folder; it is a Hugging Face dataset" in result.stderr
    assert prepare(run_recipe(result), out_dir=tmp_path / "out").returncode == 0
    assert read_bins(tmp_path / "out") == reference_bins(TEXTS)


def test_a_folder_of_other_files_is_refused_with_a_recipe_for_the_first(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text(BOOK)
    result = prepare(tmp_path / "mine", out_dir=tmp_path / "out")
    assert f"in this folder; {tmp_path / 'mine' / 'a.txt'} is plain text" in result.stderr
    run_recipe(result)
    assert prepare(tmp_path / "mine", out_dir=tmp_path / "out").returncode == 0


def test_the_recipes_of_the_documentation_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = (ROOT / "docs" / "use_your_model.md").read_text().partition("## Your own text")[2]
    recipes = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    Path("mine.txt").write_text("one\n\ntwo\n\nthree")
    exec(recipes[0], {})
    assert reference_texts("mine.parquet") == ["one", "two", "three"]
    Path("mine.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    exec(recipes[1], {})
    assert reference_texts("mine.parquet") == ["one", "two"]


# -----------------------------------------------------------------------------
# What it finds in the folder


def test_complete_bins_are_left_alone(source, prepared, tmp_path):
    out_dir = shutil.copytree(prepared[0], tmp_path / "out")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out_dir.iterdir()}
    assert "is complete already" in prepare(source, out_dir=out_dir).stdout
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out_dir.iterdir()}
    assert after == before


def test_other_bins_are_only_replaced_with_overwrite(source, prepared, tmp_path):
    out_dir = shutil.copytree(prepared[0], tmp_path / "out")
    before = read_bins(out_dir)
    changed = write_parquet(tmp_path / "source.parquet", [*TEXTS[:-1], "another last text"])
    other = write_parquet(tmp_path / "other.parquet", ["a", "b"])
    for arguments, words in (
        ([source, "--val_fraction=0.01"], "val_fraction 0.005, now 0.01"),
        ([source, other], "other files"),
        ([changed], "the same files before they were changed (source.parquet)"),
    ):
        result = prepare(*arguments, out_dir=out_dir)
        assert_one_sentence(result, words)
        assert "--overwrite" in result.stderr
    assert read_bins(out_dir) == before

    prepare(changed, "--overwrite", out_dir=out_dir)
    assert read_bins(out_dir) == reference_bins([*TEXTS[:-1], "another last text"])

    os.truncate(out_dir / "val.bin", 100)
    result = prepare(changed, out_dir=out_dir)
    assert_one_sentence(result, "bins of other sizes than its meta.json says")
    (out_dir / "meta.json").unlink()
    assert_one_sentence(prepare(changed, out_dir=out_dir), "bins of unknown origin")


def test_verify_accepts_good_bins_and_refuses_changed_ones(prepared, tmp_path):
    out_dir = shutil.copytree(prepared[0], tmp_path / "out")
    train_bin = out_dir / "train.bin"
    good = train_bin.read_bytes()

    def verify():
        return prepare("--verify", out_dir=out_dir)

    assert verify().stdout.count(".bin: good, ") == 2
    ids = np.frombuffer(good, "<u2")
    a_word = np.flatnonzero(ids != 50256)[5000]
    an_end = np.flatnonzero(ids == 50256)[50]
    for index, value, words in (
        (a_word, ids[a_word] ^ 1, "sha256"),
        (a_word, 50257, "largest id 50257 instead of at most 50256"),
        (an_end, 11, "end-of-text tokens"),
    ):
        damaged = ids.copy()
        damaged[index] = value
        train_bin.write_bytes(damaged.tobytes())
        assert_one_sentence(verify(), words)
    train_bin.write_bytes(good[:-1])
    assert_one_sentence(verify(), f"bytes {len(good) - 1} instead of {len(good)}")
    train_bin.unlink()
    assert_one_sentence(verify(), "has no train.bin")
    (out_dir / "meta.json").write_text('{"train": ')
    assert_one_sentence(verify(), "meta.json: cannot be read")


@pytest.mark.parametrize("meta", [{}, {"train": {}}, {"train": {"tokens": 20_000}, "val": {}}])
def test_verify_needs_a_meta_json_that_describes_the_bins(meta, tmp_path):
    make_bins(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps({"vocab_size": 250, **meta}))
    words = "has no train.bin with a meta.json to check"
    assert_one_sentence(prepare("--verify", out_dir=tmp_path), words)


def test_a_bad_meta_json_is_refused_by_every_command(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["a", "b", "c"])
    data = make_bins(tmp_path)
    (data / "meta.json").write_text('{"vocab_size": 250, "train": {"tokens": null}}')
    before = sorted(os.listdir(tmp_path))
    words = (
        'meta.json: cannot be read (train cannot be {"tokens": null}); '
        "correct it, or delete it and prepare again"
    )
    assert_one_sentence(train_here(data, tmp_path / "out"), words)
    for arguments in ([path], [path, "--overwrite"], ["--verify"]):
        assert_one_sentence(prepare(*arguments, out_dir=data), words)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("dtype", ["uint32", "int64"])
def test_bins_of_wider_integers_are_refused_before_training(dtype, tmp_path):
    for split in ("train", "val"):
        np.arange(1, 1001).astype(dtype).tofile(tmp_path / f"{split}.bin")
    result = train_here(tmp_path, tmp_path / "out")
    words = f"train.bin: contains {dtype} ids, not uint16; convert it with: np.fromfile("
    assert_one_sentence(result, words)
    assert not (tmp_path / "out").exists()


def test_bins_of_another_vocabulary_are_refused_before_training(tmp_path):
    for split in ("train", "val"):
        (np.arange(1000, dtype="<u2") % 65).tofile(tmp_path / f"{split}.bin")
    (tmp_path / "meta.pkl").touch()
    words = "train.bin: contains ids of another vocabulary (see meta.pkl), not of GPT-2; create it"
    assert_one_sentence(train_here(tmp_path, tmp_path / "out"), words)
    assert not (tmp_path / "out").exists()


# -----------------------------------------------------------------------------
# What it refuses


@pytest.fixture(scope="module")
def bad_files(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "truncated.parquet").write_bytes(source.read_bytes()[:-1000])
    (folder / "web_page.parquet").write_text("\n<!DOCTYPE html>\n<html><body>404")
    (folder / "pointer.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha")
    (folder / "archive.zip").write_bytes(b"PK\x03\x04" + bytes(100))
    for mode, name in (("w", "archive.tar"), ("w:gz", "archive.tar.gz")):
        with tarfile.open(folder / name, mode) as archive:
            archive.add(folder / "pointer.parquet")
    (folder / "russian.txt").write_bytes("Съешь же ещё этих мягких булок".encode("cp1251"))
    (folder / "unfinished" / "_temporary").mkdir(parents=True)
    (folder / "unfinished" / "_temporary" / "a.parquet").touch()
    (folder / "zero.parquet").touch()
    (folder / "empty_folder").mkdir()
    (folder / "broken_link").mkdir()
    (folder / "broken_link" / "here.parquet").symlink_to("gone.parquet")
    write_parquet(folder / "one.parquet", ["only this", None])
    write_parquet(folder / "none.parquet", pa.array([], pa.string()))
    parquet.write_table(pa.table({"content": ["a"], "id": ["b"]}), folder / "content.parquet")
    parquet.write_table(pa.table({"text": [1, 2]}), folder / "numbers.parquet")
    garbage = bytearray(source.read_bytes())
    middle = len(garbage) // 2
    garbage[middle : middle + 5000] = b"\xa5" * 5000
    (folder / "garbage.parquet").write_bytes(garbage)
    return folder


BAD_ARGUMENTS = [
    (["trunkated.parquet"], "; did you mean truncated.parquet?"),
    (["empty_folder"], "no .parquet file in this folder"),
    (["broken_link"], "here.parquet: cannot be read (No such file"),
    (["https://example.com/a.parquet"], "is not a local file; download it first: curl"),
    ([], "data/fineweb/train: no such file or folder in "),
    (["truncated.parquet"], "is not a complete parquet file"),
    (["web_page.parquet"], "is a web page, not the file; download it again"),
    (["pointer.parquet"], "is a Git LFS pointer, not the file; get it with: git lfs pull"),
    (["archive.zip"], "is zip data; unpack it first"),
    (["archive.tar"], "is a tar archive; unpack it first"),
    (["archive.tar.gz"], "is gzip data; unpack it first"),
    (["russian.txt"], "is text in an unknown encoding; convert it to UTF-8 first"),
    (["unfinished"], "no .parquet file in this folder"),
    (["zero.parquet"], "is not a complete parquet file"),
    (["content.parquet"], "needs one column 'text', but has content, id; choose another with"),
    (["numbers.parquet"], "column 'text' holds int64, not text"),
    (["garbage.parquet"], "is damaged"),
    (["numbers.parquet", "--val_fraction=1"], "must be more than 0 and less than 1, not 1.0"),
    (["numbers.parquet", "--val_fractoin=0.1"], "did you mean val_fraction?"),
    (["content.parquet", "--text_column=id", "--out_dir=zero.parquet"], "out_dir takes a folder"),
    (["--verify", "--out_dir=empty_folder"], "has no train.bin"),
    (["one.parquet"], "contain 1 documents with text; add some, or a single one of more than"),
    (["none.parquet"], "train.bin and val.bin would be empty: the 0 rows contain 0 documents"),
]


@pytest.mark.parametrize("arguments, words", BAD_ARGUMENTS)
def test_bad_input_is_refused_with_one_sentence(arguments, words, bad_files, tmp_path, monkeypatch):
    monkeypatch.chdir(bad_files)
    out_dir = tmp_path / "out"
    if not any(argument.startswith("--out_dir=") for argument in arguments):
        arguments = [*arguments, f"--out_dir={out_dir}"]
    assert_one_sentence(run_here(script, *arguments), words)
    # The only input that reaches the folder and leaves something is the one with a damaged middle.
    if out_dir.exists() and "garbage.parquet" not in arguments:
        assert list(out_dir.iterdir()) == []
    assert not (out_dir / "train.bin").exists()


@pytest.fixture
def fresh_ranks():
    """No rank file has been read, before the test or after it."""
    tokenizer.read_ranks.cache_clear()
    yield
    tokenizer.read_ranks.cache_clear()


def test_a_damaged_rank_file_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, fresh_ranks
):
    monkeypatch.setattr(tokenizer, "RANKS_FILE", tmp_path / "gpt2.tiktoken")
    (tmp_path / "gpt2.tiktoken").write_text("IQ== 0\n")
    path = write_parquet(tmp_path / "a.parquet", ["one", "two"])
    result = prepare(path, out_dir=tmp_path / "out")
    assert_one_sentence(result, "missing or damaged; restore it with: git checkout")
    assert not (tmp_path / "out").exists()


def without_privileges(*command):
    """Return the command as a user without root's rights runs it."""
    if os.name != "posix":
        pytest.skip("permission bits do not bind anybody here")
    if os.getuid() != 0:
        return command
    if not shutil.which("setpriv"):
        pytest.skip("permission bits do not bind root, and there is no setpriv (util-linux)")
    capabilities = "-dac_override,-dac_read_search"
    return ("setpriv", f"--inh-caps={capabilities}", f"--bounding-set={capabilities}", *command)


def test_missing_permissions_are_one_sentence(tmp_path):
    unreadable = write_parquet(tmp_path / "unreadable.parquet", ["a", "b"])
    readable = write_parquet(tmp_path / "readable.parquet", ["a", "b"])
    read_only = tmp_path / "read_only"
    read_only.mkdir()
    unreadable.chmod(0)
    read_only.chmod(0o500)
    for path, out_dir, words in (
        (unreadable, tmp_path, "unreadable.parquet: cannot be read (Permission denied)"),
        (readable, read_only, "read_only: cannot be written to (Permission denied)"),
        (readable, read_only / "new", "new: cannot be written to (Permission denied)"),
    ):
        command = without_privileges(sys.executable, ROOT / PREPARE, path, f"--out_dir={out_dir}")
        assert_one_sentence(subprocess.run(command, capture_output=True, text=True), words)
    read_only.chmod(0o700)
