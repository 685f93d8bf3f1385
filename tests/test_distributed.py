"""distributed.py: what the processes of torchrun exchange (faults/test_torchrun.py trains)."""

import socket
from pathlib import Path

import pytest

from helpers import PROGRAMS, start
from onenight.distributed import TORCHRUN_VARIABLES, Ranks, start_ranks


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads thread names from /proc")
def test_two_processes_get_the_same_and_only_the_first_one_prints(monkeypatch):
    """They are started as torchrun does, without waiting for torchrun itself."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        free_port = str(server.getsockname()[1])
    processes = []
    for rank in ("0", "1"):
        values = (rank, "2", rank, "127.0.0.1", free_port)
        for name, value in zip(TORCHRUN_VARIABLES, values):
            monkeypatch.setenv(name, value)
        processes.append(start([PROGRAMS / "exchange.py"]))
    for process, printed in zip(processes, ("printed once\n", "")):
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
        assert stdout == printed


def test_without_torchrun_there_is_one_process(monkeypatch):
    for name in TORCHRUN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    # Some batch systems set a few of its variables.
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert start_ranks("cpu") == (Ranks(), "cpu")
