"""
How fast a config trains here, and how much memory it takes, beside a checkout of nanoGPT.

    python benchmarks/train.py config/train_fineweb_4070.py
    python benchmarks/train.py config/train_fineweb_4070.py --vram_limit_gb=12 --peer=../nanoGPT
    python benchmarks/train.py config/train_demo.py --optimizer=adamw --peer=../nanoGPT  # on a CPU

Each measurement runs in a process of its own, ours and the peer's in turn. Both compile if the
config does, and have the same shape, number format and data. Both start with a micro-batch of
batch_size windows and reduce it until a training step and an evaluation fit. The peer always has
GPT-2's architecture and fused AdamW.
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

import numpy as np
import torch

from common import circumstances, make_peer, step
from configurator import UserError, configure, setting
from onenight.system.console import run_script
from onenight.system.device import autocast, choose_device, compile_model, use_tf32
from onenight.system.distributed import Ranks
from onenight.system.json_files import write_json
from onenight.system.memory import is_out_of_memory, limit_memory, peak_memory_gb
from onenight.training.recovery import Recovery
from onenight.training.settings import TrainConfig, resolve
from onenight.training.trainer import Trainer, model_args

WARM_UP_ITERS = 3  # before the measurement: they compile and allocate


@dataclass
class BenchConfig(TrainConfig):
    peer: str = setting("", "folder of a nanoGPT checkout to measure beside ours", path=True)
    rounds: int = setting(2, "measurements of each, in turn", low=1)
    seconds: float = setting(20.0, "length of a measurement, after compiling", above=0)
    only: str = setting(
        "", "measure only this, in this process; print JSON", choices=("", "ours", "peer")
    )
    save: str = setting("", "JSON file for the figures", path=True)


def main(arguments: list[str]):
    config = configure(BenchConfig, arguments, __doc__)
    if config.only:
        measure = measure_peer if config.only == "peer" else measure_ours
        with contextlib.redirect_stdout(io.StringIO()):
            figures = measure(resolve(config, config.device))
        print(json.dumps(figures))
        return

    results = {"ours": []}
    if config.peer:
        results["peer"] = []
    for _ in range(config.rounds):
        for name, measured in results.items():
            figures = run_alone(arguments, name)
            measured.append(figures)
            print(f"{name}: {describe(figures)}", flush=True)

    speeds = {}
    for name, measured in results.items():
        speeds[name] = statistics.median(figures["tokens_per_s"] for figures in measured)
    if config.peer:
        print(f"ours / peer: {speeds['ours'] / speeds['peer']:.2f} times the tokens/s")
    if config.save:
        content = {
            "command": " ".join(["python benchmarks/train.py", *arguments]),
            **circumstances(choose_device(config.device)),
            "results": results,
            "median_tokens_per_s": speeds,
        }
        write_json(Path(config.save), content)


def run_alone(arguments: list[str], name: str) -> dict:
    """Return the figures of a measurement in a new process. Raises UserError with its message if
    it fails."""
    command = [sys.executable, __file__, *arguments, f"--only={name}"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"{name} cannot be measured: {result.stderr.strip()[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def describe(figures: dict) -> str:
    """Return the figures of a measurement in words."""
    text = f"{figures['tokens_per_s']:,.0f} tokens/s with micro-batches of {figures['batch_size']}"
    if figures["peak_memory_gb"]:
        text += f", peak memory {figures['peak_memory_gb']:.2f} GB"
    if "reading_share" in figures:
        text += f", {figures['reading_share']:.2%} of the time waiting for data"
    return text


# ---- ours


def measure_ours(config: BenchConfig) -> dict:
    """Return the figures of train.py's iteration."""
    trainer = Trainer(config, Ranks())
    recovery = Recovery(trainer)
    recovery.within_memory(trainer.mean_loss, trainer.val_tokens)
    for _ in range(WARM_UP_ITERS):
        step(trainer, recovery)

    trainer.windows = TimedWindows(trainer.windows)
    iters, seconds = count_iterations(lambda: step(trainer, recovery), config.seconds)
    figures = summarize(config, trainer.micro_batch_size, iters, seconds)
    figures["reading_share"] = trainer.windows.waited_s / seconds
    return figures


class TimedWindows:
    """TrainWindows that measures how long the iterations wait for their batches."""

    def __init__(self, windows):
        self.windows = windows
        self.waited_s = 0.0

    def batch(self, *arguments, **options):
        started = time.perf_counter()
        batch = self.windows.batch(*arguments, **options)
        self.waited_s += time.perf_counter() - started
        return batch


# ---- nanoGPT


def measure_peer(config: BenchConfig) -> dict:
    """Return the figures of nanoGPT's iteration with its largest micro-batch. Raises UserError if
    not even one window fits."""
    peer = Peer(config)
    windows = config.windows_per_iter
    for size in range(config.batch_size, 0, -1):
        if windows % size:
            continue
        try:
            peer.evaluate(size)
            for _ in range(WARM_UP_ITERS):
                peer.step(size)
            iters, seconds = count_iterations(lambda size=size: peer.step(size), config.seconds)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        else:
            return summarize(config, size, iters, seconds)
    raise UserError("out of memory with a micro-batch of one window")


class Peer:
    """nanoGPT's training with its own model and optimizer, at its best settings."""

    def __init__(self, config: BenchConfig):
        self.config = config
        self.device = torch.device(config.device)
        self.path = config.data_dir / "train.bin"
        use_tf32(self.device)
        limit_memory(config.vram_limit_gb, self.device)

        shape = model_args(config)
        del shape["architecture"]
        del shape["dropout"]
        self.model = make_peer(Path(config.peer), shape).to(self.device)
        self.optimizer = self.model.configure_optimizers(
            config.weight_decay,
            config.learning_rate,
            (config.beta1, config.beta2),
            self.device.type,
        )
        # Compiled as ours is: each size of micro-batch on its own.
        self.compiled_model = compile_model(self.model) if config.compile else self.model

    def get_batch(self, batch_size: int):
        """Return a micro-batch, as get_batch() of nanoGPT's train.py does."""
        block_size = self.config.block_size
        data = np.memmap(self.path, dtype=np.uint16, mode="r")
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

    @torch.no_grad()
    def evaluate(self, batch_size: int):
        """Compute the loss of a micro-batch without a gradient."""
        self.model.eval()
        x, y = self.get_batch(batch_size)
        with autocast(self.config.dtype, self.device):
            _, loss = self.compiled_model(x, y)
        loss.item()
        self.model.train()

    def step(self, batch_size: int):
        """Train for one iteration, as the loop of nanoGPT's train.py does."""
        micro_batches = self.config.windows_per_iter // batch_size
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


# ---- both


def count_iterations(iterate, seconds: float) -> tuple[int, float]:
    """Call iterate() for about that many seconds. Return the number of calls and their seconds."""
    iters = 0
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        iterate()
        iters += 1
    return iters, time.perf_counter() - started


def summarize(config: BenchConfig, micro_batch_size: int, iters: int, seconds: float) -> dict:
    """Return the figures of a measurement."""
    peak_memory, _ = peak_memory_gb(torch.device(config.device))
    return {
        "batch_size": micro_batch_size,
        "iterations": iters,
        "tokens_per_s": iters * config.tokens_per_iter / seconds,
        "peak_memory_gb": peak_memory,
    }


if __name__ == "__main__":
    run_script(main)
