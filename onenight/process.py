"""What a process shares with others: signals, the lock of a folder, and files that another may read
at any moment."""

import contextlib
import errno
import functools
import os
import shutil
import signal
import tempfile
from pathlib import Path

import filelock

from onenight.errors import UserError

# The signals that ask a process to end. Batch systems send SIGUSR1, SIGUSR2 or SIGXCPU some time
# before they kill it. SIGBREAK is Ctrl-Break on Windows, which lacks some of the others.
STOP_SIGNALS = (
    "SIGINT",
    "SIGTERM",
    "SIGHUP",
    "SIGQUIT",
    "SIGUSR1",
    "SIGUSR2",
    "SIGXCPU",
    "SIGBREAK",
)
STOPPING = b"\nstopping after this micro-batch; press Ctrl-C again to stop without saving\n"
PARTIAL = ".partial"  # ends the name of a file that is not yet complete
# What a disk says of an operation that it does not have.
NOT_OFFERED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}

# -----------------------------------------------------------------------------
# Signals


class StopSignal:
    """`requested`: whether one of STOP_SIGNALS has come since listen(). After the first one,
    Ctrl-C raises KeyboardInterrupt."""

    def __init__(self):
        self.requested = False
        # Of a process that a signal has stopped, as shells report it; 0 if there was none, because
        # another process was asked to stop.
        self.exit_status = 0

    def listen(self):
        """Catch the signals, without those that were ignored from the start, as nohup ignores
        SIGHUP."""
        for name in STOP_SIGNALS:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.handle)

    def handle(self, number: int, _frame):
        """Record the request; the signal handler. Trainer.accumulate() looks at it."""
        if self.requested:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # SIGXCPU comes every second
        self.requested = True
        self.exit_status = 128 + number
        # Not print(), which the signal may have interrupted. The terminal may be gone.
        with contextlib.suppress(OSError):
            os.write(2, STOPPING)


# -----------------------------------------------------------------------------
# The lock of a folder


@contextlib.contextmanager
def lock_folder(folder: Path):
    """Create a folder and lock it for the duration of the block.

    The lock is held by the operating system, not by the existence of a file, so it ends with the
    process, even with one that is killed. Raises UserError if another process holds it.
    """
    make_folder(folder)
    lock_file = folder / "lock"
    # A soft lock is a file that a killed process leaves behind, and that blocks every later run.
    lock = filelock.FileLock(lock_file, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"{folder}: another process is writing there")
    except (OSError, NotImplementedError):  # some network file systems have no locks
        print(f"{folder}: this disk has no locks; do not start a second run there")
    try:
        yield
    finally:
        if lock.is_locked:
            # While the lock is held, so that the file cannot be that of another process. Windows
            # refuses this; there release() deletes the file.
            with contextlib.suppress(OSError):
                lock_file.unlink()
            lock.release()


# -----------------------------------------------------------------------------
# Files


@contextlib.contextmanager
def replacing(path: Path, mode: str = "wb"):
    """Open a temporary file that replaces `path` when the block ends without an exception, so that
    at every moment `path` has the complete old or the complete new content. Raises OSError."""
    temporary = path.with_name(path.name + PARTIAL)
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            flush(file)
        rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def flush(file):
    """Make what was written to an open file survive a power cut, if the disk offers that. Raises
    OSError if the file cannot be written."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
        say_not_flushed()


def rename(source: Path, target: Path):
    """Rename a file or folder, replacing `target`. Raises OSError."""
    os.replace(source, target)
    # The new name survives a power cut once the folder is flushed. Windows needs no flush.
    if os.name != "posix":
        return
    try:
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError:  # the file is in place nevertheless
        say_not_flushed()


@functools.cache
def say_not_flushed():
    print("this disk cannot flush files: a power cut may cost more than the last minutes")


def make_folder(path: Path):
    """Create a folder and its parents. Raises UserError if it cannot be created or written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"{path}: cannot be written to ({error.strerror})")


def free_space(folder: Path) -> float:
    """Return the free bytes of a folder's disk, or infinity if it does not report its size."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return float("inf")
    return usage.free if usage.total else float("inf")
