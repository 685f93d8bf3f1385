"""What a preparation prints."""

from collections import Counter
from types import SimpleNamespace

import pytest

from onenight.data import report
from onenight.data.report import (
    Progress,
    epochs_of_configs,
    find_oddities,
    summarize,
    token_count_verdict,
)

COUNTED = {
    "token_counts_compared": 1000,
    "token_counts_differing": 0,
    "cut_documents": 0,
    "replaced_documents": 0,
    "nul_documents": 0,
    "likely_encodings": {},
}


def writer_of(tokens, rows=0, documents=4, **state):
    """Return a stand-in for a BinsWriter."""
    job = {"settings": {"val_fraction": 0.1}}
    state = {"rows": rows, **COUNTED, **state}
    return SimpleNamespace(tokens=tokens, documents=documents, job=job, state=state)


def test_progress_is_measured_since_it_began(monkeypatch, capsys):
    clock = iter([100.0, 110.0])
    monkeypatch.setattr(report.time, "monotonic", lambda: next(clock))
    writer = writer_of(tokens=1_000_000)
    progress = Progress(writer, fraction=0.1)
    writer.tokens = 21_000_000
    writer.state["rows"] = 20_000
    progress.show(0.3)
    line = "20,000 rows, 30.0% done, 2.00 M tokens/s, ETA 35s"
    assert capsys.readouterr().out.strip() == line


def test_progress_without_any_does_not_divide_by_zero(capsys):
    Progress(writer_of(tokens=0), fraction=0.0).show(0.0)
    assert "0.0% done" in capsys.readouterr().out


def test_the_summary_counts_documents_and_tokens():
    writer = writer_of(
        tokens=18,
        empty_documents=1,
        text_bytes=56,
        train={"tokens": 15},
        val={"tokens": 3},
    )
    summary = summarize(writer, Counter({2: 2, 3: 1, 7: 1}), new_tokens=9, seconds=2.0)
    peak_memory = summary.pop("peak_memory_mb")
    assert peak_memory == "unknown on this system" or int(peak_memory.replace(",", "")) > 10
    assert summary == {
        "documents": "4",
        "empty_documents_skipped": "1",
        "documents_not_utf8": "0",
        "tokens": "18 (including one end-of-text per document)",
        "train_tokens": "15",
        "val_tokens": "3",
        "token_count_column": "equal in all 1,000 documents",
        "tokens_per_document": "median 2, p90 7, max 7",
        "bytes_per_token": "4.00",
        "seconds": "2.0",
        "tokens_per_s": "4",
    }


def test_the_summary_counts_a_document_that_was_cut_once():
    writer = writer_of(
        tokens=18,
        cut_documents=1,
        empty_documents=1,
        text_bytes=56,
        train={"tokens": 15},
        val={"tokens": 3},
    )
    summary = summarize(writer, Counter({2: 4}), new_tokens=9, seconds=2.0)
    assert summary["documents"] == "3 (1 cut in two for val.bin)"


ODD = {
    "nothing": ({}, None),
    "few that are not UTF-8": ({"replaced_documents": 20}, None),
    "many": ({"replaced_documents": 21, "likely_encodings": {"Latin-1": 21}}, "Latin-1 in 21"),
    "NULs": ({"nul_documents": 1, "likely_encodings": {"UTF-16LE": 1}}, "like: UTF-16LE in 1; "),
    "compressed": (
        {"replaced_documents": 1, "likely_encodings": {"gzip data": 1}},
        "of 1,000 documents: bytes that are not UTF-8, which became U+FFFD, in 1; "
        "they look like: gzip data in 1; convert them to text in UTF-8",
    ),
}


@pytest.mark.parametrize("state, words", ODD.values(), ids=ODD)
def test_documents_that_are_probably_not_utf8_are_named(state, words):
    writer = writer_of(tokens=100, documents=1000, val={"tokens": 10}, **state)
    oddities = find_oddities(writer)
    assert len(oddities) == (words is not None)
    assert all(words in oddity for oddity in oddities)


def test_a_val_bin_with_over_twice_its_fraction_is_named():
    assert find_oddities(writer_of(tokens=100, val={"tokens": 20})) == []
    (oddity,) = find_oddities(writer_of(tokens=100, val={"tokens": 21}))
    assert oddity.startswith("val.bin has 21.0% of the tokens, over twice --val_fraction=0.1: ")


@pytest.mark.parametrize(
    "compared, differing, verdict",
    [
        (0, 0, "none to compare with"),
        (1000, 0, "equal in all 1,000 documents"),
        (1000, 2, "2 of 1,000 documents differ"),
    ],
)
def test_the_verdict_on_the_files_token_counts(compared, differing, verdict):
    state = {"token_counts_compared": compared, "token_counts_differing": differing}
    assert token_count_verdict(state) == verdict


def test_the_epochs_of_a_config(tmp_path, monkeypatch):
    config = tmp_path / "config.py"
    config.write_text("batch_size = 2\ngradient_accumulation_steps = 5\nblock_size = 100\n")
    monkeypatch.setattr(report, "CONFIG_FILES", (str(config),))
    assert epochs_of_configs(10_000) == {}  # a file that somebody edited
    config.write_text(config.read_text() + "max_iters = 40_000\n")
    assert epochs_of_configs(10_000) == {
        str(config): "1,000 tokens per iteration, 10.0 iterations per epoch; "
        "its 40,000 iterations are 0.04 billion tokens, 4000.00 epochs"
    }
