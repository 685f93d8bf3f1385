"""What this process may use of the machine: memory and cores, within the limits of its container.

A container's limits are those of its control group (cgroup), in version 1 or 2 of Linux's
interface. The limits of all parents of a group apply to it as well.
"""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


def available_memory() -> float:
    """Return how many bytes this process may use: the smallest of the machine's memory, what is
    available of it, and the container's limit. Infinity if the system does not report it."""
    return min(total_memory(), unused_memory(), container_memory())


def total_memory() -> float:
    """Return the bytes of this machine's memory, or infinity if the system does not report it."""
    if not hasattr(os, "sysconf"):  # Windows
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def unused_memory() -> float:
    """Return the bytes that programs can still allocate, or infinity if it is not reported, as on
    systems other than Linux."""
    available = re.search(r"^MemAvailable: *(\d+) kB", read(PROC / "meminfo"), re.MULTILINE)
    return int(available[1]) * 1024 if available else math.inf


def container_memory() -> float:
    """Return the container's limit of memory in bytes, or infinity without one."""
    limits = [math.inf]
    for folder in cgroup_folders("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):  # of version 2 and 1
            content = read(folder / name)
            if content.isdigit():  # or "max"
                limits.append(int(content))
    return min(limits)


def cores() -> int:
    """Return the number of cores that this process may use: those that it is bound to, but no more
    than the container's quota of processor time, rounded up."""
    if hasattr(os, "sched_getaffinity"):
        available = len(os.sched_getaffinity(0))
    else:
        available = os.cpu_count() or 1
    quota = container_cores()
    return max(1, math.ceil(quota)) if quota < available else available


def container_cores() -> float:
    """Return the container's quota of processor time in cores, or infinity without one."""
    quotas = [math.inf]
    for folder in cgroup_folders("cpu"):
        # Version 2 has both numbers in one file, version 1 has a file for each.
        content = read(folder / "cpu.max")
        if not content:
            quota = read(folder / "cpu.cfs_quota_us")
            period = read(folder / "cpu.cfs_period_us")
            content = f"{quota} {period}"
        numbers = re.fullmatch(r"(\d+) (\d+)", content)  # without a quota "max" or -1
        if numbers:
            quotas.append(int(numbers[1]) / int(numbers[2]))
    return min(quotas)


def cgroup_folders(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control groups that limit `controller` ("memory" or
    "cpu"), with those of their parents. Inside a container, some of them do not exist."""
    for line in read(PROC / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            root = CGROUPS
        elif controller in controllers.split(","):  # version 1
            root = CGROUPS / controller
        else:
            continue
        folder = root / path.lstrip("/")
        yield folder
        while folder != root:
            folder = folder.parent
            yield folder


def limit_threads():
    """Make OpenMP, and with it torch, start no more threads than cores() allows.

    By itself it starts one for each core of the machine, and those beyond the quota make the others
    wait. Has an effect only before torch is imported, and none if OMP_NUM_THREADS is set.
    """
    if container_cores() < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(cores()))


def read(path: Path) -> str:
    """Return a file's text without surrounding whitespace, or "" if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
