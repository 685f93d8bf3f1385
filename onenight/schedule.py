"""How far a run is, and its learning rate there.

The fraction of the run that is done is the one coordinate of progress: iterations / max_iters or,
with --hours, elapsed time / hours. The learning rate depends on nothing else, so that its decay
ends when the run does, whatever the machine's speed does meanwhile.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable

from onenight.distributed import Ranks
from onenight.settings import TrainConfig
from onenight.wording import duration

RECENT_ITERS = 50  # the median of these predicts the rest, so one pause does not distort it
LOG_S = 30  # print a line if nothing was printed for this long
SAVE_S = 600  # save if the last checkpoint is older than this: what a power cut can cost
SHORTEST_S = 1e-6  # no measured time counts as less, because speeds divide by it
RETRY_S = 60  # until a save that has failed is tried again


# -----------------------------------------------------------------------------
# The learning rate


def lr_multiplier(config: TrainConfig, fraction: float, group: str = "matrices") -> float:
    """Return the learning rate of a group of parameters, when `fraction` of the run is done, as a
    multiple of its peak.

    After a linear warmup it follows nanoGPT's cosine down to min_lr or, with warmdown, a trapezoid
    (arXiv:2405.18392): constant, then linear down to min_lr. After lr_decay_iters it is min_lr.
    """
    if not config.decay_lr:
        return 1.0
    lowest = min(1.0, config.min_lr / config.learning_rate) if config.learning_rate else 0.0
    iteration = fraction * config.max_iters
    warmup, decayed = phases(config)
    if iteration < warmup:
        return (iteration + 1) / (warmup + 1)
    length = config.warmdown
    if group == "matrices" and config.matrix_warmdown:
        length = config.matrix_warmdown
    if length:
        left = (decayed / config.max_iters - fraction) / length
        return lowest + (1 - lowest) * min(1.0, max(0.0, left))
    progress = min(1.0, (iteration - warmup) / (decayed - warmup))
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * progress))


def phases(config: TrainConfig) -> tuple[float, int]:
    """Return the iterations, of max_iters, at which the warmup ends and the decay ends. The warmup
    is at most half of the iterations before the decay ends."""
    decayed = min(config.lr_decay_iters or config.max_iters, config.max_iters)
    return min(config.warmup_iters, decayed / 2), decayed


def describe_schedule(config: TrainConfig) -> str:
    """Return the learning rate along the run, in words."""
    if not config.decay_lr:
        return f"constant at {config.learning_rate:g}"

    def at(iteration: float) -> str:
        if config.hours:
            return duration(config.hours * 3600 * iteration / config.max_iters)
        return f"iteration {iteration:,.0f}"

    warmup, decayed = phases(config)
    words = f"warmup to {at(warmup)}, " if warmup else ""
    if config.warmdown:
        words += f"decay from {at(max(warmup, decayed - config.warmdown * config.max_iters))}"
        if config.matrix_warmdown:
            begin = max(warmup, decayed - config.matrix_warmdown * config.max_iters)
            words += f" (of the matrices from {at(begin)})"
    else:
        words += "cosine decay"
    return f"{words} to {min(config.min_lr, config.learning_rate):g} at {at(decayed)}"


# -----------------------------------------------------------------------------
# Time


class Clock:
    """Measures a run from the moment the clock is made. Elapsed time includes the sessions before a
    resume, but not the pause between two sessions. `now` is as time.perf_counter()."""

    def __init__(
        self, config: TrainConfig, ranks: Ranks, now: Callable[[], float] = time.perf_counter
    ):
        self.config = config
        self.ranks = ranks
        self.now = now
        self.started = now()
        self.earlier_s = 0.0  # elapsed time of the sessions before
        self.begun_s = 0.0  # elapsed time when the first iteration began
        self.next_log = self.started  # when a line is due even between two log_intervals
        self.next_save = self.started + SAVE_S  # when a save is due even between two evaluations
        self.save_s = 0.0  # seconds of the last checkpoint
        self.eval_s = 0.0  # seconds of the last evaluation, its checkpoints included
        self.iters = 0  # in this session
        self.iters_s = 0.0  # seconds of all of them
        self.last_s = 0.0  # seconds of the last one
        self.recent_s = deque(maxlen=RECENT_ITERS)

    def elapsed(self) -> float:
        """Return the seconds of the run so far."""
        return self.earlier_s + self.now() - self.started

    def fraction(self, iter_num: int) -> float:
        """Return the fraction of the run that is done after `iter_num` iterations. With --hours it
        is 1 when there is just enough time left for an evaluation and a save. The first process
        decides for all: their clocks differ."""
        if not self.config.hours:
            return min(1.0, iter_num / self.config.max_iters)
        elapsed = self.elapsed()
        if iter_num == 0:
            self.begun_s = elapsed
        end = self.config.hours * 3600 - self.eval_s - self.save_s
        fraction = 1.0
        if elapsed < end:
            fraction = (elapsed - self.begun_s) / (end - self.begun_s)
        return self.ranks.from_first(fraction)

    def seconds_left(self, iter_num: int) -> float:
        """Return the seconds to the end of the run at the present speed."""
        if self.config.hours:
            return max(0.0, self.config.hours * 3600 - self.elapsed())
        left = self.config.max_iters - iter_num
        evals = math.ceil(left / self.config.eval_interval)
        return left * self.s_per_iter() + evals * self.eval_s

    def s_per_iter(self) -> float:
        """Return the median seconds of the recent iterations; 0 before the first one."""
        return statistics.median(self.recent_s) if self.recent_s else 0.0

    def add_iteration(self, seconds: float):
        seconds = max(seconds, SHORTEST_S)
        self.iters += 1
        self.last_s = seconds
        self.iters_s += seconds
        self.recent_s.append(seconds)
