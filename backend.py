"""
What this machine can do: the device, the number format, compilation. What is missing switches itself off and says so.
"""

import contextlib
import time

import torch

from words import first_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(device: str) -> torch.device:
    """'auto' is the GPU if there is one. Raises SystemExit for a device that this machine lacks."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f"device={device} is not to be had here ({first_line(error)}); try --device=auto")
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> str:
    """'auto' is bfloat16 on a GPU that has it, float16 on an older one, float32 elsewhere. Raises SystemExit."""
    has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "auto":
        return "float32" if device.type != "cuda" else "bfloat16" if has_bfloat16 else "float16"
    if dtype not in DTYPES:
        raise SystemExit(f"dtype={dtype} is none of auto, {', '.join(DTYPES)}")
    if dtype == "bfloat16" and not has_bfloat16:
        print("this GPU has no bfloat16: using float16 with loss scaling")
        return "float16"
    if dtype == "float16" and device.type != "cuda":
        print("float16 needs a GPU: using float32")
        return "float32"
    return dtype


def autocast(dtype: str, device: torch.device):
    """The context in which the forward pass runs: matrix products in `dtype`, weights stay float32."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device_type=device.type, dtype=DTYPES[dtype])


def use_tf32(device: torch.device):
    """On a GPU, TF32 for the products that stay in float32: GPT training does not need their last 13 bits."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def compile_model(model, device: torch.device):
    """torch.compile where it works, else the model itself, with a line that says why."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # no C++ compiler, no Python headers, no Triton, a Python too new, ...
        print(f"compile: off, because it does not work here ({first_line(error)}); going on without it")
        return model
    print("compile: on; the first iterations take a minute or so")
    return torch.compile(model, dynamic=False)  # few shapes, each compiled for itself


def measure_tflops(device: torch.device, dtype: str) -> float:
    """TFLOP/s of large square matrix products, the best of half a second: the ceiling that MFU is measured against."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    best, end = float("inf"), time.monotonic() + 0.5
    while time.monotonic() < end:
        started = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e12


def limit_memory(vram_limit_gb: float, device: torch.device):
    """Lets this process take no more of the GPU's memory, as if the card were smaller. 0 is no limit."""
    if vram_limit_gb and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, vram_limit_gb * 1e9 / total), device)


def peak_memory_gb(device: torch.device) -> float:
    """The most that tensors have taken on the GPU so far, in GB (1e9 bytes); 0 on other devices."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
