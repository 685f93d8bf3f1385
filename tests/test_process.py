"""process.py: signals, the lock of a folder, and files that are complete at every moment."""

import errno
import os
import shutil
import signal
import stat
import subprocess
from pathlib import Path

import pytest

from helpers import ROOT, read_files, start, wait_for_line
from onenight.errors import UserError
from onenight.process import free_space, lock_folder, make_folder, replacing

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals")


def start_program(code, *arguments):
    """Start python with the code of a program that imports the project."""
    return start(["-c", code], *arguments, cwd=ROOT, stdin=subprocess.PIPE)


def end(child):
    """Wait for a child process. Return its exit status and what it printed."""
    stdout, stderr = child.communicate(timeout=60)
    assert "Traceback" not in stderr
    return child.returncode, stdout.split()


# -----------------------------------------------------------------------------
# Signals

# Waits for a stop, and then for a line of its input.
LISTENER = """
import sys, time
from onenight.process import StopSignal

stop = StopSignal()
stop.listen()
print("ready")
try:
    while not stop.requested:
        time.sleep(0.01)
    print("requested")
    sys.stdin.readline()
except KeyboardInterrupt:
    print("interrupted")
sys.exit(stop.exit_status)
"""


def start_listener(beginning=""):
    child = start_program(beginning + LISTENER)
    wait_for_line(child, "ready")
    return child


@posix
@pytest.mark.parametrize(
    "name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU"]
)
def test_a_signal_requests_a_stop_and_the_exit_status_names_it(name):
    child = start_listener()
    number = getattr(signal, name)
    child.send_signal(number)
    wait_for_line(child, "requested")
    # SIGXCPU comes every second, and other signals may be sent to be sure.
    for later in (number, signal.SIGTERM):
        if later != signal.SIGINT:
            child.send_signal(later)
    assert end(child) == (128 + number, [])


@posix
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_after_a_request_interrupts(first):
    child = start_listener()
    child.send_signal(first)
    wait_for_line(child, "requested")
    child.send_signal(signal.SIGINT)
    assert end(child) == (128 + first, ["interrupted"])


@posix
def test_a_request_is_recorded_when_the_terminal_is_gone():
    child = start_listener()
    child.stderr.close()
    child.send_signal(signal.SIGHUP)
    wait_for_line(child, "requested")
    child.stdin.close()
    assert child.wait(timeout=60) == 128 + signal.SIGHUP


@posix
def test_a_signal_that_was_ignored_from_the_start_stays_ignored():
    """As nohup does with SIGHUP."""
    child = start_listener("import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n")
    child.send_signal(signal.SIGHUP)
    child.send_signal(signal.SIGTERM)
    wait_for_line(child, "requested")
    assert end(child) == (128 + signal.SIGTERM, [])


# -----------------------------------------------------------------------------
# The lock

HOLDER = """
import sys
from pathlib import Path
from onenight.process import lock_folder

with lock_folder(Path(sys.argv[1])):
    print("locked")
    sys.stdin.readline()
"""


def test_a_second_process_is_refused_until_the_first_has_ended_or_is_killed(tmp_path):
    folder = tmp_path / "new" / "folder"
    for is_killed in (True, False):
        holder = start_program(HOLDER, folder)
        wait_for_line(holder, "locked")
        with pytest.raises(UserError) as refused, lock_folder(folder):
            pass
        assert str(folder) in str(refused.value)
        assert str(holder.pid) in str(refused.value)
        if is_killed:
            holder.kill()
            holder.communicate()
            assert read_files(folder)  # its files are left, and harmless
        else:
            assert end(holder) == (0, [])
    assert read_files(folder) == {}
    with lock_folder(folder):
        assert read_files(folder)
    assert read_files(folder) == {}


def test_the_lock_is_released_when_the_block_raises(tmp_path):
    with pytest.raises(ZeroDivisionError), lock_folder(tmp_path):
        1 / 0  # noqa: B018
    with lock_folder(tmp_path):
        pass


def test_without_room_for_the_name_of_the_holder_the_lock_still_holds(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", fail)
    with lock_folder(tmp_path), pytest.raises(UserError), lock_folder(tmp_path):
        pass


@posix
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_disk_without_locks_is_used_and_the_file_of_another_run_does_not_block(
    number, tmp_path, monkeypatch, capsys
):
    import fcntl

    def fail(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    (tmp_path / "lock").write_text("1234\nanother-host\n")
    with lock_folder(tmp_path):
        (tmp_path / "result").write_text("done")
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert read_files(tmp_path)["result"] == b"done"


def test_a_folder_that_cannot_be_created_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(UserError, match="file"):
            make_folder(folder)


# -----------------------------------------------------------------------------
# Files


def test_a_file_is_replaced_when_the_block_ends(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert read_files(tmp_path) == {"file": b"new"}
    with replacing(path, "w") as file:
        file.write("ü")
    assert read_files(tmp_path) == {"file": "ü".encode()}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_block_that_raises_changes_nothing(error, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error), replacing(path) as file:
        file.write(b"half of the new")
        raise error
    assert read_files(tmp_path) == {"file": b"old"}


# Replaces a file, and is killed in the call of os.NAME that has this number.
KILLED = """
import os, signal, sys
from pathlib import Path
from onenight.process import replacing

name, number, path = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
function = getattr(os, name)
calls = 0

def killing(*arguments):
    global calls
    calls += 1
    if calls == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments)

setattr(os, name, killing)
with replacing(path) as file:
    file.write(b"new" * 100_000)
    if name == "getpid":
        file.flush()
        os.getpid()
"""


@posix
@pytest.mark.parametrize(
    "name, number, content",
    [
        ("getpid", 1, b"old"),  # in the block
        ("fsync", 1, b"old"),  # before the file is flushed
        ("replace", 1, b"old"),  # before it is renamed
        ("fsync", 2, b"new" * 100_000),  # before the folder is flushed
    ],
)
def test_a_process_that_is_killed_leaves_the_old_or_the_new_content(
    name, number, content, tmp_path
):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    child = start_program(KILLED, name, number, path)
    assert end(child)[0] == -signal.SIGKILL
    assert path.read_bytes() == content
    with replacing(path) as file:
        file.write(b"next")
    assert read_files(tmp_path) == {"file": b"next"}


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


# Replaces a file twice, where os.fsync() of files, or of folders, fails with an error number.
NO_FLUSH = """
import os, stat, sys
from pathlib import Path
from onenight.process import replacing

of_folders, number, path = sys.argv[1] == "folder", int(sys.argv[2]), Path(sys.argv[3])
fsync = os.fsync

def fail(descriptor):
    if stat.S_ISDIR(os.fstat(descriptor).st_mode) == of_folders:
        raise OSError(number, os.strerror(number))
    fsync(descriptor)

os.fsync = fail
for content in (b"first", b"second"):
    with replacing(path) as file:
        file.write(content)
"""


@posix
@pytest.mark.parametrize(
    "kind, number",
    [("folder", errno.EINVAL), ("file", errno.EINVAL), ("file", errno.ENOSYS)],
)
def test_a_disk_that_has_no_flush_is_used_with_one_line(kind, number, tmp_path):
    stdout, stderr = start_program(NO_FLUSH, kind, number, tmp_path / "file").communicate()
    assert read_files(tmp_path) == {"file": b"second"}, stderr
    assert len(stdout.splitlines()) == 1


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_file_that_does_not_reach_the_disk_is_an_error(number, tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError) as failed, replacing(path) as file:
        file.write(b"new")
    assert failed.value.errno == number
    assert read_files(tmp_path) == {"file": b"old"}


def test_the_free_space_of_a_disk(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    # Other programs write meanwhile, hardly a tenth of the disk.
    assert free_space(tmp_path) == pytest.approx(usage.free, abs=usage.total / 10)
    assert free_space(tmp_path / "missing") == float("inf")
    # Some network file systems report a size of 0.
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(total=0, free=0))
    assert free_space(tmp_path) == float("inf")
