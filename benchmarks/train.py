"""
How fast a config trains here, and how much memory it takes; side by side with a checkout of nanoGPT.

    python benchmarks/train.py config/train_fineweb_4070.py
    python benchmarks/train.py config/train_fineweb_4070.py --vram_limit_gb=12 --peer=../nanoGPT --save=FILE.json
    python benchmarks/train.py config/train_demo.py --optimizer=adamw --peer=../nanoGPT      # on a CPU

Each measurement is a process of its own, ours and the peer's in turn. Both compile if the config does, have the same
shape, number format and data, and begin with batch_size windows, then fewer until a step and an evaluation fit. The
peer always has GPT-2's architecture and fused AdamW.
"""

import contextlib
import io
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from common import circumstances, make_peer
from onenight.device import (
    Ranks,
    autocast,
    choose_device,
    choose_dtype,
    compile_model,
    is_out_of_memory,
    limit_memory,
    peak_memory_gb,
    use_tf32,
)
from onenight.files import replacing
from onenight.train_config import TrainConfig
from onenight.trainer import Trainer, model_args

import numpy as np
import torch

from configurator import configure, setting


@dataclass
class BenchConfig(TrainConfig):
    peer: str = setting("", "folder of a nanoGPT checkout to measure beside ours", path=True)
    rounds: int = setting(2, "measurements of each, in turn", low=1)
    seconds: float = setting(20.0, "how long a measurement counts iterations, after compiling", above=0)
    only: str = setting("", "one measurement in this process, its figures as JSON", choices=("", "ours", "peer"))
    save: str = setting("", "JSON file for the figures", path=True)


def main(arguments: list[str]):
    config = configure(BenchConfig, arguments, __doc__)
    if config.only:
        measurement = measure_peer if config.only == "peer" else measure_ours
        with contextlib.redirect_stdout(io.StringIO()):
            figures = measurement(config)
        print(json.dumps(figures))
        return
    results = {"ours": [], **({"peer": []} if config.peer else {})}
    for _ in range(config.rounds):
        for name, measured in results.items():
            measured.append(run_alone(arguments, name))
            print(f"{name}: {describe(measured[-1])}", flush=True)
    speed = {name: statistics.median(m["tokens_per_s"] for m in measured) for name, measured in results.items()}
    if config.peer:
        print(f"ours / peer: {speed['ours'] / speed['peer']:.2f} times the tokens/s")
    if config.save:
        about = {"command": " ".join(["python benchmarks/train.py", *arguments])}
        about |= circumstances(str(choose_device(config.device)))
        with replacing(Path(config.save), "w") as file:
            json.dump({**about, "results": results, "median_tokens_per_s": speed}, file, indent=1)
            file.write("\n")


def run_alone(arguments: list[str], name: str) -> dict:
    """One measurement in a new process. Raises SystemExit with its message if it fails."""
    result = subprocess.run([sys.executable, __file__, *arguments, f"--only={name}"], capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{name} cannot be measured: {result.stderr.strip()[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def describe(figures: dict) -> str:
    text = f"{figures['tokens_per_s']:,.0f} tokens/s with micro-batches of {figures['batch_size']}"
    if figures["peak_memory_gb"]:
        text += f", {figures['peak_memory_gb']:.2f} GB at the peak"
    if "reading_share" in figures:
        text += f", {figures['reading_share']:.2%} of it waiting for data"
    return text


def measure_ours(config: BenchConfig) -> dict:
    device = choose_device(config.device)
    trainer = Trainer(config, device, choose_dtype(config.dtype, device), Ranks())
    trainer.evaluate(trainer.val_tokens)
    warm_up(trainer.step)
    waited, read = 0.0, trainer.windows.batch

    def timed_read(*arguments, **options):
        nonlocal waited
        started = time.perf_counter()
        batch = read(*arguments, **options)
        waited += time.perf_counter() - started
        return batch

    trainer.windows.batch = timed_read
    iters, seconds = count_iterations(trainer.step, config.seconds)
    return figures(config, trainer.batch_size, iters, seconds, device) | {"reading_share": waited / seconds}


def measure_peer(config: BenchConfig) -> dict:
    """nanoGPT's training iteration with its own model and optimizer, at its best settings."""
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    use_tf32(device)
    limit_memory(config.vram_limit_gb, device)
    shape = {key: value for key, value in model_args(config).items() if key not in ("architecture", "dropout")}
    model = make_peer(Path(config.peer), shape).to(device)
    betas = (config.beta1, config.beta2)
    optimizer = model.configure_optimizers(config.weight_decay, config.learning_rate, betas, device.type)
    forward = compile_model(model) if config.compile else model  # as ours: smaller micro-batches compile anew
    path, windows = config.data_dir / "train.bin", config.batch_size * config.gradient_accumulation_steps

    def get_batch(batch_size):
        data = np.memmap(path, dtype=np.uint16, mode="r")
        offsets = torch.randint(len(data) - config.block_size, (batch_size,))
        x, y = (
            torch.stack(
                [torch.from_numpy(data[i + shift : i + shift + config.block_size].astype(np.int64)) for i in offsets]
            )
            for shift in (0, 1)
        )
        if device.type == "cuda":
            return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
        return x, y

    @torch.no_grad()
    def evaluate(batch_size):
        model.eval()
        with autocast(dtype, device):
            forward(*get_batch(batch_size))[1].item()
        model.train()

    def step(batch_size):
        x, y = get_batch(batch_size)
        for _ in range(windows // batch_size):
            with autocast(dtype, device):
                loss = forward(x, y)[1] / (windows // batch_size)
            x, y = get_batch(batch_size)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    for batch_size in (size for size in range(config.batch_size, 0, -1) if windows % size == 0):
        try:
            evaluate(batch_size)
            warm_up(lambda size=batch_size: step(size))
            iters, seconds = count_iterations(lambda size=batch_size: step(size), config.seconds)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            continue
        return figures(config, batch_size, iters, seconds, device)
    raise SystemExit("out of memory with a micro-batch of one window")


def warm_up(step):
    for _ in range(3):
        step()


def count_iterations(step, seconds: float) -> tuple[int, float]:
    """Iterations in about so many seconds, and the seconds they took."""
    iters, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        step()
        iters += 1
    return iters, elapsed


def figures(config: BenchConfig, batch_size: int, iters: int, seconds: float, device: torch.device) -> dict:
    tokens = iters * config.tokens_per_iter / seconds
    return {
        "batch_size": batch_size,
        "iterations": iters,
        "tokens_per_s": tokens,
        "peak_memory_gb": peak_memory_gb(device)[0],
    }


if __name__ == "__main__":
    main(sys.argv[1:])
