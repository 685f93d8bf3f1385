"""
Ends train.py at random moments, saving included, by kill -9 or by closing its terminal (SIGHUP), starts it a second
time in the same folder, and resumes it. Its weights, optimizer and metrics must be bit for bit those of an undisturbed
run.

    python tests/torture/train.py --kills=30 --iters=3000 --seed=1

Watches the memory and the open files of the undisturbed run. Fails with a traceback if anything differs.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

TRAIN = Path(__file__).parents[2] / "train.py"
SETTINGS = {
    "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 4, "gradient_accumulation_steps": 2,
    "dropout": 0.1, "eval_interval": 50, "eval_iters": 1, "warmup_iters": 5, "learning_rate": 1e-2, "device": "cpu",
    "compile": False,
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--iters", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torture(Path(folder), args.kills, args.iters, random.Random(args.seed))


def torture(folder: Path, kills: int, iters: int, rng: random.Random):
    tokens = np.random.default_rng(0).integers(0, 250, 30_000).astype("<u2")
    tokens.tofile(folder / "train.bin")
    tokens[:3000].tofile(folder / "val.bin")
    (folder / "meta.json").write_text('{"vocab_size": 250}')
    seconds = undisturbed(folder, iters)
    out_dir, killed, starts, hung_up, refused = folder / "killed", 0, 0, 0, 0
    while True:
        process, starts = start(folder, out_dir, iters), starts + 1
        wait_for(process, ("step", "this run is finished"))
        if killed < kills and rng.random() < 0.3:
            second = start(folder, out_dir, iters)
            said, _ = second.communicate()
            assert second.returncode and ("another run (process" in said or "holds the checkpoint" in said), said
            refused += 1
        try:  # twice the mean share of a kill: the run must outlast the kills
            process.communicate(timeout=rng.uniform(0, 2 * seconds / (kills + 1)) if killed < kills else None)
        except subprocess.TimeoutExpired:
            hangs_up = rng.random() < 0.3
            process.send_signal(signal.SIGHUP if hangs_up else signal.SIGKILL)
            process.communicate()
            assert not hangs_up or process.returncode == 0, "it did not save when its terminal was closed"
            killed, hung_up = killed + 1, hung_up + hangs_up
            continue
        assert process.returncode == 0, "it did not go on after a kill"
        break
    compare(folder / "undisturbed", out_dir)
    assert not list(out_dir.glob("*.partial")), "temporary files are left"
    print(
        f"ended: {killed} times, {hung_up} of them by SIGHUP, in {starts} starts; {refused} second starts were refused"
    )
    print("weights, optimizer and metrics are those of the undisturbed run")


def start(folder: Path, out_dir: Path, iters: int) -> subprocess.Popen:
    has_checkpoint = any((out_dir / name).exists() for name in ("ckpt.pt", "ckpt-previous.pt"))
    settings = {
        **SETTINGS, "dataset": folder, "out_dir": out_dir, "max_iters": iters, "lr_decay_iters": iters,
        "init_from": "resume" if has_checkpoint else "scratch",
    }  # fmt: skip
    command = [sys.executable, "-u", TRAIN, *(f"--{key}={value}" for key, value in settings.items())]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def wait_for(process: subprocess.Popen, beginnings: tuple[str, ...]):
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith(beginnings):
            return
    raise AssertionError(f"it did not start: {''.join(said)}")


def undisturbed(folder: Path, iters: int) -> float:
    """Runs it once, and prints the memory and the open files after a third of it and at its end. Returns seconds."""
    process, began, seen = start(folder, folder / "undisturbed", iters), time.monotonic(), []
    for line in process.stdout:
        if line.startswith("step"):
            resident = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
            seen.append((resident, len(list(Path(f"/proc/{process.pid}/fd").iterdir()))))
    assert process.wait() == 0
    seconds, settled = time.monotonic() - began, seen[len(seen) // 3]
    print(f"undisturbed: {iters} iterations, {len(seen)} evaluations and checkpoints, {seconds:.0f} s")
    print(f"memory: {settled[0]:.0f} MB after a third, {seen[-1][0]:.0f} MB at the end")
    print(f"open files: {settled[1]} after a third, {seen[-1][1]} at the end")
    return seconds


def compare(one: Path, other: Path):
    first, second = (torch.load(folder / "ckpt.pt", weights_only=True) for folder in (one, other))
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    for number, state in first["optimizer"]["state"].items():
        assert all(torch.equal(value, second["optimizer"]["state"][number][name]) for name, value in state.items())
    assert metrics(one) == metrics(other), "the metrics differ"


def metrics(out_dir: Path) -> list[dict]:
    times = ("elapsed_s", "tokens_per_s", "mfu")
    records = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in times} for record in records]


if __name__ == "__main__":
    main()
