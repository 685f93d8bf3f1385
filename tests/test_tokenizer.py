"""The tokenizer is GPT-2's: against tiktoken's own recipe, published ids, and inputs that tiktoken refuses."""

import inspect
import shutil

import numpy as np
import pytest
from conftest import ROOT, assert_one_sentence, run, write_parquet
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import load_tiktoken_bpe
from tiktoken_ext import openai_public

from tokenizer import EOT, PATTERN, RANKS_SHA256, VOCAB_SIZE, encode_document, encode_documents, get_encoding

# Published examples: GPT-2's ids in the documentation of tiktoken and transformers, and often quoted ones.
PUBLISHED = {
    "hello world": [31373, 995],
    "Hello world": [15496, 995],
    "Hello, my dog is cute": [15496, 11, 616, 3290, 318, 13779],
    "The quick brown fox jumps over the lazy dog": [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290],
    "goodbye world": [11274, 16390, 995],
    "\n\n": [628],
    "<|endoftext|>": [27, 91, 437, 1659, 5239, 91, 29],  # in a document it is plain text
}


@pytest.mark.parametrize("text", PUBLISHED)
def test_published_ids(text):
    assert encode_document(text).tolist() == PUBLISHED[text]
    assert get_encoding().decode(PUBLISHED[text]) == text


def test_tiktoken_demands_the_same_pattern_ranks_and_special_token():
    assert openai_public.r50k_pat_str == PATTERN
    assert RANKS_SHA256 in inspect.getsource(openai_public.r50k_base)
    encoding = get_encoding()
    assert (encoding.n_vocab, encoding.eot_token) == (VOCAB_SIZE, EOT) == (50257, 50256)


# Any Unicode, with surrogates, and what the pattern and the join of documents could trip over.
PIECES = st.sampled_from(
    ["<|endoftext|>", "<|endof", "text|>", " ", "\n", "\u3000", "'ll", "\r\n", "\x1c", "a", "1", "é"]
)
TEXTS = st.lists(st.text(max_size=20) | PIECES | st.characters(categories=["Cs"]), max_size=8).map("".join)


@settings(max_examples=300, deadline=None)
@given(st.lists(TEXTS.filter(bool), max_size=6))
def test_documents_are_what_tiktoken_gives_for_each(texts):
    expected = [id for text in texts for id in (*get_encoding().encode_ordinary(text), EOT)]
    ids = encode_documents([text.encode("utf-8", "surrogatepass") for text in texts])
    assert ids.dtype == np.uint16
    assert ids.tolist() == expected
    assert [encode_document(text).tolist() for text in texts] == list(map(get_encoding().encode_ordinary, texts))


def test_bytes_that_are_no_utf8_become_replacement_characters():
    expected = get_encoding().encode_ordinary("caf\ufffd \ufffd\ufffd!")
    assert encode_documents([b"caf\xe9 \xff\xfe!"]).tolist() == [*expected, EOT]


@pytest.mark.parametrize("space", [" ", "\n", "\u3000"])
def test_two_million_spaces_then_text(space):
    text = space * 2_000_000 + "hello"
    with pytest.raises(BaseException, match="stack"):  # what makes the pieces necessary: an exception or a Rust panic
        get_encoding().encode_to_numpy(text, disallowed_special=())
    pieces = [space * 100_000] * 19 + [space * 100_000 + "hello"]
    expected = [id for piece in pieces for id in get_encoding().encode_ordinary(piece)]
    assert encode_document(text).tolist() == expected
    assert encode_documents([b"before", text.encode()]).tolist() == [19052, EOT, *expected, EOT]
    if space == " ":  # each space is a token, and the last one belongs to the word: no trace of the cuts
        assert expected == [220] * 1_999_999 + [23748]


def test_runs_that_tiktoken_can_take_are_not_cut():
    text = "\n" * 300_001 + "hello" + " " * 1_200_000  # at the end of the text tiktoken takes any number
    assert encode_document(text).tolist() == get_encoding().encode_ordinary(text)


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_damaged_rank_file(damage, tmp_path):
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    (tmp_path / "data").mkdir()
    if damage == "changed":
        raw = (ROOT / "data" / "gpt2.tiktoken").read_bytes()
        (tmp_path / "data" / "gpt2.tiktoken").write_bytes(raw.replace(b" 1000\n", b" 1001\n", 1))
    parquet = write_parquet(tmp_path / "a.parquet", ["one", "two"])
    result = run(tmp_path / "prepare_single_parquet.py", parquet, "--out_dir=out", cwd=tmp_path)
    assert_one_sentence(result, "restore it with: git checkout")
    assert not (tmp_path / "out").exists()


def test_ranks_are_a_permutation_that_tiktoken_itself_loads(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    path = ROOT / "data" / "gpt2.tiktoken"
    ranks = load_tiktoken_bpe(str(path), expected_hash=RANKS_SHA256)
    assert sorted(ranks.values()) == list(range(50256))
