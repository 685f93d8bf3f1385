"""
How fast a config trains here, and how much memory it takes, beside a checkout of nanoGPT.

    python benchmarks/train.py config/train_fineweb_4070.py
    python benchmarks/train.py config/train_fineweb_4070.py --vram_limit_gb=12 --peer=../nanoGPT
    python benchmarks/train.py config/train_demo.py --optimizer=adamw --peer=../nanoGPT  # on a CPU

Ours and the peer are measured in turn, each time in a process of its own, on the same data, with
the same shape and number format, and both compiled if the config is. Both have the largest
micro-batch of at most batch_size windows that fits, and the peer has GPT-2's architecture and fused
AdamW. int8 is off unless --int8 is given.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from onenight.startup import run_script

import contextlib
import importlib.util
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from gpu import describe_machine

from configurator import configure, setting
from onenight.device import (
    autocast,
    compile_model,
    is_out_of_memory,
    limit_memory,
    peak_memory_gb,
    set_up_device,
)
from onenight.distributed import Ranks
from onenight.errors import UserError
from onenight.int8 import resolve_int8
from onenight.process import StopSignal, replacing
from onenight.settings import TrainConfig, resolve
from onenight.trainer import Trainer, model_args

WARM_UP_ITERS = 3  # before the measurement: they compile and allocate


@dataclass
class BenchConfig(TrainConfig):
    peer: str = setting("", "folder of a nanoGPT checkout to measure beside ours", path=True)
    rounds: int = setting(2, "measurements of each, in turn", low=1)
    seconds: float = setting(20.0, "length of a measurement, after compiling", above=0)
    only: str = setting("", "measure one, here; print JSON", choices=("", "ours", "peer"))
    save: str = setting("", "JSON file for the figures", path=True)


def main(arguments: list[str]):
    config, _ = configure(BenchConfig, arguments, __doc__)
    if config.only:
        with contextlib.redirect_stdout(sys.stderr):
            figures = measure(config)
        print(json.dumps(figures))
        return

    # In turn, so that other work on the machine slows both
    results = {"ours": [], "peer": []} if config.peer else {"ours": []}
    for _ in range(config.rounds):
        for name, measured in results.items():
            figures = measure_alone(arguments, name)
            measured.append(figures)
            line = f"{figures['tokens_per_s']:,.0f} tokens/s"
            line += f" with micro-batches of {figures['batch_size']}"
            if figures["peak_memory_gb"]:
                line += f", peak memory {figures['peak_memory_gb']:.2f} GB"
            print(f"{name}: {line}")

    # The medians
    speeds = {}
    for name, measured in results.items():
        speeds[name] = statistics.median(figures["tokens_per_s"] for figures in measured)
    if config.peer:
        print(f"ours / peer: {speeds['ours'] / speeds['peer']:.2f} times the tokens/s")
    if config.save:
        content = {
            "command": " ".join(["python benchmarks/train.py", *arguments]),
            **describe_machine(config.device),
            "results": results,
            "median_tokens_per_s": speeds,
        }
        with replacing(Path(config.save), "w") as file:
            file.write(json.dumps(content, indent=1) + "\n")


def measure_alone(arguments: list[str], name: str) -> dict:
    """Return the figures of a measurement in a new process. Raises UserError if it fails."""
    command = [sys.executable, __file__, *arguments, f"--only={name}"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"{name} cannot be measured: {result.stderr.strip()[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


# -----------------------------------------------------------------------------
# One measurement


def measure(config: BenchConfig) -> dict:
    """Return the figures of ours or the peer."""
    device, dtype, compiled = set_up_device(config.device, config.dtype, config.compile)
    config = resolve(config, device, dtype, compiled, world_size=1)
    # "auto" would compare int8 with the peer's number format.
    config = replace(config, int8=resolve_int8(config.int8 is True, device, dtype, None))
    if config.only == "ours":
        batch_size, iters, seconds = measure_ours(config)
    else:
        batch_size, iters, seconds = measure_peer(config)
    peak_memory, _ = peak_memory_gb(device)
    return {
        "batch_size": batch_size,
        "iterations": iters,
        "tokens_per_s": iters * config.tokens_per_iter / seconds,
        "peak_memory_gb": peak_memory,
    }


def measure_ours(config: BenchConfig) -> tuple[int, int, float]:
    """Train as train.py does. Return the micro-batch, the iterations and their seconds."""
    trainer = Trainer(config, Ranks(), StopSignal())
    trainer.open_data()

    def iterate():
        trainer.update(trainer.accumulate())
        trainer.count_iteration()

    for _ in range(WARM_UP_ITERS):
        iterate()
    iters, seconds = count_iterations(iterate, config.seconds)
    return trainer.micro_batch_size, iters, seconds


def measure_peer(config: BenchConfig) -> tuple[int, int, float]:
    """Train as nanoGPT does. Return the micro-batch, the iterations and their seconds."""
    peer = Peer(config)
    windows = config.gradient_accumulation_steps * config.batch_size
    for size in range(config.batch_size, 0, -1):
        if windows % size:
            continue
        try:
            for _ in range(WARM_UP_ITERS):
                peer.iterate(size, windows // size)
            iters, seconds = count_iterations(peer.iterate, config.seconds, size, windows // size)
            return size, iters, seconds
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the except block, which keeps the tensors of the failed attempt alive.
        peer.free_memory()
    raise UserError("out of memory with a micro-batch of one window")


def count_iterations(iterate: Callable, seconds: float, *arguments) -> tuple[int, float]:
    """Call iterate() for about that many seconds. Return the number of calls and their seconds."""
    iters = 0
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        iterate(*arguments)
        iters += 1
    return iters, time.perf_counter() - began


class Peer:
    """nanoGPT's training with its own model and optimizer."""

    def __init__(self, config: BenchConfig):
        self.config = config
        self.device = torch.device(config.device)
        limit_memory(config.vram_limit_gb, self.device)
        spec = importlib.util.spec_from_file_location("peer", Path(config.peer) / "model.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # its dataclasses look it up there
        spec.loader.exec_module(module)
        shape = model_args(config)
        del shape["architecture"]
        self.model = module.GPT(module.GPTConfig(**shape)).to(self.device)
        betas = (config.beta1, config.beta2)
        self.optimizer = self.model.configure_optimizers(
            config.weight_decay, config.learning_rate, betas, self.device.type
        )
        # As ours: each size of micro-batch is compiled on its own.
        self.compiled_model = compile_model(self.model) if config.compile else self.model

    def iterate(self, batch_size: int, micro_batches: int):
        """Train for one iteration, as the loop of nanoGPT's train.py does."""
        x, y = self.get_batch(batch_size)
        for _ in range(micro_batches):
            with autocast(self.config.dtype, self.device):
                _, loss = self.compiled_model(x, y)
                loss = loss / micro_batches
            # Read the next micro-batch while the GPU computes.
            x, y = self.get_batch(batch_size)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for the GPU, as nanoGPT's log does

    def get_batch(self, batch_size: int):
        """Return a micro-batch, as get_batch() of nanoGPT's train.py does."""
        block_size = self.config.block_size
        data = np.memmap(self.config.data_dir / "train.bin", dtype=np.uint16, mode="r")
        ix = torch.randint(len(data) - block_size, (batch_size,))
        inputs = [data[i : i + block_size].astype(np.int64) for i in ix]
        targets = [data[i + 1 : i + 1 + block_size].astype(np.int64) for i in ix]
        x = torch.stack([torch.from_numpy(row) for row in inputs])
        y = torch.stack([torch.from_numpy(row) for row in targets])
        if self.device.type != "cuda":
            return x, y
        x = x.pin_memory().to(self.device, non_blocking=True)
        y = y.pin_memory().to(self.device, non_blocking=True)
        return x, y

    def free_memory(self):
        """Free what an attempt with a larger micro-batch has left."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


if __name__ == "__main__":
    run_script(main)
