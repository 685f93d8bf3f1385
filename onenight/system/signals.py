"""The signals that stop a run."""

import contextlib
import os
import signal

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
