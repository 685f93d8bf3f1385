"""onenight/bins.py: writing token files, what goes to val.bin, and opening them."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import read_files
from onenight.bins import SHORT_BYTES, BinsWriter, open_tokens
from onenight.errors import UserError

EOT = 50256


def write(writer, sizes, max_tokens=math.inf):
    """Write documents of so many bytes, with 4 bytes per token. The n-th one consists of ids n."""
    first = writer.state["documents"]
    sizes = np.array(sizes, dtype=np.int64)
    lengths = sizes // 4 + 2
    ids = np.repeat(np.arange(first, first + len(sizes)), lengths).astype(np.uint16)
    ids[np.cumsum(lengths) - 1] = EOT
    return writer.write(ids, lengths, sizes, max_tokens)


def documents(path):
    """Return the number and the length of each document of a file."""
    ids = np.fromfile(path, "<u2")
    *parts, rest = np.split(ids, np.flatnonzero(ids == EOT) + 1)
    assert len(rest) == 0
    return [(int(part[0]), len(part) - 1) for part in parts]


def written(folder, sizes, total=0, val_fraction=0.005, batch=10**9, max_tokens=math.inf):
    """Write documents of so many bytes in batches. Return the documents of train and val."""
    job = {"val_fraction": val_fraction}
    writer = BinsWriter(folder, job, expected_bytes=total or sum(sizes), overwrite=True)
    for start in range(0, len(sizes), batch):
        write(writer, sizes[start : start + batch], max_tokens)
    writer.close()
    return [documents(folder / f"{split}.bin.partial") for split in ("train", "val")]


# -----------------------------------------------------------------------------
# Writing


def test_the_unfinished_files_of_another_job_are_only_replaced_with_overwrite(tmp_path):
    job = {"val_fraction": 0.005, "sources": ["a.parquet"]}
    other = {**job, "sources": ["b.parquet"]}
    writer = BinsWriter(tmp_path, job, 100, overwrite=False)
    write(writer, [8, 40])
    writer.checkpoint()
    writer.close()
    before = read_files(tmp_path)
    with pytest.raises(UserError, match="--overwrite"):
        BinsWriter(tmp_path, other, 100, overwrite=False)
    assert read_files(tmp_path) == before

    writer = BinsWriter(tmp_path, other, 100, overwrite=True)
    write(writer, [80, 120])
    writer.finish()
    assert documents(tmp_path / "train.bin") == [(1, 31)]


# -----------------------------------------------------------------------------
# What goes to val.bin


@pytest.mark.parametrize(
    "val_fraction, numbers", [(0.005, [0, 200, 400]), (0.3333333333333333, [0, 4, 7, 10])]
)
def test_every_kth_document_goes_to_val_as_a_whole(val_fraction, numbers, tmp_path):
    train, val = written(tmp_path, [4000] * 500, val_fraction=val_fraction)
    assert val[: len(numbers)] == [(number, 1001) for number in numbers]
    assert len(val) == math.ceil(500 * val_fraction)
    assert sorted(train + val) == [(number, 1001) for number in range(500)]


def test_a_val_fraction_of_many_digits_stays_regular_after_many_documents(tmp_path):
    job = {"val_fraction": 0.3333333333333333}
    writer = BinsWriter(tmp_path, job, 10**9, overwrite=False)
    writer.state["documents"] = 30_000
    in_val = writer.val_lengths(np.full(300, 10), np.full(300, 40))
    assert np.flatnonzero(in_val).tolist() == list(range(1, 300, 3))
    writer.close()


@pytest.mark.parametrize(
    "size, total, val_fraction, val_bytes",
    [
        (100_000, 10_000_000, 0.005, 100_000),  # twice the fraction: whole
        (5_000_000, 10_000_000, 0.005, 50_000),
        (10 * SHORT_BYTES, 10 * SHORT_BYTES, 0.005, SHORT_BYTES),
        (10_000, 10_000, 0.005, 5000),  # half is left for train.bin
        (1_000_000, 1000, 0.1, 100_000),  # the estimate was too low
    ],
)
def test_a_long_document_is_cut_in_two(size, total, val_fraction, val_bytes, tmp_path):
    train, val = written(tmp_path, [size, size], total, val_fraction)
    # The first of the two is for val.bin.
    (length,) = (length for number, length in val if number == 0)
    assert length == pytest.approx(val_bytes / 4, abs=2)
    assert sum(length for number, length in train + val if number == 0) == size // 4 + 1


SIZES = st.lists(st.integers(1, 30_000), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 5), st.sampled_from([0.005, 0.1, 0.9]), st.integers(1, 40_000))
def test_documents_stay_whole_or_are_cut_once_and_batches_do_not_matter(
    tmp_path_factory, sizes, batch, val_fraction, max_tokens
):
    folder = tmp_path_factory.getbasetemp() / "split"
    folder.mkdir(exist_ok=True)
    for limit in (math.inf, max_tokens):
        train, val = written(folder, sizes, 0, val_fraction, max_tokens=limit)
        assert written(folder, sizes, 0, val_fraction, batch, limit) == [train, val]
        lengths = [0] * len(sizes)
        for number, length in train + val:
            assert length > 0
            lengths[number] += length
        count = sum(length > 0 for length in lengths)
        assert lengths[:count] == [size // 4 + 1 for size in sizes[:count]]
        tokens = sum(length + 1 for _, length in train + val)
        assert tokens >= limit or count == len(sizes)


# -----------------------------------------------------------------------------
# Opening


def open_as(folder, ids, meta=None):
    """Open these ids, an array or bytes, as the train.bin of a folder, with a small model."""
    (folder / "train.bin").write_bytes(bytes(ids))
    if meta is not None:
        (folder / "meta.json").write_text(json.dumps(meta))
    return open_tokens(folder, "train", block_size=32, vocab_size=50304)


# Distributed like GPT-2's: mostly small, with an end-of-text at times.
IDS = (50_256 * np.random.default_rng(0).random(1000) ** 3).astype("<u2")
IDS[::97] = EOT
OWN = {"encoding": "gpt2", "vocab_size": 50257, "train": {"tokens": 1000}}
SMALL = np.arange(1000, dtype="<u2") % 65


@pytest.mark.parametrize(
    "ids, meta",
    [
        (IDS, OWN),
        (IDS, {**OWN, "largest_id": {"train": EOT}}),
        (IDS, None),  # nanoGPT's folder
        (SMALL, {"vocab_size": 65}),
    ],
)
def test_good_files_are_opened(ids, meta, tmp_path):
    tokens = open_as(tmp_path, ids, meta)
    assert tokens.dtype == np.uint16
    assert np.array_equal(tokens, ids)


REFUSED = {
    "odd size": (bytes(IDS)[:-1], None),
    "cut": (IDS[:-1], OWN),
    "short": (IDS[:32], None),
    "uint32": (IDS.astype("<u4"), None),
    "uint32 of GPT-2's vocabulary": (IDS.astype("<u4"), {"vocab_size": 50257}),
    "another encoding": (IDS, {"encoding": "cl100k_base"}),
    "large ids": (np.append(IDS, 50304).astype("<u2"), None),
    "large ids, as recorded": (IDS, {**OWN, "largest_id": {"train": 50304}}),
}


@pytest.mark.parametrize("ids, meta", REFUSED.values(), ids=REFUSED)
def test_a_file_that_cannot_be_trained_on_is_refused(ids, meta, tmp_path):
    with pytest.raises(UserError, match=r"train\.bin"):
        open_as(tmp_path, ids, meta)


def test_characters_of_nanogpt_are_refused(tmp_path):
    (tmp_path / "meta.pkl").touch()
    with pytest.raises(UserError, match=r"train\.bin"):
        open_as(tmp_path, SMALL)
