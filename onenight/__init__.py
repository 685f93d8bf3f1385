"""What the stage scripts share. Imported first by each of them, because it sets the environment that torch reads once,
and what Ctrl-C does: no traceback, exit status 130, at any moment."""

import contextlib
import ctypes
import os
import platform
import signal
import sys

WINDOWS_DRIVER = sys.platform == "win32" or "microsoft" in platform.release().lower()  # of the GPU: also in WSL2

# OpenMP's threads spin for 300,000 rounds before they sleep, and crawl on a busy machine: see benchmarks/LOG.md.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
if sys.platform == "linux":
    if not WINDOWS_DRIVER:  # which fails at this on some cards: pytorch issue 192330
        # Micro-batches that change in size, as in evaluations, would leave holes in a GPU's memory.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # glibc returns large blocks, such as the head's logits, to the system, and takes them anew at each step: keep them.
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def exit_on_interrupt(kind, error, traceback):
    """The excepthook of the scripts."""
    if issubclass(kind, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not interrupt this
        sys.stdout.flush()
        os._exit(130)
    sys.__excepthook__(kind, error, traceback)


script = os.path.abspath(getattr(sys.modules["__main__"], "__file__", None) or "")
if os.path.dirname(script) == os.path.dirname(os.path.dirname(os.path.abspath(__file__))):  # not in a test or notebook
    sys.excepthook = exit_on_interrupt
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Until the imports are done (see console.set_up_output): libraries turn the exception into others.
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
