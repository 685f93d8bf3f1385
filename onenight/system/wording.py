"""Phrases that the scripts' messages share."""

from pathlib import Path


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its class if it has none."""
    message = str(error).strip() or type(error).__name__
    return message.splitlines()[0]


def looked_in(path: Path) -> str:
    """Return " in FOLDER", the working directory, if the path is relative, and "" otherwise.

    A message that says that a file is missing ends with it.
    """
    return "" if path.is_absolute() else f" in {Path.cwd()}"


def duration(seconds: float) -> str:
    """Return a duration as text: "5h 07m", "12m 30s" or "8s"."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h {minutes % 60:02}m"
    if minutes:
        return f"{minutes}m {seconds:02}s"
    return f"{seconds}s"
