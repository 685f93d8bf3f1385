"""
Measures on your own card what the project could not: speed, memory against the plan, nanoGPT beside it, switches,
running out of memory, resuming, sampling.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --peer=../nanoGPT --minutes=40

It trains on random ids in a temporary folder, and leaves data/ and out*/ alone. Every measurement is a process of its
own: one that fails is a line in the table, and the rest goes on. The most important parts come first; what the minutes
are too short for is named. After each measurement it writes benchmarks/results/gpu-<name of the card>.json, and the
table beside it as .md. Without a GPU the same parts run with a tiny model, which shows that they work, and no more.
"""

import functools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common import RESULTS, ROOT
from onenight.device import GB, RESERVE
from onenight.files import first_line, write_json

import numpy as np

from configurator import configure, setting
from gpu_report import Report

VRAM_GB = 12  # the memory that the project is made for; a larger card is held to it
TINY = {
    "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 4, "gradient_accumulation_steps": 2,
    "compile": False,
}  # fmt: skip
NIGHT, FAST = "config/train_fineweb_4070.py", "config/train_fineweb_4070_fast.py"
NEEDS_GPU = {"skipped": "needs a GPU"}


@dataclass
class GpuConfig:
    peer: str = setting("", "folder of a nanoGPT checkout to measure beside ours")
    minutes: float = setting(15.0, "after so many it stops, and says what was not reached", above=0)
    device: str = setting("auto", "'auto' is the GPU if there is one", choices=("auto", "cuda", "cpu"))
    save: str = setting("", "JSON file for the figures; '': benchmarks/results/gpu-<name of the card>.json")

    def __post_init__(self):
        if self.save and not self.save.endswith(".json"):
            raise ValueError(f"save must end in .json, not {self.save!r}; the table goes beside it as .md")


def main(arguments: list[str]):
    config = configure(GpuConfig, arguments, __doc__)
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            bench = Bench(Path(folder), config)
            name = "tiny" if bench.tiny else re.sub("[^a-z0-9]+", "-", bench.card["machine"].lower()).strip("-")
            about = {"command": " ".join(["python benchmarks/gpu.py", *arguments]), "tiny": bench.tiny, **bench.card}
            report = Report(Path(config.save or RESULTS / f"gpu-{name}.json"), about)
            for part, measure, limit_s in PARTS:
                measure_part(part, measure, limit_s, bench, report)
    except KeyboardInterrupt:
        print("stopped; what was measured so far is on the disk", file=sys.stderr)
        raise SystemExit(130) from None
    except OutOfTime:
        raise SystemExit("the card did not answer within two minutes")


class OutOfTime(Exception):
    """The part, or the whole, has had its time."""


class Bench:
    """Where it is measured, for how long, and what the card is. Raises SystemExit if that cannot be found out."""

    def __init__(self, folder: Path, config: GpuConfig):
        self.folder, self.minutes, self.tiny = folder, config.minutes, False
        self.peer = Path(config.peer).resolve() if config.peer else None
        self.end = time.monotonic() + 60 * config.minutes
        self.deadline = time.monotonic() + 120  # of the card, which everything depends on
        self.card = self.figures("card", f"--device={config.device}")
        if "failed" in self.card:
            raise SystemExit(self.card["failed"])
        self.tiny = self.card["device"] != "cuda"
        self.settings = {"dataset": folder, "vram_limit_gb": VRAM_GB, "eval_iters": 1, "wandb_log": False}
        self.settings |= {"device": "cpu", **TINY} if self.tiny else {"device": "cuda"}
        write_bins(folder, vocab_size=512 if self.tiny else 50257)

    def run(self, *command, **environment) -> tuple[str, str]:
        """Runs a script of the project in the time that is left. Returns what it printed, and why it failed or ''."""
        texts = [self.folder / name for name in ("stdout", "stderr")]  # not pipes: its own children may outlive it
        caches = {f"{name}_CACHE_DIR": str(self.folder / name) for name in ("TORCHINDUCTOR", "TRITON")}
        environment = {**os.environ, **caches, **environment}
        with open(texts[0], "w") as stdout, open(texts[1], "w") as stderr:
            options = {"stdout": stdout, "stderr": stderr, "env": environment, "cwd": self.folder}
            left = max(0, self.deadline - time.monotonic())
            try:
                code = subprocess.run([sys.executable, *map(str, command)], timeout=left, **options).returncode
            except subprocess.TimeoutExpired:
                raise OutOfTime
        printed, complaint = (path.read_text(errors="replace").strip() for path in texts)
        errors = re.findall(r"(?m)^[\w.]*(?:Error|Exception|Failed)\b.*", complaint)  # torch adds advice below it
        return printed, (errors or complaint.splitlines() or [f"exit status {code}"])[-1][:300] if code else ""

    def figures(self, *command, script="gpu_measure", **environment) -> dict:
        """The figures that a measurement prints, or {"failed": why}."""
        script = ROOT / "benchmarks" / f"{script}.py"
        printed, failed = self.run(script, *command, f"--seconds={0.2 if self.tiny else 5}", **environment)
        return {"failed": failed} if failed else json.loads(printed.splitlines()[-1])

    def flags(self, **changes) -> list[str]:
        """The settings of every measurement, and others, as flags."""
        return [f"--{key}={value}" for key, value in {**self.settings, **changes}.items()]

    def training(self, file: str, environment=None, **changes) -> dict:
        """Speed and memory of training by a config file."""
        figures = self.figures("training", file, *self.flags(**changes), **(environment or {}))
        if "failed" not in figures:
            figures["mfu"] = figures["tflops"] / self.card["tflops"][figures["dtype"]]
        return figures

    def train(self, name: str, **changes) -> dict:
        """A short run of train.py: its losses by iteration, what it printed, its peak memory; or {"failed": why}."""
        changes = {**SHORT_RUN, **(TINY if self.tiny else {}), "out_dir": self.folder / name, **changes}
        printed, failed = self.run(ROOT / "train.py", FAST, *self.flags(**changes))
        if failed:
            return {"failed": failed}
        records = [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]
        losses = {record["iter"]: record["train_loss"] for record in records if "train_loss" in record}
        peaks = {key: max(r.get(key, 0) for r in records) for key in ("peak_memory_gb", "peak_reserved_gb")}
        return {"losses": losses, "printed": printed, **peaks}


def write_bins(folder: Path, vocab_size: int):
    """Random ids, some far more frequent than others, so that there is something to learn."""
    random = np.random.default_rng(0)
    for split, n_tokens in (("train", 4_000_000), ("val", 100_000)):
        (random.geometric(1 / 2000, n_tokens) % vocab_size).astype("<u2").tofile(folder / f"{split}.bin")
    write_json(folder / "meta.json", {"vocab_size": vocab_size})


# ---- the parts: each yields the name and the figures of one measurement after another


def the_card(bench: Bench) -> Iterator[tuple[str, dict]]:
    """The ceilings. On a GPU float32 is TF32, as in training."""
    for dtype, speed in bench.card["tflops"].items():
        yield f"matrix products in {dtype}", {"matmul_tflops": speed}
    yield "copying in its memory", {"copy_gb_s": bench.card["copy_gb_s"]}


def train_config(file: str, bench: Bench) -> Iterator[tuple[str, dict]]:
    """Training with the config's micro-batch, then with the largest that should fit, by the plan and the first peak."""
    own = bench.training(file)
    yield "the config's micro-batch", own
    if "failed" in own:
        return
    share = own.get("allocated_gb", own["plan_gb"]) / own["plan_gb"]  # of the plan that is really taken
    free_gb = VRAM_GB - RESERVE / GB
    size = max((int(size) for size, gb in own["larger"].items() if gb * share <= free_gb), default=0)
    figures = {"skipped": "no larger one: by the plan and this peak, twice the micro-batch does not fit"}
    if size:
        figures = bench.training(file, batch_size=size, gradient_accumulation_steps=own["windows"] // size)
    yield f"the largest in {VRAM_GB} GB", figures


def peer(bench: Bench) -> Iterator[tuple[str, dict]]:
    """Ours and nanoGPT in turn, twice, each with its largest micro-batch; then ours with nanoGPT's."""
    if not bench.peer:
        yield "nanoGPT", {"skipped": "needs --peer=FOLDER, a checkout of nanoGPT"}
        return
    first_size, windows = (4, 8) if bench.tiny else (16, 96)  # 16, 12, 8, 6 ... divide 96
    speeds, sizes = {"ours": [], "peer": []}, {}

    def measure(name: str, size: int) -> dict:
        changes = {"batch_size": size, "gradient_accumulation_steps": windows // size, "peer": bench.peer}
        return bench.figures(NIGHT, *bench.flags(**changes), f"--only={name}", script="train")

    for name, attempt in (("ours", "first"), ("peer", "first"), ("ours", "second"), ("peer", "second")):
        figures = measure(name, sizes.get(name, first_size))
        yield f"{name}, {attempt}", figures
        if "failed" in figures:
            return
        sizes[name] = figures["batch_size"]
        speeds[name].append(figures["tokens_per_s"])
    yield "ours / peer", {"times": statistics.mean(speeds["ours"]) / statistics.mean(speeds["peer"])}
    if sizes["ours"] != sizes["peer"]:
        same = measure("ours", sizes["peer"])
        yield "ours, with the peer's micro-batch", same
        if "failed" not in same:
            yield "ours / peer, same micro-batch", {"times": same["tokens_per_s"] / statistics.mean(speeds["peer"])}


SHORT_RUN = {
    "n_layer": 6, "n_head": 3, "n_embd": 384, "batch_size": 16, "gradient_accumulation_steps": 2, "max_iters": 20,
    "lr_decay_iters": 20, "warmup_iters": 4, "warmdown_iters": 10, "eval_interval": 1000, "log_interval": 1,
    "compile": False,
}  # fmt: skip


def difference(one: dict, other: dict, first: int = 0) -> dict:
    """How far the losses of two runs are apart, from iteration `first` on."""
    if failed := one.get("failed") or other.get("failed"):
        return {"failed": failed}
    iters = range(first, len(one["losses"]))
    return {"loss_difference": max(abs(one["losses"][i] - other["losses"][i]) for i in iters), "iters": len(iters)}


def out_of_memory(bench: Bench) -> Iterator[tuple[str, dict]]:
    """A run in memory that is too small for its micro-batch, against undisturbed ones with it and with half of it."""
    if bench.tiny:
        yield "less memory than the micro-batch needs", NEEDS_GPU
        return
    whole = bench.train("whole")
    half = bench.train("half", batch_size=8, gradient_accumulation_steps=4)
    yield "losses with half the micro-batch, undisturbed", difference(whole, half)
    if "failed" in whole or "failed" in half:
        return
    # Too little for what the one allocates, enough for what the other reserves.
    limit = (whole["peak_memory_gb"] + half["peak_reserved_gb"]) / 2 + RESERVE / GB
    disturbed = bench.train("disturbed", vram_limit_gb=limit)
    figures = {"limit_gb": limit, **difference(whole, disturbed)}
    if "failed" not in figures:
        said = re.findall(r"out of memory: going on with --batch_size=(\d+)", disturbed["printed"])
        figures |= {"went_on_with": int(said[-1])} if said else {"failed": "memory did not run out"}
    yield "losses with memory for half, after running out", figures


def resuming(bench: Bench) -> Iterator[tuple[str, dict]]:
    """A run that stops half-way and is resumed, against uninterrupted ones; and the seconds of a save."""
    first, second = bench.train("first"), bench.train("second")
    yield "losses of two uninterrupted runs", difference(first, second)
    bench.train("stopped", max_iters=10)
    yield "losses after a stop, resumed", difference(first, bench.train("stopped", init_from="resume"), first=10)
    yield "saving a checkpoint of the night's model", bench.figures("saving", NIGHT, *bench.flags())


def sampling(bench: Bench) -> Iterator[tuple[str, dict]]:
    """1 and 8 samples at once, eager and compiled. A token reads all weights once, whatever the samples."""
    kinds = [("", NIGHT, 1), ("", NIGHT, 8), ("the short night's model, ", FAST, 1)]
    for name, file, samples, compiled in [(*kind, compiled) for compiled in (False, True) for kind in kinds]:
        figures = NEEDS_GPU
        if not (compiled and bench.tiny):
            changes = {"samples": samples, "compile": compiled, **({"new_tokens": 16} if bench.tiny else {})}
            figures = bench.figures("sampling", file, *bench.flags(**changes))
        if "weights_gb_s" in figures:
            figures["share_of_bandwidth"] = figures["weights_gb_s"] / bench.card["copy_gb_s"]
        yield f"{name}{samples} sample{'s' * (samples > 1)}, {'compiled' if compiled else 'eager'}", figures


def switches(bench: Bench) -> Iterator[tuple[str, dict]]:
    """The short night's config as it is, and with one change at a time; as it is once more, to show the noise."""
    changes = {
        "as it is": ({}, {}),
        "1,024 rows of the head at once": ({"chunk_rows": 1024}, {}),
        "4,096 rows of the head at once": ({"chunk_rows": 4096}, {}),
        "residual stream in bfloat16": ({"bfloat16_stream": True}, {}),
        "without expandable segments": ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}),
        "CUDA graphs": ({"cuda_graphs": True}, {}),
        "as it is, again": ({}, {}),
        "max-autotune": ({}, {"TORCHINDUCTOR_MAX_AUTOTUNE": "1"}),
    }
    base = None
    for name, (settings, environment) in changes.items():
        figures = NEEDS_GPU
        if name == "max-autotune" and bench.card.get("multiprocessors", 68) < 68:
            figures = {"skipped": "Inductor tunes matrix products from 68 multiprocessors on"}
        elif not (bench.tiny and (environment or "cuda_graphs" in settings)):
            figures = bench.training(FAST, environment, dtype="bfloat16", **settings)
        if name == "as it is":
            base = figures.get("tokens_per_s")
        elif base and "tokens_per_s" in figures:
            figures["gain"] = figures["tokens_per_s"] / base - 1
        yield name, figures


# What is measured, in this order, and the seconds that it may take.
PARTS = [
    ("card", the_card, 60),
    ("the night", functools.partial(train_config, NIGHT), 240),
    ("the short night", functools.partial(train_config, FAST), 240),
    ("nanoGPT", peer, 480),
    ("out of memory", out_of_memory, 150),
    ("resuming", resuming, 150),
    ("sampling", sampling, 240),
    ("the first evening", functools.partial(train_config, "config/train_fineweb_4070_small.py"), 180),
    ("more training", functools.partial(train_config, "config/finetune_gpt2.py"), 240),
    ("switches", switches, 720),
]


def measure_part(part: str, measure: Callable, limit_s: float, bench: Bench, report: Report):
    """Measures a part as far as it gets, and reports why it ended if it did not get to its end."""
    started, rows, missing = time.monotonic(), 0, ""
    bench.deadline = min(bench.end, started + limit_s)
    try:
        if started >= bench.end:
            raise OutOfTime
        for name, figures in measure(bench):
            rows += 1
            report.add(part, name, figures)
    except OutOfTime:
        over = f"{bench.minutes:g} minutes" if bench.deadline == bench.end else f"{limit_s:g} seconds"
        missing = f"not reached in {over}"
    except Exception as error:  # a fault of one part: the others go on
        missing = f"{type(error).__name__}: {first_line(error)}"
    if missing:
        report.add(part, "the rest" if rows else "all of it", {"skipped": missing})


if __name__ == "__main__":
    main(sys.argv[1:])
