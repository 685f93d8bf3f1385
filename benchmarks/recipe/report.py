"""
Prints results of run.py as Markdown tables, and draws their losses.

    python benchmarks/recipe/report.py                       # results.jsonl, loss.png
    python benchmarks/recipe/report.py results-h100.jsonl    # loss-h100.png

The files are in benchmarks/recipe/. The difference is that of the mean losses of a row and of
`muon-qwen3`, with its standard error if both have several seeds. If muon-qwen3 has runs of several
lengths, the last column is the number of tokens that a row needs to reach its loss, relative to
muon-qwen3: exp(difference / slope), where the slope is what muon-qwen3 gains for each e-fold of
tokens between its two longest lengths.
"""

import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
BASE = "muon-qwen3"


def main(file_name: str = "results.jsonl"):
    lines = (FOLDER / file_name).read_text().splitlines()
    runs = [json.loads(line) for line in lines]
    losses = losses_by_row(runs)
    lengths = sorted(tokens for name, tokens in losses if name == BASE)
    longest = lengths[-1]
    slope = math.nan
    if len(lengths) > 1:
        shorter = lengths[-2]
        slope = mean_loss(losses[BASE, shorter]) - mean_loss(losses[BASE, longest])
        slope /= math.log(longest / shorter)
        print(
            f"{BASE}: {slope:.3f} nats for each e-fold of tokens, "
            f"between {shorter / 1e6:.1f} and {longest / 1e6:.1f} million\n"
        )
    for tokens in reversed(lengths):
        print_table(losses, tokens, slope)
    first_seed = runs[0]["seed"]
    drawn = [run for run in runs if length(run) == longest and run["seed"] == first_seed]
    picture = file_name.replace("results", "loss").replace(".jsonl", ".png")
    draw(drawn, FOLDER / picture)


def losses_by_row(runs: list[dict]) -> dict:
    """Return the final losses: {(name of the row, tokens): {seed: loss}}."""
    losses = defaultdict(dict)
    for run in runs:
        losses[name_of(run), length(run)][run["seed"]] = final_loss(run)
    return losses


def name_of(run: dict) -> str:
    """Return the row of a run, with its changes."""
    return f"{run['row']} {run['changes'].replace('--', '')}".strip()


def length(run: dict) -> int:
    """Return the tokens of a run, rounded, because they are a multiple of those of its
    iterations."""
    return round(run["tokens"], -5)


def final_loss(run: dict) -> float:
    _, loss = run["val_loss"][-1]
    return loss


def mean_loss(by_seed: dict[int, float]) -> float:
    return statistics.mean(by_seed.values())


def describe_difference(row: dict[int, float], base: dict[int, float]) -> str:
    """Return the difference of the mean losses, with its standard error if that is known."""
    words = f"{mean_loss(row) - mean_loss(base):+.4f}"
    if min(len(row), len(base)) > 1:
        variances = [statistics.variance(losses.values()) / len(losses) for losses in (row, base)]
        words += f" ± {math.sqrt(sum(variances)):.4f}"
    return words


def print_table(losses: dict, tokens: int, slope: float):
    """Print the rows with that many tokens, the best first."""
    print(
        f"| {tokens / 1e6:.1f} million tokens | val loss, by seed | difference | tokens |\n"
        "|---|---|---|---|"
    )
    base = losses[BASE, tokens]
    rows = {name: row for (name, row_tokens), row in losses.items() if row_tokens == tokens}
    for name in sorted(rows, key=lambda name: mean_loss(rows[name])):
        row = rows[name]
        by_seed = ", ".join(f"{loss:.4f}" for _, loss in sorted(row.items()))
        times = math.exp((mean_loss(row) - mean_loss(base)) / slope)
        times = "" if math.isnan(times) else f"{times:.2f}"
        difference = "" if row is base else describe_difference(row, base)
        print(f"| {name} | {by_seed} | {difference} | {times} |")
    print()


def draw(runs: list[dict], path: Path):
    """Draw the val loss of each run against tokens."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=colormaps["tab20"].colors + colormaps["tab20b"].colors)
    for run in sorted(runs, key=final_loss):
        million_tokens = [tokens / 1e6 for tokens, _ in run["val_loss"]]
        losses = [loss for _, loss in run["val_loss"]]
        (line,) = axes.plot(million_tokens[:-1], losses[:-1], marker="o", markersize=3)
        axes.plot(
            million_tokens[-1],
            losses[-1],
            color=line.get_color(),
            marker="*",
            markersize=9,
            linestyle="",
            label=f"{name_of(run)}: {losses[-1]:.3f}",
        )
    axes.set_xlabel(
        "million tokens (dots: on 65,536 tokens of FineWeb; stars: at the end, on 524,288)"
    )
    axes.set_ylabel("val loss (nats per token, 4,096 ids)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
