"""The record of a run: metrics.jsonl, and what is made of it, loss.png and samples.txt."""

import contextlib
import json
import math
import os
from pathlib import Path

from onenight.system.files import replacing
from onenight.system.wording import first_line
from onenight.training.plot import draw_losses


class Metrics:
    """Appends records to out_dir/metrics.jsonl, and sends them to Weights & Biases if there is a
    wandb run. An error is printed once for each output and never ends the training.

    A record is a dict with iter, tokens (those that the weights with this loss have seen), the
    learning rates, elapsed_s, and either train_loss (mean over the iteration), grad_norm and
    tokens_per_s, or, of an evaluation, val_loss and train_loss_eval. Losses are in nats per token.
    """

    def __init__(self, out_dir: Path, wandb_run=None):
        self.path = out_dir / "metrics.jsonl"
        self.wandb_run = wandb_run
        self.failed = set()

    @contextlib.contextmanager
    def never_stopping(self, name):
        """Suppress an error of the block, and report the first one for each name."""
        try:
            yield
        except Exception as error:
            if name not in self.failed:
                print(
                    f"{name}: cannot be written ({first_line(error)}); the run goes on without it"
                )
            self.failed.add(name)

    def truncate(self, iter_num: int, evaluated_iter: int):
        """Remove the records that a run resumed at iter_num will write again, and lines that are
        not records."""
        with self.never_stopping(self.path):
            records = read_metrics(self.path)
            with replacing(self.path, "w") as file:
                for record in records:
                    if is_before(record, iter_num, evaluated_iter):
                        file.write(json.dumps(record) + "\n")

    def sync(self):
        """Make everything written so far survive a power cut."""
        with self.never_stopping(self.path), open(self.path, "a") as file:
            os.fsync(file.fileno())

    def write(self, record: dict):
        """Append a record, without its numbers that are not finite: JSON has none."""
        record = {key: value for key, value in record.items() if is_json(value)}
        with self.never_stopping(self.path), open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        if self.wandb_run:
            with self.never_stopping("wandb"):
                self.wandb_run.log(record, step=record["iter"])

    def draw(self):
        """Write loss.png and samples.txt anew from metrics.jsonl."""
        records = []
        with self.never_stopping(self.path):
            records = read_metrics(self.path)
        if not records:
            return
        with self.never_stopping("loss.png"):
            draw_losses(records, self.path.with_name("loss.png"))
        with self.never_stopping("samples.txt"):
            write_samples(records, self.path.with_name("samples.txt"))


def is_json(value) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def is_before(record: dict, iter_num: int, evaluated_iter: int) -> bool:
    """Return whether a record was written before iteration iter_num, whose evaluation counts as
    before if it has been done."""
    if record["iter"] < iter_num:
        return True
    is_evaluation = "val_loss" in record
    return is_evaluation and record["iter"] == iter_num == evaluated_iter


def read_metrics(path: Path) -> list[dict]:
    """Return the records of a metrics.jsonl; [] if there is no such file. Skip malformed lines,
    such as a last one that a crash has cut off, with a message."""
    if not path.is_file():
        return []
    lines = path.read_text(errors="replace").splitlines()
    records = []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            record = json.loads(line)
            if record["iter"] >= 0:
                records.append(record)
    if len(records) < len(lines):
        print(f"{path}: {len(lines) - len(records)} malformed lines, skipped")
    return records


def write_samples(records: list[dict], path: Path):
    """Write the samples of all evaluations, one on each line."""
    lines = []
    for record in records:
        if "sample" in record:
            val_loss = record.get("val_loss", math.nan)
            lines.append(f"iter {record['iter']}, val loss {val_loss:.4f}: {record['sample']}\n")
    with replacing(path) as file:
        file.write("".join(lines).encode())
