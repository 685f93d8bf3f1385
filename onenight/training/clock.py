"""How long things take: the run so far, its iterations, evaluations and checkpoints."""

import statistics
import sys
import time
from collections import deque
from collections.abc import Callable

SETTLING_ITERS = 2  # after a start: they compile and allocate, so they do not count for the speed
RECENT_ITERS = 20  # the median of these predicts the rest, so one pause does not distort it
LOG_S = 30  # print a line if nothing was printed for this long
SAVE_S = 600  # save if the last checkpoint is older than this: what a power cut can cost
SLOW_ITERATION_S = 10  # compiling is a small part of an iteration longer than this
SLEEP_S = 60  # a shorter difference between two clocks is not reported as sleep


def awake_seconds() -> float:
    """Return seconds that never go back and that stop while the machine sleeps."""
    if sys.platform != "win32":
        return time.monotonic()
    # On Windows time.monotonic() goes on during sleep.
    import ctypes

    ticks = ctypes.c_ulonglong()  # of 100 ns
    ctypes.windll.kernel32.QueryUnbiasedInterruptTime(ctypes.byref(ticks))
    return ticks.value / 1e7


class Clock:
    """Measures a run from the moment it is made. Elapsed time includes the sessions before a
    resume, but neither the pause between two sessions nor the machine's sleep. `now` is as
    awake_seconds(), `wall` as time.time()."""

    def __init__(
        self,
        now: Callable[[], float] = awake_seconds,
        wall: Callable[[], float] = time.time,
    ):
        self.now = now
        self.wall = wall
        self.started = now()
        self.compared = (self.started, wall())  # both clocks when they were last compared
        self.earlier_s = 0.0  # elapsed time of the sessions before
        self.logged = self.started  # when the last line was printed
        self.saved = self.started  # when the last checkpoint was saved
        self.save_s = 0.0  # seconds of the last checkpoint
        self.eval_s = 0.0  # seconds of the last evaluation, its checkpoints included
        self.evals = 0
        self.iters = 0  # in this session
        self.last_s = 0.0  # seconds of the last iteration
        self.measured_s = 0.0  # seconds of all iterations after the first SETTLING_ITERS
        self.recent_s = deque(maxlen=RECENT_ITERS)

    def elapsed(self) -> float:
        """Return the seconds of the run so far."""
        return self.earlier_s + self.now() - self.started

    def add_iteration(self, seconds: float):
        self.iters += 1
        self.last_s = seconds
        if self.iters > SETTLING_ITERS:
            self.measured_s += seconds
            self.recent_s.append(seconds)

    def add_evaluation(self, seconds: float):
        self.evals += 1
        self.eval_s = seconds

    def add_save(self, seconds: float):
        self.save_s = seconds
        self.saved = self.now()

    def add_log(self):
        self.logged = self.now()

    def time_of_day(self, seconds: float) -> str:
        """Return the time of day that many seconds from now, as HH:MM."""
        return time.strftime("%H:%M", time.localtime(self.wall() + seconds))

    def take_slept_s(self) -> float:
        """Return how long the machine has slept since the last call: by how much the time of day
        is ahead of the seconds awake. Small differences and clocks set back give 0."""
        awake_before, wall_before = self.compared
        self.compared = (self.now(), self.wall())
        awake = self.compared[0] - awake_before
        passed = self.compared[1] - wall_before
        return passed - awake if passed - awake > SLEEP_S else 0.0

    def save_is_due(self) -> bool:
        return self.now() - self.saved > SAVE_S

    def log_is_due(self) -> bool:
        """Return whether nothing has been printed for so long that a line is due."""
        return self.now() - self.logged >= LOG_S

    def s_per_iter(self) -> float:
        """Return the median seconds of the recent iterations; 0 before there is one that counts.
        The last of the settling iterations counts if it is so slow that compiling is a small part
        of it."""
        if self.recent_s:
            return statistics.median(self.recent_s)
        is_slow = self.iters == SETTLING_ITERS and self.last_s > SLOW_ITERATION_S
        return self.last_s if is_slow else 0.0

    def mean_s_per_iter(self) -> float:
        """Return the mean seconds of this session's iterations; 0 before there is one that
        counts."""
        return self.measured_s / max(1, self.iters - SETTLING_ITERS)
