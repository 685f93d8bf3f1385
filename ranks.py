"""
Many processes as one: the few things that torchrun's processes tell each other. Started without torchrun, there is
one process, and nothing to tell.
"""

import os
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """This process among all of the run: its rank, how many there are, and its number on this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the one process that prints and writes."""
        return self.rank == 0

    def sum(self, tensors: list[torch.Tensor]):
        """Replaces each tensor, everywhere, by its sum over all processes."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is True in any process."""
        if self.world_size == 1:
            return flag
        total = torch.tensor(float(flag), device=device)
        self.sum([total])
        return total.item() > 0

    def stop(self):
        if self.world_size > 1:
            dist.destroy_process_group()


def start_ranks(device: str) -> tuple[Ranks, str]:
    """
    Joins the processes that torchrun started, and silences all but the first. Returns the ranks, and the device of
    this one: with several GPUs on a machine each process gets its own.
    """
    if "RANK" not in os.environ:
        return Ranks(), device
    ranks = Ranks(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        device = f"cuda:{ranks.local_rank}"
        torch.cuda.set_device(device)
    # Imported later, its functions would keep the group in their defaults, and with it threads that can crash the exit.
    from torch.distributed import nn  # noqa: F401

    dist.init_process_group("nccl" if on_gpu else "gloo")
    if not ranks.is_first:
        sys.stdout = open(os.devnull, "w")
    return ranks, device
