"""What the benchmarks share.

These are the project on Python's path, an iteration of training, the circumstances of a
measurement, why a process failed, and nanoGPT's model.
"""

import contextlib
import datetime
import importlib.util
import io
import platform
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))

import onenight.startup  # isort: skip  (first: see there)  # noqa: F401

import torch

from onenight.training.recovery import Recovery
from onenight.training.trainer import Trainer
from train import clip_and_update, forward_backward

# The shape of GPT-2 124M, as nanoGPT trains it.
GPT2_SHAPE = {
    "block_size": 1024,
    "vocab_size": 50304,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "bias": False,
}


# ---- training


def step(trainer: Trainer, recovery: Recovery) -> float:
    """Train for one iteration, as the loop of train.py does, and return its loss.

    The learning rates are those that the optimizers have. Raises UserError if the loss or the
    gradient was not finite several times in a row, or if memory ran out in an update: a benchmark
    has no checkpoint to return to.
    """
    recovery.go_back_if_needed()
    loss = recovery.within_memory(forward_backward, trainer)
    loss = trainer.sum_over_processes(loss)
    recovery.guard_update(clip_and_update, loss)
    trainer.progress.count_iteration(trainer.config)
    return loss


def wait(device: torch.device):
    """Wait until a GPU has done all that was queued; return at once on other devices."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def use_float32_stream(model):
    """Make the model carry its residual stream in float32 under autocast, as nanoGPT does. Only the
    embeddings are still rounded."""

    def widen(module, inputs):
        x, *others = inputs
        return x.float(), *others

    model.transformer.h[0].register_forward_pre_hook(widen)


# ---- circumstances


def circumstances(device="cpu") -> dict:
    """Return what the figures of a benchmark depend on, apart from its command: the commit, the
    date, the machine, and the version of torch. `device` is a torch.device or its name."""
    on_gpu = torch.device(device).type == "cuda"
    return {
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "machine": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "torch": torch.__version__,
    }


def cpu_name() -> str:
    """Return the name of the processor."""
    with contextlib.suppress(OSError):  # only Linux has the file
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(": ")[1]
    return platform.processor()


def commit() -> str:
    """Return the commit of this project, with "-dirty" if files differ from it."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:  # this machine has no git
        return "unknown"
    return result.stdout.strip() or "not committed"


# ---- scripts that run in a process of their own


def failure_reason(stderr: str, exit_status: int) -> str:
    """Return the line of a failed script's stderr that says why it failed."""
    lines = stderr.strip().splitlines()
    # torch prints advice below the error.
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Failed)\b", line)]
    candidates = errors or lines or [f"exit status {exit_status}"]
    return candidates[-1][:300]


# ---- models


def bytes_per_step(model) -> int:
    """Return the bytes that a model must at least read to generate a token: each weight once.

    Embeddings are not counted, because only a few of their rows are read, unless they are also the
    output head.
    """
    looked_up = set()
    for module in model.modules():
        is_embedding = isinstance(module, torch.nn.Embedding)
        if is_embedding and module.weight is not model.lm_head.weight:
            looked_up.add(id(module.weight))
    read = [weight for weight in model.parameters() if id(weight) not in looked_up]
    return sum(weight.numel() * weight.element_size() for weight in read)


def load_peer(folder: Path):
    """Return the module model.py of a nanoGPT checkout."""
    spec = importlib.util.spec_from_file_location("model_of_peer", Path(folder) / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look it up there
    spec.loader.exec_module(module)
    return module


def make_peer(folder: Path, shape: dict):
    """Return a new model of a nanoGPT checkout, and suppress what it prints."""
    peer = load_peer(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        return peer.GPT(peer.GPTConfig(**shape, dropout=0.0))
