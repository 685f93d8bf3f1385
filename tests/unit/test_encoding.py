"""The encoding of bytes that are not UTF-8, by their beginning."""

import bz2
import gzip
import lzma
import random

import pyarrow as pa
import pytest

from onenight.data.encoding import compression, likely_encoding

FRENCH = "Où est passée la forêt ? Là-bas, près du château où l'été fut très doux. " * 3
QUOTED = "“It’s naïve,” she said – and left. " * 3
RUSSIAN = "Съешь же ещё этих мягких французских булок, да выпей чаю. " * 3
BINARY = random.Random(0).randbytes(5000)
ENCODED = {
    "Latin-1": FRENCH.encode("latin-1"),
    "Windows-1252": QUOTED.encode("cp1252"),
    "UTF-16": FRENCH.encode("utf-16"),
    "UTF-16LE": FRENCH.encode("utf-16-le"),
    "UTF-16BE": FRENCH.encode("utf-16-be"),
    "UTF-32": FRENCH.encode("utf-32"),
    "UTF-32LE": FRENCH.encode("utf-32-le"),
    "UTF-32BE": FRENCH.encode("utf-32-be"),
    "an unknown encoding": RUSSIAN.encode("cp1251"),
    "UTF-8 with damaged characters": RUSSIAN.encode()[1:-3],
    "binary data ": BINARY[:100] + bytes(2000),
    "text with NULs": b"a\0b, and some more text",
    "binary data": BINARY,
    "gzip data": gzip.compress(BINARY),
    "bz2 data": bz2.compress(BINARY),
    "xz data": lzma.compress(BINARY),
    "zstd data": pa.compress(BINARY, "zstd", asbytes=True),
}


@pytest.mark.parametrize("name, document", ENCODED.items(), ids=ENCODED)
def test_the_encoding_is_named(name, document):
    assert likely_encoding(document) == name.strip()


@pytest.mark.parametrize("document", [b"\0", b"\0\0\0", b"a\0", b"\xff", b"\xe9t\xe9"])
def test_a_very_short_document_has_a_name_too(document):
    assert likely_encoding(document)


def test_text_is_not_compressed():
    assert compression(FRENCH.encode()) is None
