"""Output that never ends or harms a run, and the signals that stop one."""

import contextlib
import os
import signal
import sys


class Output:
    """A stream that goes silent, instead of raising, when its terminal, pipe or disk fails."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str):
        self.attempt(self.stream.write, text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, action, *arguments):
        """Calls it; if it fails, sends everything from now on, and what is still buffered, to nowhere."""
        try:
            action(*arguments)
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


def set_up_output(*names: str):
    """Makes 'stdout' or 'stderr' an Output, line by line, with escapes for what its encoding lacks; and Ctrl-C a
    KeyboardInterrupt, now that the imports are done."""
    if callable(signal.getsignal(signal.SIGINT)):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in names:
        stream = getattr(sys, name) or open(os.devnull, "w")  # closed from the start: a data file could take its number
        if hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
        setattr(sys, name, stream if isinstance(stream, Output) else Output(stream))


class StopSignal:
    """Notes Ctrl-C, SIGTERM, and SIGHUP of a closed terminal unless it was ignored from the start (nohup): `asked` from
    the first on; a second Ctrl-C is a KeyboardInterrupt."""

    def __init__(self):
        self.asked = False
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
            number = getattr(signal, name, None)
            if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                signal.signal(number, self.note)

    def note(self, number: int, _frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        with contextlib.suppress(OSError):  # the terminal may be gone; and print may be what was interrupted
            os.write(2, b"\nsaving and stopping; Ctrl-C again stops at once\n")
