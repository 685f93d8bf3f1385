"""A run survives its terminal, its pipe, and the file that it prints to."""

import os
import signal

import pytest

from forks import Training, needs_fork
from helpers import load, metrics


def print_to_a_full_disk():
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def print_to_a_pipe_that_nobody_reads():
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(reader)


def print_to_nothing():
    """As with >&- in a shell."""
    os.close(1)


@needs_fork
@pytest.mark.parametrize(
    "prepare", [print_to_a_full_disk, print_to_a_pipe_that_nobody_reads, print_to_nothing]
)
def test_a_run_survives_output_that_fails(bins, tmp_path, prepare):
    training = Training(bins, tmp_path, prepare=prepare, max_iters=12)
    assert training.end() == 0, training.output()
    assert training.output() == ""
    assert load(tmp_path)["iter_num"] == 12
    assert [record["iter"] for record in metrics(tmp_path) if "lr" in record] == [*range(12)]


@needs_fork
def test_a_run_whose_terminal_is_closed_is_saved(bins, tmp_path):
    """It gets SIGHUP, and from then on all that it prints fails."""
    controller, terminal = os.openpty()

    def use_terminal():
        os.close(controller)
        os.setsid()
        terminal_of_session = os.open(os.ttyname(terminal), os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(terminal_of_session, number)

    training = Training(bins, tmp_path, prepare=use_terminal, max_iters=10**6)
    os.close(terminal)
    printed = b""
    while b"iter 20:" not in printed:
        printed += os.read(controller, 1000)
    os.close(controller)
    assert training.end() == 128 + signal.SIGHUP
    assert load(tmp_path)["iter_num"] > 20
