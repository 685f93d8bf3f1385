"""The tokenizer is GPT-2's: against tiktoken's own recipe, published ids, and inputs that tiktoken refuses."""

import inspect

from onenight.tokenizer import EOT, RANKS_SHA256, VOCAB_SIZE, encode_document, encode_documents, get_encoding

import numpy as np
import pytest
from conftest import assert_one_sentence, copy_project, run, write_parquet
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prepare import GPT2
from tiktoken_ext import openai_public

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


def test_ranks_and_end_of_text_are_those_of_tiktokens_own_recipe():
    assert RANKS_SHA256 in inspect.getsource(openai_public.r50k_base)
    encoding = get_encoding()
    assert (encoding.n_vocab, encoding.eot_token) == (VOCAB_SIZE, EOT) == (50257, 50256)
    assert sorted(GPT2._mergeable_ranks.values()) == list(range(50256))


# Any Unicode, with surrogates, and what the pattern and the join of documents could trip over. The reference, GPT2, has
# tiktoken's own pattern.
PIECES = ["<|endoftext|>", "<|endof", "text|>", "'s", "'d", "'m", "'t", "'ll", "'ve", "'re", "'S", "'x", "a", "1", "é"]
SPACES = [" ", "  ", "\n", "\r\n", "\x1c", "\u3000"]
ODD = st.text(max_size=20) | st.sampled_from(PIECES + SPACES) | st.characters(categories=["Cs"])
TEXTS = st.lists(ODD, min_size=1, max_size=8).map("".join).filter(bool)


@settings(max_examples=300, deadline=None)
@given(st.lists(TEXTS, max_size=6))
def test_documents_are_what_tiktoken_gives_for_each(texts):
    expected = [id for text in texts for id in (*GPT2.encode_ordinary(text), EOT)]
    ids = encode_documents([text.encode("utf-8", "surrogatepass") for text in texts])
    assert ids.dtype == np.uint16
    assert ids.tolist() == expected
    assert [encode_document(text).tolist() for text in texts] == list(map(GPT2.encode_ordinary, texts))


def test_bytes_that_are_no_utf8_become_replacement_characters():
    expected = GPT2.encode_ordinary("caf\ufffd \ufffd\ufffd!")
    assert encode_documents([b"caf\xe9 \xff\xfe!"]).tolist() == [*expected, EOT]


@pytest.mark.parametrize("space", [" ", "\n", "\u3000"])
def test_two_million_spaces_then_text(space):
    text = space * 2_000_000 + "hello"
    with pytest.raises(BaseException, match="stack"):  # what makes the pieces necessary: an exception or a Rust panic
        GPT2.encode_to_numpy(text, disallowed_special=())
    pieces = [space * 100_000] * 19 + [space * 100_000 + "hello"]
    expected = [id for piece in pieces for id in GPT2.encode_ordinary(piece)]
    assert encode_document(text).tolist() == expected
    assert encode_documents([b"before", text.encode()]).tolist() == [19052, EOT, *expected, EOT]
    if space == " ":  # each space is a token, and the last one belongs to the word: no trace of the cuts
        assert expected == [220] * 1_999_999 + [23748]


def test_runs_that_tiktoken_can_take_are_not_cut():
    text = "\n" * 300_001 + "hello" + " " * 1_200_000  # at the end of the text tiktoken takes any number
    assert encode_document(text).tolist() == GPT2.encode_ordinary(text)


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_damaged_rank_file(damage, tmp_path):
    project = copy_project(tmp_path / "project")
    ranks = project / "data" / "gpt2.tiktoken"
    raw = ranks.read_bytes()
    ranks.unlink()
    if damage == "changed":
        ranks.write_bytes(raw.replace(b" 1000\n", b" 1001\n", 1))
    parquet = write_parquet(tmp_path / "a.parquet", ["one", "two"])
    result = run(project / "prepare_single_parquet.py", parquet, "--out_dir=out", cwd=tmp_path)
    assert_one_sentence(result, "restore it with: git checkout")
    assert not (tmp_path / "out").exists()
