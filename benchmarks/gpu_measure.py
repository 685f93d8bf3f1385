"""
One measurement of benchmarks/gpu.py, in a process of its own. The last line of its output is the figures as JSON.

    python benchmarks/gpu_measure.py card
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

from common import bytes_per_step, circumstances
from onenight import plan
from onenight.checkpoint import build_model, save_checkpoint
from onenight.device import (
    Ranks,
    choose_device,
    choose_dtype,
    compile_model,
    measure_tflops,
    peak_memory_gb,
    use_tf32,
)
from onenight.generate import Sampling, draw_uniforms, generate
from onenight.train_config import TrainConfig
from onenight.trainer import Trainer

import torch

import model
from configurator import configure, setting

PROMPT = [198]


@dataclass
class MeasureConfig(TrainConfig):
    seconds: float = setting(5.0, "how long iterations or tokens are counted, after compiling", above=0)
    micro_batches: int = setting(4, "in each measured iteration; the config's own number follows by arithmetic", low=1)
    chunk_rows: int = setting(model.CHUNK_ROWS, "rows of the head at once", low=1)
    bfloat16_stream: bool = setting(False, "carry what blocks add to in bfloat16, not in float32")
    cuda_graphs: bool = setting(False, "run the compiled passes as CUDA graphs")
    samples: int = setting(1, "samples at once", low=1)
    new_tokens: int = setting(512, "tokens in each sample", low=1)


def main(arguments: list[str]):
    measurements = {"card": card, "training": training, "saving": saving, "sampling": sampling}
    if not arguments or arguments[0] not in measurements:
        raise SystemExit(f"the first argument is {' or '.join(measurements)}")
    config = configure(MeasureConfig, arguments[1:], __doc__)
    device = choose_device(config.device)
    use_tf32(device)
    with contextlib.redirect_stdout(sys.stderr):
        figures = measurements[arguments[0]](config, device)
    print(json.dumps(figures))


def card(config: MeasureConfig, device: torch.device) -> dict:
    """What the machine is, how fast its matrix products are, and how fast its memory."""
    about = {"device": device.type, **circumstances(str(device)), "system": platform.platform()}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        about |= {"cuda": torch.version.cuda, "driver": driver()}
        about |= {"memory_gb": round(total / plan.GB, 2), "free_gb": round(free / plan.GB, 2)}
        about["multiprocessors"] = torch.cuda.get_device_properties(device).multi_processor_count
    dtypes = dict.fromkeys((choose_dtype("bfloat16", device), "float32"))
    about["tflops"] = {dtype: round(measure_tflops(device, dtype), 2) for dtype in dtypes}
    return {**about, "copy_gb_s": round(copy_bandwidth(device) / plan.GB, 1)}


def driver() -> str:
    """The version of NVIDIA's driver, as nvidia-smi tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s read and written together while copying, the best of ten."""
    size, best = 2**30 if device.type == "cuda" else 2**27, float("inf")
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    for _ in range(10):
        started = time.perf_counter()
        target.copy_(source)
        wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size / best


def wait(device: torch.device):
    """Until the GPU has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gb(device: torch.device) -> dict[str, float]:
    """The most memory since the peak was reset; nothing on a CPU, where it is not counted."""
    if device.type != "cuda":
        return {}
    return dict(zip(("allocated_gb", "reserved_gb"), peak_memory_gb(device)))


def training(config: MeasureConfig, device: torch.device) -> dict:
    """Speed and memory of training with the largest micro-batch up to batch_size that the memory allows."""
    dtype = choose_dtype(config.dtype, device)
    model.CHUNK_ROWS = plan.CHUNK_ROWS = config.chunk_rows
    trainer = Trainer(replace(config, gradient_accumulation_steps=config.micro_batches), device, dtype, Ranks())
    if config.bfloat16_stream:
        trainer.model.transformer.drop.register_forward_hook(lambda module, args, output: output.bfloat16())
    if config.cuda_graphs:
        torch._inductor.config.triton.cudagraphs = True
        keep_gradients(trainer.model)
    started = time.perf_counter()
    trainer.step()
    wait(device)
    first_s = time.perf_counter() - started
    trainer.step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    passes_s, update_s = time_steps(trainer, config.seconds)
    size, windows = trainer.batch_size, config.batch_size * config.gradient_accumulation_steps
    speed = config.tokens_per_iter / (passes_s * windows / trainer.windows_per_iter + update_s)
    compiled = trainer.compiled_model is not trainer.model
    return {
        "batch_size": size,
        "windows": windows,
        "dtype": dtype,
        "tokens_per_s": speed,
        "tflops": speed * trainer.model.flops_per_token() / 1e12,
        "micro_batch_s": passes_s / trainer.gradient_accumulation_steps,
        "update_s": update_s,
        **about_compiling(config, compiled, first_s - passes_s - update_s),
        **peak_gb(device),
        "plan_gb": planned_gb(trainer, size),
        "larger": {n: planned_gb(trainer, n) for n in larger_sizes(trainer, windows)},
    }


def keep_gradients(module: torch.nn.Module):
    """Gives the weights gradients that are zeroed and not replaced: else the first ones of an iteration would stay in
    the memory of the CUDA graph, and the next micro-batch would overwrite them."""
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    zero_grad = module.zero_grad
    module.zero_grad = lambda set_to_none: zero_grad(set_to_none=False)


def about_compiling(config: MeasureConfig, compiled: bool, seconds: float) -> dict:
    """The seconds that it took, or that it did not work."""
    if compiled:
        return {"compile_s": seconds}
    return {"note": "torch.compile does not work here"} if config.compile else {}


def time_steps(trainer: Trainer, seconds: float) -> tuple[float, float]:
    """The median seconds of an iteration's passes, and of its clipping and update, over about so many seconds, but no
    fewer than three iterations."""
    passes, updates, forward_backward = [], [], trainer.forward_backward

    def timed_passes():
        started = time.perf_counter()
        loss = forward_backward()  # waits for the device
        passes.append(time.perf_counter() - started)
        return loss

    trainer.forward_backward = timed_passes
    while len(passes) < 3 or sum(passes) + sum(updates) < seconds:
        wait(trainer.device)
        started = time.perf_counter()
        trainer.step()
        wait(trainer.device)
        updates.append(time.perf_counter() - started - passes[-1])
    return statistics.median(passes), statistics.median(updates)


def larger_sizes(trainer: Trainer, windows: int) -> list[int]:
    """Micro-batches of twice, four times and eight times the size that share the windows of an iteration; none if
    memory has run out already."""
    if trainer.batch_size < trainer.config.batch_size:
        return []
    return [size for size in (trainer.batch_size * factor for factor in (2, 4, 8)) if windows % size == 0]


def planned_gb(trainer: Trainer, batch_size: int) -> float:
    """The plan's prediction of the peak."""
    config = trainer.config
    memory = plan.predict_memory(trainer.model, batch_size, trainer.dtype, config.optimizer, config.compile)
    return sum(memory.values()) / plan.GB


def saving(config: MeasureConfig, device: torch.device) -> dict:
    """Seconds and size of a checkpoint, without an earlier one beside it."""
    config = replace(config, batch_size=1, gradient_accumulation_steps=1, compile=False)
    trainer, path = Trainer(config, device, choose_dtype(config.dtype, device), Ranks()), config.data_dir / "saved.pt"
    trainer.step()  # makes the optimizers' moments
    wait(device)
    started = time.perf_counter()
    save_checkpoint(path, trainer.checkpoint())
    seconds, size = time.perf_counter() - started, path.stat().st_size
    path.unlink()
    return {"save_s": seconds, "saved_gb": size / plan.GB}


def sampling(config: MeasureConfig, device: torch.device) -> dict:
    """Tokens/s of so many samples at once, from random weights."""
    dtype, shape = choose_dtype(config.dtype, device), {**config.shape, "vocab_size": 50304}
    weights = model.GPT(model.GPTConfig(**shape)).state_dict()
    gpt, step = build_model({"model_args": shape, "model": weights}, "random weights", dtype).to(device), None
    if config.compile:
        torch._inductor.config.triton.cudagraphs = True  # as sample.py has it
        step = compile_model(gpt)

    def seconds_of(new_tokens: int) -> float:
        started = time.perf_counter()
        uniforms = draw_uniforms(config.seed, range(config.samples), new_tokens)
        for _ in generate(gpt, PROMPT, uniforms, Sampling(temperature=0.8, top_k=200), dtype, step):
            pass  # the ids of each token are on the CPU now
        return time.perf_counter() - started

    first_s, spent = seconds_of(8), []
    while sum(spent) < config.seconds:
        spent.append(seconds_of(config.new_tokens))
    speed = config.samples * config.new_tokens * len(spent) / sum(spent)
    compiled = step is not None and step is not gpt
    return {
        "dtype": dtype,
        "tokens_per_s": speed,
        "weights_gb": bytes_per_step(gpt) / plan.GB,
        "weights_gb_s": bytes_per_step(gpt) * speed / config.samples / plan.GB,
        **about_compiling(config, compiled, first_s),
        **peak_gb(device),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
