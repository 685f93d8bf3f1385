"""A reference for the preparation: tiktoken's own pattern and loader, and numpy."""

import os
from pydoc_data.topics import topics
from unittest import mock

import numpy as np
import tiktoken
from tiktoken.load import load_tiktoken_bpe
from tiktoken_ext import openai_public

from helpers import ROOT

# An empty TIKTOKEN_CACHE_DIR makes tiktoken read the file itself, not a copy in the system's cache.
with mock.patch.dict(os.environ, TIKTOKEN_CACHE_DIR=""):
    RANKS = load_tiktoken_bpe(str(ROOT / "data" / "gpt2.tiktoken"))
GPT2 = tiktoken.Encoding(
    "reference",
    pat_str=openai_public.r50k_pat_str,
    mergeable_ranks=RANKS,
    special_tokens={"<|endoftext|>": 50256},
)

PARAGRAPHS = [paragraph for topic in topics.values() for paragraph in topic.split("\n\n")]
UNUSUAL = [None, "", " ", "Grüße aus Köln", "日本語のテキスト 😀", "<|endoftext|>", "a\x00b\r\n"]
UNUSUAL += PARAGRAPHS[:50]
TEXTS = (PARAGRAPHS + UNUSUAL * 50)[:5000]  # 150,000 tokens


def count_tokens(text):
    """Return the number of tokens of a text, without end-of-text; 0 for None."""
    return len(GPT2.encode_ordinary(text or ""))


def reference_bins(texts, val_every=200):
    """Return the bytes that train.bin and val.bin must have."""
    documents = [text for text in texts if text]
    ids = [np.array([*GPT2.encode_ordinary(text), 50256], dtype="<u2") for text in documents]
    val = ids[::val_every]
    train = [document for number, document in enumerate(ids) if number % val_every != 0]
    return np.concatenate(train).tobytes(), np.concatenate(val).tobytes()


def read_bins(out_dir):
    """Return the bytes of train.bin and val.bin."""
    return (out_dir / "train.bin").read_bytes(), (out_dir / "val.bin").read_bytes()
