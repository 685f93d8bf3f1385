"""Kill train.py at random moments, also while it saves, and resume it.

    python tests/torture/train.py --kills=30 --iters=3000 --seed=1

It is ended by kill -9 or by one of the signals after which it saves; now and then a second run is
started in the same folder, which must be refused. In the end, weights, optimizer and metrics must
be bit for bit those of an undisturbed run. The memory and the open files of the undisturbed run are
printed.
Fails with a traceback if anything differs.
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
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 32,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "dropout": 0.1,
    "eval_interval": 50,
    "eval_iters": 1,
    "warmup_iters": 5,
    "learning_rate": 1e-2,
    "device": "cpu",
    "compile": False,
}
SECOND_START = 0.3  # the probability of a second run in the same folder
REQUEST = 0.5  # the probability that a run is ended by one of these and not by SIGKILL
STOP_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--iters", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torture(Path(folder), args.kills, args.iters, random.Random(args.seed))


def torture(folder: Path, kills: int, iters: int, rng: random.Random):
    """Do both runs in the folder, and compare them."""
    write_bins(folder)
    seconds = train_undisturbed(folder, iters)
    # On average a kill comes after an equal part of the run, so that the run outlasts them.
    mean_s = seconds / (kills + 1)
    out_dir = folder / "killed"
    starts = 0
    killed = 0
    stopped = []  # the signals after which it saved
    refused = 0
    while True:
        process = start(folder, out_dir, iters)
        starts += 1
        line = wait_for(process, ("step", "this run is finished"))
        if killed == kills or line.startswith("this run is finished"):
            process.communicate()
            break
        if rng.random() < SECOND_START:
            assert_refused(start(folder, out_dir, iters))
            refused += 1
        try:
            process.communicate(timeout=rng.uniform(0, 2 * mean_s))
            break
        except subprocess.TimeoutExpired:
            killed += 1
        if rng.random() < REQUEST:
            number = rng.choice(STOP_SIGNALS)
            stopped.append(number.name)
            process.send_signal(number)
            output, _ = process.communicate()
            has_finished = process.returncode == 0 and "\ndone\n" in output
            has_saved = process.returncode == 128 + number and "stopped at iter" in output
            assert has_finished or has_saved, f"it did not save after {number.name}: {output}"
        else:
            process.kill()
            process.communicate()
    assert process.returncode == 0, "it did not continue after a kill"
    compare(folder / "undisturbed", out_dir)
    assert not list(out_dir.glob("*.partial")), "temporary files are left"
    print(
        f"ended {killed} times, {len(stopped)} of them by signals after which it saves "
        f"({', '.join(sorted(set(stopped)))}), in {starts} starts; "
        f"{refused} second starts were refused"
    )
    print("weights, optimizer and metrics are those of the undisturbed run")


def write_bins(folder: Path):
    tokens = np.random.default_rng(0).integers(0, 250, 30_000).astype("<u2")
    tokens.tofile(folder / "train.bin")
    tokens[:3000].tofile(folder / "val.bin")
    (folder / "meta.json").write_text('{"vocab_size": 250}')


def start(folder: Path, out_dir: Path, iters: int) -> subprocess.Popen:
    """Start train.py in out_dir, from its checkpoint if there is one."""
    has_checkpoint = any((out_dir / name).exists() for name in ("ckpt.pt", "ckpt-previous.pt"))
    settings = {
        **SETTINGS,
        "dataset": folder,
        "out_dir": out_dir,
        "max_iters": iters,
        "lr_decay_iters": iters,
        "init_from": "resume" if has_checkpoint else "scratch",
    }
    flags = [f"--{key}={value}" for key, value in settings.items()]
    return subprocess.Popen(
        [sys.executable, "-u", TRAIN, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=heed_signals,
    )


def heed_signals():
    """In a new process, stop ignoring the signals that nohup or a background job ignores."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def wait_for(process: subprocess.Popen, beginnings: tuple[str, ...]) -> str:
    """Read the output of a process up to a line with one of these beginnings. Return that line."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(beginnings):
            return line
    raise AssertionError(f"it did not start: {''.join(lines)}")


def assert_refused(process: subprocess.Popen):
    """Assert that a second run ends with an error, because of the lock or of the checkpoint."""
    output, _ = process.communicate()
    assert process.returncode, output
    is_locked = "another run (process" in output
    assert is_locked or "contains the checkpoint of an earlier run" in output, output


def train_undisturbed(folder: Path, iters: int) -> float:
    """Train once, and print the memory and the open files after a third of the run and at its end.

    Return how many seconds it took.
    """
    started = time.monotonic()
    process = start(folder, folder / "undisturbed", iters)
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
    print(
        f"undisturbed: {iters} iterations, {len(memory_mb)} evaluations and checkpoints, "
        f"{seconds:.0f} s"
    )
    print(f"memory: {memory_mb[third]:.0f} MB after a third, {memory_mb[-1]:.0f} MB at the end")
    print(f"open files: {open_files[third]} after a third, {open_files[-1]} at the end")
    return seconds


def compare(one: Path, other: Path):
    """Assert that two runs have the same weights, optimizer state and metrics."""
    first = torch.load(one / "ckpt.pt", weights_only=True)
    second = torch.load(other / "ckpt.pt", weights_only=True)
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    for number, state in first["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, second["optimizer"]["state"][number][name]), (number, name)
    assert read_metrics(one) == read_metrics(other), "the metrics differ"


def read_metrics(out_dir: Path) -> list[dict]:
    """Return the records of metrics.jsonl without times and speeds."""
    times = ("elapsed_s", "tokens_per_s", "mfu")
    records = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in times} for record in records]


if __name__ == "__main__":
    main()
