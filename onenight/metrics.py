"""What a run reports: its speed, metrics.jsonl, loss.png drawn from it, and Weights & Biases if wanted."""

import contextlib
import json
import os
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path

from onenight.files import first_line, replacing
from onenight.trainer import EVAL_TOKENS, Trainer

SETTLING = 2  # iterations after a start that do not count for the speed
RECENT = 50  # iterations whose speed predicts the rest of the run
LOG_S = 30  # between two printed lines at most
SAVE_S = 600  # between two checkpoints at most: what a power cut can cost. A save takes seconds
MAX_POINTS = 1000  # of a curve: more cannot be seen, and would take more time and memory at each drawing


class Pace:
    """Times the run since `started` (time.monotonic()). Neither the first iterations after a start, which compile and
    allocate, nor evaluations count for the speed. `ceiling`: the TFLOP/s that MFU is relative to."""

    def __init__(self, trainer: Trainer, ceiling: float, started: float):
        self.trainer, self.ceiling, self.started = trainer, ceiling, started - trainer.progress.elapsed_s
        self.logged = self.saved = time.monotonic()
        self.evals, self.eval_s, self.save_s = 0, 0.0, 0.0  # how many, and seconds of the last one, saving included
        self.counted, self.counted_s = -SETTLING, 0.0  # iterations since the settling; negative before
        self.last_s, self.recent = 0.0, deque(maxlen=RECENT)

    def elapsed(self) -> float:
        """Seconds of this run so far, those before a resume included; also noted in the trainer's progress."""
        self.trainer.progress.elapsed_s = round(time.monotonic() - self.started, 2)
        return self.trainer.progress.elapsed_s

    def add_step(self, seconds: float):
        """Counts an iteration that took so long."""
        self.counted, self.last_s = self.counted + 1, seconds
        if self.counted > 0:
            self.counted_s += seconds
            self.recent.append(seconds)

    def log_is_due(self) -> bool:
        """Whether a line about the iteration just done is to be printed: at log_interval, and at least every 30 s."""
        log_interval, done = self.trainer.config.log_interval, self.trainer.progress.iter_num - 1
        if done % log_interval and time.monotonic() - self.logged < LOG_S:
            return False
        self.logged = time.monotonic()
        return True

    def s_per_iter(self) -> float:
        """Seconds of an iteration of late; 0 as long as none counts, unless they are slow."""
        slow = self.counted == 0 and self.last_s > LOG_S / 3
        return self.last_s if slow else sum(self.recent) / max(1, len(self.recent))

    def speed(self, s_per_iter: float) -> tuple[float, float]:
        """Tokens per second, and the share of the ceiling that they reach, over the devices of all processes."""
        tokens_per_s = self.trainer.config.tokens_per_iter / s_per_iter
        tflops = tokens_per_s * self.trainer.model.flops_per_token() / 1e12
        return tokens_per_s, tflops / self.ceiling / self.trainer.ranks.world_size

    def seconds_for(self, iters: int) -> float:
        """What so many more iterations will take, with their evaluations and savings, the last ones included."""
        config, done, per_iter = self.trainer.config, self.trainer.progress.iter_num, self.s_per_iter()
        eval_s = self.eval_s
        if self.evals < 2:  # the first one compiles: taken to cost at most a third of training on as many tokens
            tokens = config.eval_iters * EVAL_TOKENS
            tokens += min(tokens, len(self.trainer.val_tokens))
            eval_s = min(eval_s, tokens / 3 / config.tokens_per_iter * per_iter)
        evals = -(-(done + iters) // config.eval_interval) - (done - 1) // config.eval_interval
        evals -= self.trainer.progress.evaluated_iter == done
        seconds = iters * per_iter + evals * eval_s
        return seconds + self.save_s * max(1.0, seconds / SAVE_S - evals)

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
        self.path, self.wandb_run, self.failed = out_dir / "metrics.jsonl", wandb_run, set()

    @contextlib.contextmanager
    def never_stopping(self, name):
        """Ends the block at an error, which is reported, the first time for each name: metrics never stop a run."""
        try:
            yield
        except Exception as error:
            if name not in self.failed:
                print(f"{name}: cannot be written ({first_line(error)}); the run goes on without it")
            self.failed.add(name)

    def truncate(self, iter_num: int, evaluated_iter: int):
        """Drops the records that a run resumed at iter_num will write again, and lines that are not records."""
        kept = [
            record
            for record in read_metrics(self.path)
            if record["iter"] < iter_num or ("val_loss" in record and record["iter"] == iter_num == evaluated_iter)
        ]
        with self.never_stopping(self.path), replacing(self.path, "w") as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)

    def sync(self):
        """Makes everything written so far survive a power cut."""
        with self.never_stopping(self.path), open(self.path, "a") as file:
            os.fsync(file.fileno())

    def write(self, **record):
        """Appends a record, and logs it to Weights & Biases."""
        with self.never_stopping(self.path), open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        with self.never_stopping("wandb"):
            if self.wandb_run:
                self.wandb_run.log(record, step=record["iter"])

    def draw(self):
        """Makes loss.png and samples.txt from metrics.jsonl."""
        with self.never_stopping("loss.png or samples.txt"):
            records = read_metrics(self.path)
            draw_losses(records, self.path.with_name("loss.png"))
            line = "iter {iter}, val loss {val_loss:.4f}: {sample}\n"
            with replacing(self.path.with_name("samples.txt")) as file:
                file.write("".join(line.format(**record) for record in records if "sample" in record).encode())


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; [] if there is none. Lines that are not records, such as a last one cut off by a
    crash, are left out, with a message."""
    lines, records = path.read_text(errors="replace").splitlines() if path.is_file() else [], []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            record = json.loads(line)
            records += [record] if record["iter"] >= 0 else []
    if len(records) < len(lines):
        print(f"{path}: {len(lines) - len(records)} lines are damaged or not ours, and left out")
    return records


def draw_losses(records: list[dict], path: Path):
    """Draws a PNG: training and validation loss against tokens, with the learning rate below."""
    from matplotlib.figure import Figure  # here, because it takes a second to import

    steps = [record for record in records if "train_loss" in record]
    steps = steps[:: 1 + len(steps) // MAX_POINTS]
    evals = [record for record in records if "val_loss" in record]
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    loss_axes, lr_axes = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])

    def plot(axes, rows, key, **style):
        axes.plot([row["tokens"] for row in rows], [row[key] for row in rows], **style)
        axes.grid(alpha=0.3)

    plot(loss_axes, steps, "train_loss", color="tab:blue", alpha=0.5, linewidth=1, label="train, single iterations")
    plot(loss_axes, evals, "val_loss", color="tab:red", marker="o", markersize=4, label="val, fixed pass")
    plot(lr_axes, steps, "lr", color="tab:green")
    title = f"iter {evals[-1]['iter']:,}: val loss {evals[-1]['val_loss']:.3f}" if evals else ""
    loss_axes.set(title=title, ylabel="loss (nats per token)")
    loss_axes.legend()
    lr_axes.set(xlabel="tokens seen", ylabel="learning rate")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)


def start_wandb(trainer: Trainer, out_dir: Path):
    """A wandb run, the one of trainer.progress if that has one; or None, with a message, if there can be none. Without
    a key or a network it is an offline run."""
    config, wandb_id = trainer.config, trainer.progress.wandb_id
    about = {"project": config.wandb_project, "name": config.wandb_run_name, "config": asdict(config), "dir": out_dir}
    try:
        import wandb

        about |= {"id": wandb_id or None, "settings": wandb.Settings(init_timeout=30, silent=True)}
        mode = os.environ.get("WANDB_MODE") or "online"
        try:
            if mode == "online" and not wandb.login(prompt=False, verify=False):
                raise PermissionError("there is no API key (wandb login)")
            run = wandb.init(**about, resume="allow", mode=mode)
        except Exception as error:
            run = wandb.init(**about, resume="allow", mode="offline")
            print(f"wandb: offline, because {first_line(error)}; upload {out_dir / 'wandb'} later with `wandb sync`")
    except Exception as error:
        print(f"wandb: off, because {first_line(error)} (pip install -U wandb may help)")
        return None
    trainer.progress.wandb_id = run.id
    if run.url:
        print(f"wandb: {run.url}")
    return run
