"""Fixtures for all tests."""

import pytest

import onenight.plan
from helpers import STARTED, make_bins, train_here

onenight.plan.MEASURED_S = 0.0  # measure once: seconds less for each run in this process

# The files with the longest tests begin, so that no process waits for a long one at the end.
LONG = ("test_benchmarks.py", "test_kills.py", "test_torchrun.py", "test_signals.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="session")
def bins(tmp_path_factory):
    """A folder with small bins, which tests read but do not change."""
    return make_bins(tmp_path_factory.mktemp("bins"))


@pytest.fixture(scope="session")
def finished_run(bins, tmp_path_factory):
    """The folder of a whole run with TINY, which tests read or copy but do not change."""
    out_dir = tmp_path_factory.mktemp("finished")
    result = train_here(bins, out_dir)
    assert result.returncode == 0, result.stderr
    return out_dir


@pytest.fixture(autouse=True)
def no_process_is_left():
    """Kill the processes that a failed test has left running."""
    yield
    while STARTED:
        STARTED.pop().kill()
