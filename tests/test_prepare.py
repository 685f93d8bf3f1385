"""prepare_single_parquet.py against a reference of tiktoken and numpy, and what it refuses."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

import prepare_single_parquet as script
from helpers import ROOT, assert_one_sentence, read_files, run_here, write_parquet, write_texts
from onenight.tokenizer import EOT, get_encoding
from reference import TEXTS, count_tokens, read_bins, reference_bins

PREPARE = "prepare_single_parquet.py"
DOCUMENTS = [text for text in TEXTS if text]
BOOK = "".join(f"This is sentence {i} of a book. " for i in range(10_000))


def prepare(*arguments, out_dir):
    """Run the script in this process, without an error. Return its summary."""
    result = run_here(script, *arguments, f"--out_dir={out_dir}")
    assert result.returncode == 0, result.stderr
    return dict(re.findall(r"^(\w+): (.*)$", result.stdout, re.MULTILINE))


def read_meta(out_dir):
    return json.loads((out_dir / "meta.json").read_text())


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "source.parquet"
    return write_parquet(path, TEXTS, token_count=[count_tokens(text) for text in TEXTS])


@pytest.fixture
def prepared(source, tmp_path):
    """A finished folder."""
    prepare(source, out_dir=tmp_path / "prepared")
    return tmp_path / "prepared"


# -----------------------------------------------------------------------------
# What it writes and prints


@pytest.mark.parametrize("num_workers", [1, 4])
def test_bins_and_meta_json_are_those_of_the_reference(num_workers, source, tmp_path):
    summary = prepare(source, f"--num_workers={num_workers}", out_dir=tmp_path)
    bins = reference_bins(TEXTS)
    assert read_bins(tmp_path) == bins
    assert read_files(tmp_path).keys() == {"meta.json", "train.bin", "val.bin"}

    meta = read_meta(tmp_path)
    for split, content in zip(("train", "val"), bins):
        assert meta[split] == {
            "tokens": len(content) // 2,
            "documents": np.count_nonzero(np.frombuffer(content, "<u2") == EOT),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    n_documents = len(DOCUMENTS)
    assert (meta["documents"], meta["empty_documents"]) == (n_documents, len(TEXTS) - n_documents)
    assert (meta["encoding"], meta["vocab_size"]) == ("gpt2", 50257)
    assert meta["largest_id"] == {"train": EOT, "val": EOT}
    assert meta["text_bytes"] == sum(len(text.encode()) for text in DOCUMENTS)
    assert [file["file"] for file in meta["sources"]] == ["source.parquet"]
    assert summary["val_tokens"] == f"{len(bins[1]) // 2:,}"
    assert summary["token_count_column"] == f"equal in all {n_documents:,} documents"


def test_files_of_every_kind_are_read_in_the_given_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    texts = [f"text {i}" for i in range(1000)]
    names = ["z.jsonl", "folder/a.jsonl.gz", "folder/b.parquet", "folder/c.jsonl.zst"]
    for number, name in enumerate(names):
        write_texts(Path(name), texts[number::4])
    Path("folder/d.txt").write_text("one\n\ntwo")
    prepare("z.jsonl", "folder", out_dir="out")
    everything = [text for number in range(4) for text in texts[number::4]]
    assert read_bins(Path("out")) == reference_bins([*everything, "one\n\ntwo"])

    # Without a path it takes every file of data/fineweb/train and writes to data/fineweb.
    Path("data/fineweb").mkdir(parents=True)
    Path("folder").rename("data/fineweb/train")
    assert run_here(script).returncode == 0
    assert read_bins(Path("data/fineweb")) == reference_bins([*everything[250:], "one\n\ntwo"])


def test_unusual_documents_are_encoded_as_tiktoken_does_and_those_not_utf8_are_counted(tmp_path):
    texts = ["first", "<|endoftext|> in <|endoftext|>", "lone \ud83d", "\x00", "caf\ufffd \ufffd"]
    raw = [text.encode("utf-8", "surrogatepass") for text in texts[:-1]]
    write_parquet(tmp_path / "a.parquet", [*raw, b"caf\xe9 \xff"])
    summary = prepare(tmp_path / "a.parquet", "--val_fraction=0.5", out_dir=tmp_path / "out")
    assert summary["documents_not_utf8"] == "1"
    assert read_bins(tmp_path / "out") == reference_bins(texts, val_every=2)


def test_wrong_token_counts_are_counted(tmp_path):
    counts = [count_tokens(text) for text in TEXTS[:900]]
    counts[750] += 1
    counts[7] = None
    path = write_parquet(tmp_path / "a.parquet", TEXTS[:900], token_count=counts)
    prepare(path, out_dir=tmp_path / "out")
    assert read_meta(tmp_path / "out")["token_counts_differing"] == 1
    assert read_bins(tmp_path / "out") == reference_bins(TEXTS[:900])


def test_max_tokens_ends_a_preparation(source, tmp_path):
    prepare(source, "--max_tokens=50000", out_dir=tmp_path)
    ends = np.cumsum([count_tokens(text) + 1 for text in DOCUMENTS])
    last = np.searchsorted(ends, 50000)
    assert read_bins(tmp_path) == reference_bins(DOCUMENTS[: last + 1])


def test_a_single_txt_file_is_cut_in_two(tmp_path):
    (tmp_path / "book.txt").write_text(BOOK)
    prepare(tmp_path / "book.txt", "--val_fraction=0.05", out_dir=tmp_path)
    train, val = (np.frombuffer(content, "<u2") for content in read_bins(tmp_path))
    assert train[-1] == val[-1] == EOT
    assert get_encoding().decode([*val[:-1].tolist(), *train[:-1].tolist()]) == BOOK
    assert len(val) == pytest.approx(0.05 * (len(val) + len(train)), rel=0.1)


def test_the_commands_of_the_documentation_work(tmp_path, monkeypatch):
    section = (ROOT / "docs" / "use_your_model.md").read_text().partition("## Your own text")[2]
    section = section.partition("\n## ")[0]
    commands = re.findall(rf"^python {PREPARE} ([^#\n]*)", section, re.MULTILINE)
    assert len(commands) == 3
    monkeypatch.chdir(tmp_path)
    write_texts(Path("mine.parquet"), TEXTS[:100])
    write_texts(Path("mine.jsonl"), TEXTS[:100])
    Path("books").mkdir()
    Path("books/one.txt").write_text(BOOK)
    for command in commands:
        prepare(*command.split(), "--overwrite", out_dir="data/mine")
        assert read_files(Path("data/mine")).keys() == {"meta.json", "train.bin", "val.bin"}


# -----------------------------------------------------------------------------
# What it finds in the folder


def test_complete_bins_are_left_alone(source, prepared):
    before = {path: path.stat().st_mtime_ns for path in prepared.iterdir()}
    result = run_here(script, source, f"--out_dir={prepared}")
    assert result.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in prepared.iterdir()} == before


def test_other_text_and_settings_are_refused_without_overwrite(source, prepared, tmp_path):
    before = read_files(prepared)
    changed = write_parquet(tmp_path / "source.parquet", [*TEXTS[:-1], "another last text"])
    for arguments in ([source, "--val_fraction=0.01"], [source, changed], [changed]):
        result = run_here(script, *arguments, f"--out_dir={prepared}")
        assert_one_sentence(result, "--overwrite")
    assert read_files(prepared) == before
    prepare(changed, "--overwrite", out_dir=prepared)
    assert read_bins(prepared) == reference_bins([*TEXTS[:-1], "another last text"])


def test_the_output_may_be_beside_the_text_even_after_a_kill(tmp_path):
    (tmp_path / "book.txt").write_text(BOOK)
    (tmp_path / "lock").touch()  # left by a killed preparation
    prepare(tmp_path, out_dir=tmp_path)
    assert len(read_meta(tmp_path)["sources"]) == 1
    assert "book.txt" in read_files(tmp_path)


# -----------------------------------------------------------------------------
# What it refuses


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    for name in ("a.parquet", "a.jsonl.gz", "a.jsonl.zst"):
        whole = write_texts(folder / name, TEXTS).read_bytes()
        (folder / f"cut_{name}").write_bytes(whole[:-1000])
    good = write_texts(folder / "a.jsonl", TEXTS).read_bytes()
    for name, line in (("bad", "{no JSON"), ("no_text", '{"id": "a"}'), ("number", '{"text": 1}')):
        (folder / f"{name}.jsonl").write_bytes(good + line.encode())
    (folder / "one.txt").write_text("only this")
    return folder


@pytest.mark.parametrize(
    "arguments, word",
    [
        *[([name], name) for name in ("cut_a.parquet", "cut_a.jsonl.gz", "cut_a.jsonl.zst")],
        *[([name], f"{len(TEXTS):,}") for name in ("bad.jsonl", "no_text.jsonl", "number.jsonl")],
        (["missing.parquet"], "missing.parquet"),
        (["one.txt"], "too little text"),
        (["a.parquet", "--text_column=content"], "content"),
        (["a.parquet", "--out_dir=a.parquet"], "a.parquet"),
    ],
)
def test_bad_input_is_one_sentence_and_finished_files_stay(
    arguments, word, bad_files, prepared, monkeypatch
):
    monkeypatch.chdir(bad_files)
    before = read_files(prepared)
    result = run_here(script, f"--out_dir={prepared}", "--overwrite", *arguments)
    assert_one_sentence(result, word)
    assert before.items() <= read_files(prepared).items()
