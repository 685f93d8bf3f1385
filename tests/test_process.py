"""process.py: files that are complete at every moment.

The signals, the lock of a folder, and kills while a file is written are in tests/faults.
"""

import os
import stat

import pytest

from helpers import read_files
from onenight.process import replacing


def test_a_block_that_is_interrupted_changes_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"half of the new")
        raise KeyboardInterrupt
    assert read_files(tmp_path) == {"file": b"old"}


def test_the_content_is_on_the_disk_before_the_name_and_the_name_before_the_end(
    tmp_path, monkeypatch
):
    """What a power cut leaves, which no test can produce, depends on this order."""
    calls = []

    def record(name):
        original = getattr(os, name)

        def call(*arguments):
            is_folder = name == "fsync" and stat.S_ISDIR(os.fstat(arguments[0]).st_mode)
            calls.append("fsync of the folder" if is_folder else name)
            return original(*arguments)

        monkeypatch.setattr(os, name, call)

    record("fsync")
    record("replace")
    with replacing(tmp_path / "file") as file:
        file.write(b"new")
    expected = ["fsync", "replace", "fsync of the folder"]
    assert calls == (expected if os.name == "posix" else expected[:2])
