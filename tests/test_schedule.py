"""schedule.py: the learning rate along a run, and the clock that says how far the run is.

Whole runs by the clock are in faults/test_hours.py.
"""

import math

import pytest

from onenight.distributed import Ranks
from onenight.schedule import Clock, describe_schedule, lr_multiplier
from onenight.settings import TrainConfig
from onenight.wording import duration

# -----------------------------------------------------------------------------
# The learning rate


def nanogpt_lr(it, learning_rate, min_lr, warmup_iters, lr_decay_iters):
    """nanoGPT's get_lr()."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    decay_ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))
    return min_lr + coeff * (learning_rate - min_lr)


def trapezoid_lr(it, learning_rate, min_lr, warmup_iters, lr_decay_iters, warmdown_iters):
    """A linear warmup, a constant part, and a linear decay over the last warmdown_iters."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    left = (lr_decay_iters - it) / warmdown_iters
    if left >= 1:
        return learning_rate
    return min_lr + max(0.0, left) * (learning_rate - min_lr)


CASES = [
    {"max_iters": 110, "warmup_iters": 10},
    {"max_iters": 200, "warmup_iters": 0, "lr_decay_iters": 90},
    {"max_iters": 600, "warmup_iters": 300, "min_lr": 0.0},
    {"max_iters": 7, "warmup_iters": 2, "min_lr": 6e-4},
]


@pytest.mark.parametrize("settings", CASES)
def test_the_cosine_is_nanogpts(settings):
    settings = {"learning_rate": 6e-4, "min_lr": 6e-5, **settings}
    config = TrainConfig(**settings)
    decayed = settings.pop("lr_decay_iters", settings["max_iters"])
    n = settings.pop("max_iters")
    for it in range(n + 1):
        expected = nanogpt_lr(it, **settings, lr_decay_iters=decayed)
        assert 6e-4 * lr_multiplier(config, it / n) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("settings", CASES)
@pytest.mark.parametrize("warmdown, matrix_warmdown", [(0.5, 0.0), (0.4, 0.2), (0.2, 0.4)])
def test_with_warmdown_it_is_a_trapezoid_and_the_matrices_may_have_their_own(
    settings, warmdown, matrix_warmdown
):
    settings = {"learning_rate": 0.02, "min_lr": 0.002, **settings}
    shape = {"warmdown": warmdown, "matrix_warmdown": matrix_warmdown}
    config = TrainConfig(**settings, **shape)
    decayed = settings.pop("lr_decay_iters", settings["max_iters"])
    n = settings.pop("max_iters")
    for group in ("matrices", "vectors", "embedding", "head"):
        length = matrix_warmdown if matrix_warmdown and group == "matrices" else warmdown
        for it in range(n + 1):
            expected = trapezoid_lr(
                it, **settings, lr_decay_iters=decayed, warmdown_iters=length * n
            )
            rate = 0.02 * lr_multiplier(config, it / n, group)
            assert rate == pytest.approx(expected, rel=1e-9)


# The second one has what the config of a long run leaves behind when --max_iters makes it short.
@pytest.mark.parametrize("leftover", [{}, {"warmup_iters": 2000, "lr_decay_iters": 600_000}])
@pytest.mark.parametrize("warmdown", [0.0, 0.3])
@pytest.mark.parametrize("max_iters", [10, 1000])
def test_a_run_of_any_length_warms_up_and_ends_near_its_lowest_rate(max_iters, warmdown, leftover):
    config = TrainConfig(max_iters=max_iters, min_lr=6e-5, warmdown=warmdown, **leftover)
    rates = [lr_multiplier(config, it / max_iters) for it in range(max_iters)]
    lowest = 6e-5 / 6e-4
    # How far an iteration before the end is from the end: of a line over the warmdown, or of a
    # cosine over at least half of the run, which near its end is a parabola.
    steepest = 1 / (warmdown * max_iters) if warmdown else (math.pi / max_iters) ** 2
    assert lowest <= rates[-1] <= lowest + steepest
    assert lr_multiplier(config, 1.0) == pytest.approx(lowest)
    assert max(rates) > 0.95


@pytest.mark.parametrize("warmdown", [0.0, 0.5])
@pytest.mark.parametrize("learning_rate, end", [(1e-5, 1.0), (0.0, 0.0)])
def test_min_lr_never_raises_the_rate(learning_rate, end, warmdown):
    config = TrainConfig(learning_rate=learning_rate, min_lr=6e-5, warmdown=warmdown)
    fractions = [i / 100 for i in range(101)]
    assert max(lr_multiplier(config, fraction) for fraction in fractions) <= 1.0
    assert lr_multiplier(config, 1.0) == end


def test_without_decay_the_rate_is_constant():
    config = TrainConfig(decay_lr=False, warmdown=0.5)
    assert {lr_multiplier(config, i / 10) for i in range(11)} == {1.0}


@pytest.mark.parametrize(
    "settings, numbers",
    [
        ({"warmup_iters": 2000}, ["iteration 50,", "6e-05", "iteration 100"]),
        ({"warmdown": 0.4, "matrix_warmdown": 0.8}, ["iteration 60", "iteration 20"]),
        ({"hours": 10.0, "warmdown": 0.5}, ["1h 00m", "5h 00m", "10h 00m"]),
    ],
)
def test_the_schedule_in_words_has_its_numbers(settings, numbers):
    words = describe_schedule(TrainConfig(**{"warmup_iters": 10, "max_iters": 100, **settings}))
    for number in numbers:
        assert number in words


def test_a_duration_in_words():
    seconds = (59.6, 750, 3599.6, 18_420)
    assert [duration(s) for s in seconds] == ["1m 00s", "12m 30s", "1h 00m", "5h 07m"]


# -----------------------------------------------------------------------------
# The clock


class Time:
    """A clock that a test advances."""

    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds


def make_clock(time, **settings):
    return Clock(TrainConfig(max_iters=100, **settings), Ranks(), now=time)


def test_with_hours_the_run_ends_when_an_evaluation_and_a_save_still_fit():
    time = Time()
    clock = make_clock(time, hours=1.0)
    clock.fraction(0)
    clock.eval_s = 90.0
    clock.save_s = 30.0
    time.seconds += 3600 - 90 - 30 - 1
    assert 0.999 < clock.fraction(500) < 1.0
    time.seconds += 1
    assert clock.fraction(500) == 1.0
    clock.eval_s = 4000.0  # longer than the hours
    assert clock.fraction(500) == 1.0


def test_the_time_before_the_first_iteration_does_not_eat_the_warmup():
    """Compiling, measuring and the first evaluation. They count toward the hours."""
    time = Time()
    clock = make_clock(time, hours=1.0)
    for _ in range(2):
        time.seconds += 300
        assert clock.fraction(0) == 0.0
    time.seconds += 1500
    assert clock.fraction(1) == pytest.approx(0.5)
    time.seconds += 1500
    assert clock.fraction(2) == 1.0


def test_the_pause_between_a_stop_and_a_resume_does_not_count():
    time = Time()
    clock = make_clock(time, hours=1.0)
    time.seconds += 600
    clock.fraction(0)
    time.seconds += 1500
    fraction = clock.fraction(7)
    elapsed_s, begun_s = clock.elapsed(), clock.begun_s
    assert elapsed_s == 2100

    time.seconds += 1e5
    resumed = make_clock(time, hours=1.0)
    resumed.earlier_s = elapsed_s
    resumed.begun_s = begun_s
    assert resumed.elapsed() == 2100
    assert resumed.fraction(7) == fraction


def test_the_seconds_that_are_left_follow_the_recent_speed():
    time = Time()
    clock = make_clock(time, eval_interval=20)
    for seconds in [9.0] * 100 + [2.0] * 49 + [1000.0]:  # a pause does not distort it
        clock.add_iteration(seconds)
    clock.eval_s = 30.0
    assert clock.s_per_iter() == 2.0
    # The last one is at the end, after 100 iterations.
    assert clock.seconds_left(55) == 45 * 2.0 + 3 * 30.0
    timed = make_clock(time, hours=1.0)
    time.seconds += 600
    assert timed.seconds_left(55) == 3000
    time.seconds += 6000
    assert timed.seconds_left(55) == 0
