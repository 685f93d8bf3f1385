"""Locks that let only one process at a time write to a folder."""

import contextlib
import os
import socket
import time
from pathlib import Path

import filelock

from configurator import UserError
from onenight.system.files import make_folder

LOCK = "lock"  # the file in the folder, which exists while the lock is held, or after a kill


@contextlib.contextmanager
def lock_folder(folder: Path):
    """Create a folder and lock it for the duration of the block.

    The lock is held by the operating system, not by the existence of a file, so it ends with the
    process, even with one that is killed. Raises UserError if another process holds the lock or if
    the folder cannot be written to. On a disk without such locks it prints a warning and goes on.
    """
    make_folder(folder)
    lock_file = folder / LOCK
    holder_file = folder / "lock.txt"  # apart, because Windows does not let a locked file be read
    # A soft lock is a file that a killed process leaves behind, and that blocks every later run.
    lock = filelock.FileLock(lock_file, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        holder = holder_file.read_text() if os.access(holder_file, os.R_OK) else ""
        raise UserError(
            f"{folder}: another run {holder}is writing there; "
            "wait until it ends, or choose another --out_dir"
        )
    except (OSError, NotImplementedError) as error:  # some network file systems have no locks
        reason = getattr(error, "strerror", error)
        print(f"{folder}: cannot be locked ({reason}); do not start a second run there")
    if lock.is_locked:
        started = time.strftime("%Y-%m-%d %H:%M")
        with contextlib.suppress(OSError):  # a full disk
            holder_file.write_text(
                f"(process {os.getpid()} on {socket.gethostname()} since {started}) "
            )

    try:
        yield
    finally:
        if lock.is_locked:
            # The files are deleted while the lock is held, so that they cannot be those of another
            # process. Windows refuses this for the lock file, which release() deletes there.
            with contextlib.suppress(OSError):
                holder_file.unlink()
                lock_file.unlink()
            lock.release()
