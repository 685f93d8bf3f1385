"""Output that cannot end a run, signals that stop one, and the entry point of the scripts."""

import contextlib
import os
import signal
import sys

from configurator import UserError


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
    """Call main(arguments) for a script. A UserError is printed to stderr; the exit status is 1."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))


class StopSignal:
    """Catches the signals that ask a run to stop.

    These are SIGINT (Ctrl-C), SIGTERM, and SIGHUP (a closed terminal), unless SIGHUP was ignored
    from the start, as by nohup. `requested` is True from the first signal on. A second Ctrl-C
    raises KeyboardInterrupt.
    """

    def __init__(self):
        self.requested = False
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is None:  # Windows has no SIGHUP
                continue
            if name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:
                continue
            signal.signal(number, self.handle)

    def handle(self, number: int, _frame):
        """Record the request; the signal handler."""
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        # Not print(), which the signal may have interrupted. The terminal may be gone.
        with contextlib.suppress(OSError):
            os.write(2, b"\nsaving and stopping; press Ctrl-C again to stop at once\n")
