"""GPT-2's byte pair encoding, by tiktoken. The rank file is in data/, so nothing is downloaded."""

import base64
import functools
import hashlib
import re
import threading
from pathlib import Path

import numpy as np
import tiktoken

from onenight.errors import UserError

RANKS_FILE = Path(__file__).parents[1] / "data" / "gpt2.tiktoken"
# The checksum that tiktoken itself requires of this file (r50k_base).
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
# tiktoken's pattern for GPT-2, except that the first four alternatives are in one group and have no
# possessive quantifiers. Neither changes a match, because nothing follows those alternatives, but
# tiktoken's regex engine then runs a single automaton for the four: English is encoded 1.3 times as
# fast (benchmarks/results/prepare.json).
PATTERN = r"""(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s"""
EOT = 50256  # the last id
EOT_TEXT = "<|endoftext|>"
VOCAB_SIZE = 50257

# A piece of a long run of whitespace. At least one character stays for the rest of the run, because
# the last one belongs to the word that follows.
SPACE_RUN = re.compile(r"\s{100000}(?=\s)")

of_this_thread = threading.local()


def get_encoding() -> tiktoken.Encoding:
    """Return this thread's own encoding, which is the same as tiktoken.get_encoding("gpt2").

    Threads that share one wait for a lock in its regex engine, and two cores are then no faster
    than one. Raises UserError if the rank file is missing or damaged.
    """
    if not hasattr(of_this_thread, "encoding"):
        of_this_thread.encoding = tiktoken.Encoding(
            "gpt2", pat_str=PATTERN, mergeable_ranks=read_ranks(), special_tokens={EOT_TEXT: EOT}
        )
    return of_this_thread.encoding


@functools.cache
def read_ranks() -> dict[bytes, int]:
    """Return the id of every token except end-of-text.

    Raises UserError if the rank file is missing or damaged.
    """
    raw = RANKS_FILE.read_bytes() if RANKS_FILE.is_file() else b""
    if hashlib.sha256(raw).hexdigest() != RANKS_SHA256:
        raise UserError(
            f"{RANKS_FILE}: missing or damaged; restore it with: git checkout {RANKS_FILE}"
        )
    ranks = {}
    for line in raw.splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    return ranks


def encode_document(text: str) -> np.ndarray:
    """Return the ids of one document, without end-of-text: uint32, shape (tokens,).

    Like tiktoken's encode_ordinary(), it takes special tokens in the text as plain text and turns
    lone surrogates into U+FFFD. Unlike it, it encodes a run of a million whitespace characters, at
    which tiktoken fails, in pieces of 100,000.
    """
    encode = functools.partial(get_encoding().encode_to_numpy, disallowed_special=())
    try:
        return encode(text)
    except UnicodeEncodeError:
        return encode_document(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    except ValueError:
        return np.concatenate([encode(piece) for piece in split_space_runs(text)])


def split_space_runs(text: str) -> list[str]:
    """Cut a text after every 100,000 characters of a longer run of whitespace."""
    cuts = [match.end() for match in SPACE_RUN.finditer(text)]
    starts = [0, *cuts]
    ends = [*cuts, len(text)]
    return [text[start:end] for start, end in zip(starts, ends)]


def encode_documents(documents: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of documents in UTF-8, each followed by end-of-text: uint16, shape (tokens,).

    Bytes that are not UTF-8 become U+FFFD; also returns which documents have any: bool, shape
    (documents,). All documents are encoded in one call of tiktoken, if possible, so that threads
    rarely wait for Python's lock.
    """
    is_replaced = np.zeros(len(documents), dtype=bool)
    try:
        text = EOT_TEXT.encode().join([*documents, b""]).decode()
        # There are more if <|endoftext|> occurs in a document, where it is plain text.
        if text.count(EOT_TEXT) == len(documents):
            ids = get_encoding().encode_to_numpy(text, allowed_special={EOT_TEXT})
            return ids.astype(np.uint16), is_replaced
    except ValueError:  # bytes that are not UTF-8, or a million spaces
        pass
    parts = [np.empty(0, np.uint16)]
    for number, document in enumerate(documents):
        # Encoded lone surrogates are kept here; encode_document() replaces them.
        try:
            text = document.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            text = document.decode("utf-8", "replace")
            is_replaced[number] = True
        parts += [encode_document(text).astype(np.uint16), np.array([EOT], np.uint16)]
    return np.concatenate(parts), is_replaced
