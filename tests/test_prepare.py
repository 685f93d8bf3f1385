"""prepare_single_parquet.py against a reference of tiktoken and numpy; and what it refuses."""

import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

from onenight import make_demo

import numpy as np
import pyarrow as pa
import pytest
import tiktoken
from conftest import ROOT, assert_one_sentence, run, write_parquet
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tiktoken.load import load_tiktoken_bpe
from tiktoken_ext import openai_public

import prepare_single_parquet

PREPARE = "prepare_single_parquet.py"
os.environ["TIKTOKEN_CACHE_DIR"] = ""  # the reference reads the rank file itself, without a copy in the system's cache
GPT2 = tiktoken.Encoding(
    "reference",
    pat_str=openai_public.r50k_pat_str,
    mergeable_ranks=load_tiktoken_bpe(str(ROOT / "data" / "gpt2.tiktoken")),
    special_tokens={"<|endoftext|>": 50256},
)


ENGLISH = [paragraph for topic in topics.values() for paragraph in topic.split("\n\n")]
ODD = [None, "", " ", "Grüße aus Köln", "日本語のテキスト 😀", "<|endoftext|>", "a\x00b\r\n", *ENGLISH[:50]]
TEXTS = (ENGLISH + ODD * 50)[:5000]  # 5,000 documents, 150,000 tokens


def reference_bins(texts, val_every=200):
    """What train.bin and val.bin must hold, bytes."""
    documents = [text for text in texts if text]
    ids = [np.array([*GPT2.encode_ordinary(text), 50256], dtype="<u2") for text in documents]
    train = [document for number, document in enumerate(ids) if number % val_every != 0]
    val = [document for number, document in enumerate(ids) if number % val_every == 0]
    return np.concatenate(train).tobytes(), np.concatenate(val).tobytes()


def read_bins(out_dir):
    return (out_dir / "train.bin").read_bytes(), (out_dir / "val.bin").read_bytes()


def summary(result):
    """The `key: value` lines of a run's output."""
    return dict(re.findall(r"^(\w+): (.*)$", result.stdout, re.MULTILINE))


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    counts = [len(GPT2.encode_ordinary(text)) if text else 0 for text in TEXTS]
    return write_parquet(tmp_path_factory.mktemp("source") / "source.parquet", TEXTS, token_count=counts)


@pytest.fixture(scope="session")
def prepared(source, tmp_path_factory):
    """The finished folder (to be copied, not changed) and the run that made it."""
    out_dir = tmp_path_factory.mktemp("prepared") / "new" / "out"
    return out_dir, run(PREPARE, source, f"--out_dir={out_dir}", "--num_workers=2")


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_bins_and_meta_are_those_of_the_reference(num_workers, source, tmp_path):
    result = run(PREPARE, source, f"--out_dir={tmp_path}", f"--num_workers={num_workers}")
    assert result.returncode == 0, result.stderr
    train, val = reference_bins(TEXTS)
    assert read_bins(tmp_path) == (train, val)
    documents = [text for text in TEXTS if text]
    assert json.loads((tmp_path / "meta.json").read_text()) == {
        "encoding": "gpt2",
        "vocab_size": 50257,
        "eot": 50256,
        "dtype": "uint16",
        "empty_documents": len(TEXTS) - len(documents),
        "text_bytes": sum(len(text.encode()) for text in documents),
        "token_counts_compared": len(TEXTS),
        "token_counts_differing": 0,
        "train": {
            "tokens": len(train) // 2,
            "documents": len(documents) - len(documents[::200]),
            "sha256": hashlib.sha256(train).hexdigest(),
        },
        "val": {"tokens": len(val) // 2, "documents": len(documents[::200]), "sha256": hashlib.sha256(val).hexdigest()},
        "settings": {"text_column": "text", "val_fraction": 0.005, "max_documents": 0, "max_tokens": 0},
        "sources": [
            {
                "file": "source.parquet",
                "bytes": source.stat().st_size,
                "rows": len(TEXTS),
                "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
            }
        ],
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_summary_in_key_value_lines(prepared):
    found = summary(prepared[1])
    documents = [text for text in TEXTS if text]
    lengths = sorted(len(GPT2.encode_ordinary(text)) for text in documents)
    total = sum(lengths)
    at = [lengths[-(-len(lengths) * tenths // 10) - 1] for tenths in (5, 9)]
    assert found["documents"] == f"{len(documents):,}"
    assert found["empty_documents_skipped"] == f"{len(TEXTS) - len(documents):,}"
    assert found["tokens"].startswith(f"{total + len(documents):,} ")
    assert found["token_count_column"] == f"equal in all {len(TEXTS):,} documents"
    assert found["tokens_per_document"] == f"median {at[0]:,}, p90 {at[1]:,}, max {lengths[-1]:,}"
    assert found["bytes_per_token"] == f"{sum(len(text.encode()) for text in documents) / total:.2f}"
    assert float(found["seconds"]) > 0
    assert int(found["tokens_per_s"].replace(",", "")) > 0
    assert 50 < int(found["peak_memory_mb"]) < 800
    # 6,000 iterations of 16 * 32 * 1024 tokens, whatever this machine is
    assert re.search(r"train_fineweb_4070.py: 524,288 tokens per iteration.* 3.15 billion", prepared[1].stdout)
    assert re.search(r"train_fineweb_4070_fast.py: 262,144 tokens per iteration.* 1.70 billion", prepared[1].stdout)


def test_files_and_folders_in_the_given_order(tmp_path):
    (tmp_path / "folder").mkdir()
    for name, texts in {"b": ["b1", "b2"], "folder/c": ["c1"], "folder/a": ["a1", None, "a2"]}.items():
        write_parquet(tmp_path / f"{name}.parquet", texts)
    run(PREPARE, "b.parquet", "folder", "--out_dir=out", "--val_fraction=0.5", cwd=tmp_path)
    assert read_bins(tmp_path / "out") == reference_bins(["b1", "b2", "a1", "a2", "c1"], val_every=2)
    # Without a path it takes every parquet file of data/fineweb/train, and writes into data/fineweb.
    (tmp_path / "data" / "fineweb").mkdir(parents=True)
    (tmp_path / "folder").rename(tmp_path / "data" / "fineweb" / "train")
    run(PREPARE, "--val_fraction=0.5", cwd=tmp_path)
    assert read_bins(tmp_path / "data" / "fineweb") == reference_bins(["a1", "a2", "c1"], val_every=2)


def test_max_documents_and_max_tokens(source, tmp_path):
    documents = [text for text in TEXTS if text]
    run(PREPARE, source, f"--out_dir={tmp_path / 'd'}", "--max_documents=1234")
    assert read_bins(tmp_path / "d") == reference_bins(documents[:1234])
    run(PREPARE, source, f"--out_dir={tmp_path / 't'}", "--max_tokens=50000")
    ends = np.cumsum([len(GPT2.encode_ordinary(text)) + 1 for text in documents])
    assert read_bins(tmp_path / "t") == reference_bins(documents[: np.searchsorted(ends, 50000) + 1])


def test_wrong_token_counts_are_reported_with_row_group_and_row(tmp_path):
    counts = [len(GPT2.encode_ordinary(text)) if text else 0 for text in TEXTS[:900]]
    right = counts[750]
    counts[750], counts[7] = right + 1, None
    source = write_parquet(tmp_path / "a.parquet", TEXTS[:900], row_group_size=400, token_count=counts)
    result = run(PREPARE, source, f"--out_dir={tmp_path / 'out'}")
    assert f"row group 1, row 350: {right} tokens, but token_count is {right + 1}" in result.stdout
    assert summary(result)["token_count_column"] == "1 of 899 documents differ"
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert (meta["token_counts_compared"], meta["token_counts_differing"]) == (899, 1)
    assert read_bins(tmp_path / "out") == reference_bins(TEXTS[:900])


def test_small_files(tmp_path):
    write_parquet(tmp_path / "three.parquet", ["", "first", None, "second", "third"])
    assert run(PREPARE, "three.parquet", "--out_dir=out", cwd=tmp_path).returncode == 0
    assert read_bins(tmp_path / "out") == reference_bins(["first", "second", "third"])
    write_parquet(tmp_path / "one.parquet", ["only this", None])
    write_parquet(tmp_path / "none.parquet", pa.array([], pa.string()))
    for name, words in {"one": "nothing for train.bin", "none": "nothing for train.bin and val.bin"}.items():
        assert_one_sentence(run(PREPARE, f"{name}.parquet", f"--out_dir={name}", cwd=tmp_path), words)
        assert list((tmp_path / name).iterdir()) == []


def test_the_demo_file_is_like_fineweb(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(make_demo, "MAX_TOKENS", 20_000)
    odd = [
        ("lone", "a\ud800b"),
        ("special", "<|endoftext|>"),
        *itertools.islice(make_demo.read_documents(), 79),
    ]
    monkeypatch.setattr(make_demo, "read_documents", lambda: odd)
    make_demo.main()
    table = parquet.read_table("data/demo/train/docs.parquet")
    fineweb = "text id dump url date file_path language language_score token_count"
    assert table.column_names == fineweb.split()
    assert table["token_count"].to_pylist() == [len(GPT2.encode_ordinary(text)) for text in table["text"].to_pylist()]
    assert 20_000 <= sum(table["token_count"].to_pylist()) < 40_000


KINDS = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()]
KINDS += [pa.dictionary(pa.int32(), kind) for kind in (pa.string(), pa.large_string(), pa.binary())]
ODD_TEXT = st.text(st.characters(), max_size=30) | st.text(st.characters(categories=["Cs", "Lu", "Zs"]), max_size=5)


def column_of(texts, kind):
    """An Arrow array; string columns may hold the bytes of lone surrogates too, as some real files do."""
    values = getattr(kind, "value_type", kind)
    raw = [None if text is None else text.encode("utf-8", "surrogatepass") for text in texts]
    binary = {pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view(), pa.string(): pa.binary()}
    array = pa.array(raw, binary.get(values, values)).view(values)
    return array.dictionary_encode() if pa.types.is_dictionary(kind) else array


@settings(max_examples=80, deadline=None)
@given(st.data(), st.sampled_from(KINDS), st.lists(st.lists(st.none() | ODD_TEXT, max_size=8), max_size=4))
def test_any_text_in_any_column_type(data, kind, groups):
    texts = [text for group in groups for text in group]
    workers, stop = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 4))
    expected = [text for text in texts if text][: stop or None]
    with tempfile.TemporaryDirectory() as folder:
        with parquet.ParquetWriter(f"{folder}/a.parquet", pa.schema({"text": kind})) as writer:
            for group in groups:  # row groups without rows among them
                writer.write_table(pa.table({"text": column_of(group, kind)}))
        arguments = [f"{folder}/a.parquet", f"--out_dir={folder}", "--val_fraction=0.5", f"--num_workers={workers}"]
        arguments.append(f"--max_documents={stop}")
        if len(expected) < 2:
            with pytest.raises(SystemExit, match="nothing for"):
                prepare_single_parquet.main(arguments)
        else:
            prepare_single_parquet.main(arguments)
            assert read_bins(Path(folder)) == reference_bins(expected, val_every=2)


def test_memory_does_not_grow_with_the_row_group(tmp_path):
    def peak_mb(paragraphs):
        text = "English prose, of which this file has very much. " * 200
        texts = pa.array([f"{i} {text}" for i in range(paragraphs)])
        parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", compression="none", use_dictionary=False)
        assert parquet.read_metadata(tmp_path / "a.parquet").num_row_groups == 1
        arguments = ("--max_tokens=300000", "--num_workers=2", "--overwrite")
        return int(
            summary(run(PREPARE, tmp_path / "a.parquet", f"--out_dir={tmp_path / 'out'}", *arguments))["peak_memory_mb"]
        )

    small, large = peak_mb(500), peak_mb(20_000)  # 5 and 200 MB of text
    assert large < small + 60  # runs of the same kind differ by about 10 MB; a row group in memory would add 200


def test_complete_bins_are_left_alone_and_other_ones_are_not_lost(source, prepared, tmp_path):
    out_dir = shutil.copytree(prepared[0], tmp_path / "out")
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out_dir.iterdir()}
    assert "complete already" in run(PREPARE, source, f"--out_dir={out_dir}").stdout
    changed = write_parquet(tmp_path / "source.parquet", [*TEXTS[:-1], "another last text"])
    other = write_parquet(tmp_path / "other.parquet", ["a", "b"])
    for arguments, words in {
        (source, "--val_fraction=0.01"): "val_fraction 0.005, now 0.01",
        (source, other): "other files",
        (changed,): "the same files before they were changed (source.parquet)",
    }.items():
        result = run(PREPARE, *arguments, f"--out_dir={out_dir}")
        assert_one_sentence(result, words)
        assert "--overwrite" in result.stderr
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out_dir.iterdir()} == before
    run(PREPARE, changed, f"--out_dir={out_dir}", "--overwrite")
    assert read_bins(out_dir) == reference_bins([*TEXTS[:-1], "another last text"])
    os.truncate(out_dir / "val.bin", 100)
    assert_one_sentence(run(PREPARE, changed, f"--out_dir={out_dir}"), "bins of other sizes than its meta.json says")
    (out_dir / "meta.json").unlink()
    assert_one_sentence(run(PREPARE, changed, f"--out_dir={out_dir}"), "bins of unknown origin")


def test_verify(prepared, tmp_path):
    out_dir = shutil.copytree(prepared[0], tmp_path / "out")
    train, _ = read_bins(out_dir)

    def verify():
        return run(PREPARE, "--verify", f"--out_dir={out_dir}")

    assert verify().stdout.count("good") == 2
    ids = np.frombuffer(train, "<u2").copy()
    a_word, an_end = np.flatnonzero(ids != 50256)[5000], np.flatnonzero(ids == 50256)[50]
    for place, value, words in (
        (a_word, ids[a_word] ^ 1, "sha256"),
        (a_word, 50257, "largest id 50257 instead of 50256"),
        (an_end, 11, "end-of-text tokens"),
    ):
        damaged = ids.copy()
        damaged[place] = value
        (out_dir / "train.bin").write_bytes(damaged.tobytes())
        assert_one_sentence(verify(), words)
    (out_dir / "train.bin").write_bytes(train[:-1])
    assert_one_sentence(verify(), f"bytes {len(train) - 1} instead of {len(train)}")
    (out_dir / "train.bin").unlink()
    assert_one_sentence(verify(), "has no train.bin")
    (out_dir / "meta.json").write_text('{"train": ')
    assert_one_sentence(verify(), "meta.json: cannot be read")


@pytest.fixture(scope="module")
def bad_files(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "truncated.parquet").write_bytes(source.read_bytes()[:-1000])
    (folder / "text.parquet").write_text("this is no parquet file\n" * 10)
    (folder / "zero.parquet").touch()
    (folder / "empty_folder").mkdir()
    parquet.write_table(pa.table({"content": ["a"], "id": ["b"]}), folder / "content.parquet")
    parquet.write_table(pa.table({"text": [1, 2]}), folder / "numbers.parquet")
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    parquet.write_table(twice, folder / "twice.parquet")
    garbage = bytearray(source.read_bytes())
    middle = len(garbage) // 2
    garbage[middle : middle + 5000] = b"\xa5" * 5000
    (folder / "garbage.parquet").write_bytes(garbage)
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trunkated.parquet"], "; did you mean truncated.parquet?"),
        (["empty_folder"], "no .parquet file in this folder"),
        ([], "data/fineweb/train: no such file or folder"),
        (["truncated.parquet"], "not a whole parquet file"),
        (["text.parquet"], "not a whole parquet file"),
        (["zero.parquet"], "not a whole parquet file"),
        (["content.parquet"], "needs one column 'text', but has content, id; name another with --text_column="),
        (["twice.parquet"], "needs one column 'text', but has text, text"),
        (["numbers.parquet"], "column 'text' holds int64, not text"),
        (["garbage.parquet"], "is damaged"),
        (["numbers.parquet", "--val_fraction=1"], "val_fraction must be more than 0 and less than 1, not 1.0"),
        (["numbers.parquet", "--val_fractoin=0.1"], "did you mean val_fraction?"),
        (["content.parquet", "--text_column=id", "--out_dir=zero.parquet"], "zero.parquet: cannot be written to"),
        (["--verify", "--out_dir=empty_folder"], "has no train.bin"),
    ],
)
def test_bad_input_gets_one_sentence(arguments, words, bad_files, tmp_path):
    if not any("out_dir" in argument for argument in arguments):
        arguments = [*arguments, f"--out_dir={tmp_path / 'out'}"]
    result = run(PREPARE, *arguments, cwd=bad_files)
    assert_one_sentence(result, words)
    assert not (tmp_path / "out" / "train.bin").exists()


def without_privileges(*command):
    """The command as run by a user without root's rights."""
    if os.name != "posix":
        pytest.skip("permission bits bind nobody here")
    if os.getuid() != 0:
        return command
    if not shutil.which("setpriv"):
        pytest.skip("root without setpriv (util-linux): permission bits bind nobody here")
    capabilities = "-dac_override,-dac_read_search"
    return ("setpriv", f"--inh-caps={capabilities}", f"--bounding-set={capabilities}", *command)


def test_missing_permissions_are_one_sentence(tmp_path):
    closed, locked = write_parquet(tmp_path / "closed.parquet", ["a", "b"]), tmp_path / "locked"
    locked.mkdir()
    opened = write_parquet(tmp_path / "open.parquet", ["a", "b"])
    closed.chmod(0)
    locked.chmod(0o500)
    for source, out_dir, words in (
        (closed, tmp_path, "closed.parquet: cannot be read (Permission denied)"),
        (opened, locked, "locked: cannot be written to (Permission denied)"),
        (opened, locked / "new", "new: cannot be written to (Permission denied)"),
    ):
        command = without_privileges(sys.executable, ROOT / PREPARE, source, f"--out_dir={out_dir}")
        assert_one_sentence(subprocess.run(command, capture_output=True, text=True), words)
    locked.chmod(0o700)
