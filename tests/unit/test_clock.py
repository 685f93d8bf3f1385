"""clock.py: the times of a run, by a clock that the tests advance."""

import time

from onenight.training.clock import LOG_S, RECENT_ITERS, SAVE_S, SETTLING_ITERS, Clock


class Time:
    """Both of a Clock's sources of time."""

    def __init__(self):
        self.awake = 1000.0
        self.of_day = 2e9

    def pass_by(self, seconds):
        self.awake += seconds
        self.of_day += seconds

    def make_clock(self):
        return Clock(lambda: self.awake, lambda: self.of_day)


def do_iterations(clock, seconds):
    for s in seconds:
        clock.add_iteration(s)


def test_the_elapsed_time_includes_the_sessions_before():
    source = Time()
    clock = source.make_clock()
    source.pass_by(5)
    assert clock.elapsed() == 5
    clock.earlier_s = 100.0
    assert clock.elapsed() == 105


def test_the_first_iterations_do_not_count_for_the_speed():
    clock = Time().make_clock()
    do_iterations(clock, [9.0, 9.0])
    assert clock.s_per_iter() == 0
    assert clock.mean_s_per_iter() == 0
    do_iterations(clock, [1.0, 3.0])
    assert clock.last_s == 3.0
    assert clock.s_per_iter() == 2.0
    assert clock.mean_s_per_iter() == 2.0


def test_a_second_iteration_of_many_seconds_counts_until_there_are_later_ones():
    """Compiling is a small part of it, and the first line should name a speed."""
    clock = Time().make_clock()
    do_iterations(clock, [99.0, LOG_S / 2])
    assert clock.s_per_iter() == LOG_S / 2
    do_iterations(clock, [14.0])
    assert clock.s_per_iter() == 14.0


def test_the_speed_is_the_median_of_the_recent_iterations_so_a_pause_does_not_change_it():
    clock = Time().make_clock()
    do_iterations(clock, [9.0] * SETTLING_ITERS)
    do_iterations(clock, [5.0] * 100)
    do_iterations(clock, [1.0] * (RECENT_ITERS - 1))
    do_iterations(clock, [1000.0])
    assert clock.s_per_iter() == 1.0
    mean = (100 * 5.0 + RECENT_ITERS - 1 + 1000) / (100 + RECENT_ITERS)
    assert clock.mean_s_per_iter() == mean


def test_a_line_is_due_after_thirty_seconds():
    source = Time()
    clock = source.make_clock()
    source.pass_by(LOG_S - 1)
    assert not clock.log_is_due()
    source.pass_by(1)
    assert clock.log_is_due()
    clock.add_log()
    assert not clock.log_is_due()


def test_a_checkpoint_is_due_ten_minutes_after_the_last_one():
    source = Time()
    clock = source.make_clock()
    source.pass_by(SAVE_S)
    assert not clock.save_is_due()
    source.pass_by(1)
    assert clock.save_is_due()
    clock.add_save(3.0)
    assert not clock.save_is_due()
    assert clock.save_s == 3.0


def test_the_last_evaluation_is_remembered():
    clock = Time().make_clock()
    clock.add_evaluation(7.0)
    clock.add_evaluation(8.0)
    assert clock.evals == 2
    assert clock.eval_s == 8.0


def test_the_time_of_day_some_seconds_from_now():
    source = Time()
    expected = time.strftime("%H:%M", time.localtime(2e9 + 3600))
    assert source.make_clock().time_of_day(3600) == expected


def test_sleep_is_the_time_of_day_that_passed_while_the_machine_was_not_awake():
    source = Time()
    clock = source.make_clock()
    source.pass_by(100)
    assert clock.take_slept_s() == 0
    source.of_day += 3000
    source.pass_by(50)
    assert clock.take_slept_s() == 3000
    assert clock.take_slept_s() == 0  # reported once


def test_clocks_that_are_set_back_or_drift_are_not_sleep():
    source = Time()
    clock = source.make_clock()
    source.of_day += 20
    assert clock.take_slept_s() == 0
    source.of_day -= 5000
    assert clock.take_slept_s() == 0
