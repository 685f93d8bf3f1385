"""
What the figures of a benchmark depend on beside its command.
"""

import platform
import subprocess
from pathlib import Path


def cpu_name() -> str:
    """As the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def commit() -> str:
    """Of this project, -dirty where files differ from it."""
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return result.stdout.strip() or "not committed"
