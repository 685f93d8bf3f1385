"""Fixtures for the tests of faults."""

import pytest

from forks import RUN
from helpers import train_here


@pytest.fixture(autouse=True, scope="module")
def no_pictures():
    """Draw no loss.png, which takes longer than all else in these runs."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("onenight.records.draw_losses", lambda *arguments: None)
        yield


@pytest.fixture(scope="session")
def undisturbed(bins, tmp_path_factory):
    """The folder of a run to which nothing happened; the others must end as it did."""
    out_dir = tmp_path_factory.mktemp("undisturbed")
    result = train_here(bins, out_dir, **RUN)
    assert result.returncode == 0, result.stderr
    return out_dir
