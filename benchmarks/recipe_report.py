"""
The table and the picture of the runs in benchmarks/recipe.jsonl: prints the rows as Markdown, the lowest loss first,
and draws benchmarks/recipe.png, the val loss against tokens and against seconds.

    python benchmarks/recipe_report.py

Tokens saved: how many times fewer tokens a run took than the best of AdamW with GPT-2's architecture (`adamw`, `seed`),
where it ends at or below that one's last loss. Seconds are iterations times the median of an iteration, without
compilation, in the run of the same recipe that other work on the machine disturbed least.
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

FOLDER = Path(__file__).parent


def main():
    runs = [json.loads(line) for line in (FOLDER / "recipe.jsonl").read_text().splitlines()]
    for run in runs:
        run["label"] = " ".join(filter(None, (run["row"], run["changes"].replace("--", ""))))
        run["tokens"] = run["iters"] * run["tokens_per_iter"]
        run["last"] = run["val_loss"][-1][1]
        run["seconds"] = min(other["s_per_iter"] for other in runs if other["row"] == run["row"])
    runs.sort(key=lambda run: (run["last"], run["label"]))
    baseline = min((run for run in runs if run["row"] in ("adamw", "seed")), key=lambda run: run["last"])
    print("| recipe | million tokens | val loss | tokens saved |\n|---|---|---|---|")
    for run in runs:
        saved = f"{baseline['tokens'] / run['tokens']:.2f}" if run["last"] <= baseline["last"] else ""
        print(f"| {run['label']} | {run['tokens'] / 1e6:.2f} | {run['last']:.4f} | {saved} |")
    for row in dict.fromkeys(run["row"] for run in runs):
        print(f"{row}: {next(run['seconds'] for run in runs if run['row'] == row):.2f} s per iteration")
    best = {run["row"]: run for run in reversed(runs)}  # of each recipe the one with the lowest loss
    draw(list(best.values()), baseline)


def draw(runs: list[dict], baseline: dict):
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, unit in zip(figure.subplots(1, 2, sharey=True), ("million tokens", "seconds")):
        for run in runs:
            scale = run["tokens_per_iter"] / 1e6 if unit == "million tokens" else run["seconds"]
            iters, losses = zip(*run["val_loss"][1:])
            axes.plot(
                [i * scale for i in iters],
                losses,
                marker="o",
                markersize=3,
                label=f"{run['label']}, {run['tokens'] / 1e6:.1f} M tokens",
            )
        axes.axhline(baseline["last"], color="grey", linestyle=":", label="where tuned AdamW ends")
        axes.set_xlabel(unit)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("val loss (nats per token)")
    figure.axes[0].legend()
    figure.savefig(FOLDER / "recipe.png", dpi=110)


if __name__ == "__main__":
    main()
