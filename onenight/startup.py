"""What every script does first, and how it ends.

Importing this sets what torch reads when it is imported, and how glibc keeps memory. So it stands
before the other imports. run_script() then calls the script's main().
"""

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Callable

from onenight.errors import UserError, first_line

# Whether the GPU is run by Windows' driver, as it also is in WSL2.
WINDOWS_GPU_DRIVER = sys.platform == "win32" or "microsoft" in platform.release().lower()

# Parameters of glibc's mallopt(), from malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4

# By default OpenMP's threads spin for 300,000 rounds before they sleep, which is slow on a busy
# machine (see benchmarks/LOG.md).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

LIBC = None  # glibc, if this is the C library here

if sys.platform == "linux":
    # Micro-batches of different sizes, as in evaluation, would otherwise fragment GPU memory.
    # Expandable segments fail with Windows' driver on some cards (pytorch issue 192330).
    if not WINDOWS_GPU_DRIVER:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

    # glibc would return large blocks, such as the logits, to the system after each step and request
    # them again for the next one. Other C libraries have no mallopt().
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        LIBC = libc


class Output:
    """A text stream that goes silent, instead of raising, when its terminal, pipe or disk fails: a
    closed terminal must not end a run."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str):
        self.attempt(self.stream.write, text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, action: Callable, *arguments):
        """Call `action`. If it fails, send this output and all later output to the null device."""
        try:
            action(*arguments)
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


def set_up_output(*names: str):
    """Make sys.stdout or sys.stderr, or both, safe to print to; `names` are "stdout" and "stderr".
    Each becomes an Output that flushes every line and escapes characters that its encoding
    lacks."""
    for name in names:
        stream = getattr(sys, name)
        if stream is None:
            # It was closed when the process started, and the next open() would reuse its number.
            stream = open(os.devnull, "w")
        stream.reconfigure(line_buffering=True, errors="backslashreplace")
        setattr(sys, name, Output(stream))


def run_script(main: Callable, outputs=("stdout", "stderr")):
    """Call main(arguments), with outputs that never fail. A UserError is printed to stderr as a
    sentence, and so is that memory ran out where nothing can be made smaller; the exit status is
    then 1, and 130 after Ctrl-C."""
    set_up_output(*outputs)
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        from onenight.device import is_out_of_memory  # imports torch

        if not is_out_of_memory(error):
            raise
        sys.exit(f"out of memory ({first_line(error)})")
