"""onenight/system/limits.py: memory and cores within the limits of a container."""

import math
import os

import pytest

from onenight.system import limits

CORES = 8
MEMINFO = "MemTotal:       16000000 kB\nMemFree:  1 kB\nMemAvailable:    9000000 kB\n"
GB = 10**9


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that writes files of /proc and /sys/fs/cgroup, by their paths."""
    monkeypatch.setattr(limits, "PROC", tmp_path / "proc")
    monkeypatch.setattr(limits, "CGROUPS", tmp_path / "sys/fs/cgroup")
    monkeypatch.setattr(os, "cpu_count", lambda: CORES)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(CORES)), raising=False)
    monkeypatch.setattr(limits, "total_memory", lambda: 16 * GB)

    def write(files):
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    return write


V2 = {"proc/self/cgroup": "0::/\n"}
V2_NESTED = {"proc/self/cgroup": "0::/user/job\n"}
# Inside Docker, the path of version 1 is that of the host, which does not exist here.
V1 = {"proc/self/cgroup": "5:memory:/docker/1f\n4:cpu,cpuacct:/docker/1f\n1:name=systemd:/\n0::/\n"}
CGROUP = "sys/fs/cgroup"


@pytest.mark.parametrize(
    "files, limit",
    [
        ({}, math.inf),
        (V2, math.inf),
        ({**V2, f"{CGROUP}/memory.max": "max\n"}, math.inf),
        ({**V2, f"{CGROUP}/memory.max": "2000000000\n"}, 2 * GB),
        ({**V2_NESTED, f"{CGROUP}/user/job/memory.max": "3000000000\n"}, 3 * GB),
        (
            {
                **V2_NESTED,
                f"{CGROUP}/user/job/memory.max": "3000000000\n",
                f"{CGROUP}/user/memory.max": "1000000000\n",
            },
            GB,
        ),
        ({**V1, f"{CGROUP}/memory/memory.limit_in_bytes": "2000000000\n"}, 2 * GB),
        ({**V1, f"{CGROUP}/memory/docker/1f/memory.limit_in_bytes": "4000000000\n"}, 4 * GB),
    ],
)
def test_the_limit_of_memory_is_that_of_the_group_and_its_parents(machine, files, limit):
    machine(files)
    assert limits.container_memory() == limit
    assert limits.available_memory() == min(limit, 16 * GB)


def test_the_available_memory_is_the_smallest_of_limit_unused_and_total(machine, monkeypatch):
    machine({"proc/meminfo": MEMINFO})
    assert limits.available_memory() == 9_000_000 * 1024
    machine({**V2, f"{CGROUP}/memory.max": "2000000000\n"})
    assert limits.available_memory() == 2 * GB
    monkeypatch.setattr(limits, "total_memory", lambda: GB)
    assert limits.available_memory() == GB


def test_a_system_that_does_not_report_its_memory_has_no_limit(machine, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(limits, "PROC", limits.PROC / "missing")
    monkeypatch.delattr(os, "sysconf", raising=False)
    assert limits.available_memory() == math.inf


@pytest.mark.parametrize(
    "files, cores",
    [
        ({}, CORES),
        ({**V2, f"{CGROUP}/cpu.max": "max 100000\n"}, CORES),
        ({**V2, f"{CGROUP}/cpu.max": "200000 100000\n"}, 2),
        ({**V2, f"{CGROUP}/cpu.max": "150000 100000\n"}, 2),
        ({**V2, f"{CGROUP}/cpu.max": "10000 100000\n"}, 1),
        ({**V2, f"{CGROUP}/cpu.max": "6400000 100000\n"}, CORES),
        ({**V2_NESTED, f"{CGROUP}/user/cpu.max": "300000 100000\n"}, 3),
        (
            {
                **V1,
                f"{CGROUP}/cpu/cpu.cfs_quota_us": "400000\n",
                f"{CGROUP}/cpu/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        (
            {
                **V1,
                f"{CGROUP}/cpu/cpu.cfs_quota_us": "-1\n",
                f"{CGROUP}/cpu/cpu.cfs_period_us": "100000\n",
            },
            CORES,
        ),
    ],
)
def test_the_cores_are_those_of_the_quota_rounded_up(machine, files, cores):
    machine(files)
    assert limits.cores() == cores


def test_a_process_that_is_bound_to_fewer_cores_has_those(machine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1}, raising=False)
    machine({**V2, f"{CGROUP}/cpu.max": "200000 100000\n"})
    assert limits.cores() == 1


@pytest.mark.parametrize(
    "quota, before, after",
    [("max", None, None), ("200000", None, "2"), ("200000", "5", "5")],
)
def test_torch_gets_as_many_threads_as_the_quota_unless_told_otherwise(
    machine, monkeypatch, quota, before, after
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if before:
        monkeypatch.setenv("OMP_NUM_THREADS", before)
    machine({**V2, f"{CGROUP}/cpu.max": f"{quota} 100000\n"})
    limits.limit_threads()
    assert os.environ.get("OMP_NUM_THREADS") == after
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
