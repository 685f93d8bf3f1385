"""The device, its number formats, and torch.compile.

What this machine lacks is replaced by what it has, with a message.
"""

import os
import re
import sys
import time
from collections.abc import Callable

import torch

from configurator import UserError
from onenight.system.cache_folders import use_cache_folder
from onenight.system.wording import first_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MEASURE_S = 0.5  # how long measure_tflops() and measure_bandwidth() measure
COPIES = 4  # at once: a GPU copies faster than it can be told to
# What compilers and the system say of a folder for temporary files that is full, or from which
# nothing may be executed (noexec).
UNUSABLE_FOLDER = re.compile(
    "No space left|quota exceeded|Read-only file system|Permission denied|Operation not permitted"
    "|failed to map segment|No usable temporary directory"
)


def set_up_device(device: str, dtype: str, compiled: bool) -> tuple[torch.device, str, bool]:
    """Return the device, the number format and whether to compile, as this machine can.

    The arguments are the settings of the same names. Raises UserError as choose_device() does.
    """
    chosen = choose_device(device)
    use_tf32(chosen)
    return chosen, choose_dtype(dtype, chosen), compiled and compile_works(chosen)


def choose_device(device: str) -> torch.device:
    """Return the device of that name; "auto" is a GPU if there is one, or else the CPU.

    Raises UserError if this machine does not have the device, or if the device holds no numbers, as
    "meta".
    """
    if device == "auto":
        if torch.cuda.is_available():
            device = "cuda"
        elif torch.backends.mps.is_available():
            device = "mps"
        else:
            device = "cpu"
    try:
        probe = torch.ones(1, device=device)
        probe.item()
        return probe.device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(
            f"device={device} is not available here ({first_line(error)}); try --device=auto"
        )


def choose_dtype(dtype: str, device: torch.device) -> str:
    """Return the number format to compute in, a key of DTYPES.

    "auto" is bfloat16 on a GPU that supports it, float16 on an older GPU, and float32 on other
    devices. A format that the device lacks, or emulates a hundred times slower, is replaced, with
    a message.
    """
    on_gpu = device.type == "cuda"
    has_bfloat16 = supports_bfloat16(device)
    fallback = "float16" if on_gpu else "float32"
    if dtype == "auto":
        return "bfloat16" if on_gpu and has_bfloat16 else fallback
    if dtype == "bfloat16" and not has_bfloat16:
        print(f"this {'GPU' if on_gpu else 'CPU'} has no bfloat16 instructions: using {fallback}")
        return fallback
    if dtype == "float16" and not on_gpu:
        print("float16 needs a GPU: using float32")
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


def use_tf32(device: torch.device):
    """On a GPU, compute float32 matrix products in TF32.

    TF32 drops 13 of the 23 bits of the mantissa, which training a GPT does not need.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def compile_works(device: torch.device) -> bool:
    """Return whether torch.compile works here; if not, print the reason and the remedy."""
    try:
        choose_compile_caches()
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
        return True
    except Exception as error:
        # No C++ compiler, no Python headers, no Triton, a Python that is too new, ...
        print(describe_compile_failure(error))
        return False


def choose_compile_caches():
    """Make sure that torch.compile can write to its cache folders. Raises OSError if it cannot."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    use_cache_folder("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    if os.environ.get("TRITON_CACHE_DIR"):  # otherwise a folder in the other one
        use_cache_folder("TRITON_CACHE_DIR", "")


def is_compile_failure(error: Exception) -> bool:
    """Return whether this is an error of torch.compile, and not of the code that it compiled."""
    if isinstance(getattr(error, "inner_exception", None), torch.OutOfMemoryError):
        return False  # a GPU's memory, when Inductor tried a kernel
    of_triton = type(error).__module__.startswith("triton.")
    return of_triton or isinstance(error, torch._dynamo.exc.TorchDynamoException)


def describe_compile_failure(error: Exception) -> str:
    """Return the line that says why torch.compile is disabled, and what to do about it."""
    reason = compiler_line(error)
    if UNUSABLE_FOLDER.search(reason):
        remedy = "set TMPDIR to a folder with free space from which programs can be executed"
    elif sys.platform == "win32":
        remedy = "pip install triton-windows, or train in WSL2"
    else:
        remedy = (
            "install a C++ compiler and Python's headers "
            "(on Debian and Ubuntu: apt install g++ python3-dev)"
        )
    return f"torch.compile: disabled ({reason}). To enable it: {remedy}"


def compiler_line(error: Exception) -> str:
    """Return the line of a compilation's error that names the cause: the C++ compiler's own, if it
    was started."""
    _, _, output = str(error).partition("\nOutput:\n")
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for line in lines:
        if re.search("error|failed", line, re.IGNORECASE):
            return line
    if lines:
        return lines[0]
    line = first_line(error)
    if line.endswith(" raised:"):  # torch's, which only names the backend
        line = str(error).strip().splitlines()[1]
    return line


def compile_model(model):
    """Return the model under torch.compile.

    The inputs have only a few shapes, and each is compiled separately.
    """
    # A micro-batch that is halved because memory ran out is another shape.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(model, dynamic=False)


def compile_if_possible(model) -> Callable:
    """Return the model under torch.compile. If that fails, which only its first call shows, print
    the reason to stderr and go on with the model itself."""
    step = compile_model(model)

    def call(*arguments, **options):
        nonlocal step
        try:
            return step(*arguments, **options)
        except Exception as error:
            if not is_compile_failure(error):
                raise
            print(describe_compile_failure(error), file=sys.stderr)
        step = model
        return model(*arguments, **options)

    return call


def measure_tflops(device: torch.device, dtype: str) -> float:
    """Return the TFLOP/s of large square matrix products, the ceiling that MFU is relative to."""
    # Small enough on a CPU that some product is not disturbed by other processes.
    size = 8192 if device.type == "cuda" else 512
    matrix = torch.randn(size, size, device=device, dtype=DTYPES[dtype])
    seconds = fastest(time_product, matrix)
    del matrix
    torch.cuda.empty_cache()  # has no effect without a GPU
    return 2 * size**3 / seconds / 1e12


def measure_bandwidth(device: torch.device) -> float:
    """Return the GB/s of large copies in the memory of the device, read and written together."""
    size = 2**28 if device.type == "cuda" else 2**27  # more than the caches hold
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = fastest(time_copy, source, target)
    del source, target
    torch.cuda.empty_cache()
    return COPIES * 2 * size / seconds / 1e9


def fastest(time_once: Callable[..., float], *arguments) -> float:
    """Return the least of what time_once(*arguments) returns in MEASURE_S seconds."""
    time_once(*arguments)  # the first time loads libraries
    least = time_once(*arguments)
    end = time.monotonic() + MEASURE_S
    while time.monotonic() < end:
        least = min(least, time_once(*arguments))
    return least


def time_product(matrix: torch.Tensor) -> float:
    """Return the seconds that the product of a square matrix with itself takes."""
    started = time.perf_counter()
    (matrix @ matrix)[0, 0].item()  # item() waits for the device
    return time.perf_counter() - started


def time_copy(source: torch.Tensor, target: torch.Tensor) -> float:
    """Return the seconds that copying `source` to `target` COPIES times takes."""
    started = time.perf_counter()
    for _ in range(COPIES):
        target.copy_(source)
    target[0].item()
    return time.perf_counter() - started
