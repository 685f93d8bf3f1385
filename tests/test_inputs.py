"""Input as people have it: folders, links, copies, encrypted files, odd counts; bins and meta.json of others."""

import base64
import json
import os
import re
import shutil

from onenight.bins import read_meta
from onenight.dataset import open_bin
from onenight.parquet import find_parquets

import numpy as np
import pyarrow as pa
import pytest
from conftest import assert_one_sentence, make_bins, run, train, write_parquet
from pyarrow import parquet
from pyarrow.parquet import encryption
from test_prepare import PREPARE, read_bins, reference_bins

# ---- parquet files


def names_found(folder, *names):
    return [str(path.relative_to(folder)) for path in find_parquets([str(folder / name) for name in names], folder)]


def test_folders_as_downloads_leave_them(tmp_path):
    for name in ("b/c.parquet", "b/._c.parquet", ".cache/d.parquet", "a.PARQUET", "z.parquet", "x.parquet/part.parquet",
                 "b/README.md", "q[1].parquet"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    everything = ["a.PARQUET", "b/c.parquet", "q[1].parquet", "x.parquet/part.parquet", "z.parquet"]
    assert names_found(tmp_path, "") == names_found(tmp_path, "./") == everything
    assert names_found(tmp_path, "z.parquet", "b") == ["z.parquet", "b/c.parquet"]
    assert names_found(tmp_path, "*.parquet") == ["q[1].parquet", "x.parquet/part.parquet", "z.parquet"]  # unexpanded
    assert names_found(tmp_path, "q[1].parquet", "[z]*") == ["q[1].parquet", "z.parquet"]
    hidden = tmp_path / ".hidden"  # which is named
    shutil.copytree(tmp_path / "b", hidden)
    assert names_found(tmp_path, ".hidden") == [".hidden/c.parquet"]


def test_names_that_are_no_files(tmp_path):
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "here.parquet"
    link.symlink_to("gone.parquet")
    address = "https://huggingface.co/datasets/HuggingFaceFW/fineweb/resolve/main/data/x/000_00000.parquet"
    for name, words in {
        "hf://datasets/HuggingFaceFW/fineweb/data/x/000_00000.parquet": f"train/000_00000.parquet {address}$",
        f"{address}?download=true": rf"train/000_00000.parquet {address}\?download=true$",
        link: "here.parquet: no such file or folder$",
        tmp_path / "*.parquet": r"/\*.parquet: no such file or folder$",
        tmp_path / ("x" * 300): r"cannot be read \(File name too long\)$",
    }.items():
        with pytest.raises(SystemExit, match=words):
            find_parquets([str(name)], tmp_path / "train")
    for name, words in {"links": "here.parquet: cannot be read (No such file", address: "no file; download it"}.items():
        assert_one_sentence(run(PREPARE, name, "--out_dir=out", cwd=tmp_path), words)
    assert os.listdir(tmp_path) == ["links"]


def test_the_same_content_is_taken_once(tmp_path):
    texts = [f"text {i}" for i in range(300)]
    source = write_parquet(tmp_path / "a.parquet", texts)
    shutil.copy(source, tmp_path / "a (1).parquet")
    result = run(PREPARE, source, source, tmp_path, f"--out_dir={tmp_path / 'out'}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("skipped, because it has the same content as ") == 3
    assert read_bins(tmp_path / "out") == reference_bins(texts)
    assert "is complete already" in run(PREPARE, source, f"--out_dir={tmp_path / 'out'}").stdout


class KeyService(encryption.KmsClient):
    """Keeps keys in the open: for a test."""

    def __init__(self, _config):
        encryption.KmsClient.__init__(self)

    def wrap_key(self, key, _name):
        return base64.b64encode(key)

    def unwrap_key(self, wrapped, _name):
        return base64.b64decode(wrapped)


def write_encrypted(path, column, plaintext_footer=True):
    settings = {"footer_key": "f", "column_keys": {"k": [column]}, "plaintext_footer": plaintext_footer}
    properties = encryption.CryptoFactory(KeyService).file_encryption_properties(
        encryption.KmsConnectionConfig(), encryption.EncryptionConfiguration(**settings)
    )
    texts = [f"text {i}" for i in range(300)]
    table = pa.table({"secret": texts, "text": texts})
    with parquet.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    return texts


def test_encrypted_files(tmp_path):
    texts = write_encrypted(tmp_path / "other.parquet", "secret")
    result = run(PREPARE, tmp_path / "other.parquet", f"--out_dir={tmp_path / 'out'}")
    assert result.returncode == 0, result.stderr
    assert read_bins(tmp_path / "out") == reference_bins(texts)
    write_encrypted(tmp_path / "text.parquet", "text")
    write_encrypted(tmp_path / "footer.parquet", "secret", plaintext_footer=False)
    for name in ("text.parquet", "footer.parquet"):
        assert_one_sentence(run(PREPARE, tmp_path / name, f"--out_dir={tmp_path / 'new'}"), f"{name}: encrypted (")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (pa.float64(), [-1.0, 2.5, 1e300, float("inf"), 3.0]),
        (pa.float32(), [2.5]),
        (pa.float16(), [2.5]),
        (pa.int64(), [-1, 2**62]),
        (pa.uint64(), [2**64 - 1]),
    ],
)
def test_token_counts_of_any_number_are_compared(kind, wrong, tmp_path):
    texts = ["one two"] * 200
    missing = [None, float("nan")] if pa.types.is_floating(kind) else [None]
    counts = [*wrong, *missing, *[2] * (200 - len(wrong) - len(missing))]
    if kind == pa.float16():
        counts = [None if count is None else np.float16(count) for count in counts]
    write_parquet(tmp_path / "a.parquet", texts, token_count=pa.array(counts, kind))
    result = run(PREPARE, tmp_path / "a.parquet", f"--out_dir={tmp_path / 'out'}")
    assert result.returncode == 0, result.stderr
    assert f"\ntoken_count_column: {len(wrong)} of {200 - len(missing)} documents differ\n" in result.stdout
    assert len(re.findall(r": 2 tokens, but token_count is ", result.stdout)) == len(wrong)


# ---- bins


def gpt2_ids(count, with_ends=True):
    """Ids as GPT-2's are spread: many small ones, some of all, an end-of-text now and then."""
    ids = (50_256 * np.random.default_rng(0).random(count) ** 3).astype("<u2")
    if with_ends:
        ids[::97] = 50256
    return ids


def bin_of(content, folder, meta=None):
    for split in ("train", "val"):
        (folder / f"{split}.bin").write_bytes(content)
    if meta:
        (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def opened(folder):
    return [open_bin(folder, split, 32, 50304) for split in ("train", "val")]


HEADER = np.array([20240520, 1, 1000, *[0] * 253], "<i4").tobytes()
REFUSED = {
    "llm.c": (HEADER + gpt2_ids(1000).tobytes(), None, "has llm.c's header; cut it off: tail -c +1025 "),
    "numpy": (b"\x93NUMPY\x01\x00" + gpt2_ids(1000).tobytes(), None, "was written by np.save"),
    "text": (b"To be, or not to be: that is the question.\r\n" * 100, None, "holds text, not ids"),
    "other encoding": (gpt2_ids(1000).tobytes(), {"encoding": "cl100k_base"}, "holds ids of 'cl100k_base'"),
    "odd encoding": (gpt2_ids(1000).tobytes(), {"encoding": None}, "holds ids of None"),
}


@pytest.mark.parametrize("content, meta, words", REFUSED.values(), ids=REFUSED)
def test_bins_of_other_formats_are_refused(content, meta, words, tmp_path):
    with pytest.raises(SystemExit, match=re.escape(f"{tmp_path / 'train.bin'}: {words}")):
        opened(bin_of(content, tmp_path, meta))


def test_bins_of_characters_are_refused(tmp_path):
    bin_of(np.arange(1000, dtype="<u2") % 65, tmp_path)
    (tmp_path / "meta.pkl").touch()
    assert_one_sentence(train(tmp_path, tmp_path / "out"), "train.bin: holds ids of meta.pkl, not GPT-2's; make it")
    assert not (tmp_path / "out").exists()


ODD = {
    "uint32": (gpt2_ids(1000).astype("<u4"), None, "every second id is 0"),
    "int64": (gpt2_ids(1000).astype("<i8"), None, "every second id is 0"),
    "no ends": (gpt2_ids(1000, with_ends=False), None, "no end-of-text (50256), and the largest id is"),
    "bytes": (np.arange(1000, dtype="<u2") % 256, None, "and the largest id is 255: are these GPT-2's ids?"),
    "GPT-2's": (gpt2_ids(1000), None, None),
    "GPT-2's, named": (gpt2_ids(1000), {"encoding": "gpt2", "vocab_size": 50257}, None),
    "a small vocabulary": (np.arange(1000, dtype="<u2") % 256, {"vocab_size": 256}, None),
}


@pytest.mark.parametrize("ids, meta, words", ODD.values(), ids=ODD)
def test_odd_bins_are_opened_with_one_line(ids, meta, words, tmp_path, capsys):
    tokens = opened(bin_of(ids.tobytes(), tmp_path, meta))
    assert all(np.array_equal(part, np.frombuffer(ids.tobytes(), "<u2")) for part in tokens)
    lines = capsys.readouterr().out.splitlines()
    if words:
        assert len(lines) == 1 and lines[0].startswith(f"{tmp_path / 'train.bin'}: ") and words in lines[0]
    else:
        assert lines == []


# ---- meta.json

BAD_META = [
    '["vocab_size", 250]', '{"vocab_size": "abc"}', '{"vocab_size": -1}', '{"vocab_size": 0}', '{"vocab_size": true}',
    '{"vocab_size": 250.5}', '{"vocab_size": null}', '{"vocab_size": 1000000000000}', '{"train": 5}', '{"val": []}',
    '{"train": {"tokens": null}}', '{"train": {"tokens": "many"}}', '{"train": {"tokens": -5}}',
    '{"val": {"tokens": 1e999}}', '{"train": {"documents": null}}', '{"train": {"sha256": 5}}', '{"settings": 1}',
    '{"sources": 5}', '{"sources": [1]}', '{"sources": [{"file": 1}]}', "[" * 100_000, "\x00", '"x"', "",
]  # fmt: skip


@pytest.mark.parametrize("content", BAD_META, ids=[content[:30] for content in BAD_META])
def test_a_bad_meta_is_refused(content, tmp_path):
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(SystemExit, match=r"meta.json: cannot be read \(.*\); correct it, or delete it and prepare"):
        read_meta(tmp_path)


def test_a_bad_meta_is_one_sentence_at_each_door(tmp_path):
    source = write_parquet(tmp_path / "a.parquet", ["a", "b", "c"])
    data = make_bins(tmp_path)
    (data / "meta.json").write_text('{"vocab_size": 250, "train": {"tokens": null}}')
    before = sorted(os.listdir(tmp_path))
    words = 'meta.json: cannot be read (train cannot be {"tokens": null}); correct it, or delete it and prepare again'
    assert_one_sentence(train(data, tmp_path / "out"), words)
    for arguments in ([source], [source, "--overwrite"], ["--verify"]):
        assert_one_sentence(run(PREPARE, *arguments, f"--out_dir={data}"), words)
    assert sorted(os.listdir(tmp_path)) == before
    for odd in ({}, {"train": {}}, {"train": {"tokens": 20_000}, "val": {}}):  # nothing wrong, nothing to check
        (data / "meta.json").write_text(json.dumps({"vocab_size": 250, **odd}))
        assert_one_sentence(run(PREPARE, "--verify", f"--out_dir={data}"), "has no train.bin with a meta.json to check")
