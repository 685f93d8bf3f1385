"""
What a run leaves to look at: metrics.jsonl, loss.png drawn from it, and Weights & Biases where wanted.
"""

import json
import os
from pathlib import Path

from files import replacing
from words import first_line

MAX_POINTS = 1000  # of a curve: more cannot be seen, and drawing more each time would take more memory each time


class Metrics:
    """
    Appends records to out_dir/metrics.jsonl. A record is a dict with iter, tokens (seen by the weights that gave the
    loss), lr, elapsed_s, and either train_loss (mean over the iteration) and tokens_per_s, or what an evaluation
    found: val_loss and train_loss_eval. Losses are nats per token.
    """

    def __init__(self, out_dir: Path, wandb_run=None):
        self.path, self.wandb_run = out_dir / "metrics.jsonl", wandb_run

    def forget_after(self, iter_num: int, evaluated_iter: int):
        """Drops what a run at iter_num will write again: all later records, and that iteration's own."""
        kept = [
            record
            for record in read_metrics(self.path)
            if record["iter"] < iter_num or ("val_loss" in record and record["iter"] == iter_num == evaluated_iter)
        ]
        with replacing(self.path, "w") as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)

    def sync(self):
        """What was written until now survives a power cut."""
        with open(self.path, "a") as file:
            os.fsync(file.fileno())

    def write(self, **record):
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        if self.wandb_run:
            try:
                self.wandb_run.log(record, step=record["iter"])
            except Exception as error:
                print(f"wandb: no more logging, because {error}; metrics.jsonl goes on")
                self.wandb_run = None

    def draw(self):
        """loss.png from metrics.jsonl. A picture that cannot be drawn never stops a run."""
        try:
            draw_losses(read_metrics(self.path), self.path.with_name("loss.png"))
        except Exception as error:
            print(f"loss.png was not drawn: {error}")


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; [] if there is none. A last line cut off by a crash is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def draw_losses(records: list[dict], path: Path):
    """Training and validation loss against tokens seen, with the learning rate below, as a PNG."""
    from matplotlib.figure import Figure  # here, because it takes a second to import

    steps = [record for record in records if "train_loss" in record]
    steps = steps[:: 1 + len(steps) // MAX_POINTS]
    evals = [record for record in records if "val_loss" in record]
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    loss_axes, lr_axes = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    unit, name = (1e9, "billion") if records and records[-1]["tokens"] >= 1e9 else (1e6, "million")

    def plot(axes, rows, key, **style):
        axes.plot([row["tokens"] / unit for row in rows], [row[key] for row in rows], **style)

    plot(loss_axes, steps, "train_loss", color="tab:blue", alpha=0.5, linewidth=1, label="train, each iteration")
    plot(loss_axes, evals, "val_loss", color="tab:red", marker="o", markersize=4, label="val, fixed pass")
    plot(lr_axes, steps, "lr", color="tab:green")
    if evals:
        last = evals[-1]
        loss_axes.set_title(f"iter {last['iter']:,}: val loss {last['val_loss']:.3f}")
    loss_axes.set_ylabel("loss (nats per token)")
    loss_axes.legend()
    lr_axes.set_ylabel("learning rate")
    lr_axes.set_xlabel(f"tokens seen ({name})")
    for axes in (loss_axes, lr_axes):
        axes.grid(alpha=0.3)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)


def start_wandb(project: str, name: str, run_id: str, config: dict, out_dir: Path):
    """
    A wandb run, or None; run_id is that of the run to go on with, '' for a new one. Without a key or a network it is
    wandb's offline run, and a line says so.
    """
    try:
        import wandb
    except ImportError:
        print("wandb: not installed (pip install wandb); going on without it")
        return None

    def start(mode):
        settings = wandb.Settings(init_timeout=30, silent=True)
        same = {"id": run_id, "resume": "allow"} if run_id else {}
        return wandb.init(project=project, name=name, config=config, dir=out_dir, mode=mode, settings=settings, **same)

    try:
        if os.environ.get("WANDB_MODE"):
            return start(os.environ["WANDB_MODE"])
        reason = "there is no API key (wandb login)"
        if wandb.login(prompt=False, verify=False):
            try:
                return start("online")
            except Exception as error:
                reason = first_line(error)
        print(f"wandb: offline, because {reason}; the run lies in {out_dir / 'wandb'}, for `wandb sync` later")
        return start("offline")
    except Exception as error:
        print(f"wandb: off, because {first_line(error)}")
        return None
