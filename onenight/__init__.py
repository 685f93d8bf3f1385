"""What the stage scripts share. Imported before torch, because it sets the environment that torch reads once."""

import os
import sys

# OpenMP's threads spin for 300,000 rounds before they sleep, and crawl on a busy machine: see benchmarks/LOG.md.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def exit_on_interrupt(kind, error, traceback):
    """Ctrl-C where nothing handles it, such as during the imports: no traceback, exit status 130."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    sys.stdout.flush()
    os._exit(130)


sys.excepthook = exit_on_interrupt
