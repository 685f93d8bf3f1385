"""What is printed, signals that stop a run, and the entry point of the scripts."""

import contextlib
import logging
import os
import signal
import sys

from configurator import UserError

# The signals that ask a process to end. Batch systems send SIGUSR1, SIGUSR2 or SIGXCPU some time
# before they kill it. SIGBREAK is Ctrl-Break on Windows, which lacks some of the others.
STOP_SIGNALS = (
    "SIGINT",
    "SIGTERM",
    "SIGHUP",
    "SIGQUIT",
    "SIGUSR1",
    "SIGUSR2",
    "SIGXCPU",
    "SIGBREAK",
)


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
    """Call main(arguments) for a script. A UserError is printed to stderr; the exit status is 1."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))


class StopSignal:
    """Catches the signals that ask a run to stop: STOP_SIGNALS, without those that were ignored
    from the start, as nohup ignores SIGHUP.

    `number` is that of the first signal, and None before it. A later Ctrl-C raises
    KeyboardInterrupt.
    """

    def __init__(self):
        self.number = None
        for name in STOP_SIGNALS:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.handle)

    @property
    def requested(self) -> bool:
        return self.number is not None

    @property
    def exit_status(self) -> int:
        """The exit status of a process that a signal has stopped, as shells report it; 0 if there
        was none, because another process was asked to stop."""
        return 128 + self.number if self.requested else 0

    def handle(self, number: int, _frame):
        """Record the request; the signal handler."""
        if self.requested:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # SIGXCPU comes every second
        self.number = number
        # Not print(), which the signal may have interrupted. The terminal may be gone.
        with contextlib.suppress(OSError):
            os.write(2, b"\nsaving and stopping; press Ctrl-C again to stop without saving\n")
