"""Process setup that must come before torch is imported.

Importing this module exits with one sentence if Python or a package is too old, sets environment
variables that torch reads only once, replaces a cache folder that torch cannot create, tells glibc
to keep freed memory, and makes Ctrl-C end a script without a traceback (exit status 130), even
while it is still importing. Every script imports it first. This is the only place where the order
of imports matters.
"""

import contextlib
import ctypes
import os
import platform
import signal
import sys

# These two import nothing but the standard library.
from onenight.system.limits import limit_threads
from onenight.system.requirements import check_requirements

check_requirements()
limit_threads()

# torch creates this folder when it is imported.
if os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
    from onenight.system.cache_folders import use_cache_folder

    with contextlib.suppress(OSError, ValueError):
        use_cache_folder("TORCHINDUCTOR_CACHE_DIR", "")

# Whether the GPU is run by Windows' driver, as it also is in WSL2.
WINDOWS_GPU_DRIVER = sys.platform == "win32" or "microsoft" in platform.release().lower()

# Parameters of glibc's mallopt(), from malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4

# By default OpenMP's threads spin for 300,000 rounds before they sleep, which is slow on a busy
# machine (see benchmarks/LOG.md).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

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


def exit_on_interrupt(kind, error, traceback):
    """End the process at once and in silence on KeyboardInterrupt; an excepthook."""
    if issubclass(kind, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the exit
        sys.stdout.flush()
        os._exit(130)
    sys.__excepthook__(kind, error, traceback)


def is_project_script() -> bool:
    """Return whether this process runs a script of the project, not a test or a notebook."""
    script = os.path.abspath(getattr(sys.modules["__main__"], "__file__", None) or "")
    project = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return os.path.dirname(script) == project


if is_project_script():
    sys.excepthook = exit_on_interrupt
    # Libraries turn a KeyboardInterrupt during their import into other errors, so until the imports
    # are done Ctrl-C exits directly. console.set_up_output() then restores the usual handler.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
