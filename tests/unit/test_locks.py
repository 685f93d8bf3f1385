"""onenight/system/locks.py: one process at a time in a folder (see faults/test_second_run.py)."""

import errno
import os

import filelock
import pytest

from configurator import UserError
from helpers import read_files
from onenight.system.locks import lock_folder


def test_a_locked_folder_is_refused_and_the_message_names_the_holder(tmp_path):
    folder = tmp_path / "new" / "folder"
    with lock_folder(folder):
        holder = (folder / "lock.txt").read_text()
        assert holder.startswith(f"(process {os.getpid()} on ")
        with pytest.raises(UserError) as refused, lock_folder(folder):
            pass
        assert str(refused.value) == (
            f"{folder}: another run {holder}is writing there; "
            "wait until it ends, or choose another --out_dir"
        )
    assert read_files(folder) == {}
    with lock_folder(folder):
        pass


def test_without_room_for_the_name_of_the_holder_the_lock_still_holds(
    tmp_path, monkeypatch, capsys
):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("onenight.system.locks.Path.write_text", fail)
    with (
        lock_folder(tmp_path),
        pytest.raises(UserError, match="another run is writing there"),
        lock_folder(tmp_path),
    ):
        pass
    assert capsys.readouterr().out == ""


def test_the_lock_is_released_when_the_block_raises(tmp_path):
    with pytest.raises(ZeroDivisionError), lock_folder(tmp_path):
        1 / 0  # noqa: B018
    with lock_folder(tmp_path):
        pass


def test_a_folder_that_cannot_be_created_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="file: cannot be written to"),
        lock_folder(tmp_path / "file"),
    ):
        pass


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)), os.strerror(errno.ENOLCK)),
        (NotImplementedError("no flock"), "no flock"),
    ],
)
def test_a_disk_without_locks_is_used_with_a_warning(error, reason, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    with lock_folder(tmp_path):
        (tmp_path / "result").write_text("done")
    assert capsys.readouterr().out == (
        f"{tmp_path}: cannot be locked ({reason}); do not start a second run there\n"
    )
    assert read_files(tmp_path) == {"result": b"done"}


@pytest.mark.skipif(os.name != "posix", reason="Windows has no flock")
def test_on_a_disk_without_flock_the_file_of_a_killed_run_does_not_block(
    tmp_path, monkeypatch, capsys
):
    """filelock would read the name of another host in it, and wait for that host's process."""
    import fcntl

    def fail(*arguments):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", fail)
    (tmp_path / "lock").write_text("1234\nanother-host\n")
    with lock_folder(tmp_path):
        pass
    assert capsys.readouterr().out == (
        f"{tmp_path}: cannot be locked ({os.strerror(errno.ENOSYS)}); "
        "do not start a second run there\n"
    )
