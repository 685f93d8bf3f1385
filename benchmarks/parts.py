"""
Parts of a run, timed one by one. --root times another checkout, such as an earlier commit.

    python benchmarks/parts.py head      # the loss with its gradients, eager and compiled
    python benchmarks/parts.py start     # up to the first iteration, with and without a cache
    python benchmarks/parts.py messages  # gradients summed over two processes
    python benchmarks/parts.py ceiling   # measure_tflops(), alone and on a busy machine
    python benchmarks/parts.py muon      # an update of the matrices, ours and torch's

    git worktree add ../before 89237fc
    python benchmarks/parts.py head --root=../before

Prints the fastest of several runs. They use one thread, so that the number of cores does not
matter.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# The gradients of GPT-2 124M: shapes, and how many there are of each.
SHAPES = [
    ((50304, 768), 1),
    ((1024, 768), 1),
    ((768,), 25),
    ((2304, 768), 12),
    ((3072, 768), 24),
    ((768, 768), 12),
]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def main():
    parts = {
        "head": head,
        "start": start,
        "messages": messages,
        "ceiling": ceiling,
        "muon": muon,
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=list(parts))
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1])
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if args.part == "messages" and "RANK" not in os.environ:
        raise SystemExit(subprocess.call([sys.executable, *TORCHRUN, *sys.argv]))

    root = args.root.resolve()
    sys.path.insert(0, str(root))
    set_up(root)
    parts[args.part](root)


def set_up(root: Path):
    """Set the environment of the checkout, which must happen before torch is imported."""
    if (root / "onenight" / "startup.py").exists():
        import onenight.startup  # noqa: F401
    else:  # an older commit
        import onenight  # noqa: F401


def best(job, times: int = 6) -> float:
    """Return the seconds of the fastest of several calls, after one that does not count."""
    job()
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        job()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def head(root: Path):
    """Time the loss of 4,096 rows of width 64 and 50,304 ids, with its gradients."""
    import torch

    from model import linear_cross_entropy

    compiled = torch.compile(linear_cross_entropy, dynamic=False)
    weight = torch.nn.Parameter(torch.randn(50304, 64) / 10)
    targets = torch.randint(50304, (4096,))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(4096, 64, dtype=dtype).requires_grad_()
        seconds = [
            best(lambda loss=loss, x=x: loss(x, weight, targets))
            for loss in (linear_cross_entropy, compiled)
        ]
        print(f"{dtype}: eager {seconds[0]:.2f} s, compiled {seconds[1]:.2f} s")


def start(root: Path):
    """Time train.py with a single iteration, twice: the second run finds what the first one
    compiled."""
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "val"):
            ids = np.random.default_rng(0).integers(0, 50257, 2000)
            ids.astype("<u2").tofile(Path(folder, f"{split}.bin"))
        flags = [
            "config/train_demo.py",
            f"--dataset={folder}",
            "--compile",
            "--max_iters=1",
            "--warmdown_iters=0",
            "--lr_decay_iters=2",
        ]
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}
        for cache in ("no", "a full"):
            command = [sys.executable, "train.py", *flags, f"--out_dir={folder}/{cache}"]
            started = time.perf_counter()
            subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True)
            seconds = time.perf_counter() - started
            print(f"train.py with one iteration, {cache} cache: {seconds:.1f} s")


def messages(root: Path):
    """Time the sum of GPT-2's gradients over two processes."""
    import torch

    try:
        from onenight.system.distributed import start_ranks
    except ImportError:  # an older commit
        from onenight.device import start_ranks

    ranks, _ = start_ranks("cpu")
    gradients = [torch.ones(shape) for shape, number in SHAPES for _ in range(number)]
    seconds = best(lambda: ranks.sum(gradients))
    print(f"{len(gradients)} gradients summed over 2 processes: {seconds * 1000:.0f} ms")
    ranks.stop()


def ceiling(root: Path):
    """Measure the speed of matrix products alone, and beside twice as many busy programs as there
    are cores."""
    import torch

    try:
        from onenight.system.device import measure_tflops
    except ImportError:  # an older commit
        from onenight.device import measure_tflops

    cpu = torch.device("cpu")
    alone = measure_tflops(cpu, "float32")
    busy_program = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(busy_program) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        beside = measure_tflops(cpu, "float32")
    finally:
        for process in busy:
            process.kill()
    print(f"alone {alone:.3f} TFLOP/s, beside {len(busy)} busy programs {beside:.3f}")


def muon(root: Path):
    """Count the operators of an update of Muon for the short night's matrices, and time one for
    matrices of a quarter of their width."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    from model import GPT, GPTConfig
    from onenight.training.muon import Muon

    class Operators(TorchDispatchMode):
        """Counts what computes."""

        n = 0

        def __torch_dispatch__(self, operator, types, arguments=(), options=None):
            result = operator(*arguments, **(options or {}))
            is_view = isinstance(result, torch.Tensor) and result._is_view()
            if not is_view and "aten" in str(operator):
                self.n += 1
            return result

    def optimizer(n_embd: int, build, **options):
        model = GPT(GPTConfig(architecture="qwen3", bias=False, n_head=6, n_embd=n_embd))
        matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2]
        for matrix in matrices:
            matrix.grad = torch.randn_like(matrix)
        return build(matrices, lr=0.01, weight_decay=0.1, **options)

    improved = {"row_norm": True, "cautious": True, "lookahead": 0.6, "slow_share": 0.5}
    for name, build, options in (
        ("torch's", torch.optim.Muon, {}),
        ("ours", Muon, {}),
        ("ours, with its improvements", Muon, improved),
    ):
        with FakeTensorMode():
            fake = optimizer(768, build, **options)
            fake.step()  # the first update creates the state
            with Operators() as operators:
                fake.step()
        seconds = best(optimizer(192, build, **options).step)
        print(f"{name}: {operators.n} operators, {1e3 * seconds:.0f} ms")


if __name__ == "__main__":
    main()
