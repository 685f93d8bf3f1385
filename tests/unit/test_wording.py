"""onenight/system/wording.py: phrases that the messages share."""

from pathlib import Path

import pytest

from onenight.system.wording import duration, first_line, looked_in


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0s"),
        (8.4, "8s"),
        (59.6, "1m 00s"),
        (750, "12m 30s"),
        (3599.6, "1h 00m"),
        (18_420, "5h 07m"),
    ],
)
def test_a_duration_in_words(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    "error, text",
    [
        (ValueError("first\nsecond"), "first"),
        (ValueError(" \n"), "ValueError"),
        (OSError(), "OSError"),
    ],
)
def test_the_first_line_of_an_error(error, text):
    assert first_line(error) == text


def test_a_message_names_the_working_directory_for_a_relative_path(tmp_path):
    assert looked_in(Path("a.bin")) == f" in {Path.cwd()}"
    assert looked_in(tmp_path / "a.bin") == ""
