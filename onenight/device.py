"""The device: its number formats, torch.compile, and its memory.

What this machine lacks is replaced by what it has, with a message.
"""

from onenight.startup import LIBC, WINDOWS_GPU_DRIVER

import re
from pathlib import Path

import torch

from onenight.errors import UserError, first_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GB = 1e9
# Bytes of a GPU's memory that tensors cannot use: the CUDA context and the allocator's
# fragmentation. An assumption, not a measurement.
RESERVE = 0.7 * GB
WINDOWS_MARGIN = 0.5 * GB  # for other programs that need more while the run goes on
# What the errors say that have no class of their own: some of CUDA's libraries', a CPU's, MPS's.
OUT_OF_MEMORY_WORDS = (
    "out of memory",
    "alloc_failed",
    "allocate memory",
    "not enough memory",
    "could not create a primitive",  # oneDNN, on a CPU
)


# -----------------------------------------------------------------------------
# The device and its number formats


def set_up_device(device: str, dtype: str, compiled: bool) -> tuple[torch.device, str, bool]:
    """Return the device, the number format and whether to compile, as this machine can.

    The arguments are the settings of the same names. On a GPU, float32 products are computed in
    TF32, which drops 13 of the 23 bits of the mantissa: training a GPT does not need them. Raises
    UserError if the device is not available.
    """
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return chosen, choose_dtype(dtype, chosen), compiled and compile_works(chosen)


def choose_device(device: str) -> torch.device:
    """Return the device of that name, and make it the current one; "auto" is a GPU if there is one,
    or else the CPU."""
    if device == "auto":
        device = "cpu"
        if torch.cuda.is_available():
            device = "cuda"
        elif torch.backends.mps.is_available():
            device = "mps"
    try:
        probe = torch.ones(1, device=device)
        probe.item()
        if probe.device.type == "cuda":
            torch.cuda.set_device(probe.device)  # for torch's functions that take no device
        return probe.device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"device={device} is not available here ({first_line(error)})")


def choose_dtype(dtype: str, device: torch.device) -> str:
    """Return the number format to compute in, a key of DTYPES.

    "auto" is bfloat16 on a GPU that supports it, float16 on an older GPU, and float32 on other
    devices. A format that the device lacks, or emulates a hundred times slower, is replaced.
    """
    on_gpu = device.type == "cuda"
    fallback = "float16" if on_gpu else "float32"
    if dtype == "auto":
        return "bfloat16" if on_gpu and supports_bfloat16(device) else fallback
    is_missing = dtype == "bfloat16" and not supports_bfloat16(device)
    if is_missing or (dtype == "float16" and not on_gpu):
        print(f"this {device.type} has no {dtype}: using {fallback}")
        return fallback
    return dtype


def supports_bfloat16(device: torch.device) -> bool:
    """Return whether the device has bfloat16 instructions."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        has_onednn = torch.backends.mkldnn.is_available()
        return has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return True


def autocast(dtype: str, device: torch.device):
    """Return the context for a forward pass: matrix products in `dtype`, weights in float32."""
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")


# -----------------------------------------------------------------------------
# torch.compile


def compile_works(device: torch.device) -> bool:
    """Return whether torch.compile works here; if not, print why."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
        return True
    except Exception as error:  # no C++ compiler, no Triton, a Python that is too new, ...
        reason = " ".join(str(error).split())[:200]
        print(f"torch.compile does not work here: continuing without it ({reason})")
        return False


def compile_model(model):
    """Return the model under torch.compile. The inputs have only a few shapes, and each is compiled
    separately: a micro-batch that is halved because memory ran out is another shape."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(model, dynamic=False)


# -----------------------------------------------------------------------------
# Memory


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on a GPU or on a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        words in message for words in OUT_OF_MEMORY_WORDS
    )


def free_memory(device: torch.device, vram_limit_gb: float = 0.0) -> float | None:
    """Return how many bytes a run may use, None if the system does not report it.

    Of a GPU that is the free memory, less WINDOWS_MARGIN with Windows' driver, but at most the size
    of the card (or `vram_limit_gb`, if positive) less RESERVE.
    """
    if device.type != "cuda":
        meminfo = Path("/proc/meminfo")
        if not meminfo.exists():
            return None
        available = re.search(r"MemAvailable: *(\d+) kB", meminfo.read_text())
        return int(available[1]) * 1024
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device)  # by this process
    if WINDOWS_GPU_DRIVER:
        free -= WINDOWS_MARGIN
    size = min(total, vram_limit_gb * GB) if vram_limit_gb else total
    return min(free, size - RESERVE)


def limit_memory(vram_limit_gb: float, device: torch.device):
    """Limit the GPU memory of this process, as if the card had `vram_limit_gb`; 0: no limit.

    Windows' driver would move on to the computer's memory when the GPU's is full, and be many
    times slower. With that driver there is always a limit.
    """
    if device.type != "cuda" or not (vram_limit_gb or WINDOWS_GPU_DRIVER):
        return
    _, total = torch.cuda.mem_get_info(device)
    limit = free_memory(device, vram_limit_gb)
    torch.cuda.set_per_process_memory_fraction(max(0.0, limit / total), device)
    print(f"memory: limited to {limit / GB:.1f} GB of the GPU's {total / GB:.1f}")


def release_memory(device: torch.device):
    """Return the memory of freed tensors to the device, after it has run out, and measure the peak
    anew."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif LIBC is not None:
        LIBC.malloc_trim(0)


def peak_memory_gb(device: torch.device) -> tuple[float, float]:
    """Return the most GPU memory so far that tensors took and that was reserved for them, in GB;
    both are 0 on devices other than CUDA GPUs."""
    if device.type != "cuda":
        return 0.0, 0.0
    allocated = torch.cuda.max_memory_allocated(device)
    reserved = torch.cuda.max_memory_reserved(device)
    return allocated / GB, reserved / GB
