"""Atomic writing: a file is written beside its target, flushed to disk, and renamed over it."""

import contextlib
import os
import tempfile
import time
from pathlib import Path

from configurator import UserError

# Windows does not rename a file that is open: for a virus scanner, or for sample.py, which takes
# some seconds to read a checkpoint.
RENAME_ATTEMPTS = 300
RENAME_PAUSE_S = 0.1


@contextlib.contextmanager
def replacing(path: Path, mode: str = "wb", keep: Path | None = None):
    """Open a temporary file that replaces `path` when the block ends without an exception.

    Args:
        path: the file to create or replace.
        mode: the mode to open the temporary file in.
        keep: where the old file is moved to; by default it is overwritten.

    At every moment `path`, or else `keep`, holds the complete old or the complete new content. If
    anything fails, the temporary file is removed and the exception is passed on.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            replace_patiently(path, keep)
        rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def rename(source: Path, target: Path):
    """Rename a file or folder, replacing `target`, so that the new name survives a power cut."""
    replace_patiently(source, target)
    # The name is on disk once the folder is flushed. Windows cannot open a folder, and does not
    # need the flush.
    if os.name == "posix":
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def replace_patiently(source: Path, target: Path):
    """Rename a file or folder, replacing `target`; on Windows, wait for programs that have it
    open."""
    for attempt in range(1, RENAME_ATTEMPTS + 1):
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if os.name != "nt" or attempt == RENAME_ATTEMPTS:
                raise
            time.sleep(RENAME_PAUSE_S)


def make_folder(path: Path):
    """Create a folder and its parents. Raises UserError if it cannot be created or written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"{path}: cannot be written to ({error.strerror})") from None
