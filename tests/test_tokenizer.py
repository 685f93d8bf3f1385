"""onenight/tokenizer.py: GPT-2's ids, published ones and those of tiktoken's own pattern."""

import numpy as np
import pytest
import tiktoken.load
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from configurator import UserError
from onenight import tokenizer
from onenight.tokenizer import (
    EOT,
    EOT_TEXT,
    VOCAB_SIZE,
    encode_document,
    encode_documents,
    get_encoding,
    read_ranks,
)
from reference import GPT2

# From the documentation of tiktoken and transformers, and other examples that are often quoted.
PUBLISHED = {
    "Hello world": [15496, 995],
    "Hello, my dog is cute": [15496, 11, 616, 3290, 318, 13779],
    "The quick brown fox jumps over the lazy dog": (
        [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290]
    ),
    "\n\n": [628],
    "<|endoftext|>": [27, 91, 437, 1659, 5239, 91, 29],  # in a document it is plain text
}


@pytest.mark.parametrize("text", PUBLISHED)
def test_published_ids(text):
    assert encode_document(text).tolist() == PUBLISHED[text]
    assert get_encoding().decode(PUBLISHED[text]) == text


def test_tiktoken_accepts_the_rank_file_as_its_own(monkeypatch, tmp_path):
    """tiktoken builds its own encoding from our file, whose checksum it verifies."""

    def load_ours(_url, expected_hash):
        return tiktoken.load.load_tiktoken_bpe(str(tokenizer.RANKS_FILE), expected_hash)

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", load_ours)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))  # with "" it would not check the hash
    theirs = openai_public.r50k_base()
    assert theirs["mergeable_ranks"] == read_ranks()
    assert theirs["special_tokens"] == {EOT_TEXT: EOT}
    assert theirs["explicit_n_vocab"] == get_encoding().n_vocab == VOCAB_SIZE


# Any Unicode text, with surrogates, and what might confuse the pattern or the joining of documents.
PIECES = ["<|endoftext|>", "<|endof", "text|>", "a", "1", "é"]
PIECES += ["'s", "'d", "'m", "'t", "'ll", "'ve", "'re", "'S", "'x"]
SPACES = [" ", "  ", "\n", "\r\n", "\x1c", "\u3000"]
ODD = st.text(max_size=20) | st.sampled_from(PIECES + SPACES) | st.characters(categories=["Cs"])
TEXTS = st.lists(ODD, min_size=1, max_size=8).map("".join).filter(bool)


@settings(max_examples=200, deadline=None)
@given(st.lists(TEXTS, max_size=6))
def test_documents_are_encoded_as_tiktoken_encodes_each(texts):
    each = [GPT2.encode_ordinary(text) for text in texts]
    ids, is_replaced = encode_documents([text.encode("utf-8", "surrogatepass") for text in texts])
    assert ids.dtype == np.uint16
    assert is_replaced.tolist() == [False] * len(texts)
    assert ids.tolist() == [id for document in each for id in (*document, EOT)]
    assert [encode_document(text).tolist() for text in texts] == each


@pytest.mark.parametrize("space", [" ", "\n"])
def test_two_million_spaces_before_text_are_encoded_in_pieces(space):
    text = space * 2_000_000 + "hello"
    # tiktoken fails, with an exception or a Rust panic. Without that no pieces would be needed.
    with pytest.raises(BaseException, match="stack"):
        GPT2.encode_to_numpy(text, disallowed_special=())

    pieces = [space * 100_000] * 19 + [space * 100_000 + "hello"]
    expected = [id for piece in pieces for id in GPT2.encode_ordinary(piece)]
    assert encode_document(text).tolist() == expected
    ids, _ = encode_documents([b"before", text.encode()])
    assert ids.tolist() == [19052, EOT, *expected, EOT]
    if space == " ":
        # Each space is a token and the last one belongs to the word, so the cuts leave no trace.
        assert expected == [220] * 1_999_999 + [23748]


def test_runs_of_spaces_that_tiktoken_can_encode_are_not_cut():
    text = "\n" * 300_001 + "hello" + " " * 1_200_000  # it encodes any number at the end of a text
    assert encode_document(text).tolist() == GPT2.encode_ordinary(text)


def test_a_damaged_rank_file_is_refused(monkeypatch, tmp_path):
    copy = tmp_path / "gpt2.tiktoken"
    copy.write_bytes(tokenizer.RANKS_FILE.read_bytes().replace(b" 1000\n", b" 1001\n", 1))
    monkeypatch.setattr(tokenizer, "RANKS_FILE", copy)
    with pytest.raises(UserError, match="gpt2.tiktoken"):
        read_ranks.__wrapped__()  # without its cache
