"""
The table and the picture of benchmarks/recipe/results.jsonl: prints Markdown, and draws benchmarks/recipe/loss.png.

    python benchmarks/recipe/report.py

The last column compares by tokens: how many times those of `muon-qwen3` a row takes to the same loss. It is
exp(difference / slope), where the difference of the losses is the mean over the seeds that both have, which decide what
text is seen, and the slope is what muon-qwen3 gains for each e-fold of tokens.
"""

import json
import math
import statistics
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
BASE = "muon-qwen3"


def main():
    runs = [json.loads(line) for line in (FOLDER / "results.jsonl").read_text().splitlines()]
    rows = defaultdict(dict)  # by name and length: the loss by seed
    for run in runs:
        name = " ".join(filter(None, (run["row"], run["changes"].replace("--", ""))))
        rows[name, length(run)][run["seed"]] = final(run)
    lengths = sorted(tokens for name, tokens in rows if name == BASE)
    first, last = lengths[0], lengths[-1]
    slope = difference(rows[BASE, first], rows[BASE, last]) / math.log(last / first)
    print(
        f"{BASE}: {slope:.3f} nats for each e-fold of tokens, between {first / 1e6:.1f} and {last / 1e6:.1f} million\n"
    )
    for tokens in reversed(lengths):
        print(f"| {tokens / 1e6:.1f} million tokens | val loss, by seed | times the tokens of {BASE} |\n|---|---|---|")
        base = rows[BASE, tokens]
        found = [(name, losses) for (name, seen), losses in rows.items() if seen == tokens]
        for name, losses in sorted(found, key=lambda row: difference(row[1], base)):
            times = math.exp(difference(losses, base) / slope)
            by_seed = ", ".join(f"{loss:.4f}" for _, loss in sorted(losses.items()))
            print(f"| {name} | {by_seed} | {'' if 'n_embd' in name else f'{times:.2f}'} |")
        print()
    draw([run for run in runs if length(run) == last and run["seed"] == runs[0]["seed"]])


def difference(one: dict[int, float], other: dict[int, float]) -> float:
    """The mean difference of two rows' losses over the seeds that both have."""
    return statistics.mean(one[seed] - other[seed] for seed in one.keys() & other.keys())


def length(run: dict) -> int:
    """The tokens of a run, rounded, because they are a multiple of those of its iterations."""
    return round(run["tokens"], -5)


def final(run: dict) -> float:
    return run["val_loss"][-1][1]


def draw(runs: list[dict]):
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for run in sorted(runs, key=final):
        tokens, losses = zip(*run["val_loss"])
        label = f"{run['row']} {run['changes'].replace('--', '')}".strip()
        (line,) = axes.plot([n / 1e6 for n in tokens[:-1]], losses[:-1], marker="o", markersize=3)
        last = {"color": line.get_color(), "marker": "*", "markersize": 9, "linestyle": ""}
        axes.plot(tokens[-1] / 1e6, losses[-1], **last, label=f"{label}: {losses[-1]:.3f}")
    axes.set_xlabel("million tokens (dots: on 65,536 tokens of FineWeb; stars: at the end, on 524,288)")
    axes.set_ylabel("val loss (nats per token, 4,096 ids)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(FOLDER / "loss.png", dpi=110)


if __name__ == "__main__":
    main()
