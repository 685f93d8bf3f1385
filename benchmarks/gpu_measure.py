"""
One measurement of benchmarks/gpu.py. The last line of the output is its figures as JSON.

    python benchmarks/gpu_measure.py card
    python benchmarks/gpu_measure.py exactness
    python benchmarks/gpu_measure.py training config/train_fineweb_4070.py --chunk_rows=1024
    python benchmarks/gpu_measure.py saving config/train_fineweb_4070.py
    python benchmarks/gpu_measure.py sampling config/train_fineweb_4070.py --samples=8
"""

import contextlib
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import torch

import common
import model
from configurator import UserError, configure, setting
from onenight.models.checkpoint import build_model, save_checkpoint
from onenight.models.generate import Sampling, draw_uniforms, generate
from onenight.system.console import run_script
from onenight.system.device import (
    choose_device,
    choose_dtype,
    compile_model,
    measure_bandwidth,
    measure_tflops,
    use_tf32,
)
from onenight.system.distributed import Ranks
from onenight.system.memory import GB, peak_memory_gb
from onenight.training import costs
from onenight.training.int8 import load_torchao
from onenight.training.recovery import Recovery
from onenight.training.settings import TrainConfig, resolve
from onenight.training.trainer import Trainer
from train import clip_and_update, forward_backward

PROMPT = [198]  # a newline
# Rows, inner dimension and columns of products in the blocks of the nights' models: outputs,
# gradients of inputs, and gradients of weights.
INT8_SHAPES = [
    (16384, 768, 768),
    (16384, 768, 2304),
    (16384, 2304, 768),
    (16384, 768, 2048),
    (16384, 2048, 768),
    (16384, 768, 3072),
    (16384, 3072, 768),
    (768, 16384, 768),
    (2304, 16384, 768),
    (2048, 16384, 768),
    (768, 16384, 2048),
    (3072, 16384, 768),
    (768, 16384, 3072),
]


@dataclass
class MeasureConfig(TrainConfig):
    seconds: float = setting(5.0, "length of a measurement, after compiling", above=0)
    micro_batches: int = setting(
        4, "in each measured iteration; the config's own number is computed from them", low=1
    )
    chunk_rows: int = setting(model.CHUNK_ROWS, "rows of the head at once", low=1)
    float32_stream: bool = setting(False, "carry the residual stream in float32, not bfloat16")
    cuda_graphs: bool = setting(False, "run the compiled passes as CUDA graphs")
    samples: int = setting(1, "samples at once", low=1)
    new_tokens: int = setting(512, "tokens in each sample", low=1)


def main(arguments: list[str]):
    measurements = {
        "card": card,
        "exactness": exactness,
        "training": training,
        "saving": saving,
        "sampling": sampling,
    }
    if not arguments or arguments[0] not in measurements:
        raise UserError(f"the first argument must be one of: {', '.join(measurements)}")
    config = configure(MeasureConfig, arguments[1:], __doc__)
    with contextlib.redirect_stdout(sys.stderr):
        figures = measurements[arguments[0]](config)
    print(json.dumps(figures))


# ---- the card


def card(config: MeasureConfig) -> dict:
    """Return what the machine is, and the speeds of its matrix products and of its memory."""
    device = choose_device(config.device)
    use_tf32(device)
    figures = {
        "device": device.type,
        **common.circumstances(device),
        "system": platform.platform(),
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        figures["cuda"] = torch.version.cuda
        figures["driver"] = driver_version()
        figures["memory_gb"] = round(total / GB, 2)
        figures["free_gb"] = round(free / GB, 2)
        properties = torch.cuda.get_device_properties(device)
        figures["multiprocessors"] = properties.multi_processor_count
    figures["tflops"] = {}
    for dtype in (choose_dtype("bfloat16", device), "float32"):
        if dtype not in figures["tflops"]:  # without bfloat16 both may be float32
            figures["tflops"][dtype] = round(measure_tflops(device, dtype), 2)
    figures["copy_gb_s"] = round(measure_bandwidth(device), 1)
    return figures


def driver_version() -> str:
    """Return the version of NVIDIA's driver, or "unknown"."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        return result.stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def peak_gb(device: torch.device) -> dict[str, float]:
    """Return the most memory since the peak was reset; {} on a CPU, where it is not counted."""
    if device.type != "cuda":
        return {}
    allocated, reserved = peak_memory_gb(device)
    return {"allocated_gb": allocated, "reserved_gb": reserved}


# ---- int8


def exactness(config: MeasureConfig) -> dict:
    """Return the largest difference between torchao's products of integers and the exact ones.

    The integers are rounded to themselves, because each row of the left matrix and each column of
    the right one contains 127, and float32 holds their products exactly.
    """
    device = choose_device(config.device)
    torchao = load_torchao()
    sizes = INT8_SHAPES if device.type == "cuda" else [(64, 48, 80)]
    largest = 0.0
    for rows, inner, columns in sizes:
        a = torch.randint(-60, 61, (rows, inner), device=device)
        b = torch.randint(-60, 61, (inner, columns), device=device)
        a[:, 0] = 127
        b[0] = 127
        exact = a.double() @ b.double()
        product = torchao.product(torchao.round_rows(a.float()), torchao.round_rows(b.T.float()))
        largest = max(largest, (product - exact).abs().max().item())
    return {"difference": largest}


# ---- training


def training(config: MeasureConfig) -> dict:
    """Return the speed and the memory of training with the largest micro-batch up to batch_size
    that fits."""
    wants_compile = config.compile
    windows = config.windows_per_iter  # the measured iterations have fewer
    config = resolve(
        replace(config, gradient_accumulation_steps=config.micro_batches), config.device
    )
    device = torch.device(config.device)
    model.CHUNK_ROWS = config.chunk_rows
    costs.CHUNK_ROWS = config.chunk_rows
    trainer = Trainer(config, Ranks())
    recovery = Recovery(trainer)
    if config.float32_stream:
        common.use_float32_stream(trainer.model)
    if config.cuda_graphs:
        torch._inductor.config.triton.cudagraphs = True
        keep_gradients(trainer.model)

    # The first iteration compiles and allocates.
    started = time.perf_counter()
    common.step(trainer, recovery)
    common.wait(device)
    first_s = time.perf_counter() - started
    common.step(trainer, recovery)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    passes_s, update_s = time_iterations(trainer, recovery, config.seconds)

    # The speed of an iteration with all windows of the config
    config_passes_s = passes_s * windows / config.windows_per_iter
    tokens_per_s = windows * config.block_size / (config_passes_s + update_s)
    size = trainer.micro_batch_size
    return {
        "batch_size": size,
        "windows": windows,
        "dtype": config.dtype,
        "tokens_per_s": tokens_per_s,
        "tflops": tokens_per_s * trainer.model.flops_per_token() / 1e12,
        "micro_batch_s": passes_s / trainer.micro_batches_per_iter,
        "update_s": update_s,
        **about_compiling(wants_compile, config.compile, first_s - passes_s - update_s),
        **peak_gb(device),
        "plan_gb": planned_gb(trainer, size),
        "larger": {n: planned_gb(trainer, n) for n in larger_sizes(trainer, windows)},
    }


def keep_gradients(module: torch.nn.Module):
    """Give the weights gradients that are zeroed instead of replaced.

    The first gradients of an iteration would otherwise lie in the memory of the CUDA graph, where
    the next micro-batch overwrites them.
    """
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    zero_grad = module.zero_grad
    module.zero_grad = lambda set_to_none: zero_grad(set_to_none=False)


def about_compiling(is_wanted: bool, works: bool, seconds: float) -> dict:
    """Return the seconds that compiling took, or a note that it does not work."""
    if works:
        return {"compile_s": seconds}
    return {"note": "torch.compile does not work here"} if is_wanted else {}


def time_iterations(trainer: Trainer, recovery: Recovery, seconds: float) -> tuple[float, float]:
    """Train for about that many seconds, but at least three iterations. Return the median seconds
    of the passes of an iteration, and those of its clipping and update."""
    passes_s = []
    updates_s = []
    while len(passes_s) < 3 or sum(passes_s) + sum(updates_s) < seconds:
        common.wait(trainer.device)
        started = time.perf_counter()
        loss = recovery.within_memory(forward_backward, trainer)
        loss = trainer.sum_over_processes(loss)  # waits for the device
        passed = time.perf_counter()
        recovery.guard_update(clip_and_update, loss)
        common.wait(trainer.device)
        updates_s.append(time.perf_counter() - passed)
        passes_s.append(passed - started)
        trainer.progress.count_iteration(trainer.config)
    return statistics.median(passes_s), statistics.median(updates_s)


def larger_sizes(trainer: Trainer, windows: int) -> list[int]:
    """Return the micro-batches of twice, four times and eight times the size that divide an
    iteration of `windows` windows; [] if memory has already run out."""
    if trainer.micro_batch_size < trainer.config.batch_size:
        return []
    sizes = [factor * trainer.micro_batch_size for factor in (2, 4, 8)]
    return [size for size in sizes if windows % size == 0]


def planned_gb(trainer: Trainer, micro_batch_size: int) -> float:
    """Return the peak that the plan predicts."""
    memory = costs.predict_memory(trainer.model, trainer.config, micro_batch_size)
    return sum(memory.values()) / GB


# ---- checkpoints and sampling


def saving(config: MeasureConfig) -> dict:
    """Return the seconds and the size of a checkpoint, when there is no earlier one to replace."""
    config = replace(config, batch_size=1, gradient_accumulation_steps=1, compile=False)
    trainer = Trainer(resolve(config, config.device), Ranks())
    common.step(trainer, Recovery(trainer))  # creates the optimizers' state
    common.wait(trainer.device)
    path = config.data_dir / "saved.pt"
    started = time.perf_counter()
    save_checkpoint(path, trainer.checkpoint())
    seconds = time.perf_counter() - started
    size = path.stat().st_size
    path.unlink()
    return {"save_s": seconds, "saved_gb": size / GB}


def sampling(config: MeasureConfig) -> dict:
    """Return the tokens/s of several samples at once, from random weights."""
    wants_compile = config.compile
    config = resolve(config, config.device)
    device = torch.device(config.device)
    use_tf32(device)
    shape = {**config.shape, "vocab_size": 50304}
    weights = model.GPT(model.GPTConfig(**shape)).state_dict()
    checkpoint = {"model_args": shape, "model": weights}
    gpt = build_model(checkpoint, "random weights", config.dtype).to(device)
    step = None
    if config.compile:
        torch._inductor.config.triton.cudagraphs = True  # as in sample.py
        step = compile_model(gpt)

    def seconds_for(new_tokens: int) -> float:
        started = time.perf_counter()
        uniforms = draw_uniforms(config.seed, range(config.samples), new_tokens)
        choice = Sampling(temperature=0.8, top_k=200)
        for _ in generate(gpt, PROMPT, uniforms, choice, config.dtype, step):
            pass  # the ids of each token are on the CPU now
        return time.perf_counter() - started

    first_s = seconds_for(8)
    spent_s = []
    while sum(spent_s) < config.seconds:
        spent_s.append(seconds_for(config.new_tokens))
    tokens_per_s = config.samples * config.new_tokens * len(spent_s) / sum(spent_s)
    steps_per_s = tokens_per_s / config.samples
    step_bytes = common.bytes_per_step(gpt)
    return {
        "dtype": config.dtype,
        "tokens_per_s": tokens_per_s,
        "weights_gb": step_bytes / GB,
        "weights_gb_s": step_bytes * steps_per_s / GB,
        **about_compiling(wants_compile, config.compile, first_s),
        **peak_gb(device),
    }


if __name__ == "__main__":
    run_script(main)
