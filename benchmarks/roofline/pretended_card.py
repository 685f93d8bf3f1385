"""An RTX 4070 that does not exist.

It answers what PyTorch, Inductor and Triton ask a card while they trace and compile, so that they
compile for sm_89 on a machine without a GPU. Nothing can run on it. The parts of Inductor that
would run something there are replaced: they are those of torch 2.14.1.

Import this before Inductor, which keeps some functions of torch.cuda. If the stand-in driver is
loaded, they answer from then on.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from configurator import UserError
from onenight.system.wording import first_line

TORCH = "2.14.1"
SOURCE = Path(__file__).with_name("driver.cpp")
FOLDER = Path(sys.prefix, "roofline")  # of the built driver, in the virtual environment
PRELOADED = FOLDER / "driver.so"

NAME = "NVIDIA GeForce RTX 4070"
MEMORY = 12_000_000_000  # bytes
MULTIPROCESSORS = 46
SHARED_MEMORY = 101_376  # bytes that a block may have
CLOCK_KHZ = 2_475_000
MEMORY_CLOCK_KHZ = 10_501_000
BUS_BITS = 192


def driver_is_loaded() -> bool:
    return str(PRELOADED) in os.environ.get("LD_PRELOAD", "")


def start_with_driver():
    """Start this process again with the stand-in driver loaded, unless it is.

    Raises UserError if this is not the CUDA build of torch 2.14.1, or if the driver cannot be
    built.
    """
    if driver_is_loaded():
        return
    version = torch.__version__.partition("+")[0]
    if torch.version.cuda is None or version != TORCH:
        raise UserError(
            f"this needs Linux and the CUDA build of torch {TORCH}, not torch {torch.__version__}; "
            "see --help for a virtual environment with it"
        )
    build_driver(PRELOADED)
    build_driver(FOLDER / "libcuda.so.1", "-Wl,-soname,libcuda.so.1")
    os.environ["LD_PRELOAD"] = str(PRELOADED)
    os.environ["LD_LIBRARY_PATH"] = str(FOLDER)
    os.execv(sys.executable, [sys.executable, *sys.argv])


def build_driver(library: Path, *options: str):
    """Compile driver.cpp to that file, unless it is there and newer. Raises UserError."""
    if library.exists() and library.stat().st_mtime > SOURCE.stat().st_mtime:
        return
    library.parent.mkdir(exist_ok=True)
    # Triton brings CUDA's headers.
    site_packages = Path(torch.__file__).parents[1]
    headers = site_packages / "triton" / "backends" / "nvidia" / "include"
    command = ["g++", "-std=c++17", "-shared", "-fPIC", "-O1", f"-I{headers}", str(SOURCE)]
    command += ["-ldl", *options, "-o", str(library)]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"the stand-in driver needs g++ ({first_line(error)})")
    if result.returncode:
        raise UserError(f"g++ cannot compile {SOURCE}: {result.stderr.strip()}")


def always(value):
    """Return a function that returns `value`, whatever its arguments."""

    def answer(*_, **__):
        return value

    return answer


nothing = always(None)


def answer_for_torch():
    properties = SimpleNamespace(
        name=NAME,
        major=8,
        minor=9,
        total_memory=MEMORY,
        multi_processor_count=MULTIPROCESSORS,
        max_threads_per_multi_processor=1536,
        max_threads_per_block=1024,
        regs_per_multiprocessor=65536,
        warp_size=32,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=SHARED_MEMORY,
        shared_memory_per_multiprocessor=102_400,
        L2_cache_size=36 << 20,
        clock_rate=CLOCK_KHZ,
        memory_clock_rate=MEMORY_CLOCK_KHZ,
        memory_bus_width=BUS_BITS,
        gcnArchName="",
        is_integrated=False,
        uuid="0",
    )
    device = torch.device("cuda", 0)
    answers = {
        "_lazy_init": None,
        "current_device": 0,
        "current_stream": SimpleNamespace(cuda_stream=0, stream_id=0, device=device),
        "device_count": 1,
        "empty_cache": None,
        "get_device_capability": (8, 9),
        "get_device_name": NAME,
        "get_device_properties": properties,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "is_available": True,
        "is_bf16_supported": True,
        "is_initialized": True,
        "set_device": None,
        "set_rng_state": None,
        "synchronize": None,
    }
    for name, value in answers.items():
        setattr(torch.cuda, name, always(value))
    for name in ("getDevice", "setDevice", "exchangeDevice", "maybeExchangeDevice"):
        setattr(torch._C, f"_cuda_{name}", always(0))
    torch._C._cuda_getCurrentRawStream = always(0)
    torch._C._cuda_getDeviceCount = always(1)
    torch._C._cuda_isInBadFork = always(False)


class TritonDriver:
    """What Triton asks of the card."""

    def __init__(self):
        limits = {
            "max_shared_mem": SHARED_MEMORY,
            "multiprocessor_count": MULTIPROCESSORS,
            "sm_clock_rate": CLOCK_KHZ,
            "mem_clock_rate": MEMORY_CLOCK_KHZ,
            "mem_bus_width": BUS_BITS,
            "max_num_regs": 65536,
            "warpSize": 32,
        }
        # module, function, registers, spilled registers, threads: a kernel that is never started
        loaded = (1, 1, 0, 0, 1024)
        self.utils = SimpleNamespace(
            get_device_properties=always(limits), load_binary=always(loaded)
        )

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 89, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device=None) -> int:
        return 0

    def get_device_interface(self):
        return torch.cuda

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


def answer_for_triton():
    from triton.runtime import driver

    driver.set_active(TritonDriver())


def compile_only(on_kernel):
    """Make Inductor compile kernels for the card and run none, for the rest of this process.

    on_kernel(name) is called for each kernel that Triton has compiled.
    """
    from torch._inductor import config
    from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    answer_for_triton()
    # Patterns and folded constants are made of real tensors on the device.
    fuse_attention._sfdp_init = nothing
    misc_patterns._misc_patterns_init = nothing
    pad_mm._pad_mm_init = nothing
    config.joint_graph_constant_folding = False
    triton_helpers.set_driver_to_gpu = nothing
    # A graph from a cache would not be compiled, nor counted.
    config.fx_graph_cache = False
    torch._functorch.config.enable_autograd_cache = False
    config.compile_threads = 1

    def precompile(tuner, *_, **__):
        tuner._precompile_config(tuner.configs[0])  # raises if Triton or ptxas does
        on_kernel(tuner.inductor_meta.get("kernel_name", tuner.fn.__name__))
        tuner.launchers = [nothing]

    CachingAutotuner.precompile = precompile
    CachingAutotuner.run = nothing


if driver_is_loaded():
    answer_for_torch()
