"""
The memory of a training step and of an evaluation of GPT-2 124M in eager mode, in GB (1e9 bytes).

    python benchmarks/memory.py --peer=../nanoGPT

Beside them it prints the plan's prediction, and the figures of a nanoGPT checkout. Nothing is
allocated and no GPU is needed: the tensors are fake ones, counted by torch's MemTracker. The model
has 12 layers, 12 heads, width 768 and 1,024 tokens; it is trained with AdamW under bfloat16
autocast, one micro-batch per step.
"""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

import common
import model
from configurator import configure, setting
from onenight.system.console import run_script
from onenight.system.memory import GB
from onenight.training.costs import predict_memory
from onenight.training.settings import TrainConfig

BATCH_SIZES = (4, 8, 16, 32)
STEPS = 2  # only the second one has the optimizer's state from its start


@dataclass
class MemoryConfig:
    peer: str = setting("", "folder of a nanoGPT checkout to measure beside ours", path=True)


def main(arguments: list[str]):
    config = configure(MemoryConfig, arguments, __doc__)
    modules = {"ours": model}
    if config.peer:
        modules["peer"] = common.load_peer(Path(config.peer))

    head = " " * 12
    for name in modules:
        head += f"{name + ' train':>12}{name + ' eval':>12}"
    print(head + f"{'plan, train':>14}")
    for batch_size in BATCH_SIZES:
        line = f"batch {batch_size:<6}"
        for module in modules.values():
            line += f"{peak_gb(module, batch_size, trains=True):12.2f}"
            line += f"{peak_gb(module, batch_size, trains=False):12.2f}"
        print(line + f"{planned_gb(batch_size):14.2f}")


def peak_gb(module, batch_size: int, trains: bool) -> float:
    """Return the peak of a training step, or of an evaluation, of the GPT in a module, in GB."""
    with FakeTensorMode(), contextlib.redirect_stdout(io.StringIO()):
        gpt = module.GPT(module.GPTConfig(**common.GPT2_SHAPE, dropout=0.0))
        optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-3)
        x = torch.zeros(batch_size, common.GPT2_SHAPE["block_size"], dtype=torch.long)
        y = torch.zeros_like(x)
        gpt.train(trains)
        tracker = MemTracker()
        tracker.track_external(gpt, optimizer)
        with tracker:
            for _ in range(STEPS):
                with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(trains):
                    _, loss = gpt(x, y)
                if trains:
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                tracker.reset_mod_stats()
        by_device = tracker.get_tracker_snapshot("peak").values()
        return sum(snapshot["Total"] for snapshot in by_device) / GB


def planned_gb(batch_size: int) -> float:
    """Return the plan's prediction of the same step, in GB. The plan counts the gradients of an
    earlier micro-batch, which this step does not have."""
    with torch.device("meta"):
        gpt = model.GPT(model.GPTConfig(**common.GPT2_SHAPE))
    config = TrainConfig(optimizer="adamw", dtype="bfloat16", compile=False)
    memory = predict_memory(gpt, config, batch_size)
    return (sum(memory.values()) - memory["gradients"]) / GB


if __name__ == "__main__":
    run_script(main)
