"""How benchmarks/gpu.py measures: processes of their own, for a limited time, on random ids."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from common import ROOT, failure_reason
from configurator import UserError
from onenight.system.json_files import write_json

VRAM_GB = 12  # the memory that the project is made for; a larger card is limited to it
CARD_S = 120  # the time limit of the first measurement, which all others depend on
NIGHT = "config/train_fineweb_4070.py"
FAST = "config/train_fineweb_4070_fast.py"

# What every config becomes without a GPU.
TINY = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 32,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "compile": False,
}
# A run of train.py that is long enough for losses to be compared.
SHORT_RUN = {
    "n_layer": 6,
    "n_head": 3,
    "n_embd": 384,
    "batch_size": 16,
    "gradient_accumulation_steps": 2,
    "max_iters": 20,
    "lr_decay_iters": 20,
    "warmup_iters": 4,
    "warmdown_iters": 10,
    "matrix_warmdown_iters": 16,
    "eval_interval": 1000,
    "log_interval": 1,
    "compile": False,
}


class OutOfTime(Exception):
    """The time of a part, or of the whole, is over."""


class Bench:
    """Runs the measurements. Raises UserError if the device cannot be measured at all."""

    def __init__(self, folder: Path, config):
        self.folder = folder
        self.peer = Path(config.peer).resolve() if config.peer else None
        self.minutes = config.minutes
        self.end = time.monotonic() + 60 * config.minutes
        self.deadline = time.monotonic() + CARD_S  # of the part that is measured now
        self.tiny = False
        self.card = self.figures("card", f"--device={config.device}")
        if "failed" in self.card:
            raise UserError(self.card["failed"])

        self.tiny = self.card["device"] != "cuda"
        self.settings = {
            "dataset": folder,
            "vram_limit_gb": VRAM_GB,
            "eval_iters": 1,
            "wandb_log": False,
            "device": "cpu" if self.tiny else "cuda",
        }
        if self.tiny:
            self.settings.update(TINY)
        write_bins(folder, vocab_size=512 if self.tiny else 50257)

    def run(self, *command, **environment) -> tuple[str, str]:
        """Run a script until the deadline. Return what it printed, and why it failed or ""."""
        environment = {
            **os.environ,
            # Fresh caches, so that what an earlier run has compiled does not count. In this run,
            # only the first measurement of a model compiles all of it.
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "TORCHINDUCTOR"),
            "TRITON_CACHE_DIR": str(self.folder / "TRITON"),
            **environment,
        }
        # Files instead of pipes, which the children of a killed script would keep open.
        stdout_path = self.folder / "stdout"
        stderr_path = self.folder / "stderr"
        with open(stdout_path, "w") as stdout, open(stderr_path, "w") as stderr:
            try:
                result = subprocess.run(
                    [sys.executable, *map(str, command)],
                    cwd=self.folder,
                    env=environment,
                    stdout=stdout,
                    stderr=stderr,
                    timeout=max(0, self.deadline - time.monotonic()),
                )
            except subprocess.TimeoutExpired:
                raise OutOfTime
        printed = stdout_path.read_text(errors="replace").strip()
        if result.returncode == 0:
            return printed, ""
        stderr = stderr_path.read_text(errors="replace")
        return printed, failure_reason(stderr, result.returncode)

    def figures(self, *command, script: str = "gpu_measure", **environment) -> dict:
        """Return the figures that a script of benchmarks/ prints, or {"failed": the reason}."""
        seconds = 0.2 if self.tiny else 5
        path = ROOT / "benchmarks" / f"{script}.py"
        printed, failed = self.run(path, *command, f"--seconds={seconds}", **environment)
        if failed:
            return {"failed": failed}
        return json.loads(printed.splitlines()[-1])

    def flags(self, **changes) -> list[str]:
        """Return the settings of every measurement, with changes, as flags."""
        settings = {**self.settings, **changes}
        return [f"--{key}={value}" for key, value in settings.items()]

    def training(self, file: str, environment: dict | None = None, **changes) -> dict:
        """Return the speed and the memory of training with a config file."""
        flags = self.flags(**changes)
        figures = self.figures("training", file, *flags, **(environment or {}))
        if "failed" not in figures:
            figures["mfu"] = figures["tflops"] / self.card["tflops"][figures["dtype"]]
        return figures

    def train(self, name: str, **changes) -> dict:
        """Run train.py for a few iterations. Return the loss of each iteration, what it printed,
        and its peak memory; or {"failed": the reason}."""
        out_dir = self.folder / name
        settings = {**SHORT_RUN, **(TINY if self.tiny else {}), "out_dir": out_dir, **changes}
        printed, failed = self.run(ROOT / "train.py", FAST, *self.flags(**settings))
        if failed:
            return {"failed": failed}

        lines = (out_dir / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        figures = {"printed": printed, "losses": {}}
        for record in records:
            if "train_loss" in record:
                figures["losses"][record["iter"]] = record["train_loss"]
        for key in ("peak_memory_gb", "peak_reserved_gb"):
            figures[key] = max(record.get(key, 0) for record in records)
        return figures


def write_bins(folder: Path, vocab_size: int):
    """Write train.bin and val.bin with random ids, some of which are far more frequent than others,
    so that there is something to learn."""
    random = np.random.default_rng(0)
    for split, n_tokens in (("train", 4_000_000), ("val", 100_000)):
        ids = random.geometric(1 / 2000, n_tokens) % vocab_size
        ids.astype("<u2").tofile(folder / f"{split}.bin")
    write_json(folder / "meta.json", {"vocab_size": vocab_size})
