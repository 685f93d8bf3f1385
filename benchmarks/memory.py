"""
The memory of a training step and of an evaluation of GPT-2 124M in eager mode, measured without a GPU and without
allocating it: fake tensors under torch's MemTracker. Beside it the plan's prediction, and a checkout of nanoGPT.

    python benchmarks/memory.py --peer=../nanoGPT

The shape: 12 layers, 12 heads, 768 wide, 1,024 tokens, bfloat16 autocast, AdamW, one micro-batch. In GB (1e9 bytes).
"""

import contextlib
import io
import sys
from pathlib import Path

from common import GPT2_SHAPE, load_peer
from onenight.plan import GB, predict_memory

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

import model


def main(arguments: list[str]):
    modules = {"ours": model}
    for argument in arguments:
        if not argument.startswith("--peer="):
            raise SystemExit(f"{argument}: the only argument is --peer=FOLDER_OF_NANOGPT")
        modules["peer"] = load_peer(Path(argument.removeprefix("--peer=")))
    print(
        f"{'':12}" + "".join(f"{name + ' train':>12}{name + ' eval':>12}" for name in modules) + f"{'plan, train':>14}"
    )
    for batch_size in (4, 8, 16, 32):
        row = [peak(module, batch_size, with_step) for module in modules.values() for with_step in (True, False)]
        print(f"batch {batch_size:<6}" + "".join(f"{gb:12.2f}" for gb in row) + f"{planned(batch_size):14.2f}")


def peak(module, batch_size: int, with_step: bool) -> float:
    """GB at the peak of the second training step, or of an evaluation."""
    with FakeTensorMode(), contextlib.redirect_stdout(io.StringIO()):
        trained = module.GPT(module.GPTConfig(**GPT2_SHAPE, dropout=0.0))
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
        tracker = MemTracker()
        tracker.track_external(trained, optimizer)
        x, y = (torch.zeros(batch_size, GPT2_SHAPE["block_size"], dtype=torch.long) for _ in range(2))
        trained.train(with_step)
        with tracker:
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(with_step):
                    _, loss = trained(x, y)
                if with_step:
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                tracker.reset_mod_stats()
        return sum(snapshot["Total"] for snapshot in tracker.get_tracker_snapshot("peak").values()) / GB


def planned(batch_size: int) -> float:
    """The plan's prediction of the same step, without the gradients of an earlier micro-batch."""
    with torch.device("meta"):
        memory = predict_memory(model.GPT(model.GPTConfig(**GPT2_SHAPE)), batch_size, "bfloat16")
    return (sum(memory.values()) - memory["gradients"]) / GB


if __name__ == "__main__":
    main(sys.argv[1:])
