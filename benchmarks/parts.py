"""
Parts of a run, timed one by one. --root times another checkout of the project, such as a former commit.

    python benchmarks/parts.py head                             # the loss with its gradients, eager and compiled
    python benchmarks/parts.py start                            # until the first iteration, with and without a cache
    python benchmarks/parts.py messages                         # gradients summed over two processes
    python benchmarks/parts.py ceiling                          # measure_tflops() beside a busy program
    git worktree add ../before 89237fc && python benchmarks/parts.py head --root=../before

Prints the best of several runs. On a CPU, with one thread, so that the two cores of a small machine do not matter.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# The gradients of GPT-2 124M, by shape and number.
SHAPES = [((50304, 768), 1), ((1024, 768), 1), ((768,), 25), ((2304, 768), 12), ((3072, 768), 24), ((768, 768), 12)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("head", "start", "messages", "ceiling"))
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1])
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if args.part == "messages" and "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *sys.argv]
        raise SystemExit(subprocess.run(command).returncode)
    sys.path.insert(0, str(args.root.resolve()))
    import onenight  # noqa: F401  before torch, for its environment

    parts = {"head": head, "start": start, "messages": messages, "ceiling": ceiling}
    parts[args.part](args.root.resolve())


def best(job, times: int = 6) -> float:
    """The seconds of the fastest of several calls, after one that does not count."""
    job()
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        job()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def head(root: Path):
    import torch

    from model import linear_cross_entropy

    weight = torch.nn.Parameter(torch.randn(50304, 64) / 10)
    for dtype in (torch.float32, torch.bfloat16):
        x, targets = torch.randn(4096, 64, dtype=dtype).requires_grad_(), torch.randint(50304, (4096,))
        eager = best(lambda x=x, targets=targets: linear_cross_entropy(x, weight, targets))
        compiled = torch.compile(linear_cross_entropy, dynamic=False)
        with_compile = best(lambda x=x, targets=targets, loss=compiled: loss(x, weight, targets))
        print(f"{dtype}: eager {eager:.2f} s, compiled {with_compile:.2f} s")


def start(root: Path):
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "val"):
            np.random.default_rng(0).integers(0, 50257, 2000).astype("<u2").tofile(Path(folder) / f"{split}.bin")
        flags = ["config/train_demo.py", "--compile", f"--dataset={folder}", "--max_iters=1", "--warmdown_iters=0"]
        for cache in ("no", "a full"):
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}
            command = [sys.executable, "train.py", *flags, "--lr_decay_iters=2", f"--out_dir={folder}/{cache}"]
            started = time.perf_counter()
            subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True)
            print(f"train.py with one iteration, {cache} cache: {time.perf_counter() - started:.1f} s")


def messages(root: Path):
    from onenight.device import start_ranks

    import torch

    ranks, _ = start_ranks("cpu")
    gradients = [torch.ones(shape) for shape, number in SHAPES for _ in range(number)]
    seconds = best(lambda: ranks.sum(gradients))
    print(f"{len(gradients)} gradients summed over 2 processes: {seconds * 1000:.0f} ms")
    ranks.stop()


def ceiling(root: Path):
    from onenight.device import measure_tflops

    import torch

    alone = measure_tflops(torch.device("cpu"), "float32")
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        beside = measure_tflops(torch.device("cpu"), "float32")
    finally:
        for process in busy:
            process.kill()
    print(f"alone {alone:.3f} TFLOP/s, beside {len(busy)} busy programs {beside:.3f}")


if __name__ == "__main__":
    main()
