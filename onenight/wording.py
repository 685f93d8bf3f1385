"""Phrases that several scripts print."""


def duration(seconds: float) -> str:
    """Return a duration as text: "5h 07m", "12m 30s" or "8s"."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h {minutes % 60:02}m"
    if minutes:
        return f"{minutes}m {seconds:02}s"
    return f"{seconds}s"
