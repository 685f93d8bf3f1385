"""prepare_single_parquet.py against a reference of tiktoken and numpy, and what it refuses."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
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
        ("train_fineweb_4070_fast.py", "262,144", "1.70"),
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
    (folder / "text.parquet").write_text("this is not a parquet file\n" * 10)
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
    (["text.parquet"], "is not a complete parquet file"),
    (["zero.parquet"], "is not a complete parquet file"),
    (["content.parquet"], "needs one column 'text', but has content, id; choose another with"),
    (["numbers.parquet"], "column 'text' holds int64, not text"),
    (["garbage.parquet"], "is damaged"),
    (["numbers.parquet", "--val_fraction=1"], "must be more than 0 and less than 1, not 1.0"),
    (["numbers.parquet", "--val_fractoin=0.1"], "did you mean val_fraction?"),
    (["content.parquet", "--text_column=id", "--out_dir=zero.parquet"], "cannot be written to"),
    (["--verify", "--out_dir=empty_folder"], "has no train.bin"),
    (["one.parquet"], "train.bin would be empty: the 2 rows contain 1 documents with text; "),
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
