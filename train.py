"""
Trains a GPT on data/<dataset>/{train,val}.bin.

    python train.py config/train_fineweb_4070.py --plan                 # what it will take: memory, hours, epochs
    python train.py config/train_fineweb_4070.py                        # from scratch
    python train.py config/train_fineweb_4070.py --batch_size=12        # with a key overridden
    python train.py config/train_fineweb_4070.py --init_from=resume     # go on from out_dir/ckpt.pt
    python train.py config/finetune_gpt2.py --dataset=mine              # from GPT-2, on data/mine
    torchrun --standalone --nproc_per_node=4 train.py config/train_fineweb_4070.py      # on four GPUs

Writes out_dir/ckpt.pt, best.pt, metrics.jsonl and loss.png. Ctrl-C and SIGTERM save and stop.
"""

import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: threads that spin longer crawl on a busy machine

from backend import choose_device, choose_dtype, measure_tflops, peak_memory_gb
from checkpoint import LATEST, check_space, has_checkpoint, load_latest, save_best, save_latest
from configurator import configure
from files import make_folder
from metrics import Metrics, start_wandb
from optimizer import learning_rates, schedule
from pace import Pace
from plan import print_plan
from pretrained import load_weights
from ranks import start_ranks
from train_config import TrainConfig
from trainer import Trainer
from words import duration

BAD_IN_A_ROW = 5  # iterations without an update after which the run goes back to its last checkpoint
ROLLBACKS = 2  # in a row, without a checkpoint in between, after which it gives up


def main(arguments: list[str]):
    sys.stdout.reconfigure(line_buffering=True)  # a log file is as far as the run is
    config = configure(TrainConfig, arguments, __doc__)
    out_dir = Path(config.out_dir)
    if config.init_from != "resume" and has_checkpoint(out_dir) and not (config.eval_only or config.plan):
        raise SystemExit(
            f"{out_dir} holds the checkpoint of an earlier run, which a new one would overwrite: "
            "go on with --init_from=resume, or choose another --out_dir, or delete it"
        )
    ranks, device = start_ranks(config.device)
    device = choose_device(device)
    dtype = choose_dtype(config.dtype, device)
    ceiling = measure_tflops(device, dtype)
    print_plan(config, device, dtype, ceiling)
    if config.plan:
        ranks.stop()
        return
    start = None if config.init_from == "scratch" else load_weights(config.init_from, out_dir)
    trainer = Trainer(config, device, dtype, ranks, start)
    if config.init_from == "resume":
        resume(trainer, start)
    elif start:
        print(f"starting from {config.init_from}")
    if config.eval_only:
        train_loss, val_loss = trainer.evaluate(trainer.train_tokens), trainer.evaluate(trainer.val_tokens)
        print(f"step {trainer.iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
    elif trainer.iter_num >= config.max_iters and trainer.evaluated_iter == trainer.iter_num:
        print(f"this run is finished (iter {trainer.iter_num:,}); a larger --max_iters would extend it")
    else:
        run(trainer, Pace(trainer, ceiling), out_dir)
    ranks.stop()


def resume(trainer: Trainer, checkpoint: dict):
    """Takes up the checkpoint, and says what is not as it was. Raises SystemExit where that cannot be gone on with."""
    config = trainer.config
    new_data = checkpoint.get("data", trainer.data) != trainer.data
    if new_data and not config.allow_new_data:
        raise SystemExit(
            f"{config.data_dir}: train.bin is not what this run began with ({checkpoint['data']['tokens']:,} tokens "
            f"then, {trainer.data['tokens']:,} now); put it back, or go on with the new with --allow_new_data"
        )
    trainer.restore(checkpoint)
    if new_data:
        trainer.position = 0
    print(f"resuming at iter {trainer.iter_num:,}, best val loss {trainer.best_val_loss:.4f}")
    was = checkpoint.get("config", {})
    for key, value in asdict(config).items():
        if key in was and was[key] != value and key not in ("init_from", "out_dir", "eval_only", "allow_new_data"):
            print(f"changed since: {key} {was[key]} -> {value}")


def run(trainer: Trainer, pace: Pace, out_dir: Path):
    """Everything around the training: what must be there before, and what is said after."""
    config, is_first = trainer.config, trainer.ranks.is_first
    metrics = None
    if is_first:  # the other processes write nothing
        make_folder(out_dir)
        check_space(out_dir, trainer.model.get_num_params(non_embedding=False))
        wandb_run = None
        if config.wandb_log:
            name = config.wandb_run_name
            wandb_run = start_wandb(config.wandb_project, name, trainer.wandb_id, asdict(config), out_dir)
            trainer.wandb_id = wandb_run.id if wandb_run else ""
        metrics = Metrics(out_dir, wandb_run)
        metrics.forget_after(trainer.iter_num, trainer.evaluated_iter)
    try:
        ending = train(trainer, metrics, pace, out_dir, StopSignal())
    except KeyboardInterrupt:
        print(f"stopped at once at iter {trainer.iter_num:,}; --init_from=resume goes on from the last checkpoint")
        raise SystemExit(130) from None
    except OSError as error:
        raise SystemExit(f"{out_dir}: {error.strerror or error}; --init_from=resume goes on from the last checkpoint")
    print(f"{ending}\n{summary(trainer, pace)}")
    print(f"loss picture: {out_dir / 'loss.png'}")


def train(trainer: Trainer, metrics: Metrics | None, pace: Pace, out_dir: Path, stop: "StopSignal") -> str:
    """Iterates until max_iters or something else ends it; saves and evaluates on the way. Returns why it ended."""
    config, rollbacks, went_back_to = trainer.config, 0, 0
    while True:
        lr_share, done = schedule(config, trainer.iter_num), trainer.iter_num >= config.max_iters
        due = (done or trainer.iter_num % config.eval_interval == 0) and trainer.evaluated_iter != trainer.iter_num
        asked = trainer.ranks.any(stop.asked, trainer.device)
        if trainer.skipped_in_row >= BAD_IN_A_ROW or ((due or asked) and not trainer.is_sound()):
            rollbacks += 1
            go_back(trainer, metrics, out_dir, rollbacks)
            went_back_to = trainer.iter_num
            continue
        if due:
            if trainer.iter_num and config.always_save_checkpoint:  # first: an evaluation cannot cost the run
                save(trainer, metrics, out_dir)
                rollbacks = 0 if trainer.iter_num > went_back_to else rollbacks
            improved = evaluate(trainer, metrics, lr_share, pace, out_dir)
            if improved and trainer.iter_num and not config.always_save_checkpoint:
                save(trainer, metrics, out_dir)
        stale = 0 < config.early_stop_patience <= trainer.stale_evals
        if done or stale or asked:
            save(trainer, metrics, out_dir)
            if asked and not done:
                return f"stopped; go on with the same command and --init_from=resume (iter {trainer.iter_num:,})"
            return f"stopped: no better val loss in {trainer.stale_evals} evaluations" if stale else "done"
        started = time.monotonic()
        loss = trainer.step(lr_share)
        pace.add_step(time.monotonic() - started)
        if trainer.skipped_in_row:
            print(f"iter {trainer.iter_num - 1}: loss or gradient is not finite, no update")
        if (trainer.iter_num - 1) % config.log_interval == 0:
            log(trainer, metrics, lr_share, loss, pace)


def evaluate(trainer: Trainer, metrics: Metrics | None, lr_share: float, pace: Pace, out_dir: Path) -> bool:
    """The loss on both splits: a line, a record, the picture, and best.pt. Returns whether val loss improved."""
    started, config = time.monotonic(), trainer.config
    train_loss, val_loss = trainer.evaluate(trainer.train_tokens), trainer.evaluate(trainer.val_tokens)
    pace.eval_s = time.monotonic() - started
    print(f"step {trainer.iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
    improved = val_loss < trainer.best_val_loss
    stale = val_loss >= trainer.best_val_loss - config.early_stop_min_delta
    trainer.evaluated_iter, trainer.stale_evals = trainer.iter_num, trainer.stale_evals + 1 if stale else 0
    if improved:
        trainer.best_val_loss, trainer.best_iter = val_loss, trainer.iter_num
    if metrics:
        tokens = trainer.iter_num * config.tokens_per_iter
        record = {"iter": trainer.iter_num, "tokens": tokens, "val_loss": val_loss, "train_loss_eval": train_loss}
        metrics.write(**record, **learning_rates(config, lr_share), elapsed_s=pace.elapsed())
        metrics.draw()
        if improved and trainer.iter_num:
            save_best(out_dir, trainer.weights())
    return improved


def log(trainer: Trainer, metrics: Metrics | None, lr_share: float, loss: float, pace: Pace):
    """The iteration just done: a line to read, and a record in the metrics."""
    iter_num = trainer.iter_num - 1
    record = {"iter": iter_num, "tokens": iter_num * trainer.config.tokens_per_iter, "train_loss": loss}
    record |= learning_rates(trainer.config, lr_share)
    line = f"iter {iter_num}: loss {loss:.4f}, time {pace.last_s * 1000:.2f}ms"
    if seconds := pace.lap():
        record |= {"tokens_per_s": round(pace.tokens_per_s(seconds)), "mfu": round(pace.mfu(seconds), 4)}
        line += f", {record['tokens_per_s']:,} tokens/s, mfu {record['mfu']:.1%}, ETA {duration(pace.eta())}"
    if memory := peak_memory_gb(trainer.device):
        record["peak_memory_gb"] = round(memory, 2)
        line += f", {memory:.1f} GB"
    print(f"{line}, epoch {trainer.epoch:.2f}")
    if metrics:
        metrics.write(**record, elapsed_s=pace.elapsed())


def save(trainer: Trainer, metrics: Metrics | None, out_dir: Path):
    """The latest checkpoint, after the metrics that lead up to it."""
    if metrics:
        print(f"saving checkpoint to {out_dir}")
        metrics.sync()
        save_latest(out_dir, trainer.checkpoint())


def go_back(trainer: Trainer, metrics: Metrics | None, out_dir: Path, rollbacks: int):
    """To the last checkpoint, with other data ahead. Raises SystemExit if there is none or it has not helped."""
    advice = "try a lower --learning_rate, a longer --warmup_iters, --grad_clip=1.0 or --dtype=float32"
    if not has_checkpoint(out_dir):
        raise SystemExit(f"loss or weights are not finite at iter {trainer.iter_num}, before any checkpoint; {advice}")
    if rollbacks > ROLLBACKS:
        raise SystemExit(
            f"loss or weights are not finite at iter {trainer.iter_num}, also after going back {ROLLBACKS} times; "
            f"{advice}; {out_dir / LATEST} is good"
        )
    kept = {name: getattr(trainer, name) for name in ("position", "skipped_iters", "elapsed_s")}
    trainer.restore(load_latest(out_dir))
    for name, value in kept.items():
        setattr(trainer, name, value)
    if metrics:
        metrics.forget_after(trainer.iter_num, trainer.evaluated_iter)
    print(f"loss or weights are not finite: back to iter {trainer.iter_num}, with other data ahead")


def summary(trainer: Trainer, pace: Pace) -> str:
    """The run in `key: value` lines."""
    lines = [
        f"iterations: {trainer.iter_num:,}",
        f"tokens: {trainer.iter_num * trainer.config.tokens_per_iter:,}",
        f"epochs: {trainer.epoch:.2f}",
        f"best_val_loss: {trainer.best_val_loss:.4f} at iter {trainer.best_iter:,}",
        f"skipped_iterations: {trainer.skipped_iters}",
        f"time: {duration(pace.elapsed())}",
    ]
    if pace.counted:
        lines.append(f"tokens_per_s: {pace.tokens_per_s(pace.counted_s / pace.counted):,.0f}")
    if memory := peak_memory_gb(trainer.device):
        lines.append(f"peak_memory_gb: {memory:.2f}")
    return "\n".join(lines)


class StopSignal:
    """Notices Ctrl-C and SIGTERM: `asked` from the first on; a second Ctrl-C is a KeyboardInterrupt."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.notice)

    def notice(self, number: int, _frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        os.write(2, b"\nsaving and stopping; Ctrl-C again stops at once\n")  # print may be what was interrupted


if __name__ == "__main__":
    main(sys.argv[1:])
