"""How long a run is, and its learning rate along the way.

The settings describe both in iterations: warmup_iters, warmdown_iters, lr_decay_iters, max_iters.
Without --hours the run's place in this schedule is simply its iteration. With --hours it is the
fraction of the run that is done, times max_iters. After each iteration the fraction advances by
that iteration's part of the time that is left, at the present speed. So the schedule is traversed
exactly once and ends when the hours do, whatever the machine's speed does meanwhile.
"""

import bisect
import math
from dataclasses import replace

import torch

from configurator import UserError
from onenight.system.distributed import Ranks
from onenight.system.wording import duration
from onenight.training.clock import SAVE_S, Clock
from onenight.training.settings import TrainConfig, config_file_values, flag_names

# For the model card.
SETTINGS = ("min_lr", "warmup_iters", "warmdown_iters", "matrix_warmdown_iters")
# These belong to max_iters.
LENGTHS = ("warmup_iters", "warmdown_iters", "matrix_warmdown_iters", "lr_decay_iters")
# Muon's lookahead at the peak learning rate, with which it decays, and the part of the schedule
# that has it: result 39 of modded-nanogpt's track 3, in iterations of its 3,150.
LOOKAHEAD = 0.6
LOOKAHEAD_FROM = 500 / 3150
LOOKAHEAD_TO = 2400 / 3150
# The weight of Muon's slow momentum, and the part of the schedule from which on it has it: pull
# request 340 there, in iterations of its 3,250.
SLOW_SHARE = 0.5615
SLOW_FROM = 1000 / 3250


def fit_to_max_iters(config: TrainConfig, arguments: list[str]) -> TrainConfig:
    """Return the settings for a length that was changed by a flag: what no flag sets of the rest
    of the schedule changes in proportion, with a message. Raises UserError if the resulting
    schedule is impossible, or if --hours sets the length as well."""
    flags = flag_names(arguments)
    if "max_iters" in flags and config.hours:
        raise UserError("--max_iters and --hours both set the length of the run; use one of them")
    if "max_iters" in flags and config.decay_lr:
        intended = {key: getattr(TrainConfig, key) for key in ("max_iters", *LENGTHS)}
        intended.update(config_file_values(arguments, tuple(intended)))
        fitted = {}
        for key in LENGTHS:
            if key not in flags and intended[key]:
                fitted[key] = round(intended[key] * config.max_iters / intended["max_iters"])
        config = replace(config, **fitted)
        changed = [f"{key}={value}" for key, value in fitted.items() if value != intended[key]]
        if changed:
            print(f"schedule: fitted to --max_iters={config.max_iters}: {', '.join(changed)}")
    if config.decay_lr and config.lr_decay_iters <= config.warmup_iters:
        raise UserError(
            f"lr_decay_iters={config.lr_decay_iters} must be more than "
            f"warmup_iters={config.warmup_iters}"
        )
    return config


def describe_schedule(config: TrainConfig) -> str:
    """Return the learning rate along the run, in words."""
    if not config.decay_lr:
        return f"constant at {config.learning_rate:g}"

    def at(iteration: int) -> str:
        if config.hours:
            return duration(config.hours * 3600 * iteration / config.max_iters)
        return f"iteration {iteration:,}"

    def phases(warmdown_iters: int) -> str:
        words = []
        if config.warmup_iters:
            words.append(f"warmup to {at(config.warmup_iters)}")
        decay = "cosine decay"
        if warmdown_iters:
            decay = "decay"
            decay_start = config.lr_decay_iters - warmdown_iters
            if decay_start > config.warmup_iters:
                words.append(f"constant to {at(decay_start)}")
        words.append(f"{decay} to {config.min_lr:g} at {at(config.lr_decay_iters)}")
        return ", ".join(words)

    described = phases(config.warmdown_iters)
    if config.matrix_warmdown_iters:
        described += f"; of the matrices: {phases(config.matrix_warmdown_iters)}"
    return described


def schedule_warnings(config: TrainConfig) -> list[str]:
    """Return what is probably not intended about the schedule, one sentence each."""
    if not config.decay_lr:
        return []
    if config.warmup_iters >= config.max_iters:
        return [
            f"the run ends in its warmup: warmup_iters={config.warmup_iters}, "
            f"max_iters={config.max_iters}; set a smaller --warmup_iters"
        ]
    warnings = []
    for key in ("warmdown_iters", "matrix_warmdown_iters"):
        iters = getattr(config, key)
        if iters and config.lr_decay_iters - iters < config.warmup_iters:
            warnings.append(
                f"the decay of {iters:,} iterations begins before the warmup ends, so the learning "
                f"rate falls abruptly; set a smaller --{key}"
            )
    last = lr_multiplier_at(config, config.max_iters)
    lowest = lr_multiplier_at(config, max(config.max_iters, config.lr_decay_iters))
    if last > lowest + 0.1:
        warnings.append(
            f"the run ends at {last:.0%} of the peak learning rate; set "
            f"--lr_decay_iters={config.max_iters} to end at its lowest"
        )
    at_lowest = config.max_iters - config.lr_decay_iters
    if at_lowest > 0.1 * config.max_iters:
        warnings.append(
            f"the last {at_lowest:,} iterations have the lowest learning rate; set "
            f"--lr_decay_iters={config.max_iters} to decay until the end"
        )
    return warnings


def set_rates(optimizers: dict[str, torch.optim.Optimizer], config: TrainConfig, place: float):
    """Set the learning rate of each group, and Muon's lookahead and slow momentum, for the
    iteration at `place`."""
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            multiplier = lr_multiplier_at(config, place, group["name"])
            group["lr"] = multiplier * group["peak_lr"]
            if group.get("lookahead") is not None:
                begin = LOOKAHEAD_FROM * config.lr_decay_iters
                end = LOOKAHEAD_TO * config.lr_decay_iters
                group["lookahead"] = LOOKAHEAD * multiplier if begin <= place < end else 0.0
            if group.get("slow_share") is not None:
                begin = SLOW_FROM * config.lr_decay_iters
                group["slow_share"] = SLOW_SHARE if place >= begin else 0.0


def lr_multiplier_at(config: TrainConfig, place: float, group: str = "") -> float:
    """Return the learning rate at `place`, an iteration or between two, as a multiple of its peak.

    After a linear warmup it follows nanoGPT's cosine down to min_lr or, with warmdown_iters, a
    trapezoid (arXiv:2405.18392): constant, then linear down to min_lr. After lr_decay_iters it is
    min_lr. The group "matrices" may have a trapezoid of its own.
    """
    if not config.decay_lr:
        return 1.0
    if place < config.warmup_iters:
        return (place + 1) / (config.warmup_iters + 1)
    lowest = config.min_lr / config.learning_rate if config.learning_rate else 0.0
    warmdown_iters = config.warmdown_iters
    if group == "matrices" and config.matrix_warmdown_iters:
        warmdown_iters = config.matrix_warmdown_iters
    if warmdown_iters:
        left = (config.lr_decay_iters - place) / warmdown_iters
        return lowest + (1 - lowest) * min(1.0, max(0.0, left))
    decayed = (place - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * min(1.0, decayed)))


def expected_eval_s(config: TrainConfig, eval_tokens: int, s_per_iter: float) -> float:
    """Return the seconds that an evaluation is expected to take at most: a third of what training
    on as many tokens takes."""
    return eval_tokens / config.tokens_per_iter * s_per_iter / 3


class Schedule:
    """Decides when a run ends and which learning rate each iteration has. `eval_tokens`: the tokens
    of an evaluation. The methods take the run's Progress, which only advance() changes."""

    def __init__(self, config: TrainConfig, clock: Clock, ranks: Ranks, eval_tokens: int):
        self.config = config
        self.clock = clock
        self.ranks = ranks
        self.eval_tokens = eval_tokens

    def place(self, progress) -> float:
        """Return where in the schedule the next iteration is, in its iterations."""
        if self.config.hours:
            return progress.fraction * self.config.max_iters
        return progress.iter_num

    def lr_multiplier(self, progress) -> float:
        """Return the matrices' learning rate in the next iteration as a multiple of its peak."""
        return lr_multiplier_at(self.config, self.place(progress), "matrices")

    def set_rates(self, optimizers: dict[str, torch.optim.Optimizer], progress):
        """Set what changes along the run for the next iteration: see set_rates() above."""
        set_rates(optimizers, self.config, self.place(progress))

    def is_over(self, progress) -> bool:
        """Return whether the run has reached its end."""
        if self.config.hours:
            return progress.fraction >= 1
        return progress.iter_num >= self.config.max_iters

    def advance(self, progress):
        """Update progress.fraction after an iteration."""
        if not self.config.hours:
            progress.fraction = progress.iter_num / self.config.max_iters
            return
        # The first process decides for all: their clocks differ.
        left = self.ranks.from_first(self.iters_within_hours(progress))
        if left == 0:
            progress.fraction = 1.0
        elif left > 0:
            progress.fraction += (1 - progress.fraction) / (left + 1)

    def iters_within_hours(self, progress) -> int:
        """Return how many more iterations fit into the hours; -1 if that is not known yet."""
        seconds = self.seconds_of_hours_left()
        if seconds <= 0:
            return 0
        s_per_iter = self.clock.s_per_iter()
        if not s_per_iter:
            return -1
        candidates = range(1, int(seconds / s_per_iter) + 1)
        return bisect.bisect_right(
            candidates, seconds, key=lambda iters: self.seconds_for(progress, iters)
        )

    def seconds_of_hours_left(self) -> float:
        return self.config.hours * 3600 - self.clock.elapsed()

    def seconds_left(self, progress) -> float:
        """Return the seconds to the end of the run at the present speed."""
        if self.config.hours:
            return self.seconds_of_hours_left()
        return self.seconds_for(progress, self.config.max_iters - progress.iter_num)

    def seconds_for(self, progress, iters: int) -> float:
        """Return what that many more iterations will take, with the evaluations and checkpoints
        among them and after the last one."""
        s_per_iter = self.clock.s_per_iter()
        eval_s = self.clock.eval_s
        if self.clock.evals < 2:
            # Not known yet after a resume, and the first one also compiles.
            expected_s = expected_eval_s(self.config, self.eval_tokens, s_per_iter)
            eval_s = min(eval_s, expected_s) if self.clock.evals else expected_s
        evals = self.evaluations_within(progress, iters)
        seconds = iters * s_per_iter + evals * eval_s
        other_saves = max(1.0, seconds / SAVE_S - evals)
        return seconds + other_saves * self.clock.save_s

    def evaluations_within(self, progress, iters: int) -> int:
        """Return the number of evaluations from now on if the run ends after that many iterations:
        at the multiples of eval_interval, and at the end."""
        interval = self.config.eval_interval
        end = progress.iter_num + iters
        multiples = math.ceil(end / interval) - math.ceil(progress.iter_num / interval)
        is_done_here = progress.evaluated_iter == progress.iter_num
        return multiples + (0 if is_done_here else 1)
