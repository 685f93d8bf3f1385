"""onenight/system/cache_folders.py: a cache folder that cannot be written to is replaced."""

import os
import tempfile
from pathlib import Path

import pytest

from onenight.system.cache_folders import use_cache_folder

pwd = pytest.importorskip("pwd", reason="Windows has none")


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TEST_CACHE", "")  # restored after the test
    return folder


def test_a_folder_that_can_be_written_to_is_used(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TEST_CACHE", str(tmp_path / "new" / "cache"))
    use_cache_folder("TEST_CACHE", "/proc/none")
    assert os.environ["TEST_CACHE"] == str(tmp_path / "new" / "cache")
    assert capsys.readouterr().out == ""


def test_without_the_variable_the_usual_folder_is_used(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    use_cache_folder("TEST_CACHE", "~/cache")
    assert (tmp_path / "cache").is_dir()
    assert os.environ["TEST_CACHE"] == ""
    assert capsys.readouterr().out == ""


def test_a_folder_that_cannot_be_created_is_replaced_by_a_temporary_one(
    tmp_path, temporary_folder, monkeypatch, capsys
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TEST_CACHE", str(tmp_path / "file" / "cache"))
    use_cache_folder("TEST_CACHE", "unused")
    replacement = Path(os.environ["TEST_CACHE"])
    assert replacement.is_dir()
    assert replacement.parent == temporary_folder
    line = capsys.readouterr().out
    assert line.startswith(f"{tmp_path / 'file' / 'cache'}: cannot be written to (")
    assert line.endswith(f"): using TEST_CACHE={replacement}\n")


def test_without_a_home_directory_a_temporary_folder_is_used(monkeypatch, capsys):
    def fail(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", fail)
    use_cache_folder("TEST_CACHE", "~")
    replacement = os.environ["TEST_CACHE"]
    assert capsys.readouterr().out == (
        f"there is no home directory: using TEST_CACHE={replacement}\n"
    )
