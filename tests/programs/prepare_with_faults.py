"""Prepares again and again, with a fault one step later each time, then without a fault.

    python prepare_with_faults.py kill|full_disk OLD NEW OUT ARGUMENTS ...

A step is a flush, a renaming or a removal of a file. The fault is a SIGKILL, or an error as on a
full disk. OLD has the files that are there before, NEW those that the preparation must produce, and
OUT is the folder to work in. After each fault OUT must hold no token file but complete ones of OLD
or of NEW, and the same command must then produce NEW. Beside it prepare.json may stay, which is
removed last. Prints how many steps there are.
"""

import errno
import hashlib
import json
import mmap
import os
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import prepare_single_parquet  # noqa: E402
from onenight.errors import UserError  # noqa: E402

DONE = 0
FULL_DISK = 1  # the script ended with the sentence for a full disk
OTHER_ERROR = 2
has_failed = mmap.mmap(-1, 1)  # shared with the child processes: whether the fault has happened


def main(fault, old, new, out, *arguments):
    prepare_single_parquet.read_ranks()  # once for all child processes
    arguments = [*arguments, f"--out_dir={out}"]
    expected_codes = {"kill": (DONE, -signal.SIGKILL), "full_disk": (DONE, FULL_DISK)}[fault]
    for step in range(1, 100):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(old, out)
        has_failed[0] = 0
        code = prepare_in_child(arguments, fault, step)
        assert code in expected_codes, (step, code)
        check_files(step, read_files(out), read_files(old), read_files(new))

        assert prepare_in_child(arguments) == DONE, step
        assert read_files(out).items() >= read_files(new).items(), step
        assert read_files(out).keys() <= read_files(new).keys() | {"prepare.json"}, step
        if not has_failed[0]:
            print(step)
            return
    raise AssertionError("the preparation never ended")


def prepare_in_child(arguments, fault=None, step=0):
    """Prepare in a child process, with a fault at a step. Return its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    code = OTHER_ERROR
    try:
        if fault:
            fail_at(step, fault)
        prepare_single_parquet.main(arguments)
        code = DONE
    except UserError as error:
        if os.strerror(errno.ENOSPC) in str(error):
            code = FULL_DISK
    finally:
        os._exit(code)


def fail_at(step, fault):
    """Make the system calls of this process fail at a step."""
    done = 0

    def failing(function):
        def wrapper(*args, **kwargs):
            nonlocal done
            done += 1
            if done != step:
                return function(*args, **kwargs)
            has_failed[0] = 1
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return wrapper

    os.replace = failing(os.replace)
    os.fsync = failing(os.fsync)
    Path.unlink = failing(Path.unlink)


def check_files(step, found, old, new):
    """Assert that the token files are complete, of one preparation, and those of meta.json."""
    names = ("train.bin", "val.bin")
    there = {name: found[name] for name in names if name in found}
    assert there.items() <= old.items() or there.items() <= new.items(), step
    if "meta.json" in found:
        meta = json.loads(found["meta.json"])
        for split in ("train", "val"):
            digest = hashlib.sha256(found[f"{split}.bin"]).hexdigest()
            assert meta[split]["sha256"] == digest, step


def read_files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


main(*sys.argv[1:])
