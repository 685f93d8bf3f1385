"""
What the benchmarks share: the project on Python's path, the circumstances of a measurement, nanoGPT's model.
"""

import contextlib
import datetime
import importlib.util
import io
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))
# The shape of GPT-2 124M, as nanoGPT trains it.
GPT2_SHAPE = {"block_size": 1024, "vocab_size": 50304, "n_layer": 12, "n_head": 12, "n_embd": 768, "bias": False}


def circumstances(device: str = "cpu") -> dict:
    """What the figures of a benchmark depend on, apart from its command: commit, date, machine, torch."""
    import torch  # here, so that onenight can set the environment before

    on_gpu = torch.device(device).type == "cuda"
    return {
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "machine": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "torch": torch.__version__,
    }


def cpu_name() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def commit() -> str:
    """The commit of this project, with -dirty if files differ from it."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:  # no git on this machine
        return "unknown"
    return result.stdout.strip() or "not committed"


def bytes_per_step(model) -> int:
    """What a model must read for a token at the least: every weight once, but next to nothing of the embeddings."""
    import torch

    embeddings = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    looked_up = {id(weight) for weight in embeddings if weight is not model.lm_head.weight}
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in looked_up)


def load_peer(folder: Path):
    """The module model.py in a checkout of nanoGPT."""
    spec = importlib.util.spec_from_file_location("model_of_peer", Path(folder) / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def make_peer(folder: Path, shape: dict):
    """A new model of nanoGPT, without what it prints meanwhile."""
    peer = load_peer(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        return peer.GPT(peer.GPTConfig(**shape, dropout=0.0))
