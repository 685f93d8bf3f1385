"""
The tables and the picture of the runs in benchmarks/recipe.jsonl: prints the rows as Markdown, the lowest loss first,
and draws benchmarks/recipe.png, the val loss against tokens and against seconds.

    python benchmarks/recipe_report.py

The last column compares by tokens: how many times those that `fast` takes to the same loss, by a parabola through its
own losses over the logarithm of its tokens. Seconds are iterations times the median of an iteration, without
compilation, in the run of the same arithmetic that other work on the machine disturbed least. Of `fast` each run is
drawn.
"""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

FOLDER = Path(__file__).parent


def main():
    runs = [json.loads(line) for line in (FOLDER / "recipe.jsonl").read_text().splitlines()]
    for run in runs:
        run["label"] = " ".join(filter(None, (run["row"], run["changes"].replace("--", ""))))
        run["tokens"] = run["iters"] * run["tokens_per_iter"]
        run["last"] = run["val_loss"][-1][1]
    runs.sort(key=lambda run: (run["last"], run["label"]))
    fast = [run for run in runs if run["label"] == "fast"]
    curve = np.polyfit([run["last"] for run in fast], np.log([run["tokens"] for run in fast]), 2)
    parts = [run for run in runs if "without" in run["label"] or "plus" in run["label"]]
    for rows in ([run for run in runs if run not in parts], parts):
        print("| recipe | million tokens | val loss | times the tokens of `fast` |\n|---|---|---|---|")
        for run in rows:
            times = run["tokens"] / np.exp(np.polyval(curve, run["last"]))
            print(f"| {run['label']} | {run['tokens'] / 1e6:.2f} | {run['last']:.4f} | {times:.2f} |")
        print()
    for run in runs:
        run["seconds"] = min(other["s_per_iter"] for other in runs if kind(other) == kind(run) and other not in parts)
    best = {run["row"]: run for run in reversed(runs) if run not in parts}  # the lowest loss of each
    for run in best.values():
        print(f"{run['row']}: {run['seconds']:.2f} s per iteration")
    draw([*(run for name, run in best.items() if name != "fast"), *fast])


def kind(run: dict) -> str:
    """Of the arithmetic: `seed` and `adamw` differ in their rates only."""
    return "adamw" if run["row"] == "seed" else run["row"]


def draw(runs: list[dict]):
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    baseline = min(run["last"] for run in runs if kind(run) == "adamw")
    colours = {row: f"C{i}" for i, row in enumerate(dict.fromkeys(run["row"] for run in runs))}
    for axes, unit in zip(figure.subplots(1, 2, sharey=True), ("million tokens", "seconds")):
        for run in runs:
            scale = run["tokens_per_iter"] / 1e6 if unit == "million tokens" else run["seconds"]
            iters, losses = zip(*run["val_loss"][1:])
            style = {"color": colours[run["row"]], "marker": "o", "markersize": 3}
            axes.plot([i * scale for i in iters], losses, label=run["label"], **style)
        axes.axhline(baseline, color="grey", linestyle=":", label="where AdamW on GPT-2's architecture ends")
        axes.set_xlabel(unit)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("val loss (nats per token)")
    legend = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels())))  # each label once
    figure.axes[0].legend(legend.values(), legend.keys())
    figure.savefig(FOLDER / "recipe.png", dpi=110)


if __name__ == "__main__":
    main()
