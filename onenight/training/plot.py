"""loss.png: the losses and the learning rate against tokens."""

import sys
from pathlib import Path

from onenight.system.cache_folders import use_cache_folder
from onenight.system.files import replacing

MAX_POINTS = 1000  # of a curve; more would not be visible, and would take longer to draw


def draw_losses(records: list[dict], path: Path):
    """Draw the records of metrics.jsonl as a PNG: training and validation loss, and below them the
    learning rate."""
    if "matplotlib" not in sys.modules:
        use_cache_folder("MPLCONFIGDIR", "~")
    from matplotlib.figure import Figure  # here, because importing it takes a second

    steps = [record for record in records if "train_loss" in record]
    steps = steps[:: 1 + len(steps) // MAX_POINTS]
    evals = [record for record in records if "val_loss" in record]
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    loss_axes, lr_axes = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])

    plot(
        loss_axes, steps, "train_loss",
        color="tab:blue", alpha=0.5, linewidth=1, label="train, single iterations",
    )  # fmt: skip
    plot(
        loss_axes, evals, "val_loss",
        color="tab:red", marker="o", markersize=4, label="val, fixed pass",
    )  # fmt: skip
    plot(lr_axes, steps, "lr", color="tab:green")

    title = ""
    if evals:
        title = f"iter {evals[-1]['iter']:,}: val loss {evals[-1]['val_loss']:.3f}"
    loss_axes.set(title=title, ylabel="loss (nats per token)")
    loss_axes.legend()
    lr_axes.set(xlabel="tokens seen", ylabel="learning rate")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)


def plot(axes, records: list[dict], key: str, **style):
    axes.plot(
        [record["tokens"] for record in records], [record[key] for record in records], **style
    )
    axes.grid(alpha=0.3)
