"""The record of a run: metrics.jsonl and Weights & Biases, and what is made of it, loss.png and
samples.txt."""

import contextlib
import json
import math
import os
from dataclasses import asdict
from pathlib import Path

from onenight.errors import first_line
from onenight.process import flush, replacing
from onenight.settings import TrainConfig

MAX_POINTS = 1000  # of a curve; more would not be visible, and would take longer to draw
NEAR = 1.0  # the reference loss is drawn once the losses are this near


class Records:
    """Appends records to out_dir/metrics.jsonl, and sends them to Weights & Biases if there is a
    wandb run. An error is printed once for each output and never ends the training.

    A record is a dict with iter, tokens (those that the weights with this loss have seen), the
    learning rates, elapsed_s, and either train_loss (mean over the iteration), grad_norm and
    tokens_per_s, or, of an evaluation, val_loss and train_loss_eval. Losses are in nats per token.
    """

    def __init__(self, config: TrainConfig, wandb_id: str):
        self.config = config
        self.out_dir = Path(config.out_dir)
        self.path = self.out_dir / "metrics.jsonl"
        self.failed = set()
        self.wandb_run = start_wandb(config, wandb_id) if config.wandb_log else None

    @contextlib.contextmanager
    def never_stopping(self, name: str):
        """Suppress an error of the block, and report the first one for each name. A folder that was
        moved away is made again."""
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            yield
        except Exception as error:
            if name not in self.failed:
                print(f"{name}: cannot be written ({first_line(error)}); the run goes on")
            self.failed.add(name)

    def truncate(self, iter_num: int, evaluated_iter: int):
        """Remove the records that a run resumed at iter_num will write again. Its evaluation may
        have been done already."""
        with self.never_stopping("metrics.jsonl"):
            records = [
                record
                for record in read_metrics(self.path)
                if record["iter"] < iter_num
                or ("val_loss" in record and record["iter"] == iter_num == evaluated_iter)
            ]
            with replacing(self.path, "w") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)

    def flush(self):
        """Make everything written so far survive a power cut."""
        with self.never_stopping("metrics.jsonl"), open(self.path, "a") as file:
            flush(file)

    def write(self, record: dict):
        """Append a record, without its numbers that are not finite: JSON has none."""
        record = {
            key: value
            for key, value in record.items()
            if not isinstance(value, float) or math.isfinite(value)
        }
        with self.never_stopping("metrics.jsonl"), open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        if self.wandb_run:
            with self.never_stopping("wandb"):
                self.wandb_run.log(record, step=record["iter"])

    def draw(self):
        """Write loss.png and samples.txt anew from metrics.jsonl."""
        with self.never_stopping("loss.png"):
            records = read_metrics(self.path)
            draw_losses(
                records,
                self.out_dir / "loss.png",
                self.config.reference_loss,
                self.config.reference_label,
            )
        with self.never_stopping("samples.txt"), replacing(self.out_dir / "samples.txt") as file:
            for record in records:
                if "sample" in record:
                    line = f"iter {record['iter']}, val loss {record.get('val_loss', math.nan):.4f}"
                    file.write(f"{line}: {record['sample']}\n".encode())


def read_metrics(path: Path) -> list[dict]:
    """Return the records of a metrics.jsonl; [] if there is no such file. Lines that are none, such
    as a last one that a crash has cut off, are left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            record = json.loads(line)
            record["iter"] += 0  # a number
            records.append(record)
    return records


# -----------------------------------------------------------------------------
# The picture


def draw_losses(
    records: list[dict], path: Path, reference_loss: float = 0.0, reference_label: str = ""
):
    """Draw the records of metrics.jsonl as a PNG: training and validation loss, and below them the
    learning rate, against tokens. The loss axis shows what comes after the first twentieth."""
    from matplotlib.figure import Figure  # here, because importing it takes a second

    steps = [record for record in records if "train_loss" in record]
    steps = steps[:: 1 + len(steps) // MAX_POINTS]
    evals = [record for record in records if "val_loss" in record]
    if not steps and not evals:
        return
    last_tokens = max(record["tokens"] for record in [*steps, *evals])
    unit, name = (1e9, "B") if last_tokens >= 1e9 else (1e6, "M")
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    loss_axes, lr_axes = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])

    # The losses
    tokens = [record["tokens"] / unit for record in steps]
    train = [record["train_loss"] for record in steps]
    loss_axes.plot(tokens, train, color="tab:blue", alpha=0.25, linewidth=0.8)
    loss_axes.plot(tokens, smoothed(train), color="tab:blue", linewidth=1.5, label="train")
    loss_axes.plot(
        [record["tokens"] / unit for record in evals],
        [record["val_loss"] for record in evals],
        color="tab:red",
        marker="o",
        markersize=4,
        label="val",
    )
    shown = [
        record.get("val_loss", record.get("train_loss"))
        for record in [*steps, *evals]
        if record["tokens"] >= 0.05 * last_tokens
    ]
    low = min(shown)
    high = max(shown)
    if reference_loss and low - NEAR < reference_loss < high + NEAR:
        label = f"{reference_label or 'reference'}: {reference_loss:g}"
        loss_axes.axhline(reference_loss, color="black", linestyle="--", linewidth=1, label=label)
        low = min(low, reference_loss)
        high = max(high, reference_loss)
    margin = 0.05 * (high - low) + 0.01
    loss_axes.set_ylim(low - margin, high + margin)
    title = f"iter {evals[-1]['iter']:,}: val loss {evals[-1]['val_loss']:.3f}" if evals else ""
    loss_axes.set(title=title, ylabel="loss (nats per token)")
    loss_axes.legend()

    # The learning rate
    lr_axes.plot(tokens, [record["lr"] for record in steps], color="tab:green")
    lr_axes.set(xlabel=f"tokens seen ({name})", ylabel="learning rate")
    for axes in (loss_axes, lr_axes):
        axes.grid(alpha=0.3)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)


def smoothed(values: list[float]) -> list[float]:
    """Return for each value the mean of those around it, a twenty-fifth of all on both sides."""
    reach = len(values) // 25
    result = []
    for i in range(len(values)):
        nearby = values[max(0, i - reach) : i + reach + 1]
        result.append(sum(nearby) / len(nearby))
    return result


# -----------------------------------------------------------------------------
# Weights & Biases


def start_wandb(config: TrainConfig, wandb_id: str):
    """Return a wandb run that records `config`: a new one, or, if resumed, the one with that id.
    Without a key or a network it is offline; without the package there is None, with a message."""
    try:
        import wandb

        options = {
            "project": config.wandb_project,
            "name": config.wandb_run_name,
            "config": asdict(config),
            "dir": config.out_dir,
            "id": wandb_id or None,
            "resume": "allow",
            "settings": wandb.Settings(init_timeout=30, silent=True),
        }
        try:
            mode = os.environ.get("WANDB_MODE") or "online"
            if mode == "online" and not wandb.login(prompt=False, verify=False):
                print("wandb: offline, because there is no API key")
                mode = "offline"
            return wandb.init(**options, mode=mode)
        except Exception as error:
            print(f"wandb: offline ({first_line(error)})")
            return wandb.init(**options, mode="offline")
    except Exception as error:
        print(f"wandb: the run goes on without it ({first_line(error)})")
        return None
