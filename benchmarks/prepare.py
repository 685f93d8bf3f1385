"""
How fast prepare_single_parquet.py is, and how much memory it takes.

    python benchmarks/prepare.py FILE.parquet --name="what the file contains"

Speed: the whole command is compared, on the same file, with nanoGPT's openwebtext method (which
needs `datasets`: pip install datasets), with tiktoken alone on text that is already in memory, and
with processes in place of threads. All of them take turns, and the medians count. Memory: the
largest resident size of the whole process tree (Linux only). Writes
benchmarks/results/prepare.json.
"""

import collections
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from common import RESULTS, ROOT, commit, cpu_name
from configurator import UserError, configure, setting
from onenight.system.console import run_script
from onenight.system.limits import cores

OURS = [sys.executable, ROOT / "prepare_single_parquet.py"]
WAYS = [sys.executable, ROOT / "benchmarks" / "prepare_ways.py"]
CACHE = (
    "CACHE"  # in a command: a new folder for each run, or nanoGPT's method finds its last result
)
LARGE_BYTES = 1.05e9  # of the text of the files whose memory is measured
SAMPLE_S = 0.05  # between two looks at the memory


@dataclass
class BenchConfig:
    paths: list = field(default_factory=list)
    name: str = setting("", "what the file contains, for the record; default: the file's name")
    repeats: int = setting(5, "how often each way is measured", low=1)


def main(arguments: list[str]):
    config = configure(BenchConfig, arguments, __doc__)
    if len(config.paths) != 1:
        raise UserError("give one parquet file; see --help")
    file = Path(config.paths[0])
    if not importlib.util.find_spec("datasets"):
        raise UserError("nanoGPT's method needs one more package: pip install datasets")
    results = {
        "command": f"python benchmarks/prepare.py FILE.parquet --repeats={config.repeats}",
        "input": config.name or file.name,
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "cores": cores(),
        "versions": versions(),
        "commit": commit(),
        "load_average_before": round(os.getloadavg()[0], 2),  # other work on the machine
    }
    with tempfile.TemporaryDirectory() as folder:
        results["speed"] = measure_speed(file, Path(folder), config.repeats)
        results["memory"] = {"peak_mb": measure_memory(file, Path(folder))}
    (RESULTS / "prepare.json").write_text(json.dumps(results, indent=1) + "\n")


def versions() -> dict:
    """Return the versions of Python and of the packages that the figures depend on."""
    found = {"python": platform.python_version()}
    for package in ("tiktoken", "pyarrow", "numpy", "datasets"):
        found[package] = importlib.metadata.version(package)
    return found


# -----------------------------------------------------------------------------
# Speed


def measure_speed(file: Path, folder: Path, repeats: int) -> dict:
    """Print and return the median seconds of each way, the single times, and the ratios."""
    workers = cores()
    commands = commands_by_way(file, folder, workers)
    runs = collections.defaultdict(list)
    for repeat in range(1, repeats + 1):
        for way, command in commands.items():
            runs[way].append(run_with_cache(command, folder, way))
        times = ", ".join(f"{way} {found[-1]['s']:.2f} s" for way, found in runs.items())
        print(f"round {repeat}: {times}")

    seconds = {way: statistics.median(run["s"] for run in found) for way, found in runs.items()}
    peaks = {way: max(run["peak_mb"] for run in found) for way, found in runs.items()}
    ratios = speed_ratios(seconds)
    tokens = count_tokens(folder / "ours")

    print(f"\n{tokens:,} tokens, {workers} workers")
    print(f"{'way':28}{'seconds':>9}{'M tokens/s':>12}{'peak MB':>9}")
    for way in runs:
        speed = tokens / seconds[way] / 1e6
        print(f"{way:28}{seconds[way]:9.2f}{speed:12.2f}{peaks[way]:9.0f}")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")

    return {
        "tokens": tokens,
        "workers": workers,
        "median_s": rounded(seconds),
        "ratios": rounded(ratios),
        "all_s": {way: [round(run["s"], 2) for run in found] for way, found in runs.items()},
        "all_cpu_s": {
            way: [round(run["cpu_s"], 2) for run in found] for way, found in runs.items()
        },
        "peak_mb": {way: round(peak) for way, peak in peaks.items()},
    }


def commands_by_way(file: Path, folder: Path, workers: int) -> dict[str, list]:
    """Return the command of each way."""
    options = ["--overwrite", f"--num_workers={workers}"]
    return {
        "ours": [*OURS, file, f"--out_dir={folder}/ours", *options],
        "nanogpt": [*WAYS, "nanogpt", file, CACHE, workers],
        "tiktoken_alone": [*WAYS, "tiktoken", file, "apart", workers],
        "tiktoken_alone_shared": [*WAYS, "tiktoken", file, "shared", workers],
        "tiktoken_alone_our_pattern": [*WAYS, "tiktoken", file, "pattern", workers],
        "ours_with_processes": [
            *WAYS, "processes", file, f"--out_dir={folder}/processes", *options
        ],
    }  # fmt: skip


def run_with_cache(command: list, folder: Path, way: str) -> dict:
    """Run and measure a command with an empty cache folder."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        run = measure([cache if part == CACHE else part for part in command])
    if way.startswith("tiktoken"):
        # It prints the seconds without the start of Python and the reading of the file.
        run["s"] = float(run["output"])
    return run


def speed_ratios(seconds: dict[str, float]) -> dict[str, float]:
    """Return the comparisons that the measurements were made for."""
    tiktoken_s = seconds["tiktoken_alone"]
    return {
        "ours_times_as_fast_as_nanogpt": seconds["nanogpt"] / seconds["ours"],
        "ours_rate_of_tiktoken_alone": tiktoken_s / seconds["ours"],
        "threads_times_as_fast_as_processes": seconds["ours_with_processes"] / seconds["ours"],
        "apart_times_as_fast_as_shared": seconds["tiktoken_alone_shared"] / tiktoken_s,
        "our_pattern_times_as_fast": tiktoken_s / seconds["tiktoken_alone_our_pattern"],
    }


def count_tokens(out_dir: Path) -> int:
    """Return the tokens of both bins."""
    meta = json.loads((out_dir / "meta.json").read_text())
    return meta["train"]["tokens"] + meta["val"]["tokens"]


def rounded(figures: dict) -> dict:
    return {name: round(figure, 2) for name, figure in figures.items()}


# -----------------------------------------------------------------------------
# Memory


def measure_memory(file: Path, folder: Path) -> dict:
    """Print and return the peaks in MB, by file and number of workers."""
    print(f"\n{'file':54}{'workers':>8}{'peak MB':>9}{'seconds':>9}")
    peaks = {}
    for name, path in files_for_memory(file, folder).items():
        peaks[name] = {}
        for workers in (1, 2, 4):
            options = [f"--out_dir={folder}/memory", "--overwrite", f"--num_workers={workers}"]
            run = measure([*OURS, path, *options])
            peaks[name][f"{workers} workers"] = round(run["peak_mb"])
            print(f"{name:54}{workers:8}{run['peak_mb']:9.0f}{run['s']:9.1f}")
    return peaks


def files_for_memory(file: Path, folder: Path) -> dict[str, Path]:
    """Return files by what they contain: the file itself, one over 1 GB, one large row group."""
    table = parquet.read_table(file, columns=["text"])
    copies = math.ceil(LARGE_BYTES / table.nbytes)

    many_groups = folder / "many_groups.parquet"
    with parquet.ParquetWriter(many_groups, table.schema, compression="none") as writer:
        for _ in range(copies):
            writer.write_table(table, row_group_size=1000)

    one_group = folder / "one_group.parquet"
    half = pa.concat_tables([table] * math.ceil(copies / 2)).combine_chunks()
    parquet.write_table(half, one_group, row_group_size=len(half), compression="zstd")

    size_gb = many_groups.stat().st_size / 1e9
    return {
        "the file": file,
        f"its row groups {copies} times, {size_gb:.2f} GB": many_groups,
        f"a single row group, {half.nbytes / 1e6:.0f} MB of text": one_group,
    }


# -----------------------------------------------------------------------------
# One command


def measure(command: list) -> dict:
    """Run a command to its end.

    Returns its seconds of wall clock ("s") and of CPU ("cpu_s"), the largest resident MB of its
    process tree ("peak_mb"), and its output. Raises UserError if it fails.
    """
    words = [str(word) for word in command]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    cpu_before = children_cpu_s()
    started = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    watch = MemoryWatch(process)
    watch.start()
    output = process.communicate()[0]
    seconds = time.monotonic() - started
    cpu_s = children_cpu_s() - cpu_before
    watch.join()
    if process.returncode:
        raise UserError(f"failed: {' '.join(words)}")
    return {"s": seconds, "cpu_s": cpu_s, "peak_mb": watch.peak_bytes / 1e6, "output": output}


def children_cpu_s() -> float:
    """Return the seconds of CPU that the processes which this one started and that ended took."""
    times = os.times()
    return times.children_user + times.children_system


class MemoryWatch(threading.Thread):
    """Records the largest resident memory of a process and its descendants until it ends."""

    def __init__(self, process: subprocess.Popen):
        super().__init__()
        self.process = process
        self.peak_bytes = 0

    def run(self):
        while self.process.poll() is None:
            self.peak_bytes = max(self.peak_bytes, tree_bytes(self.process.pid))
            time.sleep(SAMPLE_S)


def tree_bytes(pid: int) -> int:
    """Return the resident bytes of a process and its descendants; 0 without /proc.

    Pages that they share are counted for each.
    """
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(tree_bytes(int(child)) for child in children)


if __name__ == "__main__":
    run_script(main)
