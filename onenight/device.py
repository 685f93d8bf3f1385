"""The hardware: device, number format, compilation, memory, and the processes that torchrun starts. A feature that the
machine lacks is switched off with a message."""

import contextlib
import os
import sys
import time
from dataclasses import dataclass

from onenight.files import first_line

import torch
import torch.distributed as dist

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(device: str) -> torch.device:
    """'auto' is the GPU if there is one. Raises SystemExit for a device that this machine does not have."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f"device={device} is not available here ({first_line(error)}); try --device=auto")
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> str:
    """'auto' is bfloat16 on a GPU that supports it, float16 on an older one, float32 elsewhere."""
    has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "auto":
        return "float32" if device.type != "cuda" else "bfloat16" if has_bfloat16 else "float16"
    if dtype == "bfloat16" and not has_bfloat16:
        print("this GPU does not support bfloat16: using float16 with loss scaling")
        return "float16"
    if dtype == "float16" and device.type != "cuda":
        print("float16 needs a GPU: using float32")
        return "float32"
    return dtype


def autocast(dtype: str, device: torch.device):
    """The context of the forward pass: matrix products in `dtype`, while the weights stay float32."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device_type=device.type, dtype=DTYPES[dtype])


def use_tf32(device: torch.device):
    """On a GPU, TF32 for the products that stay in float32: GPT training does not need their last 13 bits."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def compile_model(model, device: torch.device):
    """The model under torch.compile, or the model itself, with the reason, where compilation does not work."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # no C++ compiler, no Python headers, no Triton, a Python too new, ...
        print(f"compile: off, because it does not work here ({first_line(error)}); going on without it")
        return model
    print("compile: on; the first iterations take a minute or so")
    return torch.compile(model, dynamic=False)  # few shapes, each compiled for itself


def measure_tflops(device: torch.device, dtype: str) -> float:
    """TFLOP/s of large square matrix products, the best of half a second: the ceiling that MFU is relative to."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    best, end = float("inf"), time.monotonic() + 0.5
    while time.monotonic() < end:
        started = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e12


def limit_memory(vram_limit_gb: float, device: torch.device):
    """Limits this process to so much of the GPU's memory, as if the card were smaller. 0: no limit."""
    if vram_limit_gb and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, vram_limit_gb * 1e9 / total), device)


def peak_memory_gb(device: torch.device) -> float:
    """The most GPU memory that tensors have taken so far, in GB (1e9 bytes); 0 on other devices."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started: its rank, how many there are, its number on this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the one process that prints and writes."""
        return self.rank == 0

    def sum(self, tensors: list[torch.Tensor]):
        """Replaces each tensor, in every process, by its sum over all processes."""
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

    def from_first(self, value: float, device: torch.device) -> float:
        """The value that the first process has."""
        total = torch.tensor(value if self.is_first else 0.0, device=device)
        self.sum([total])
        return total.item()

    def stop(self):
        """Leaves the process group."""
        if self.world_size > 1:
            dist.destroy_process_group()


def start_ranks(device: str) -> tuple[Ranks, str]:
    """Joins the processes that torchrun started, and silences all but the first; without torchrun there is one. Returns
    the ranks and the device of this process: with several GPUs on a machine each process gets its own."""
    if "RANK" not in os.environ:
        return Ranks(), device
    ranks = Ranks(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        device = f"cuda:{ranks.local_rank}"
        torch.cuda.set_device(device)
    # Imported after the group exists, its functions would keep the group, and its threads, alive until the exit.
    from torch.distributed import nn  # noqa: F401

    dist.init_process_group("nccl" if on_gpu else "gloo")
    if not ranks.is_first:
        sys.stdout = open(os.devnull, "w")
    return ranks, device
