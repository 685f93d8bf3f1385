"""The processes that torchrun starts, and what they exchange."""

import os
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist

# The environment variables that torchrun sets.
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """The group of processes that train together, seen from one of them.

    `rank` is the number of this process, from 0, and `world_size` is how many there are. Without
    torchrun there is only one, and nothing is exchanged.
    """

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    def sum(self, tensors: list[torch.Tensor]):
        """Replace each tensor, in every process, by its sum over the processes."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is True in any process."""
        if self.world_size == 1:
            return flag
        return self._sum_number(float(flag)) > 0

    def from_first(self, value: float) -> float:
        """Return the value that the first process passes; the others' values are ignored."""
        return self._sum_number(value if self.is_first else 0.0)

    def _sum_number(self, value: float) -> float:
        """Return the sum of a number over the processes."""
        if self.world_size == 1:
            return float(value)
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return total.item()

    def stop(self):
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def start_ranks(device: str) -> tuple[Ranks, str]:
    """Join the processes that torchrun started, and silence all but the first.

    Args:
        device: the setting: "auto", "cpu", "cuda", ...

    Returns:
        The ranks, and the device of this process: with several GPUs each process gets its own.
    """
    if not all(os.environ.get(name) for name in TORCHRUN_VARIABLES):
        return Ranks(), device
    rank = int(os.environ["RANK"])
    world_size = int(os.environ["WORLD_SIZE"])
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)

    # Imported only after the group exists, this module would keep the group and its threads alive
    # until the process exits.
    from torch.distributed import nn  # noqa: F401

    # With GPUs, tensors on the CPU go through gloo, and those on a GPU through NCCL.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    return Ranks(rank, world_size), device
