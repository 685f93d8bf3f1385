"""
Files that are whole or absent: written beside their name, flushed to the disk, renamed.
"""

import contextlib
import os
import tempfile
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path, mode: str = "wb", keep: Path | None = None):
    """
    Opens a file beside `path` that takes its place when the block ends well; the old one stays as `keep`. Whatever
    happens, and at every moment, `path`, or else `keep`, holds either all of the old or all of the new. Raises
    OSError, and leaves nothing beside.
    """
    beside = path.with_name(path.name + ".partial")
    try:
        with open(beside, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        rename(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def rename(source: Path, target: Path):
    """Renames over `target`, and flushes the folder, so that a power cut cannot undo it."""
    os.replace(source, target)
    if os.name == "posix":  # Windows cannot open a folder, and needs no flush
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def make_folder(path: Path):
    """Makes the folder and its parents. Raises SystemExit if it cannot be made or written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise SystemExit(f"{path}: cannot be written to ({error.strerror})") from None
