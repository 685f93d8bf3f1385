"""Recognizes bytes that are not text in UTF-8, by their beginning."""

import codecs

PROBE_BYTES = 1 << 12
# What the files of compression programs begin with.
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"BZh": "bz2",
    b"\xfd7zXZ\x00": "xz",
    b"PK\x03\x04": "zip",
}
# UTF-32's mark begins with that of UTF-16.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
UNKNOWN = "an unknown encoding"
DAMAGED_UTF8 = "UTF-8 with damaged characters"
# The encodings that likely_encoding() returns by the names that Python knows too.
PYTHON_NAMES = ("UTF-16", "UTF-16LE", "UTF-16BE", "UTF-32", "UTF-32LE", "UTF-32BE")
PYTHON_NAMES += ("Latin-1", "Windows-1252")
CONTROL_BYTES = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b"))


def compression(start: bytes) -> str | None:
    """Return the program that compressed a file with this beginning, or None."""
    return starts_with(start, COMPRESSED)


def starts_with(start: bytes, names: dict[bytes, str]) -> str | None:
    """Return the name of the first magic number that `start` begins with, or None."""
    for magic, name in names.items():
        if start.startswith(magic):
            return name
    return None


def likely_encoding(document: bytes) -> str:
    """Return in words how bytes are probably encoded that are not UTF-8, or that contain NULs."""
    start = document[:PROBE_BYTES]
    codec = compression(start)
    if codec:
        return f"{codec} data"
    marked = starts_with(start, BYTE_ORDER_MARKS)
    if marked:
        return marked
    if b"\0" in start:
        return encoding_by_nuls(start)
    if has_controls(start):
        return "binary data"
    return encoding_by_high_bytes(start)


def encoding_by_nuls(start: bytes) -> str:
    """Return the encoding of bytes with NULs: English in UTF-16 has one in every second place."""
    if len(start) < 8:
        return "text with NULs"
    pairs = len(start) / 2
    even = start[0::2].count(0) / pairs
    odd = start[1::2].count(0) / pairs
    encoding = None
    if even + odd > 1.2:
        encoding = "UTF-32LE" if start[0] else "UTF-32BE"
    elif odd > 0.4 and even < 0.1:
        encoding = "UTF-16LE"
    elif even > 0.4 and odd < 0.1:
        encoding = "UTF-16BE"
    if encoding and "\0" not in start.decode(encoding, "replace"):
        return encoding
    return "binary data" if has_controls(start.replace(b"\0", b"")) else "text with NULs"


def has_controls(start: bytes) -> bool:
    """Return whether more than a hundredth of the bytes are control characters."""
    controls = len(start) - len(start.translate(None, CONTROL_BYTES))
    return controls > len(start) / 100


def encoding_by_high_bytes(start: bytes) -> str:
    """Return the encoding of text without NULs, from its bytes above 127."""
    high = len(start) - len(start.decode("ascii", "ignore"))
    lost = len(start) - len(start.decode("utf-8", "ignore").encode())
    if lost < high / 4:
        return DAMAGED_UTF8
    if high > 0.3 * len(start):
        return UNKNOWN
    # Only Windows-1252 has characters, such as curly quotes, in this range.
    has_quotes = any(0x80 <= byte < 0xA0 for byte in start)
    return "Windows-1252" if has_quotes else "Latin-1"
