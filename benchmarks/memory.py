"""
The memory of a training step and of an evaluation of GPT-2 124M in eager mode, without a GPU and without the memory:
fake tensors under torch's MemTracker. Beside it the plan's prediction, and another checkout of nanoGPT.

    python benchmarks/memory.py --peer=../nanoGPT

The shape: 12 layers, 12 heads, 768 wide, 1,024 tokens, bfloat16 autocast, AdamW, one micro-batch. In GiB (2**30 bytes).
"""

import contextlib
import importlib.util
import io
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

ROOT = Path(__file__).parent.parent
SHAPE = {"block_size": 1024, "vocab_size": 50304, "n_layer": 12, "n_head": 12, "n_embd": 768, "bias": False}
GIB = 2**30


def main(arguments: list[str]):
    sys.path.insert(0, str(ROOT))
    folders = {"ours": ROOT}
    for argument in arguments:
        if not argument.startswith("--peer="):
            raise SystemExit(f"{argument}: the only argument is --peer=FOLDER_OF_NANOGPT")
        folders["peer"] = Path(argument.removeprefix("--peer="))
    print(
        f"{'':12}" + "".join(f"{name + ' train':>12}{name + ' eval':>12}" for name in folders) + f"{'plan, train':>14}"
    )
    for batch_size in (4, 8, 16, 32):
        row = [
            peak(load(folder, name), batch_size, with_step)
            for name, folder in folders.items()
            for with_step in (True, False)
        ]
        print(f"batch {batch_size:<6}" + "".join(f"{gib:12.2f}" for gib in row) + f"{planned(batch_size):14.2f}")


def load(folder: Path, name: str):
    """The model.py of a checkout, as a module."""
    spec = importlib.util.spec_from_file_location(f"model_of_{name}", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def peak(module, batch_size: int, with_step: bool) -> float:
    """GiB at the peak of the second training step, or of an evaluation."""
    with FakeTensorMode(), contextlib.redirect_stdout(io.StringIO()):
        model = module.GPT(module.GPTConfig(**SHAPE, dropout=0.0))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        x, y = (torch.zeros(batch_size, SHAPE["block_size"], dtype=torch.long) for _ in range(2))
        model.train(with_step)
        with tracker:
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(with_step):
                    _, loss = model(x, y)
                if with_step:
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                tracker.reset_mod_stats()
        return sum(snapshot["Total"] for snapshot in tracker.get_tracker_snapshot("peak").values()) / GIB


def planned(batch_size: int) -> float:
    """What plan.py predicts for the same step; it has no gradients of an earlier micro-batch beside it."""
    from model import GPT, GPTConfig
    from plan import predict_memory

    with torch.device("meta"):
        memory = predict_memory(GPT(GPTConfig(**SHAPE)), batch_size, "bfloat16")
    return (sum(memory.values()) - memory["gradients"]) / GIB


if __name__ == "__main__":
    main(sys.argv[1:])
