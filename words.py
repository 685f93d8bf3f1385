"""
How the program speaks of errors and of time.
"""


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or else its name: enough for a sentence about it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def duration(seconds: float) -> str:
    """5h 07m, 12m 30s or 8s."""
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    if hours:
        return f"{hours}h {minutes:02}m"
    return f"{minutes}m {seconds % 60:02}s" if minutes else f"{seconds}s"
