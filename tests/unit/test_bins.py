"""The writer of the token files: continuing, finishing, and refusing to replace other files."""

import json

import numpy as np
import pytest

from configurator import UserError
from onenight.data.bins import BinsWriter, clear_work, is_complete

JOB = {
    "settings": {"text_column": "text", "val_fraction": 0.005},
    "sources": [{"file": "a.parquet", "bytes": 100, "rows": 4, "sha256": "0"}],
}
OTHER_JOB = {**JOB, "settings": {"text_column": "text", "val_fraction": 0.01}}
COUNTERS = {"empty_documents": 0}


def ids(*values):
    return np.array([*values, 50256], np.uint16)


def finish_small(out_dir, job=JOB):
    """Write two documents and finish."""
    writer = BinsWriter(out_dir, job, COUNTERS, overwrite=False)
    writer.write("train", ids(1, 2, 3))
    writer.write("val", ids(4))
    return writer.finish()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_finished_files_and_their_meta_json(tmp_path):
    assert finish_small(tmp_path) == {3: 1, 1: 1}
    assert names(tmp_path) == ["meta.json", "train.bin", "val.bin"]
    assert np.fromfile(tmp_path / "train.bin", "<u2").tolist() == [1, 2, 3, 50256]
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["train"].keys() == {"tokens", "documents", "sha256"}
    assert meta["largest_id"] == {"train": 50256, "val": 50256}
    assert {key: meta[key] for key in JOB} == JOB


def test_what_was_written_after_the_last_checkpoint_is_written_again(tmp_path):
    writer = BinsWriter(tmp_path, JOB, COUNTERS, overwrite=False)
    writer.write("train", ids(1, 2, 3))
    writer.state["rows"] = 2
    writer.state["empty_documents"] = 1
    writer.checkpoint()
    writer.write("train", ids(7, 8))
    writer.close()
    assert names(tmp_path) == ["prepare.json", "train.bin.partial", "val.bin.partial"]

    writer = BinsWriter(tmp_path, JOB, COUNTERS, overwrite=False)
    assert (writer.tokens, writer.documents) == (4, 1)
    assert (writer.state["rows"], writer.state["empty_documents"]) == (2, 1)
    writer.write("train", ids(9))
    writer.write("val", ids(4))
    writer.finish()
    assert np.fromfile(tmp_path / "train.bin", "<u2").tolist() == [1, 2, 3, 50256, 9, 50256]


def test_work_of_an_older_version_with_fewer_counters_is_continued(tmp_path):
    writer = BinsWriter(tmp_path, JOB, {}, overwrite=False)
    writer.state["rows"] = 2
    writer.checkpoint()
    writer.close()
    counters = {"empty_documents": 0, "likely_encodings": {}}
    writer = BinsWriter(tmp_path, JOB, counters, overwrite=False)
    assert (writer.state["rows"], writer.state["empty_documents"]) == (2, 0)
    writer.state["likely_encodings"]["Latin-1"] = 1
    writer.close()
    assert counters == {"empty_documents": 0, "likely_encodings": {}}


def test_unfinished_work_of_another_job_is_refused_or_overwritten(tmp_path):
    writer = BinsWriter(tmp_path, JOB, COUNTERS, overwrite=False)
    writer.write("train", ids(1, 2, 3))
    writer.state["rows"] = 2
    writer.checkpoint()
    writer.close()
    words = r"an unfinished preparation of other settings \(val_fraction 0.005, now 0.01\); choose"
    with pytest.raises(UserError, match=words):
        BinsWriter(tmp_path, OTHER_JOB, COUNTERS, overwrite=False)
    writer = BinsWriter(tmp_path, OTHER_JOB, COUNTERS, overwrite=True)
    assert writer.tokens == 0
    writer.discard()
    assert names(tmp_path) == []


def test_work_that_was_checkpointed_without_a_row_is_replaced_silently(tmp_path):
    writer = BinsWriter(tmp_path, JOB, COUNTERS, overwrite=False)
    writer.checkpoint()
    writer.close()
    BinsWriter(tmp_path, OTHER_JOB, COUNTERS, overwrite=False).close()


def changed_job(**changes):
    return {**JOB, "sources": [{**JOB["sources"][0], **changes}]}


def without_origin(meta):
    return {key: value for key, value in meta.items() if key not in JOB}


REFUSALS = {
    "settings": (OTHER_JOB, dict, r"other settings \(val_fraction 0.005, now 0.01\)"),
    "files": (changed_job(file="b.parquet"), dict, r"other files \(a.parquet\)"),
    "content": (changed_job(sha256="1"), dict, r"the same files before they were changed \(a.par"),
    "origin": (JOB, without_origin, "unknown origin"),
    "nothing": (JOB, dict, "other sizes than its meta.json says"),
}


@pytest.mark.parametrize("job, edit_meta, words", REFUSALS.values(), ids=REFUSALS)
def test_finished_files_are_not_replaced_and_the_difference_is_named(
    job, edit_meta, words, tmp_path
):
    finish_small(tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps(edit_meta(meta)))
    with pytest.raises(UserError, match=f"contains finished bins of {words}"):
        BinsWriter(tmp_path, job, COUNTERS, overwrite=False)
    assert names(tmp_path) == ["meta.json", "train.bin", "val.bin"]


def test_damaged_work_is_refused_and_not_continued(tmp_path):
    writer = BinsWriter(tmp_path, JOB, COUNTERS, overwrite=False)
    writer.write("train", ids(1, 2))
    writer.write("val", ids(3))
    writer.state["train"]["documents"] += 1
    with pytest.raises(UserError, match=r"damaged \(end-of-text tokens 1 instead of 2\)"):
        writer.finish()
    assert BinsWriter(tmp_path, JOB, COUNTERS, overwrite=True).tokens == 0


def test_only_files_of_the_same_job_in_full_size_are_complete(tmp_path):
    assert not is_complete(tmp_path, JOB)
    finish_small(tmp_path)
    assert is_complete(tmp_path, JOB)
    assert not is_complete(tmp_path, OTHER_JOB)

    train_bin = tmp_path / "train.bin"
    whole = train_bin.read_bytes()
    train_bin.write_bytes(whole[:-2])
    assert not is_complete(tmp_path, JOB)
    train_bin.unlink()
    assert not is_complete(tmp_path, JOB)


def test_files_of_an_older_version_are_complete(tmp_path):
    """Their meta.json does not record the largest ids."""
    finish_small(tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text())
    del meta["largest_id"]
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert is_complete(tmp_path, JOB)


def test_clearing_the_work_leaves_finished_files(tmp_path):
    finish_small(tmp_path)
    BinsWriter(tmp_path, OTHER_JOB, COUNTERS, overwrite=True).close()
    clear_work(tmp_path)
    assert names(tmp_path) == ["meta.json", "train.bin", "val.bin"]
