"""GPT-2's byte pair encoding by tiktoken, with the rank file in data/, so that nothing is downloaded."""

import base64
import functools
import hashlib
import re
import threading
from pathlib import Path

import numpy as np
import tiktoken

RANKS_FILE = Path(__file__).parents[1] / "data" / "gpt2.tiktoken"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # as tiktoken demands of r50k_base
# tiktoken's pattern for GPT-2, but with the first four alternatives in one group and without possessive quantifiers.
# Neither changes a match, because nothing follows those alternatives, and tiktoken's regex engine then runs one
# automaton for the four: 1.3 times as fast on English (benchmarks/results/prepare.json).
PATTERN = r"""(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s"""
EOT = 50256  # <|endoftext|>, the last id
EOT_TEXT = "<|endoftext|>"
VOCAB_SIZE = 50257

# A piece of a long run of whitespace. The rest keeps at least one, because the last one belongs to the word after it.
SPACE_RUN = re.compile(r"\s{100000}(?=\s)")

of_this_thread = threading.local()


def get_encoding() -> tiktoken.Encoding:
    """The same encoding as tiktoken.get_encoding("gpt2"), one for each thread: threads that share one wait for a lock
    in its regex engine, and two busy cores are then no faster than one. Raises as read_ranks() does."""
    if not hasattr(of_this_thread, "encoding"):
        of_this_thread.encoding = tiktoken.Encoding(
            "gpt2", pat_str=PATTERN, mergeable_ranks=read_ranks(), special_tokens={EOT_TEXT: EOT}
        )
    return of_this_thread.encoding


@functools.cache
def read_ranks() -> dict[bytes, int]:
    """The id of every token but end-of-text. Raises SystemExit if the rank file is missing or damaged."""
    raw = RANKS_FILE.read_bytes() if RANKS_FILE.is_file() else b""
    if hashlib.sha256(raw).hexdigest() != RANKS_SHA256:
        raise SystemExit(f"{RANKS_FILE}: missing or damaged; restore it with: git checkout {RANKS_FILE}")
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, raw.splitlines())}


def encode_document(text: str) -> np.ndarray:
    """The ids of one document, without end-of-text: uint32, shape (tokens,). As tiktoken's encode_ordinary: special
    tokens in the text are plain text, lone surrogates become U+FFFD. A run of a million whitespace characters, at which
    tiktoken fails, is encoded in pieces of 100,000."""
    encode = functools.partial(get_encoding().encode_to_numpy, disallowed_special=())
    try:
        return encode(text)
    except UnicodeEncodeError:
        return encode_document(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    except ValueError:
        cuts = [match.end() for match in SPACE_RUN.finditer(text)]
        return np.concatenate([encode(text[start:end]) for start, end in zip([0, *cuts], [*cuts, None])])


def encode_documents(documents: list[bytes]) -> np.ndarray:
    """The ids of the documents (UTF-8), each followed by end-of-text: uint16, shape (tokens,). One call of tiktoken for
    all of them, so that threads seldom wait for Python's lock. Bytes that are not UTF-8 become U+FFFD."""
    try:
        text = EOT_TEXT.encode().join([*documents, b""]).decode()
        if text.count(EOT_TEXT) == len(documents):  # else <|endoftext|> stands in a document
            return get_encoding().encode_to_numpy(text, allowed_special={EOT_TEXT}).astype(np.uint16)
    except ValueError:  # bytes that are not UTF-8, or a million spaces
        pass
    ids = [part for document in documents for part in (encode_document(decode(document)), [EOT])]
    return np.concatenate([np.empty(0), *ids], dtype=np.uint16, casting="unsafe")


def decode(document: bytes) -> str:
    """The text of UTF-8 bytes. Encoded lone surrogates stay; everything else that is not UTF-8 becomes U+FFFD."""
    try:
        return document.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return document.decode("utf-8", "replace")
