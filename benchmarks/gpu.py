"""
Measures this project on your own GPU.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --peer=../nanoGPT --parts=short,long,peer --minutes=10

The parts are the speed and the peak memory of the short and the long night's model against the
plan, what int8 gains, nanoGPT beside ours, running out of memory, resuming, and sampling. Each
measurement is a run of one of the project's scripts, in a process of its own, on random ids in a
temporary folder. If a part fails, that is a line in the table, and the other parts still run.

The figures go to benchmarks/results/gpu-<card>.json (with --parts, their names follow), and the
table to the .md file beside it. Without a GPU, the same parts run with tiny models, which shows
only that they work.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from onenight.startup import run_script

import concurrent.futures
import contextlib
import datetime
import functools
import json
import multiprocessing
import platform
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from configurator import configure, setting
from onenight.device import GB, RESERVE, choose_device
from onenight.errors import UserError, first_line
from onenight.process import replacing
from onenight.records import read_metrics

SHORT_NIGHT = "config/train_fineweb_4070_fast.py"
LONG_NIGHT = "config/train_fineweb_4070.py"
# For every run of train.py: the memory that the project is made for, also on a larger card, next to
# no evaluation, and int8 only where it is measured.
SETTINGS = (
    "--vram_limit_gb=12 --max_iters=6 --log_interval=1 --eval_interval=1000 "
    "--eval_tokens=16384 --int8=False --wandb_log=False"
)
# A model whose losses are compared, iteration by iteration.
SMALL = (
    "--n_layer=6 --n_head=3 --n_embd=384 --batch_size=16 --tokens_per_iter=32768 --max_iters=20 "
    "--eval_interval=10 --compile=False"
)
# What every model becomes without a GPU.
TINY = (
    "--n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --batch_size=2 --tokens_per_iter=64 "
    "--eval_tokens=64 --compile=False"
)


@dataclass
class GpuConfig:
    peer: str = setting("", "folder of a nanoGPT checkout to measure beside ours", path=True)
    minutes: float = setting(25.0, "stop after this time, and name what was not reached", above=0)
    parts: str = setting("", "parts to measure, separated by commas; '': all")
    device: str = setting("auto", "'auto', 'cuda' or 'cpu'", choices=("auto", "cuda", "cpu"))
    save: str = setting("", "JSON file for the figures; '': in benchmarks/results/", path=True)


def main(arguments: list[str]):
    config, _ = configure(GpuConfig, arguments, __doc__)
    parts = config.parts.split(",") if config.parts else list(PARTS)
    if not set(parts) <= set(PARTS):
        raise UserError(f"--parts must be some of {','.join(PARTS)}, not {config.parts}")
    # In a process of its own, because this one must not take memory of the GPU.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
        machine = pool.submit(describe_machine, config.device).result()
    is_tiny = machine["device"] != "cuda"
    about = {"command": " ".join(["python benchmarks/gpu.py", *arguments]), **machine}
    name = f"gpu {'tiny' if is_tiny else machine['machine']} {config.parts}".lower()
    name = re.sub("[^a-z0-9]+", "-", name).strip("-")
    path = Path(config.save or ROOT / "benchmarks" / "results" / f"{name}.json")
    print(f"The figures go to {path}, and this table beside it.\n\n{TABLE_HEAD}", end="")

    # In the project, whose disk has room for checkpoints; git ignores out*.
    with tempfile.TemporaryDirectory("", "out-gpu-", ROOT, ignore_cleanup_errors=True) as folder:
        bench = Bench(Path(folder), config, is_tiny, time.monotonic() + 60 * config.minutes)
        write_bins(bench.folder)
        rows = []
        for part in parts:
            for name, figures in measure(part, bench):
                rows.append((part, name, figures))
                print(table_line(*rows[-1]), end="")
                save(path, about, rows)


def describe_machine(device_name: str) -> dict:
    """Return what figures depend on, apart from the command. Raises UserError if the device is not
    available."""
    device = choose_device(device_name)
    name = platform.machine()
    commit = "unknown"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        name = re.search(r"model name\s*: (.*)|$", Path("/proc/cpuinfo").read_text())[1] or name
    with contextlib.suppress(OSError):  # this machine has no git
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or commit
    return {
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "device": device.type,
        "machine": name,
        "torch": torch.__version__,
    }


# -----------------------------------------------------------------------------
# A script in a process of its own


class OutOfTime(Exception):
    """The minutes are over."""


@dataclass
class Bench:
    folder: Path  # the data, and in run/ the latest run of train.py
    config: GpuConfig
    is_tiny: bool
    end: float  # of the minutes, as time.monotonic()

    def flags(self, *changes: str) -> list[str]:
        """Return the settings of a run of train.py. Later changes override earlier ones."""
        device = "--device=cpu" if self.is_tiny else "--device=cuda"
        text = " ".join([SETTINGS, device, *changes, TINY if self.is_tiny else ""])
        return [*text.split(), f"--dataset={self.folder}"]


def write_bins(folder: Path):
    """Write train.bin and val.bin with random ids, some of which are far more frequent than others,
    so that there is something to learn."""
    random = np.random.default_rng(0)
    for split, n_tokens in (("train", 4_000_000), ("val", 100_000)):
        ids = random.geometric(1 / 2000, n_tokens) % 50257
        ids.astype("<u2").tofile(folder / f"{split}.bin")


def run(bench: Bench, script: str, arguments: list[str], stdin="", stop_after: int = 0) -> str:
    """Run a script of the project, and return what it printed. With `stop_after`, stop it by a
    signal once it has written so many records. Raises UserError if it fails, and OutOfTime."""
    with open(bench.folder / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / script), *arguments],
            cwd=bench.folder,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        )
        try:
            process.stdin.write(stdin.encode())
            process.stdin.close()
            while process.poll() is None:
                if time.monotonic() > bench.end:
                    raise OutOfTime
                if stop_after and len(read_run(bench)) > stop_after:
                    process.terminate()
                time.sleep(0.02)
        finally:
            process.kill()
    printed = (bench.folder / "log").read_text(errors="replace")
    if stop_after and not process.returncode:
        raise UserError("the run ended before it was stopped")
    if process.returncode and not stop_after:
        # torch prints advice below the error.
        errors = re.findall(r"^[\w.]*(?:Error|Exception)\b.*", printed, re.MULTILINE)
        raise UserError((errors or ["", *printed.strip().splitlines()])[-1][:300])
    return printed


def read_run(bench: Bench) -> list[dict]:
    """Return the records of the latest run of train.py."""
    return read_metrics(bench.folder / "run" / "metrics.jsonl")


def train(bench: Bench, file: str, *changes: str, stop_after: int = 0) -> dict:
    """Run train.py for some iterations, and return its figures and those of its plan."""
    is_resumed = "--init_from=resume" in changes
    if not is_resumed:
        shutil.rmtree(bench.folder / "run", ignore_errors=True)
    flags = [file, *bench.flags(*changes), f"--out_dir={bench.folder / 'run'}"]
    printed = run(bench, "train.py", flags, stop_after=stop_after)
    steps = [record for record in read_run(bench) if "train_loss" in record]
    tokens_per_s = steps[-1]["tokens_per_s"]
    planned = re.search(r"memory: .* at the peak \((.*)\)", printed)[1]
    figures = {
        "tokens_per_s": tokens_per_s,
        "planned_tokens_per_s": number_in(printed, r"speed: ([\d,]+) tokens/s, measured"),
        "tflops": tokens_per_s * number_in(printed, r"([\d,]+) MFLOP per token") / 1e6,
        "planned_gb": sum(map(float, re.findall(r"[\d.]+", planned))),
        "losses": {step["iter"]: step["train_loss"] for step in steps},
    }
    if not bench.is_tiny:
        figures["batch_size"] = number_in(printed, r"with --batch_size=(\d+)")
        figures["peak_gb"] = max(step["peak_memory_gb"] for step in steps)
        figures["reserved_gb"] = max(step["peak_reserved_gb"] for step in steps)
    if is_resumed:
        figures["resumed_at"] = number_in(printed, r"resuming at iter ([\d,]+)")
    return figures


def number_in(printed: str, pattern: str) -> float:
    """Return the number in the last match of the pattern."""
    return float(re.findall(pattern, printed)[-1].replace(",", ""))


def difference(one: dict, other: dict) -> dict:
    """Return the largest difference of the losses of two runs, and the first iteration with one."""
    iters = sorted(one["losses"].keys() & other["losses"].keys())
    differences = {i: abs(one["losses"][i] - other["losses"][i]) for i in iters}
    figures = {"loss_difference": max(differences.values())}
    differing = [i for i in iters if differences[i]]
    if differing:
        figures["differs_from"] = differing[0]
    return figures


# -----------------------------------------------------------------------------
# The parts: each yields the name of a measurement, and its figures

Measurements = Iterator[tuple[str, dict]]


def night(file: str, bench: Bench) -> Measurements:
    """A night's config as it is, apart from its length."""
    yield file, train(bench, file)


def int8(bench: Bench) -> Measurements:
    """The short night without int8, with it, and without it again, which shows the noise. Wrong
    products would show in the losses."""
    without = train(bench, SHORT_NIGHT)
    yield "without", without
    with_int8 = train(bench, SHORT_NIGHT, "--int8=True")
    yield "with int8", with_int8
    again = train(bench, SHORT_NIGHT)
    yield "without, again", again
    speed = (without["tokens_per_s"] + again["tokens_per_s"]) / 2
    times = with_int8["tokens_per_s"] / speed
    yield "with int8 / without", {"times": times, **difference(without, with_int8)}


def peer(bench: Bench) -> Measurements:
    """Ours and nanoGPT in turn, by benchmarks/train.py, each with its largest micro-batch."""
    if not bench.config.peer:
        yield "nanoGPT", {"skipped": "needs --peer=FOLDER, a checkout of nanoGPT"}
        return
    # 96 windows can be divided into micro-batches of 16, 12, 8, 6, ...
    flags = [LONG_NIGHT, *bench.flags(f"--tokens_per_iter={96 * 1024}")]
    flags += [f"--peer={Path(bench.config.peer).resolve()}"]
    flags += [f"--seconds={0.2 if bench.is_tiny else 5}"]
    speeds = {"ours": [], "peer": []}
    for attempt in ("first", "second"):
        for name, found in speeds.items():
            printed = run(bench, "benchmarks/train.py", [*flags, f"--only={name}"])
            figures = json.loads(re.findall(r"^\{.*\}$", printed, re.MULTILINE)[-1])
            found.append(figures["tokens_per_s"])
            yield f"{name}, {attempt}", figures
    ours, theirs = (statistics.mean(found) for found in speeds.values())
    yield "ours / peer", {"times": ours / theirs}


def memory(bench: Bench) -> Measurements:
    """A run with too little memory for its micro-batch, compared with an undisturbed run with half
    of it."""
    if bench.is_tiny:
        yield "too little memory", {"skipped": "needs a GPU"}
        return
    whole = train(bench, SHORT_NIGHT, SMALL)
    half = train(bench, SHORT_NIGHT, SMALL, "--batch_size=8")
    yield "half the micro-batch, undisturbed", difference(whole, half)
    # Less than the whole micro-batch allocates, and more than half of it reserves.
    limit_gb = (whole["peak_gb"] + half["reserved_gb"]) / 2 + RESERVE / GB
    disturbed = train(bench, SHORT_NIGHT, SMALL, f"--vram_limit_gb={limit_gb}")
    figures = {"limit_gb": limit_gb, "batch_size": disturbed["batch_size"]}
    if disturbed["batch_size"] == whole["batch_size"]:
        figures["failed"] = "memory did not run out"
    yield "too little memory", {**figures, **difference(half, disturbed)}


def resuming(bench: Bench) -> Measurements:
    """A run that a signal stops half-way and that is resumed, compared with uninterrupted runs."""
    first = train(bench, SHORT_NIGHT, SMALL)
    second = train(bench, SHORT_NIGHT, SMALL)
    yield "two uninterrupted runs", difference(first, second)
    train(bench, SHORT_NIGHT, SMALL, stop_after=10)
    resumed = train(bench, SHORT_NIGHT, SMALL, "--init_from=resume")
    figures = {"resumed_at": resumed["resumed_at"], **difference(first, resumed)}
    yield "stopped and resumed", figures


def sampling(bench: Bench) -> Measurements:
    """The short night's model. With --interactive there is one sample for each prompt, and only the
    first prompt compiles."""
    train(bench, SHORT_NIGHT, "--max_iters=1", "--tokens_per_iter=16384", "--compile=False")
    flags = [f"--out_dir={bench.folder / 'run'}", "--stop=False"]
    flags += ["--device=cpu", "--max_new_tokens=8"] if bench.is_tiny else ["--max_new_tokens=512"]
    ways = {"1 sample": ["--interactive"], "8 samples": ["--num_samples=8"]}
    if not bench.is_tiny:
        ways["1 sample, compiled"] = ["--interactive", "--compile"]
    for name, options in ways.items():
        printed = run(bench, "sample.py", [*flags, *options], stdin="One\nTwo\n")
        yield name, {"tokens_per_s": number_in(printed, r"([\d,.]+) tokens/s")}


PARTS = {
    "short": functools.partial(night, SHORT_NIGHT),
    "long": functools.partial(night, LONG_NIGHT),
    "int8": int8,
    "peer": peer,
    "memory": memory,
    "resuming": resuming,
    "sampling": sampling,
}


def measure(part: str, bench: Bench) -> Measurements:
    """Yield the measurements of a part, and why the rest of them is missing, if it is."""
    try:
        yield from PARTS[part](bench)
    except OutOfTime:
        yield "the rest", {"skipped": f"not reached in {bench.config.minutes:g} minutes"}
    except Exception as error:  # the other parts still run
        yield "the rest", {"failed": f"{type(error).__name__}: {first_line(error)}"}


# -----------------------------------------------------------------------------
# The table

TABLE_HEAD = "| part | measured | result |\n|---|---|---|\n"
# The figures in a line of the table, in this order, and how they are printed.
WORDS = {
    "skipped": "{}",
    "failed": "failed: {}",
    "limit_gb": "limited to {:.2f} GB",
    "batch_size": "micro-batch {:.0f}",
    "tokens_per_s": "{:,.0f} tokens/s",
    "planned_tokens_per_s": "planned {:,.0f}",
    "tflops": "{:.3g} TFLOP/s",
    "peak_gb": "peak {:.2f} GB",
    "planned_gb": "planned {:.2f} GB",
    "times": "{:.2f} times as fast",
    "resumed_at": "resumed at iteration {:.0f}",
    "loss_difference": "losses at most {:.1g} apart",
    "differs_from": "the first at iteration {}",
}


def table_line(part: str, name: str, figures: dict) -> str:
    words = [text.format(figures[key]) for key, text in WORDS.items() if key in figures]
    return f"| {part} | {name} | {', '.join(words).replace('|', '/')} |\n"


def save(path: Path, about: dict, rows: list[tuple[str, str, dict]]):
    """Write the figures as JSON, and the table beside it."""
    parts = {}
    for part, name, figures in rows:
        parts.setdefault(part, {})[name] = figures
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, "w") as file:
        file.write(json.dumps({**about, "parts": parts}, indent=1) + "\n")
    title = "Tiny models, which show only that the parts work"
    if about["device"] == "cuda":
        title = about["machine"]
    versions = f"torch {about['torch']}, commit {about['commit']}, {about['date']}"
    with replacing(path.with_suffix(".md"), "w") as file:
        file.write(f"# {title}\n\n{versions}\n\n{TABLE_HEAD}")
        file.writelines(table_line(*row) for row in rows)


if __name__ == "__main__":
    run_script(main)
