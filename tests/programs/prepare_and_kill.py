"""Prepares again and again, killed one step later each time, then undisturbed.

    python prepare_and_kill.py OLD NEW OUT ARGUMENTS ...

A step is a flush, a renaming or a removal of a file. OLD has the files that are there before, NEW
those that the preparation must produce, and OUT is the folder to work in. After each kill OUT must
hold no token file but complete ones of OLD or of NEW, and the same command must then produce NEW.
Beside it prepare.json may stay, which is removed last. Prints how many steps there are.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[2]))

import prepare_single_parquet  # noqa: E402
from onenight import tokenizer  # noqa: E402


def main(old, new, out, *arguments):
    # Once for all child processes and their threads.
    tokenizer.of_this_thread = SimpleNamespace(encoding=tokenizer.get_encoding())
    arguments = [*arguments, f"--out_dir={out}"]
    for step in range(1, 100):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(old, out)
        code = prepare_in_child(arguments, step)
        assert code in (0, -signal.SIGKILL), (step, code)
        check_files(step, read_files(out), read_files(old), read_files(new))

        assert prepare_in_child(arguments) == 0, step
        assert read_files(out).items() >= read_files(new).items(), step
        assert read_files(out).keys() <= read_files(new).keys() | {"prepare.json"}, step
        if code == 0:
            print(step)
            return
    raise AssertionError("the preparation never ended")


def prepare_in_child(arguments, step=None):
    """Prepare in a child process that is killed at a step. Return its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    code = 1
    try:
        kill_at(step)
        prepare_single_parquet.main(arguments)
        code = 0
    finally:
        os._exit(code)


def kill_at(step):
    done = 0

    def killing(function):
        def wrapper(*args, **kwargs):
            nonlocal done
            done += 1
            if done == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    os.replace = killing(os.replace)
    os.fsync = killing(os.fsync)
    Path.unlink = killing(Path.unlink)


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
