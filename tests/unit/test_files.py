"""onenight/system/files.py: a file is replaced completely or not at all."""

import os

import pytest

from configurator import UserError
from helpers import read_files
from onenight.system.files import make_folder, rename, replacing


def test_a_file_is_replaced_when_the_block_ends(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert read_files(tmp_path) == {"file": b"new"}


def test_the_old_file_can_be_kept_under_another_name(tmp_path):
    path = tmp_path / "file"
    for content in ("first", "second", "third"):
        with replacing(path, "w", keep=tmp_path / "previous") as file:
            file.write(content)
    assert read_files(tmp_path) == {"file": b"third", "previous": b"second"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_block_that_raises_changes_nothing(error, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error), replacing(path, keep=tmp_path / "previous") as file:
        file.write(b"half of the new")
        raise error
    assert read_files(tmp_path) == {"file": b"old"}


def test_the_content_is_on_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    calls = []

    def record(name):
        original = getattr(os, name)

        def call(*arguments):
            calls.append(name)
            return original(*arguments)

        monkeypatch.setattr(os, name, call)

    record("fsync")
    record("replace")
    with replacing(tmp_path / "file") as file:
        file.write(b"new")
    expected = ["fsync", "replace", "fsync"] if os.name == "posix" else ["fsync", "replace"]
    assert calls == expected


@pytest.mark.parametrize("failures, succeeds", [(299, True), (300, False)])
def test_on_windows_a_rename_is_tried_for_half_a_minute(tmp_path, monkeypatch, failures, succeeds):
    replace = os.replace
    pauses = []
    attempts = []

    def replace_later(source, target):
        attempts.append(source)
        if len(attempts) <= failures:
            raise PermissionError
        replace(source, target)

    (tmp_path / "source").write_text("text")
    monkeypatch.setattr("onenight.system.files.os.replace", replace_later)
    monkeypatch.setattr("onenight.system.files.os.name", "nt")
    monkeypatch.setattr("onenight.system.files.time.sleep", pauses.append)
    if succeeds:
        rename(tmp_path / "source", tmp_path / "target")
    else:
        with pytest.raises(PermissionError):
            rename(tmp_path / "source", tmp_path / "target")
    assert sum(pauses) == pytest.approx(29.9)


def test_a_folder_is_created_with_its_parents(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot be written to"):
        make_folder(tmp_path / "file")
