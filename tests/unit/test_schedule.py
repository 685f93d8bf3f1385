"""schedule.py: the learning rate at each place of a run, and what --hours decides.

Whole runs by the clock are in tests/faults/test_hours.py.
"""

import math

import pytest
import torch

from configurator import UserError, configure
from model import GPT, GPTConfig
from onenight.system.distributed import Ranks
from onenight.training.clock import Clock
from onenight.training.optimizers import learning_rates, make_optimizers
from onenight.training.schedule import (
    Schedule,
    describe_schedule,
    fit_to_max_iters,
    lr_multiplier_at,
    schedule_warnings,
    set_rates,
)
from onenight.training.settings import TrainConfig
from onenight.training.trainer import Progress

# -----------------------------------------------------------------------------
# The learning rate


def test_the_cosine_is_nanogpts():
    config = TrainConfig(learning_rate=6e-4, min_lr=6e-5, warmup_iters=10, lr_decay_iters=110)
    assert lr_multiplier_at(config, 0) == pytest.approx(1 / 11)
    assert lr_multiplier_at(config, 9) == pytest.approx(10 / 11)
    for decayed in (0.0, 0.25, 0.5, 1.0):
        cosine = 0.5 * (1 + math.cos(math.pi * decayed))
        expected = 6e-5 + cosine * (6e-4 - 6e-5)
        assert 6e-4 * lr_multiplier_at(config, 10 + 100 * decayed) == pytest.approx(expected)
    assert lr_multiplier_at(config, 1000) == pytest.approx(0.1)


def test_the_trapezoid_is_constant_and_then_linear():
    config = TrainConfig(
        learning_rate=0.02, min_lr=0.002, warmup_iters=10, warmdown_iters=70, lr_decay_iters=100
    )
    multipliers = [lr_multiplier_at(config, place) for place in (0, 10, 30, 65, 100, 200)]
    assert multipliers == pytest.approx([1 / 11, 1.0, 1.0, 0.55, 0.1, 0.1])


def test_the_matrices_may_have_a_decay_of_their_own():
    config = TrainConfig(
        learning_rate=0.02,
        min_lr=0.0,
        warmup_iters=0,
        warmdown_iters=40,
        matrix_warmdown_iters=80,
        lr_decay_iters=100,
    )
    assert [lr_multiplier_at(config, place, "matrices") for place in (20, 60, 90)] == [
        pytest.approx(left) for left in (1.0, 0.5, 0.125)
    ]
    assert [lr_multiplier_at(config, place, "head") for place in (20, 60, 90)] == [
        pytest.approx(left) for left in (1.0, 1.0, 0.25)
    ]


def test_lookahead_and_slow_momentum_have_their_parts_of_the_run():
    config = TrainConfig(
        optimizer="muon",
        embedding_lr=0.1,
        warmup_iters=0,
        warmdown_iters=50,
        min_lr=0.0,
        lr_decay_iters=100,
        max_iters=100,
    )
    group = {"name": "matrices", "peak_lr": 0.02, "lookahead": 0.0, "slow_share": 0.0}
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], **group}])
    (group,) = optimizer.param_groups
    lookaheads = []
    shares = []
    for place in (0, 15, 16, 30, 31, 50, 75, 76.2):
        set_rates({"muon": optimizer}, config, place)
        lookaheads.append(group["lookahead"])
        shares.append(group["slow_share"])
    # The lookahead follows the learning rate.
    assert lookaheads == pytest.approx([0.0, 0.0, 0.6, 0.6, 0.6, 0.6, 0.3, 0.0])
    assert shares == [0.0] * 4 + [0.5615] * 4


def test_each_group_gets_its_own_rate_and_the_metrics_have_it():
    config = TrainConfig(
        learning_rate=0.02,
        head_lr=0.01,
        warmup_iters=0,
        warmdown_iters=40,
        matrix_warmdown_iters=80,
        min_lr=0.0,
        lr_decay_iters=100,
    )
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "bias": False}
    model = GPT(GPTConfig(**shape, architecture="qwen3", block_size=8, vocab_size=64))
    optimizers = make_optimizers(model, config, torch.device("cpu"))
    set_rates(optimizers, config, 80)
    assert learning_rates(optimizers, config) == pytest.approx({"lr": 0.005, "lr_head": 0.005})


def test_without_decay_the_rate_is_constant():
    config = TrainConfig(decay_lr=False, warmdown_iters=5)
    assert {lr_multiplier_at(config, place) for place in (0, 5, 10**6)} == {1.0}


def test_a_learning_rate_of_zero_stays_zero():
    config = TrainConfig(learning_rate=0.0, min_lr=0.0, warmup_iters=0, lr_decay_iters=10)
    assert [0.0 * lr_multiplier_at(config, place) for place in (0, 5, 10)] == [0.0, 0.0, 0.0]


# -----------------------------------------------------------------------------
# A length that a flag changes


def fit(arguments, folder, config_lines):
    """Return the settings that are fitted to the flags and to a config file with these lines."""
    config_file = folder / "config.py"
    config_file.write_text(config_lines)
    arguments = [str(config_file), *arguments]
    return fit_to_max_iters(configure(TrainConfig, arguments, ""), arguments)


def test_a_decay_that_ends_before_the_warmup_is_refused():
    def check(**settings):
        fit_to_max_iters(TrainConfig(warmup_iters=20, **settings), [])

    with pytest.raises(UserError, match="lr_decay_iters=10 must be more than warmup_iters=20"):
        check(lr_decay_iters=10)
    with pytest.raises(UserError, match="lr_decay_iters=20 must be more than warmup_iters=20"):
        check(lr_decay_iters=20, hours=1.0)
    check(lr_decay_iters=10, decay_lr=False)


def test_flags_as_nanogpts_users_write_them_are_fitted_before_they_are_checked(tmp_path):
    config = fit(["--max_iters=2000", "--lr_decay_iters=2000"], tmp_path, "")
    assert (config.warmup_iters, config.lr_decay_iters) == (7, 2000)


CONFIG = "max_iters = 6000\nwarmup_iters = 500\nlr_decay_iters = 6000\n"


def test_the_schedule_of_a_config_file_follows_a_max_iters_that_is_given_as_a_flag(
    tmp_path, capsys
):
    config = fit(["--max_iters=3000"], tmp_path, CONFIG)
    assert (config.max_iters, config.warmup_iters, config.lr_decay_iters) == (3000, 250, 3000)
    line = "schedule: fitted to --max_iters=3000: warmup_iters=250, lr_decay_iters=3000\n"
    assert capsys.readouterr().out == line


def test_the_warmdown_follows_as_well(tmp_path):
    config = fit(["--max_iters=3000"], tmp_path, CONFIG + "warmdown_iters = 4200\n")
    assert config.warmdown_iters == 2100


def test_what_is_given_as_a_flag_does_not_follow(tmp_path):
    flags = ["--max_iters=3000", "--lr_decay_iters=6000"]
    config = fit(flags, tmp_path, CONFIG)
    assert (config.warmup_iters, config.lr_decay_iters) == (250, 6000)


@pytest.mark.parametrize("arguments", [[], ["--max_iters=6000"], ["--warmup_iters=7"]])
def test_a_schedule_whose_length_is_not_changed_stays(arguments, tmp_path, capsys):
    config = fit(arguments, tmp_path, CONFIG)
    assert config.lr_decay_iters == 6000
    assert capsys.readouterr().out == ""


def test_a_constant_learning_rate_has_nothing_to_follow(tmp_path):
    config = fit(["--max_iters=3000", "--decay_lr=False"], tmp_path, CONFIG)
    assert config.lr_decay_iters == 6000


def test_two_lengths_are_refused(tmp_path):
    with pytest.raises(UserError, match="--max_iters and --hours both set the length"):
        fit(["--max_iters=3000", "--hours=8"], tmp_path, CONFIG)


def test_a_warmup_that_is_longer_than_the_new_length_is_refused(tmp_path):
    with pytest.raises(UserError, match="lr_decay_iters=10 must be more than warmup_iters=100"):
        fit(["--max_iters=10", "--warmup_iters=100"], tmp_path, CONFIG)


# -----------------------------------------------------------------------------
# In words


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"decay_lr": False, "learning_rate": 3e-4}, "constant at 0.0003"),
        ({}, "warmup to iteration 10, cosine decay to 6e-05 at iteration 100"),
        (
            {"warmdown_iters": 70, "min_lr": 0.0},
            "warmup to iteration 10, constant to iteration 30, decay to 0 at iteration 100",
        ),
        (
            {"warmdown_iters": 40, "matrix_warmdown_iters": 90, "min_lr": 0.0},
            "warmup to iteration 10, constant to iteration 60, decay to 0 at iteration 100; "
            "of the matrices: warmup to iteration 10, decay to 0 at iteration 100",
        ),
        ({"warmup_iters": 0}, "cosine decay to 6e-05 at iteration 100"),
        ({"hours": 10.0}, "warmup to 1h 00m, cosine decay to 6e-05 at 10h 00m"),
    ],
)
def test_the_schedule_in_words(settings, words):
    lengths = {"warmup_iters": 10, "max_iters": 100, "lr_decay_iters": 100}
    assert describe_schedule(TrainConfig(**{**lengths, **settings})) == words


@pytest.mark.parametrize(
    "settings, words",
    [
        ({}, None),
        ({"decay_lr": False, "lr_decay_iters": 1000}, None),
        ({"lr_decay_iters": 105}, None),  # it ends close to the lowest rate
        ({"lr_decay_iters": 95}, None),
        ({"warmup_iters": 100, "lr_decay_iters": 200}, "the run ends in its warmup"),
        ({"lr_decay_iters": 200}, "the run ends at 59% of the peak learning rate"),
        ({"lr_decay_iters": 80}, "the last 20 iterations have the lowest learning rate"),
        ({"warmdown_iters": 95}, "begins before the warmup ends"),
    ],
)
def test_a_schedule_that_is_probably_not_intended_is_reported(settings, words):
    lengths = {"warmup_iters": 10, "max_iters": 100, "lr_decay_iters": 100}
    warnings = schedule_warnings(TrainConfig(**{**lengths, **settings}))
    if words is None:
        assert warnings == []
    else:
        (warning,) = warnings
        assert words in warning


# -----------------------------------------------------------------------------
# The end of a run


class Time:
    """A clock that a test advances."""

    def __init__(self):
        self.seconds = 1000.0

    def now(self):
        return self.seconds


def make_schedule(time, **settings):
    """Return a Schedule by that clock whose evaluations have 1,000 tokens."""
    config = TrainConfig(warmup_iters=0, max_iters=100, lr_decay_iters=100, **settings)
    return Schedule(config, Clock(time.now), Ranks(), eval_tokens=1000)


def train(schedule, time, progress, iters, seconds=10.0):
    """Do iterations that take so many seconds each."""
    for _ in range(iters):
        time.seconds += seconds
        progress.iter_num += 1
        schedule.clock.add_iteration(seconds)
        schedule.advance(progress)


def test_without_hours_a_run_ends_after_max_iters():
    time = Time()
    schedule = make_schedule(time)
    progress = Progress()
    train(schedule, time, progress, 99)
    assert not schedule.is_over(progress)
    assert progress.fraction == pytest.approx(0.99)
    assert schedule.lr_multiplier(progress) == lr_multiplier_at(schedule.config, 99)
    train(schedule, time, progress, 1)
    assert schedule.is_over(progress)
    assert progress.fraction == 1.0


def test_with_hours_the_fraction_waits_for_a_measured_speed_and_then_follows_it():
    time = Time()
    schedule = make_schedule(time, hours=1.0, eval_interval=1000)
    schedule.clock.add_evaluation(0.0)
    progress = Progress(evaluated_iter=0)
    train(schedule, time, progress, 2)  # these compile and allocate
    assert progress.fraction == 0.0
    train(schedule, time, progress, 1)
    assert progress.fraction == pytest.approx(1 / 358)
    train(schedule, time, progress, 178)
    assert progress.fraction == pytest.approx(1 / 2, abs=1e-6)
    half_way = lr_multiplier_at(schedule.config, 50)
    assert schedule.lr_multiplier(progress) == pytest.approx(half_way, abs=1e-6)
    train(schedule, time, progress, 178)
    assert not schedule.is_over(progress)
    train(schedule, time, progress, 1)
    assert time.seconds == 1000 + 3600
    assert schedule.is_over(progress)


def test_with_hours_there_is_time_left_for_evaluations_and_checkpoints():
    time = Time()
    schedule = make_schedule(time, hours=1.0, eval_interval=50)
    progress = Progress(evaluated_iter=0)
    schedule.clock.add_evaluation(90.0)
    schedule.clock.add_evaluation(90.0)
    schedule.clock.add_save(30.0)
    train(schedule, time, progress, 3)
    # 3,570 seconds are left. After 297 more iterations the run has 300, with 6 evaluations, the
    # last one at the end, and a save. Another iteration would be followed by a 7th evaluation.
    assert 297 * 10 + 6 * 90 + 30 < 3570 < 298 * 10 + 7 * 90 + 30
    assert schedule.iters_within_hours(progress) == 297


def test_the_first_evaluation_which_also_compiles_is_not_taken_as_typical():
    time = Time()
    schedule = make_schedule(time, block_size=10, batch_size=1, gradient_accumulation_steps=10)
    progress = Progress()
    train(schedule, time, progress, 3)  # 100 tokens in 10 seconds

    # An evaluation of 1,000 tokens takes at most a third as long as training on them.
    schedule.clock.add_evaluation(300.0)
    assert schedule.seconds_for(progress, 0) == pytest.approx(100 / 3)
    schedule.clock.add_evaluation(300.0)
    assert schedule.seconds_for(progress, 0) == pytest.approx(300)


@pytest.mark.parametrize(
    "iter_num, evaluated_iter, iters, evals",
    [
        (0, -1, 45, 4),  # at 0, 20, 40 and 45
        (0, 0, 45, 3),
        (10, 0, 5, 1),  # at the end
        (20, 0, 20, 2),
        (20, 20, 20, 1),
        (45, 45, 0, 0),
    ],
)
def test_evaluations_are_counted_as_train_py_does_them(iter_num, evaluated_iter, iters, evals):
    schedule = make_schedule(Time(), eval_interval=20)
    progress = Progress(iter_num=iter_num, evaluated_iter=evaluated_iter)
    assert schedule.evaluations_within(progress, iters) == evals


def test_when_the_hours_have_passed_the_run_is_over():
    time = Time()
    schedule = make_schedule(time, hours=1.0)
    progress = Progress(fraction=0.5)
    train(schedule, time, progress, 1, seconds=4000.0)
    assert schedule.is_over(progress)


def test_all_processes_follow_the_first_one():
    class SecondOfTwo(Ranks):
        def from_first(self, value):
            return 9  # what the first process sends

    time = Time()
    schedule = make_schedule(time, hours=1.0)
    schedule.ranks = SecondOfTwo(rank=1, world_size=2)
    progress = Progress()
    train(schedule, time, progress, 1)
    assert progress.fraction == pytest.approx(0.1)
