"""
How fast prepare_single_parquet.py is, and how much memory it takes; writes benchmarks/results/prepare.json.

    python benchmarks/prepare.py FILE.parquet --name="what the file holds"

Speed: the whole command, against nanoGPT's openwebtext method on the same file (`datasets`, which must be installed
for this alone), against tiktoken alone on text already in memory, and with processes in place of threads. All take
turns, and the medians count. Memory: the largest resident size of the whole process tree (Linux).
"""

import argparse
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
from pathlib import Path

from common import RESULTS, ROOT, commit, cpu_name

import pyarrow as pa
from pyarrow import parquet

from prepare_single_parquet import cores

OURS = [sys.executable, ROOT / "prepare_single_parquet.py"]

WITH_PROCESSES = """
import sys, concurrent.futures, prepare_single_parquet
prepare_single_parquet.ThreadPoolExecutor = concurrent.futures.ProcessPoolExecutor
prepare_single_parquet.main(sys.argv[1:])
"""

# tiktoken.get_encoding("gpt2") without its download.
ENCODING = """
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str
from onenight.tokenizer import EOT, EOT_TEXT, read_ranks
def new_encoding():
    ranks, special = read_ranks(), {EOT_TEXT: EOT}
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)
"""

# tiktoken as it comes, in threads: each with an Encoding of its own ("apart", its fastest), or all with one ("shared");
# and apart with the project's own form of the pattern ("pattern").
TIKTOKEN_ALONE = f"""{ENCODING}
import sys, threading, time, concurrent.futures, pyarrow.parquet, onenight.tokenizer
texts = pyarrow.parquet.read_table(sys.argv[1], columns=["text"]).column(0).to_pylist()
workers, way, of_thread, shared = int(sys.argv[2]), sys.argv[3], threading.local(), new_encoding()
make = dict(apart=new_encoding, shared=lambda: shared, pattern=onenight.tokenizer.get_encoding)[way]
def tokens_from(start):
    if not hasattr(of_thread, "encoding"):
        of_thread.encoding = make()
    encode = of_thread.encoding.encode_to_numpy
    return sum(len(encode(text, disallowed_special=())) for text in texts[start : start + 64])
started = time.monotonic()
with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    sum(pool.map(tokens_from, range(0, len(texts), 64)))
print(time.monotonic() - started)
"""

# nanoGPT's method: datasets.map with a Python list of ids per document, then a memmap filled shard by shard.
NANOGPT = f"""{ENCODING}
import sys, datasets, numpy
file, out_dir, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
encoding = new_encoding()
def process(row):
    ids = [*encoding.encode_ordinary(row["text"]), EOT]
    return dict(ids=ids, len=len(ids))
texts = datasets.load_dataset("parquet", data_files=file, columns=["text"], split="train", cache_dir=out_dir)
splits = texts.train_test_split(test_size=0.005, seed=1, shuffle=True)
for name, split in splits.map(process, remove_columns=["text"], num_proc=workers).items():
    total = int(numpy.sum(split["len"], dtype=numpy.uint64))
    bin = numpy.memmap(out_dir + "/" + name + ".bin", dtype=numpy.uint16, mode="w+", shape=(total,))
    position, shards = 0, min(1024, len(split))
    for index in range(shards):
        shard = split.shard(num_shards=shards, index=index, contiguous=True).with_format("numpy")
        ids = numpy.concatenate(shard["ids"])
        bin[position : position + len(ids)] = ids
        position += len(ids)
    bin.flush()
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--name", help="what the file holds, for the record; its file name if not given")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if not importlib.util.find_spec("datasets"):
        raise SystemExit("this compares with nanoGPT's method, which needs one more package: pip install datasets")
    results = {
        "command": f"python benchmarks/prepare.py FILE.parquet --repeats={args.repeats}",
        "input": args.name or args.file.name,
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "cores": cores(),
        "versions": {"python": platform.python_version(), **versions("tiktoken", "pyarrow", "numpy", "datasets")},
        "commit": commit(),
        "load_average_before": round(os.getloadavg()[0], 2),  # of other work on the machine
    }
    with tempfile.TemporaryDirectory() as folder:
        results["speed"] = speed(args.file, Path(folder), args.repeats)
        results["memory"] = memory(args.file, Path(folder))
    (RESULTS / "prepare.json").write_text(json.dumps(results, indent=1) + "\n")


def speed(file: Path, folder: Path, repeats: int) -> dict:
    """Prints and returns the median seconds of each way, their single times, and the ratios."""
    workers = cores()
    ways = {
        "ours": [*OURS, file, f"--out_dir={folder}/ours", "--overwrite", f"--num_workers={workers}"],
        "nanogpt": [sys.executable, "-c", NANOGPT, file, "OUT", workers],
        "tiktoken_alone": [sys.executable, "-c", TIKTOKEN_ALONE, file, workers, "apart"],
        "tiktoken_alone_shared": [sys.executable, "-c", TIKTOKEN_ALONE, file, workers, "shared"],
        "tiktoken_alone_our_pattern": [sys.executable, "-c", TIKTOKEN_ALONE, file, workers, "pattern"],
        "ours_with_processes": [
            *(sys.executable, "-c", WITH_PROCESSES, file),
            *(f"--out_dir={folder}/processes", "--overwrite", f"--num_workers={workers}"),
        ],
    }
    runs = collections.defaultdict(list)
    for repeat in range(repeats):
        for name, command in ways.items():
            with tempfile.TemporaryDirectory(dir=folder) as cache:  # nanoGPT's method would find its last result
                run = measure([cache if part == "OUT" else part for part in command])
            if name.startswith("tiktoken"):  # without the start of Python and the reading
                run["s"] = float(run["output"])
            runs[name].append(run)
        print(f"round {repeat + 1}: " + ", ".join(f"{name} {found[-1]['s']:.2f} s" for name, found in runs.items()))
    seconds = {name: statistics.median(run["s"] for run in found) for name, found in runs.items()}
    tokens = count_tokens(folder / "ours")
    ratios = {
        "ours_times_as_fast_as_nanogpt": seconds["nanogpt"] / seconds["ours"],
        "ours_rate_of_tiktoken_alone": seconds["tiktoken_alone"] / seconds["ours"],
        "threads_times_as_fast_as_processes": seconds["ours_with_processes"] / seconds["ours"],
        "apart_times_as_fast_as_shared": seconds["tiktoken_alone_shared"] / seconds["tiktoken_alone"],
        "our_pattern_times_as_fast": seconds["tiktoken_alone"] / seconds["tiktoken_alone_our_pattern"],
    }
    print(f"\n{tokens:,} tokens, {workers} workers\n{'way':28}{'seconds':>9}{'M tokens/s':>12}{'peak MB':>9}")
    for name, found in runs.items():
        peak = max(run["peak_mb"] for run in found)
        print(f"{name:28}{seconds[name]:9.2f}{tokens / seconds[name] / 1e6:12.2f}{peak:9.0f}")
    print("\n".join(f"{name}: {ratio:.2f}" for name, ratio in ratios.items()))
    return {
        "tokens": tokens,
        "workers": workers,
        "median_s": rounded(seconds),
        "ratios": rounded(ratios),
        "all_s": {name: [round(run["s"], 2) for run in found] for name, found in runs.items()},
        "all_cpu_s": {name: [round(run["cpu_s"], 2) for run in found] for name, found in runs.items()},
        "peak_mb": {name: round(max(run["peak_mb"] for run in found)) for name, found in runs.items()},
    }


def memory(file: Path, folder: Path) -> dict:
    """Prints and returns the peaks in MB by file and number of workers."""
    table = parquet.read_table(file, columns=["text"])
    copies = math.ceil(1.05e9 / table.nbytes)
    over_1_gb, one_row_group = folder / "over_1_gb.parquet", folder / "one_row_group.parquet"
    with parquet.ParquetWriter(over_1_gb, table.schema, compression="none") as writer:
        for _ in range(copies):
            writer.write_table(table, row_group_size=1000)
    half = pa.concat_tables([table] * math.ceil(copies / 2)).combine_chunks()
    parquet.write_table(half, one_row_group, row_group_size=len(half), compression="zstd")
    peaks = {}
    print(f"\n{'file':54}{'workers':>8}{'peak MB':>9}{'seconds':>9}")
    for what, path in {
        "the file": file,
        f"its row groups {copies} times, {over_1_gb.stat().st_size / 1e9:.2f} GB": over_1_gb,
        f"a single row group, {half.nbytes / 1e6:.0f} MB of text": one_row_group,
    }.items():
        peaks[what] = {}
        for workers in (1, 2, 4):
            run = measure([*OURS, path, f"--out_dir={folder}/memory", "--overwrite", f"--num_workers={workers}"])
            peaks[what][f"{workers} workers"] = round(run["peak_mb"])
            print(f"{what:54}{workers:8}{run['peak_mb']:9.0f}{run['s']:9.1f}")
    return {"peak_mb": peaks}


def measure(command: list) -> dict:
    """Runs it; seconds of wall clock and of CPU, the largest resident MB of the process tree, and its output."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    before, started, peak = os.times(), time.monotonic(), [0]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, env=environment)
    watch = threading.Thread(target=watch_memory, args=(process, peak))
    watch.start()
    output = process.communicate()[0]
    seconds, after = time.monotonic() - started, os.times()
    watch.join()
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(map(str, command))}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"s": seconds, "cpu_s": cpu, "peak_mb": peak[0] / 1e6, "output": output}


def watch_memory(process: subprocess.Popen, peak: list[int]):
    while process.poll() is None:
        peak[0] = max(peak[0], tree_bytes(process.pid))
        time.sleep(0.05)


def tree_bytes(pid: int) -> int:
    """Resident bytes of a process and its descendants, where pages they share count for each; 0 without /proc."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(tree_bytes(int(child)) for child in children)


def count_tokens(out_dir: Path) -> int:
    meta = json.loads((out_dir / "meta.json").read_text())
    return meta["train"]["tokens"] + meta["val"]["tokens"]


def rounded(figures: dict) -> dict:
    return {name: round(figure, 2) for name, figure in figures.items()}


def versions(*packages: str) -> dict:
    return {package: importlib.metadata.version(package) for package in packages}


if __name__ == "__main__":
    main()
