"""index.html: a page about a run, for a browser. It shows loss.png and needs no server. Its HTML is
in page.html."""

import time
from dataclasses import asdict
from html import escape
from pathlib import Path
from string import Template

from onenight.plan import Plan
from onenight.process import replacing
from onenight.records import NEAR, Records, read_metrics
from onenight.schedule import Clock
from onenight.settings import TrainConfig
from onenight.trainer import Trainer
from onenight.wording import duration

PAGE = Path(__file__).with_name("page.html")
REFRESH_S = 60


def write_page(records: Records, trainer: Trainer, clock: Clock, plan: Plan, ending: str):
    """Write out_dir/index.html anew. `ending` says how the run ended, and is "" while it lasts;
    until then the page reloads itself. An error never ends the run."""
    with records.never_stopping("index.html"):
        page = render(read_metrics(records.path), trainer, clock, plan, ending)
        with replacing(records.out_dir / "index.html", "w") as file:
            file.write(page)


def render(records: list[dict], trainer: Trainer, clock: Clock, plan: Plan, ending: str) -> str:
    """Return the page as HTML. `records` are those of metrics.jsonl."""
    config = trainer.config
    refresh = ""
    note = f"written {time_in(0)}"
    if not ending:
        refresh = f'<meta http-equiv="refresh" content="{REFRESH_S}">'
        note += ", and again at the next evaluation"
    iter_num = trainer.progress.iter_num
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        refresh=refresh,
        name=escape(Path(config.out_dir).absolute().name),
        status=escape(ending or f"running, at iteration {iter_num:,}"),
        loss=escape(describe_loss(records, config)),
        note=escape(note),
        picture=picture(Path(config.out_dir), iter_num),
        comparison=table(compare(records, trainer, clock, plan, ending)),
        samples=samples(records),
        settings=table([(key, str(value)) for key, value in asdict(config).items()]),
    )


def describe_loss(records: list[dict], config: TrainConfig) -> str:
    """Return the last val loss and the lowest, and how far the reference is, in words."""
    evals = [record for record in records if "val_loss" in record]
    if not evals:
        return "no evaluation yet"
    last = evals[-1]
    best = min(evals, key=lambda record: record["val_loss"])
    text = f"val loss {last['val_loss']:.4f} at iteration {last['iter']:,}, the lowest of the run"
    if best["iter"] != last["iter"]:
        text = f"val loss {last['val_loss']:.4f} at iteration {last['iter']:,}"
        text += f"; the lowest was {best['val_loss']:.4f} at iteration {best['iter']:,}"
    distance = best["val_loss"] - config.reference_loss
    if config.reference_loss and distance < NEAR:
        side = "above" if distance > 0 else "below"
        label = config.reference_label or "the reference"
        text += f"; {abs(distance):.2f} {side} {config.reference_loss:g}, {label}"
    return text


def picture(out_dir: Path, iter_num: int) -> str:
    """Return loss.png as HTML, or "" before it exists."""
    if not (out_dir / "loss.png").exists():
        return ""
    # The number makes a browser read the picture again when it reloads the page.
    link = f"loss.png?iter={iter_num}"
    image = f'<img src="{link}" alt="losses and learning rate against tokens">'
    return f'<a class="picture" href="{link}">{image}</a>'


def compare(
    records: list[dict], trainer: Trainer, clock: Clock, plan: Plan, ending: str
) -> list[tuple[str, str, str]]:
    """Return the rows of a table: planned and actual."""
    progress = trainer.progress
    elapsed = clock.elapsed()
    speeds = [record["tokens_per_s"] for record in records if "tokens_per_s" in record]
    speed = f"{speeds[-1]:,} tokens/s" if speeds else "not known yet"
    peaks = [record["peak_memory_gb"] for record in records if "peak_memory_gb" in record]
    peak = f"{max(peaks):.1f} GB" if peaks else f"not measured on {trainer.device.type}"
    left_s = clock.seconds_left(progress.iter_num)
    end = time_in(0) if ending else f"{time_in(left_s)}, in {duration(left_s)}"
    return [
        ("", "plan", "run" if ending else "run so far"),
        ("speed", f"{plan.tokens_per_s:,.0f} tokens/s", speed),
        ("peak memory", f"{plan.peak_memory_gb:.1f} GB", peak),
        ("time", duration(plan.seconds), duration(elapsed)),
        ("done at", time_in(plan.seconds - elapsed), end),
        ("iterations", f"{plan.iters:,}", f"{progress.iter_num:,}"),
        ("tokens", f"{plan.tokens:,}", f"{progress.tokens:,}"),
    ]


def time_in(seconds: float) -> str:
    """Return the day and the time of day that many seconds from now."""
    return time.strftime("%a %d %b %H:%M", time.localtime(time.time() + seconds))


def samples(records: list[dict]) -> str:
    """Return the samples of the evaluations as HTML, the newest first."""
    parts = []
    for record in reversed(records):
        if "sample" in record:
            heading = f"iteration {record['iter']:,}"
            if "val_loss" in record:
                heading += f", val loss {record['val_loss']:.4f}"
            parts.append(f"<h3>{heading}</h3>")
            parts.append(f'<p class="sample">{escape(record["sample"])}</p>')
    return "\n".join(parts) or "<p>none yet</p>"


def table(rows: list[tuple[str, ...]]) -> str:
    """Return rows as an HTML table. The first cell of each row names it."""
    lines = []
    for name, *values in rows:
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        lines.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    return "\n".join(["<table>", *lines, "</table>"])
