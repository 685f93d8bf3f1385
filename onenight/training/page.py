"""index.html: a page about a run, for a browser. It shows loss.png and needs no server."""

import time
from dataclasses import asdict
from html import escape

from onenight.system.files import replacing
from onenight.system.wording import duration
from onenight.training.clock import Clock
from onenight.training.metrics import read_metrics
from onenight.training.run import Run

REFRESH_S = 60

STYLE = """
:root { color-scheme: light dark; --text: #24292e; --muted: #66707a; --line: #e2e5e8;
  --background: #ffffff; }
body { margin: 0; background: var(--background); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 44rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.5rem; line-height: 1.25; }
h2 { margin: 2.25rem 0 0.5rem; font-size: 1.1rem; }
h3 { margin: 1.25rem 0 0; font-size: 0.875rem; font-weight: normal; color: var(--muted); }
p { margin: 0.25rem 0; }
.muted { font-size: 0.875rem; color: var(--muted); }
.picture img { display: block; width: 100%; height: auto; margin-top: 1.25rem; }
.sample { white-space: pre-wrap; }
table { width: 100%; border-collapse: collapse; font-size: 0.9375rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 0.375rem 0.75rem 0.375rem 0; border-bottom: 1px solid var(--line);
  text-align: left; vertical-align: top; font-weight: normal; }
th { color: var(--muted); }
summary { margin-top: 2.25rem; font-size: 1.1rem; font-weight: bold; cursor: pointer; }
@media (prefers-color-scheme: dark) {
  :root { --text: #d8dde2; --muted: #929ba4; --line: #33393f; --background: #16191c; }
  .picture img { filter: brightness(0.85); }
}
"""


def write_page(run: Run, ending: str = ""):
    """Write out_dir/index.html anew, in the process that writes files.

    `ending` says how the run ended, and is "" while it lasts; until then the page reloads itself.
    An error is printed once and never ends the run.
    """
    if not run.writes_files:
        return
    with run.metrics.never_stopping("index.html"):
        page = render(run, read_metrics(run.metrics.path), ending)
        with replacing(run.out_dir / "index.html") as file:
            file.write(page.encode(errors="replace"))


def render(run: Run, records: list[dict], ending: str) -> str:
    """Return the page as HTML. `records` are those of metrics.jsonl."""
    name = run.out_dir.absolute().name
    status = ending
    refresh = ""
    note = f"written {time_in(run.clock, 0)}"
    if not ending:
        status = f"running, at iteration {run.progress.iter_num:,}"
        refresh = f'<meta http-equiv="refresh" content="{REFRESH_S}">'
        note += ", and again at the next evaluation"
    settings = [(key, str(value)) for key, value in asdict(run.config).items()]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{refresh}
<title>{escape(name)}: {escape(status)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(name)}</h1>
<p>{escape(status)}</p>
<p>{escape(describe_loss(records))}</p>
<p class="muted">{escape(note)}</p>
{picture(run)}
<h2>Plan and run</h2>
{table(compare(run, records, ending))}
<h2>Samples</h2>
{samples(records)}
<details>
<summary>Settings</summary>
{table(settings)}
</details>
</main>
</body>
</html>
"""


def describe_loss(records: list[dict]) -> str:
    """Return the last val loss and the lowest, in words."""
    evals = [record for record in records if "val_loss" in record]
    if not evals:
        return "no evaluation yet"
    last = evals[-1]
    best = min(evals, key=lambda record: record["val_loss"])
    text = f"val loss {last['val_loss']:.4f} at iteration {last['iter']:,}"
    if best["iter"] == last["iter"]:
        return f"{text}, the lowest of the run"
    return f"{text}; the lowest was {best['val_loss']:.4f} at iteration {best['iter']:,}"


def picture(run: Run) -> str:
    """Return loss.png as HTML; "" if it could not be drawn."""
    if not (run.out_dir / "loss.png").exists():
        return ""
    # The number makes a browser read the picture again when it reloads the page.
    source = f"loss.png?iter={run.progress.iter_num}"
    return (
        f'<a class="picture" href="{source}">'
        f'<img src="{source}" alt="losses and learning rate against tokens"></a>'
    )


def compare(run: Run, records: list[dict], ending: str) -> list[tuple[str, str, str]]:
    """Return the plan beside what is so, as rows of a table."""
    plan = run.plan
    elapsed = run.clock.elapsed()
    plan_heading = "plan"
    if run.trainer.ranks.world_size > 1:
        plan_heading = "plan for one process"
    plan_time = duration(plan.seconds)
    if not run.config.hours:
        plan_time += " plus evaluation"

    speeds = [record["tokens_per_s"] for record in records if "tokens_per_s" in record]
    speed = f"{speeds[-1]:,} tokens/s" if speeds else "not known yet"
    peaks = [record["peak_memory_gb"] for record in records if "peak_memory_gb" in record]
    peak = f"{max(peaks):.1f} GB" if peaks else f"not measured on {run.trainer.device.type}"
    return [
        ("", plan_heading, "run" if ending else "run so far"),
        ("speed", f"{plan.tokens_per_s:,.0f} tokens/s", speed),
        ("peak memory", f"{plan.peak_memory_gb:.1f} GB", peak),
        ("time", plan_time, duration(elapsed)),
        ("done at", time_in(run.clock, plan.seconds - elapsed), describe_end(run, ending)),
        ("iterations", f"{plan.iters:,}", f"{run.progress.iter_num:,}"),
        ("tokens", f"{plan.tokens:,}", f"{run.progress.tokens:,}"),
    ]


def describe_end(run: Run, ending: str) -> str:
    """Return when the run has ended or will end, in words."""
    now = time_in(run.clock, 0)
    if ending:
        return now if run.schedule.is_over(run.progress) else f"stopped {now}"
    if not run.config.hours and not run.clock.s_per_iter():
        return "not known yet"
    left = max(0, run.schedule.seconds_left(run.progress))
    return f"{time_in(run.clock, left)}, in {duration(left)}"


def time_in(clock: Clock, seconds: float) -> str:
    """Return the day and the time of day that many seconds from now."""
    return time.strftime("%a %d %b %H:%M", time.localtime(clock.wall() + seconds))


def samples(records: list[dict]) -> str:
    """Return the samples of the evaluations as HTML, the newest first."""
    parts = []
    for record in reversed(records):
        if "sample" not in record:
            continue
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
