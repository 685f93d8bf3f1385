"""Token files and meta.json: our own, nanoGPT's, and those of other programs."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from configurator import UserError
from onenight.data import token_file
from onenight.data.token_file import (
    check_tokens,
    is_whole,
    open_tokens,
    read_contents,
    read_meta,
    token_count,
)

VOCAB_SIZE = 50304  # of a model


def gpt2_ids(count, with_ends=True):
    """Return ids that are distributed like GPT-2's: mostly small, with an end-of-text at times."""
    ids = (50_256 * np.random.default_rng(0).random(count) ** 3).astype("<u2")
    if with_ends:
        ids[::97] = 50256
    return ids


def write_folder(folder, content, meta=None):
    """Write the same content into train.bin and val.bin, then meta.json."""
    for split in ("train", "val"):
        (folder / f"{split}.bin").write_bytes(content)
    if meta is not None:
        (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def open_both(folder):
    return [open_tokens(folder, split, 32, VOCAB_SIZE) for split in ("train", "val")]


# -----------------------------------------------------------------------------
# Opening


LLM_C_HEADER = np.array([20240520, 1, 1000, *[0] * 253], "<i4").tobytes()
SHAKESPEARE = b"To be, or not to be: that is the question.\r\n" * 100
GPT2_BYTES = gpt2_ids(1000).tobytes()
REFUSED = {
    "llm.c": (LLM_C_HEADER + GPT2_BYTES, None, "has llm.c's header; remove it with: tail -c +1025"),
    "numpy": (b"\x93NUMPY\x01\x00" + GPT2_BYTES, None, "was written by np.save; convert it with: "),
    "text": (SHAKESPEARE, None, "is a text file, not token ids; create it with: python prepare"),
    "other encoding": (GPT2_BYTES, {"encoding": "cl100k_base"}, "contains ids of 'cl100k_base'"),
    "no encoding": (GPT2_BYTES, {"encoding": None}, "contains ids of None (see meta.json), not of"),
    "odd size": (GPT2_BYTES[:-1], None, "1999 bytes is not a whole number of uint16 tokens"),
    "cut": (GPT2_BYTES[:-2], {"train": {"tokens": 1000}}, "999 tokens, but meta.json says 1,000"),
    "short": (GPT2_BYTES[:64], None, "32 tokens are too few for one window of block_size=32; "),
    "uint32": (gpt2_ids(1000).astype("<u4").tobytes(), None, "contains uint32 ids, not uint16; "),
    "int64": (gpt2_ids(1000).astype("<i8").tobytes(), None, "contains int64 ids, not uint16; "),
    "large ids": (b"\xff\xff" * 1000, None, "contains id 65535, but the model's vocab_size is 503"),
}


@pytest.mark.parametrize("content, meta, words", REFUSED.values(), ids=REFUSED)
def test_a_file_that_cannot_be_trained_on_is_refused(content, meta, words, tmp_path):
    write_folder(tmp_path, content, meta)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'train.bin'}: {words}")):
        open_both(tmp_path)


@pytest.mark.parametrize("dtype", ["<u4", "<i4", "<i8", "<u8"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_the_line_that_converts_wider_integers_works(split, dtype, tmp_path):
    ids = gpt2_ids(1000)
    write_folder(tmp_path, GPT2_BYTES)
    path = tmp_path / f"{split}.bin"
    path.write_bytes(ids.astype(dtype).tobytes())
    with pytest.raises(UserError, match="ids, not uint16; convert it with: ") as refusal:
        open_both(tmp_path)
    line = str(refusal.value).partition("convert it with: ")[2]
    exec(line, {"np": np, "OLD": path, "NEW": path})
    assert path.read_bytes() == ids.tobytes()
    open_both(tmp_path)


def test_a_file_beside_nanogpts_meta_pkl_is_refused(tmp_path):
    write_folder(tmp_path, (np.arange(1000, dtype="<u2") % 65).tobytes())
    (tmp_path / "meta.pkl").touch()
    with pytest.raises(UserError, match=r"ids of another vocabulary \(see meta.pkl\), not of GPT"):
        open_both(tmp_path)


def test_a_missing_file_is_refused_with_the_command_that_creates_it(tmp_path, monkeypatch):
    command = re.escape(f"python prepare_single_parquet.py FILE.parquet --out_dir={tmp_path}")
    with pytest.raises(UserError, match=rf"\(No such file or directory\); create it .*{command}$"):
        open_both(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(f"directory) in {tmp_path}; create it with")):
        open_both(Path("data"))


SMALL_IDS = np.arange(1000, dtype="<u2") % 256
UNUSUAL = {
    "no ends": (gpt2_ids(1000, with_ends=False), None, "contains no end-of-text token (50256), "),
    "bytes": (SMALL_IDS, None, "and the largest id is 255; are these GPT-2 ids?"),
    "GPT-2": (gpt2_ids(1000), None, None),
    "GPT-2, named": (gpt2_ids(1000), {"encoding": "gpt2", "vocab_size": 50257}, None),
    "a small vocabulary": (SMALL_IDS, {"vocab_size": 256}, None),
}


@pytest.mark.parametrize("ids, meta, warning", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_ids_are_opened_with_a_warning(ids, meta, warning, tmp_path, capsys):
    for tokens in open_both(write_folder(tmp_path, ids.tobytes(), meta)):
        assert tokens.dtype == np.uint16
        assert np.array_equal(tokens, np.frombuffer(ids.tobytes(), "<u2"))
    lines = capsys.readouterr().out.splitlines()
    if warning:
        (line,) = lines
        assert line.startswith(f"{tmp_path / 'train.bin'}: ")
        assert warning in line
    else:
        assert lines == []


# -----------------------------------------------------------------------------
# The largest id, from meta.json or from the file


RECORD = {"train": {"tokens": 1000}, "val": {"tokens": 1000}}
TRUSTED = {**RECORD, "largest_id": {"train": 60_000, "val": 60_000}}  # not what the files contain


def set_age(folder, seconds):
    """Make train.bin that much older than meta.json, or younger if negative."""
    modified_ns = (folder / "meta.json").stat().st_mtime_ns - seconds * 10**9
    os.utime(folder / "train.bin", ns=(modified_ns, modified_ns))


def largest_id_when_opened(folder):
    """Return the largest id of train.bin that open_tokens() goes by: the first one it refuses."""
    with pytest.raises(UserError, match=r"contains id \d+") as refusal:
        open_tokens(folder, "train", 32, vocab_size=1)
    return int(re.search(r"contains id (\d+)", str(refusal.value))[1])


def test_the_recorded_largest_id_saves_reading_the_file(tmp_path):
    write_folder(tmp_path, GPT2_BYTES, TRUSTED)
    for age in (0, 10):
        set_age(tmp_path, age)
        assert largest_id_when_opened(tmp_path) == 60_000


UNTRUSTED = {
    "no meta.json": None,
    "a meta.json of an older version": RECORD,
    "no number of tokens": {"largest_id": TRUSTED["largest_id"]},
    "only the other split": {**RECORD, "largest_id": {"val": 60_000}},
}


@pytest.mark.parametrize("meta", UNTRUSTED.values(), ids=UNTRUSTED)
def test_a_file_without_a_record_is_read(meta, tmp_path):
    assert largest_id_when_opened(write_folder(tmp_path, GPT2_BYTES, meta)) == 50256


def test_a_file_that_changed_after_meta_json_is_read(tmp_path):
    write_folder(tmp_path, GPT2_BYTES, TRUSTED)
    set_age(tmp_path, 10)
    ids = np.memmap(tmp_path / "train.bin", "<u2", "r+")
    ids[500] = 50300
    ids.flush()
    set_age(tmp_path, -1)  # the file system's clock may be too coarse to show the change
    assert largest_id_when_opened(tmp_path) == 50300


# -----------------------------------------------------------------------------
# Checking


def write_tokens(path, *documents):
    """Write documents, lists of ids, each with its end-of-text."""
    ids = [id for document in documents for id in (*document, 50256)]
    path.write_bytes(np.array(ids, "<u2").tobytes())
    return path


def test_the_contents_of_a_file_are_counted(tmp_path, monkeypatch):
    path = write_tokens(tmp_path / "a.bin", [1, 2, 3], [], [4], [5, 6, 7], [50255])
    found = read_contents(path)
    assert found.document_lengths == {3: 2, 1: 2, 0: 1}
    assert (found.documents, found.largest_id, found.size) == (5, 50256, 26)
    monkeypatch.setattr(token_file, "READ_BYTES", 4)  # documents across the borders of blocks
    assert read_contents(path) == found
    assert token_count(path) == 13
    assert is_whole(path, 13) and not is_whole(path, 12) and not is_whole(tmp_path / "b.bin", 13)


def test_a_good_file_passes_the_check(tmp_path):
    path = write_tokens(tmp_path / "a.bin", [1, 2, 3], [4])
    found = check_tokens(path, tokens=6, documents=2)
    assert check_tokens(path, 6, 2, found.sha256) == found


def test_every_difference_from_what_is_expected_is_reported(tmp_path):
    path = write_tokens(tmp_path / "a.bin", [1, 2, 3], [50257])
    path.write_bytes(path.read_bytes() + b"\x00")
    digest = read_contents(path).sha256
    expected = (
        f"{path}: damaged (bytes 13 instead of 10, end-of-text tokens 2 instead of 3, "
        f"largest id 50257 instead of at most 50256, sha256 {digest} instead of 0); "
        "prepare it again with --overwrite"
    )
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        check_tokens(path, tokens=5, documents=3, sha256="0")


# -----------------------------------------------------------------------------
# meta.json


BAD_META = [
    '["vocab_size", 250]',
    '{"vocab_size": "abc"}',
    '{"vocab_size": -1}',
    '{"vocab_size": 0}',
    '{"vocab_size": true}',
    '{"vocab_size": 250.5}',
    '{"vocab_size": null}',
    '{"vocab_size": 1000000000000}',
    '{"train": 5}',
    '{"val": []}',
    '{"train": {"tokens": null}}',
    '{"train": {"tokens": "many"}}',
    '{"train": {"tokens": -5}}',
    '{"val": {"tokens": 1e999}}',
    '{"train": {"documents": null}}',
    '{"train": {"sha256": 5}}',
    '{"largest_id": 50256}',
    '{"largest_id": {"train": "50256"}}',
    '{"largest_id": {"val": 65536}}',
    '{"settings": 1}',
    '{"sources": 5}',
    '{"sources": [1]}',
    '{"sources": [{"file": 1}]}',
    "[" * 100_000,
    "\x00",
    '"x"',
    "",
]


@pytest.mark.parametrize("content", BAD_META, ids=[content[:30] for content in BAD_META])
def test_a_bad_meta_json_is_refused(content, tmp_path):
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(UserError, match=r"meta.json: cannot be read \(.*\); correct it, or delete"):
        read_meta(tmp_path)


def test_a_folder_without_meta_json_has_no_meta(tmp_path):
    assert read_meta(tmp_path) == {}
