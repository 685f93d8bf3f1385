"""onenight/models/hf_tokenizer.py, compared with tiktoken and with the files that OpenAI
published."""

import hashlib
import json

import hypothesis
import pytest
from hypothesis import strategies
from transformers import AutoTokenizer

from onenight.data.tokenizer import get_encoding
from onenight.models.hf_tokenizer import make_tokenizer

# The checksums of encoder.json and vocab.bpe of GPT-2, as tiktoken has them.
VOCAB_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"

ODD_TEXTS = [
    "",
    " ",
    "  two  spaces ",
    "\t\n\r\n \n\n",
    "it's we'll I'VE",
    "naïve e\u0301 ﬁ ½ ② ٣ 一二 日本語 한국어",
    "🤦🏽‍♀️👩‍👩‍👧 🇪🇺 \U0001d7d8\U000e0041\U0010ffff",
    "\u1680\u180e\u2003\u3000 x",
    "a" * 500,
    " " * 300 + "x",
    "\u0000\u001f\u007f\u0085\u00a0\u00ad\u200b\u2028\u2029\ufeff\ufffd",
    "Ω≈ç√∫ ़क्षि ﷽",
    "<|endoftext|>",
    "a<|endoftext|>b <|endoftext|>",
    "def f(x):\n    return x**2  # ok\n",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the files of the tokenizer, for a context of 48 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = make_tokenizer(48)
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def assert_same_tokens(tokenizer, text):
    ids = get_encoding().encode(text, allowed_special="all")
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == text


def test_vocabulary_and_merges_are_the_files_that_openai_published(folder):
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    vocab_as_published = json.dumps(vocab).encode()  # OpenAI's file is what json.dumps writes
    assert hashlib.sha256(vocab_as_published).hexdigest() == VOCAB_SHA256
    merges = (folder / "merges.txt").read_bytes()
    assert hashlib.sha256(merges).hexdigest() == MERGES_SHA256


def test_size_end_of_text_and_context_are_those_of_the_model(tokenizer):
    assert len(tokenizer) == 50257
    assert tokenizer.eos_token_id == 50256
    assert tokenizer.model_max_length == 48


@pytest.mark.parametrize("text", [*ODD_TEXTS, "".join(ODD_TEXTS)])
def test_tokens_of_odd_texts_are_those_of_tiktoken(text, tokenizer):
    assert_same_tokens(tokenizer, text)


def test_tokens_of_random_texts_are_those_of_tiktoken(tokenizer):
    @hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
    @hypothesis.given(strategies.text(strategies.characters(codec="utf-8")))
    def check(text):
        assert_same_tokens(tokenizer, text)

    check()
