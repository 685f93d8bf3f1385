"""What a run reports: its speed, metrics.jsonl, loss.png drawn from it, and Weights & Biases if wanted."""

import bisect
import contextlib
import json
import os
import time
from collections import deque
from pathlib import Path

from onenight.files import first_line, replacing
from onenight.trainer import EVAL_TOKENS, Trainer

LOG_S = 30  # between two printed lines at most
SAVE_S = 600  # between two checkpoints at most: what a power cut can cost. A save takes seconds
MAX_ITERS = 10**9  # more than any run has
MAX_POINTS = 1000  # of a curve: more cannot be seen, and would take more time and memory at each drawing


class Pace:
    """Times the run since `started` (time.monotonic()). The first two iterations after a start, which compile and
    allocate, do not count for the speed, nor do evaluations. `ceiling`: the TFLOP/s that MFU is relative to."""

    SETTLING = 2
    RECENT = 50  # iterations whose speed predicts the rest of the run

    def __init__(self, trainer: Trainer, ceiling: float, started: float):
        self.trainer, self.ceiling = trainer, ceiling
        self.started = started - trainer.progress.elapsed_s
        self.steps, self.last_s, self.logged, self.saved = 0, 0.0, time.monotonic(), time.monotonic()
        self.evals, self.eval_s, self.save_s = 0, 0.0, 0.0  # how many, and seconds of the last one, saving included
        self.recent = deque(maxlen=self.RECENT)
        self.counted, self.counted_s = 0, 0.0  # iterations since the settling

    def elapsed(self) -> float:
        """Seconds of this run so far, those before a resume included; also noted in the trainer's progress."""
        self.trainer.progress.elapsed_s = round(time.monotonic() - self.started, 2)
        return self.trainer.progress.elapsed_s

    def add_step(self, seconds: float):
        """Counts an iteration that took so long."""
        self.steps, self.last_s = self.steps + 1, seconds
        if self.steps > self.SETTLING:
            self.counted, self.counted_s = self.counted + 1, self.counted_s + seconds
            self.recent.append(seconds)

    def add_eval(self, seconds: float):
        """Counts an evaluation that took so long. The first one compiles: until there is another, it is taken to cost
        at most a third of training on as many tokens."""
        self.evals, self.eval_s = self.evals + 1, seconds

    def log_is_due(self) -> bool:
        """Whether a line about the iteration just done is to be printed: at log_interval, and at least every 30 s."""
        log_interval, done = self.trainer.config.log_interval, self.trainer.progress.iter_num - 1
        if done % log_interval and time.monotonic() - self.logged < LOG_S:
            return False
        self.logged = time.monotonic()
        return True

    def s_per_iter(self) -> float:
        """Seconds of an iteration of late; 0 as long as none counts, unless they are slow."""
        if self.recent:
            return sum(self.recent) / len(self.recent)
        return self.last_s if self.steps > 1 and self.last_s > LOG_S / 3 else 0.0

    def tokens_per_s(self, seconds_per_iter: float) -> float:
        return self.trainer.config.tokens_per_iter / seconds_per_iter

    def mfu(self, seconds_per_iter: float) -> float:
        """The share of the ceiling that training reaches, over the devices of all processes."""
        flops = self.tokens_per_s(seconds_per_iter) * self.trainer.model.flops_per_token()
        return flops / 1e12 / self.ceiling / self.trainer.ranks.world_size

    def seconds_for(self, iters: int) -> float:
        """What so many more iterations will take, with their evaluations and savings, the last ones included."""
        config, done, per_iter = self.trainer.config, self.trainer.progress.iter_num, self.s_per_iter()
        eval_s = self.eval_s
        if self.evals < 2:
            tokens = config.eval_iters * EVAL_TOKENS
            tokens += min(tokens, len(self.trainer.val_tokens))
            eval_s = min(eval_s, tokens / 3 / config.tokens_per_iter * per_iter)
        evals = -(-(done + iters) // config.eval_interval) - (done - 1) // config.eval_interval
        evals -= self.trainer.progress.evaluated_iter == done
        seconds = iters * per_iter + evals * eval_s
        return seconds + self.save_s * max(1.0, seconds / SAVE_S - evals)

    def iters_within(self, seconds: float) -> int:
        """The most iterations that seconds_for() gives so much time; at least 1."""
        return max(1, bisect.bisect_right(range(MAX_ITERS), seconds, key=self.seconds_for) - 1)

    def eta(self) -> float:
        """Seconds to the end at the present speed."""
        config, progress = self.trainer.config, self.trainer.progress
        if config.hours and not progress.decisions:
            return config.hours * 3600 - self.elapsed()
        return self.seconds_for(config.max_iters - progress.iter_num)


class Metrics:
    """Appends records to out_dir/metrics.jsonl. A record is a dict with iter, tokens (seen by the weights that gave the
    loss), lr, elapsed_s, and either train_loss (mean over the iteration) and tokens_per_s, or, of an evaluation,
    val_loss and train_loss_eval. Losses are in nats per token."""

    def __init__(self, out_dir: Path, wandb_run=None):
        self.path, self.wandb_run, self.failed = out_dir / "metrics.jsonl", wandb_run, False

    def truncate(self, iter_num: int, evaluated_iter: int):
        """Drops the records that a run resumed at iter_num will write again, and lines that are not records."""
        records = read_metrics(self.path)
        n_lines = len(self.path.read_bytes().splitlines()) if self.path.is_file() else 0
        if n_lines > len(records):
            print(f"{self.path}: {n_lines - len(records)} lines are damaged or not ours, and left out")
        kept = [
            record
            for record in records
            if record["iter"] < iter_num or ("val_loss" in record and record["iter"] == iter_num == evaluated_iter)
        ]
        with self.failing_quietly(), replacing(self.path, "w") as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)

    @contextlib.contextmanager
    def failing_quietly(self):
        """Metrics that cannot be written never stop a run: the first failure is reported."""
        try:
            yield
        except OSError as error:
            if not self.failed:
                print(f"{self.path}: cannot be written ({error.strerror}); the run goes on without it")
            self.failed = True

    def sync(self):
        """Makes everything written so far survive a power cut."""
        with self.failing_quietly(), open(self.path, "a") as file:
            os.fsync(file.fileno())

    def write(self, **record):
        """Appends a record, and logs it to Weights & Biases; a failure there ends that logging only."""
        with self.failing_quietly(), open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        if self.wandb_run:
            try:
                self.wandb_run.log(record, step=record["iter"])
            except Exception as error:
                print(f"wandb: logging stopped, because {error}; metrics.jsonl continues")
                self.wandb_run = None

    def draw(self):
        """Makes loss.png and samples.txt from metrics.jsonl. A failure is reported, and never stops a run."""
        try:
            records = read_metrics(self.path)
            draw_losses(records, self.path.with_name("loss.png"))
            evals = [(record["iter"], record["val_loss"], record["sample"]) for record in records if "sample" in record]
            lines = [f"iter {iter_num}, val loss {val_loss:.4f}: {text}\n" for iter_num, val_loss, text in evals]
            with replacing(self.path.with_name("samples.txt")) as file:
                file.write("".join(lines).encode())
        except Exception as error:
            print(f"loss.png or samples.txt could not be made: {first_line(error)}")


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; [] if there is none. Lines that are not records, such as a last one cut off by a
    crash, are left out."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            record = json.loads(line)
            records += [record] if record["iter"] >= 0 else []
    return records


def draw_losses(records: list[dict], path: Path):
    """Draws a PNG: training and validation loss against tokens, with the learning rate below."""
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
    """A wandb run, or None if there can be none; run_id is that of the run to continue, '' for a new one. Without a key
    or a network it is an offline run, with a message."""
    try:
        import wandb
    except ImportError:
        print("wandb: not installed (pip install wandb); going on without it")
        return None
    same = {"id": run_id, "resume": "allow"} if run_id else {}
    settings = wandb.Settings(init_timeout=30, silent=True)
    wanted, reason = os.environ.get("WANDB_MODE") or "online", "there is no API key (wandb login)"
    for mode in (wanted, "offline"):
        try:
            if mode == "online" and not wandb.login(prompt=False, verify=False):
                continue
            if mode == "offline":
                reason = "of WANDB_MODE" if wanted == "offline" else reason
                print(f"wandb: offline, because {reason}; upload {out_dir / 'wandb'} later with `wandb sync`")
            about = {"project": project, "name": name, "config": config, "dir": out_dir}
            run = wandb.init(**about, mode=mode, settings=settings, **same)
            if run.url:
                print(f"wandb: {run.url}")
            return run
        except Exception as error:
            reason = first_line(error)
    print(f"wandb: off, because {reason}")
    return None
