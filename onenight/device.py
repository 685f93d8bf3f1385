"""The hardware: device, number format, compilation, memory, processes. What it lacks is left out, with a message."""

import os
import sys
import time
from dataclasses import dataclass

from onenight import WINDOWS_DRIVER
from onenight.files import first_line

import torch
import torch.distributed as dist
from torch._utils import _flatten_dense_tensors, _take_tensors, _unflatten_dense_tensors

GB = 1e9
RESERVE = 0.7 * GB  # of a GPU's memory, not available to tensors, assumed: the CUDA context, the allocator's fragments
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what it sets for its processes
MESSAGE = 1 << 27  # bytes that are summed over the processes at once
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def set_up_device(device: str, dtype: str, compiled: bool) -> tuple[torch.device, str, bool]:
    """Device, number format and whether to compile, as far as this machine can. Raises as choose_device() does."""
    chosen = choose_device(device)
    use_tf32(chosen)
    return chosen, choose_dtype(dtype, chosen), compiled and compile_works(chosen)


def choose_device(device: str) -> torch.device:
    """'auto' is the GPU if there is one. Raises SystemExit for a device that this machine does not have."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f"device={device} is not available here ({first_line(error)}); try --device=auto")


def choose_dtype(dtype: str, device: torch.device) -> str:
    """'auto' is bfloat16 on a GPU that supports it, float16 on an older one, float32 elsewhere. What the device lacks,
    or emulates a hundred times slower, is replaced, with a message."""
    on_gpu, has_bfloat16 = device.type == "cuda", supports_bfloat16(device)
    instead = "float16" if on_gpu else "float32"
    if dtype == "auto":
        return "bfloat16" if on_gpu and has_bfloat16 else instead
    if dtype == "bfloat16" and not has_bfloat16:
        print(f"this {device.type.upper()} has no bfloat16 instructions: using {instead}")
        return instead
    if dtype == "float16" and not on_gpu:
        print("float16 needs a GPU: using float32")
        return instead
    return dtype


def supports_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has_onednn = torch.backends.mkldnn.is_available()
    return device.type != "cpu" or (has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def autocast(dtype: str, device: torch.device):
    """The context of the forward pass: matrix products in `dtype`, while the weights stay float32."""
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")


def use_tf32(device: torch.device):
    """On a GPU, TF32 for the products that stay in float32: GPT training does not need their last 13 bits."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def compile_works(device: torch.device) -> bool:
    """Whether torch.compile works here; says what is missing if it does not."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # no C++ compiler, no Python headers, no Triton, a Python too new, ...
        remedy = "install a C++ compiler and Python's headers (Debian and Ubuntu: apt install g++ python3-dev)"
        if sys.platform == "win32":
            remedy = "pip install triton-windows, or train in WSL2"
        print(f"compile: off, because it does not work here ({first_line(error)}); to get it, {remedy}")
        return False
    return True


def compile_model(model):
    """The model under torch.compile. Few shapes are seen, each compiled for itself, and kept on the disk."""
    torch._dynamo.config.recompile_limit = 64  # each micro-batch halved for want of memory is another shape
    # The cache of compiled backward passes leaves out models with an autograd.Function, such as our loss, unless told.
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    return torch.compile(model, dynamic=False)


def measure_tflops(device: torch.device, dtype: str) -> float:
    """TFLOP/s of large square matrix products, the best of half a second: the ceiling that MFU is relative to."""
    size = 8192 if device.type == "cuda" else 512  # on a CPU short ones, so that one is undisturbed by other work
    matrix = torch.randn(size, size, device=device, dtype=DTYPES[dtype])
    (matrix @ matrix)[0, 0].item()  # loads the library
    times, end = [], time.monotonic() + 0.5
    while not times or time.monotonic() < end:
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - started)
    del matrix
    torch.cuda.empty_cache()  # nothing without a GPU
    return 2 * size**3 / min(times) / 1e12


def usable_memory(device: torch.device, vram_limit_gb: float = 0.0) -> float:
    """Bytes of a GPU's memory for tensors: what is free, at most the card's size, or vram_limit_gb, less RESERVE."""
    free, total = torch.cuda.mem_get_info(device)
    return min(free, min(total, vram_limit_gb * GB or total) - RESERVE)


def limit_memory(vram_limit_gb: float, device: torch.device):
    """Limits this process to usable_memory(), as if the card had vram_limit_gb; 0: no limit, but with Windows' driver,
    which would go on in the computer's memory, many times slower, to 0.5 GB less than is free now."""
    if device.type == "cuda" and (vram_limit_gb or WINDOWS_DRIVER):
        free, total = torch.cuda.mem_get_info(device)
        limit = usable_memory(device, vram_limit_gb) if vram_limit_gb else free - 0.5 * GB
        torch.cuda.set_per_process_memory_fraction(max(0.0, limit / total), device)
        print(f"memory: limited to {limit / GB:.1f} GB of the GPU's {total / GB:.1f}")


def peak_memory_gb(device: torch.device) -> tuple[float, float]:
    """The most GPU memory so far, in GB, that tensors took, and that was reserved for them; 0, 0 on other devices."""
    if device.type != "cuda":
        return 0.0, 0.0
    return torch.cuda.max_memory_allocated(device) / GB, torch.cuda.max_memory_reserved(device) / GB


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out: CUDA's has several classes, and a CPU's and MPS's none of its own."""
    words = ("out of memory", "alloc_failed", "allocate memory", "not enough memory")
    told = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    return told or isinstance(error, (torch.OutOfMemoryError, MemoryError))


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started: its rank, and how many there are."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one process that prints and writes."""
        return self.rank == 0

    def sum(self, tensors: list[torch.Tensor]):
        """Replaces each tensor, in every process, by its sum over all processes. A few large messages are faster than
        one for each of hundreds of tensors."""
        for some in _take_tensors(tensors, MESSAGE) if self.world_size > 1 else ():
            message = _flatten_dense_tensors(some)
            dist.all_reduce(message)
            for tensor, total in zip(some, _unflatten_dense_tensors(message, some)):
                tensor.copy_(total)

    def any(self, flag: bool) -> bool:
        """Whether the flag is True in any process."""
        return self._decide(float(flag)) > 0

    def from_first(self, value: float) -> float:
        """The value that the first process has."""
        return self._decide(value if self.is_first else 0.0)

    def _decide(self, value: float) -> float:
        """The sum of the value over the processes."""
        total = torch.tensor(value, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.item()

    def stop(self):
        """Leaves the process group."""
        if self.world_size > 1:
            dist.destroy_process_group()


def start_ranks(device: str) -> tuple[Ranks, str]:
    """Joins the processes that torchrun started, and silences all but the first; without torchrun there is one. Returns
    the ranks and the device of this process: with several GPUs on a machine each process gets its own."""
    found = [name for name in TORCHRUN if os.environ.get(name)]
    if len(found) < len(TORCHRUN):
        if found:
            print(f"{' and '.join(found)} set, but not all that torchrun sets ({', '.join(TORCHRUN)}): training alone")
        return Ranks(), device
    rank, world_size, local_rank = (int(os.environ[name]) for name in TORCHRUN[:3])
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    # Imported after the group exists, its functions would keep the group, and its threads, alive until the exit.
    from torch.distributed import nn  # noqa: F401

    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")  # by the tensor's device
    if rank:
        sys.stdout = open(os.devnull, "w")
    return Ranks(rank, world_size), device
