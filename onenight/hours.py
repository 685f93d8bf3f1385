"""A run of a given number of hours: the iterations and the decay of the learning rate follow from the speed that the
machine turns out to have."""

import bisect
import time
from dataclasses import replace

from onenight.metrics import Pace
from onenight.train_config import TrainConfig
from onenight.trainer import Progress, Trainer

MAX_ITERS = 10**9  # more than any run has
MEASURED_ITERS, MEASURED_SHARE = 10, 0.01  # a speed counts after so many iterations and this share of the hours


def open_ended(config: TrainConfig, progress: Progress) -> TrainConfig:
    """The config with the iterations that `progress` has decided on, or with no end yet: a trapezoid's constant part
    and a cosine's warmup are the same for every length."""
    if progress.hours and config.hours != progress.hours:
        if progress.iter_num >= decay_start(config, progress):
            print(f"hours: the decay has begun, so the run still ends at iter {progress.max_iters:,}")
        else:
            progress.hours = progress.decisions = 0
    if progress.decisions:
        return with_length(config, progress.max_iters, progress.warmdown_iters)
    return with_length(config, MAX_ITERS, MAX_ITERS * config.warmdown_iters // config.max_iters)


def with_length(config: TrainConfig, max_iters: int, warmdown_iters: int) -> TrainConfig:
    lr_decay_iters = max(max_iters, config.warmup_iters + 1)
    return replace(config, max_iters=max_iters, lr_decay_iters=lr_decay_iters, warmdown_iters=warmdown_iters)


def decay_start(config: TrainConfig, progress: Progress) -> int:
    """The iteration from which on the length cannot be changed."""
    return progress.max_iters - progress.warmdown_iters if progress.warmdown_iters else config.warmup_iters


def decide_length(trainer: Trainer, pace: Pace):
    """Decides max_iters when the speed has been measured, and, for a trapezoid, a last time where its warmdown begins.
    The first process decides for all."""
    config, progress = trainer.config, trainer.progress
    share = config.warmdown_iters / config.max_iters  # of a trapezoid's warmdown, which stays as configured
    if progress.decisions == (2 if share else 1):
        return
    hours_s, measured = config.hours * 3600, pace.counted >= MEASURED_ITERS
    first = not progress.decisions and measured and pace.counted_s >= MEASURED_SHARE * hours_s
    last = progress.decisions and measured and progress.iter_num >= decay_start(config, progress)
    if not trainer.ranks.from_first(first or last):
        return
    left = max(1, bisect.bisect_right(range(1, MAX_ITERS), hours_s - pace.elapsed(), key=pace.seconds_for))
    left = round(trainer.ranks.from_first(left))
    progress.max_iters, progress.hours = progress.iter_num + left, config.hours
    progress.warmdown_iters = left if progress.decisions else round(share * progress.max_iters)
    progress.decisions += 1
    trainer.config = with_length(config, progress.max_iters, progress.warmdown_iters)
    tokens = progress.max_iters * config.tokens_per_iter / 1e9
    epochs = progress.max_iters * trainer.windows_per_iter / trainer.windows.windows_per_epoch
    end = time.strftime("%H:%M", time.localtime(time.time() + hours_s - pace.elapsed()))
    print(f"hours: {progress.max_iters:,} iterations, {tokens:.3g} billion tokens, {epochs:.2f} epochs; done at {end}")
