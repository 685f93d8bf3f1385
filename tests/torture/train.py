"""End train.py at random moments, also while it saves, and resume it.

    python tests/torture/train.py --ends=30 --iters=3000 --seed=1

It is ended by kill -9 or by one of the signals after which it saves. In the end, weights, optimizer
and metrics must be bit for bit those of an undisturbed run, whose memory and open files are
printed. Fails with a traceback if anything differs.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "faults")]

from forks import STOP_SIGNALS, assert_same_run  # noqa: E402
from helpers import load, make_bins, start_training  # noqa: E402

SETTINGS = {
    "batch_size": 4,
    "dropout": 0.1,
    "eval_interval": 50,
    "eval_tokens": 128,
    "init_from": "auto",
}
REQUEST = 0.5  # the probability that a run is ended by one of these and not by kill -9


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ends", type=int, default=30)
    parser.add_argument("--iters", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torture(make_bins(Path(folder)), args.ends, args.iters, random.Random(args.seed))


def torture(folder: Path, ends: int, iters: int, rng: random.Random):
    """Do both runs in the folder of the bins, and compare them."""
    settings = {**SETTINGS, "max_iters": iters}
    seconds = train_undisturbed(folder, settings)
    out_dir = folder / "ended"
    counts = Counter()
    while counts.total() < ends and not is_finished(out_dir, iters):
        process = start_training(folder, out_dir, **settings)
        while not process.stdout.readline().startswith("iter"):
            assert process.poll() is None, process.stderr.read()
        # On average an end comes after an equal part of the run, so that the run outlasts them.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=rng.uniform(0, 2 * seconds / (ends + 1)))
        number = signal.SIGKILL
        status = -number
        if rng.random() < REQUEST:
            number = rng.choice(STOP_SIGNALS)
            status = 128 + number
        process.send_signal(number)
        _, errors = process.communicate()
        assert process.returncode == status or is_finished(out_dir, iters), (number.name, errors)
        counts[number.name] += 1
    process = start_training(folder, out_dir, **settings)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert_same_run(folder / "undisturbed", out_dir)
    assert not list(out_dir.glob("*.partial")), "temporary files are left"
    print(f"ended by {dict(counts)}")
    print("weights, optimizer and metrics are those of the undisturbed run")


def is_finished(out_dir: Path, iters: int) -> bool:
    return (out_dir / "ckpt.pt").exists() and load(out_dir)["iter_num"] == iters


def train_undisturbed(folder: Path, settings: dict) -> float:
    """Train once, and print the memory and the open files after a third of the run and at its end.
    Return how many seconds it took."""
    started = time.monotonic()
    process = start_training(folder, folder / "undisturbed", **settings)
    memory_mb = []
    open_files = []
    for line in process.stdout:
        if line.startswith("step"):
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            memory_mb.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
            open_files.append(len(list(Path(f"/proc/{process.pid}/fd").iterdir())))
    assert process.wait() == 0
    seconds = time.monotonic() - started
    third = len(memory_mb) // 3
    print(f"undisturbed: {len(memory_mb)} evaluations and checkpoints, {seconds:.0f} s")
    print(f"memory: {memory_mb[third]:.0f} MB after a third, {memory_mb[-1]:.0f} MB at the end")
    print(f"open files: {open_files[third]} after a third, {open_files[-1]} at the end")
    return seconds


if __name__ == "__main__":
    main()
