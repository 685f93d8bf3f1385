"""GPU memory: how much may be used, how much was used, and whether it ran out."""

import torch

from onenight.startup import WINDOWS_GPU_DRIVER

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


def usable_memory(device: torch.device, vram_limit_gb: float = 0.0) -> float:
    """Return how many bytes of GPU memory tensors may use.

    That is the free memory, less WINDOWS_MARGIN with Windows' driver, but at most the size of the
    card (or `vram_limit_gb`, if positive) less RESERVE.
    """
    free, total = torch.cuda.mem_get_info(device)
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
    limit = usable_memory(device, vram_limit_gb)
    torch.cuda.set_per_process_memory_fraction(max(0.0, limit / total), device)
    print(f"memory: limited to {limit / GB:.1f} GB of the GPU's {total / GB:.1f}")


def peak_memory_gb(device: torch.device) -> tuple[float, float]:
    """Return the most GPU memory so far that tensors took and that was reserved for them, in GB.

    Both are 0 on devices other than CUDA GPUs.
    """
    if device.type != "cuda":
        return 0.0, 0.0
    allocated = torch.cuda.max_memory_allocated(device)
    reserved = torch.cuda.max_memory_reserved(device)
    return allocated / GB, reserved / GB


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on a GPU or on a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        words in message for words in OUT_OF_MEMORY_WORDS
    )
