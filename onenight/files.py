"""Files that are either whole or absent: written to a temporary file, flushed to the disk, renamed. And the few words
that all scripts use for errors and durations."""

import contextlib
import json
import os
import socket
import tempfile
import time
from pathlib import Path

import filelock


@contextlib.contextmanager
def replacing(path: Path, mode: str = "wb", keep: Path | None = None):
    """Opens a temporary file beside `path`, which replaces it atomically when the block ends without an exception; the
    old file stays as `keep`. At every moment `path`, or else `keep`, holds all of the old or all of the new content.
    Raises OSError, and leaves no temporary file."""
    temporary = path.with_name(path.name + ".partial")
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def rename(source: Path, target: Path):
    """Renames, replacing `target`, and flushes the folder, so that the new name survives a power cut."""
    for attempt in range(20):
        try:
            os.replace(source, target)
            break
        except PermissionError:  # on Windows a virus scanner may hold the file for a moment
            if os.name != "nt" or attempt == 19:
                raise
            time.sleep(0.1)
    if os.name == "posix":  # Windows cannot open a folder, and does not need the flush
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def make_folder(path: Path):
    """Creates the folder and its parents. Raises SystemExit if it cannot be created or written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise SystemExit(f"{path}: cannot be written to ({error.strerror})") from None


@contextlib.contextmanager
def lock_folder(folder: Path):
    """Makes the folder, and lets no other process in here until the block ends or this process does, however it ends:
    the system's lock counts, not its file. Raises SystemExit if another has it, or the folder cannot be written to."""
    make_folder(folder)
    lock, holder = filelock.FileLock(folder / "lock"), folder / "lock.txt"  # Windows lets nobody read a locked file
    try:
        lock.acquire(timeout=0)
        holder.write_text(f"(process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M')}) ")
    except filelock.Timeout:
        who = holder.read_text() if os.access(holder, os.R_OK) else ""
        raise SystemExit(f"{folder}: another run {who}is writing there; wait for it, or choose another --out_dir")
    except (OSError, NotImplementedError) as error:  # some network disks have no locks
        print(f"{folder}: cannot be locked ({getattr(error, 'strerror', error)}), so start no second run there")
    try:
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):
                holder.unlink()
                os.unlink(folder / "lock")  # while it is held, so that nobody else's is lost; Windows does it below
            lock.release()


def read_json(path: Path, shape: dict) -> dict:
    """The JSON object in a file; {} if there is no such file. Raises SystemExit if it cannot be read, or a key that is
    in `shape` does not fit."""
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        for key in content.keys() & shape.keys():
            if not fits(content[key], shape[key]):
                raise ValueError(f"{key} cannot be {json.dumps(content[key]):.60}")
        return content
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, OSError, RecursionError) as error:
        raise SystemExit(f"{path}: cannot be read ({error}); correct it, or delete it and prepare again") from None


def fits(value, shape) -> bool:
    """Whether a JSON value is of a type, in a range, or a list or dict of such; any key of a dict may be missing."""
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(fits(value[key], shape[key]) for key in value.keys() & shape.keys())
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(item, shape[0]) for item in value)
    return type(value) is int and value in shape if isinstance(shape, range) else isinstance(value, shape)


def write_json(path: Path, content: dict):
    """Replaces the file atomically. Raises OSError."""
    with replacing(path, "w") as file:
        file.write(json.dumps(content, indent=1) + "\n")


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def where(path: Path) -> str:
    """' in FOLDER', the working directory in which a relative path was looked for; '' for an absolute path."""
    return "" if path.is_absolute() else f" in {Path.cwd()}"


def duration(seconds: float) -> str:
    """5h 07m, 12m 30s or 8s."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h {minutes % 60:02}m"
    return f"{minutes}m {seconds:02}s" if minutes else f"{seconds}s"
