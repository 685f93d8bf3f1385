"""What is printed, and the entry point of the scripts."""

import contextlib
import logging
import os
import signal
import sys

from configurator import UserError
from onenight.system.wording import first_line


class Output:
    """A text stream that goes silent, instead of raising, when its terminal, pipe or disk fails."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str):
        self.attempt(self.stream.write, text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, action, *arguments):
        """Call `action`. If it fails, send this output and all later output to the null device."""
        try:
            action(*arguments)
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


def quiet_torchao():
    """Silence the warnings that importing torchao prints: its own, about parts that are not used
    here, and torch's about the types that it registers."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def set_up_output(*names: str):
    """Make sys.stdout or sys.stderr, or both, safe to print to; `names` are "stdout" and "stderr".

    Each becomes an Output that flushes every line and escapes characters that its encoding lacks.
    Ctrl-C raises KeyboardInterrupt again, which onenight.startup prevents during the imports.
    """
    if callable(signal.getsignal(signal.SIGINT)):  # neither ignored nor left to the system
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for name in names:
        stream = getattr(sys, name)
        if stream is None:
            # It was closed when the process started. Opening the null device takes its file
            # descriptor, which the next data file would get otherwise.
            stream = open(os.devnull, "w")
        if hasattr(stream, "reconfigure"):  # a notebook's streams lack it
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
        if not isinstance(stream, Output):
            stream = Output(stream)
        setattr(sys, name, stream)


def run_script(main):
    """Call main(arguments) for a script. A UserError, and that memory ran out where nothing can be
    made smaller, is printed to stderr as a sentence; the exit status is 1."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
    except Exception as error:
        from onenight.system.memory import is_out_of_memory  # imports torch

        if not is_out_of_memory(error):
            raise
        sys.exit(
            f"out of memory ({first_line(error)}); close other programs that use much memory, on "
            "the GPU too, or use a smaller model"
        )
