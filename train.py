"""
Trains a GPT on data/<dataset>/{train,val}.bin.

    python train.py config/train_fineweb_4070.py --plan                 # what it will take: memory, hours, epochs
    python train.py config/train_fineweb_4070.py                        # from scratch
    python train.py config/train_fineweb_4070.py --batch_size=12        # with a key overridden
    python train.py config/train_fineweb_4070.py --init_from=resume     # go on from out_dir/ckpt.pt

Writes out_dir/ckpt.pt, metrics.jsonl and loss.png.
"""

import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

from backend import choose_device, choose_dtype, measure_tflops, peak_memory_gb
from checkpoint import load_checkpoint, save_checkpoint
from configurator import configure
from files import make_folder
from metrics import Metrics, start_wandb
from plan import print_plan
from train_config import TrainConfig
from trainer import Trainer
from words import duration


def main(arguments: list[str]):
    config = configure(TrainConfig, arguments, __doc__)
    out_dir = Path(config.out_dir)
    ckpt = out_dir / "ckpt.pt"
    if config.init_from == "scratch" and ckpt.exists() and not (config.eval_only or config.plan):
        raise SystemExit(
            f"{ckpt} holds an earlier run, which a new one would overwrite: "
            "go on with --init_from=resume, or choose another --out_dir, or delete it"
        )
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    ceiling = measure_tflops(device, dtype)
    print_plan(config, device, dtype, ceiling)
    if config.plan:
        return
    trainer = Trainer(config, device, dtype)
    if config.init_from == "resume":
        trainer.restore(load_checkpoint(ckpt))
        print(f"resuming at iter {trainer.iter_num:,}, best val loss {trainer.best_val_loss:.4f}")
    if config.eval_only:
        train_loss, val_loss = trainer.evaluate(trainer.train_tokens), trainer.evaluate(trainer.val_tokens)
        print(f"step {trainer.iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
        return
    if trainer.iter_num >= config.max_iters:
        print(f"this run is finished (iter {trainer.iter_num:,}); a larger --max_iters would extend it")
        return
    make_folder(out_dir)
    wandb_run = None
    if config.wandb_log:
        wandb_run = start_wandb(config.wandb_project, config.wandb_run_name, asdict(config), out_dir)
    metrics, pace = Metrics(out_dir, trainer.iter_num, wandb_run), Pace(trainer, ceiling)
    try:
        train(trainer, metrics, pace, ckpt)
    except KeyboardInterrupt:
        kept = "--init_from=resume goes on from the last checkpoint" if ckpt.exists() else "no checkpoint was due yet"
        print(f"\nstopped at iter {trainer.iter_num:,}; {kept}")
        raise SystemExit(130) from None
    except OSError as error:
        raise SystemExit(f"{out_dir}: {error.strerror or error}; --init_from=resume goes on from the last checkpoint")
    print(f"done: {trainer.iter_num:,} iterations in {duration(pace.elapsed())}, {trainer.epoch:.2f} epochs")
    print(f"best val loss: {trainer.best_val_loss:.4f}")
    print(f"loss picture: {out_dir / 'loss.png'}")


def train(trainer: Trainer, metrics: Metrics, pace: "Pace", ckpt: Path):
    """Iterates until max_iters; evaluates and saves every eval_interval iterations and at the end."""
    config = trainer.config
    while True:
        lr = get_lr(config, trainer.iter_num)
        done = trainer.iter_num >= config.max_iters
        if done or trainer.iter_num % config.eval_interval == 0:
            evaluate(trainer, metrics, lr, pace)
            if trainer.iter_num and (done or config.always_save_checkpoint or trainer.just_improved):
                print(f"saving checkpoint to {ckpt.parent}")
                save_checkpoint(ckpt, trainer.checkpoint())
        if done:
            return
        started = time.monotonic()
        loss = trainer.step(lr)
        pace.add_step(time.monotonic() - started)
        if (trainer.iter_num - 1) % config.log_interval == 0:
            log(trainer, metrics, lr, loss, pace)


def evaluate(trainer: Trainer, metrics: Metrics, lr: float, pace: "Pace"):
    """The loss on both splits: a line to read, a record in the metrics, and the picture."""
    started = time.monotonic()
    train_loss, val_loss = trainer.evaluate(trainer.train_tokens), trainer.evaluate(trainer.val_tokens)
    pace.eval_s = time.monotonic() - started
    trainer.just_improved = val_loss < trainer.best_val_loss
    trainer.best_val_loss = min(trainer.best_val_loss, val_loss)
    print(f"step {trainer.iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
    tokens = trainer.iter_num * trainer.config.tokens_per_iter
    record = {"iter": trainer.iter_num, "tokens": tokens, "val_loss": val_loss, "train_loss_eval": train_loss}
    metrics.write(**record, lr=lr, elapsed_s=pace.elapsed())
    metrics.draw()


def log(trainer: Trainer, metrics: Metrics, lr: float, loss: float, pace: "Pace"):
    """The iteration just done: a line to read, and a record in the metrics."""
    iter_num, per_iter = trainer.iter_num - 1, trainer.config.tokens_per_iter
    record = {"iter": iter_num, "tokens": iter_num * per_iter, "train_loss": loss, "lr": lr}
    line = f"iter {iter_num}: loss {loss:.4f}, time {pace.last_s * 1000:.2f}ms"
    if seconds := pace.lap():
        speed = per_iter / seconds
        mfu = speed * trainer.model.flops_per_token() / 1e12 / pace.ceiling
        record |= {"tokens_per_s": round(speed), "mfu": round(mfu, 4)}
        line += f", {speed:,.0f} tokens/s, mfu {mfu:.1%}, ETA {duration(pace.eta())}"
    if memory := peak_memory_gb(trainer.device):
        record["peak_memory_gb"] = round(memory, 2)
        line += f", {memory:.1f} GB"
    print(f"{line}, epoch {trainer.epoch:.2f}")
    metrics.write(**record, elapsed_s=pace.elapsed())


def get_lr(config: TrainConfig, iter_num: int) -> float:
    """Linear warmup, then a cosine down to min_lr, then min_lr: nanoGPT's schedule."""
    if not config.decay_lr:
        return config.learning_rate
    if iter_num < config.warmup_iters:
        return config.learning_rate * (iter_num + 1) / (config.warmup_iters + 1)
    progress = (iter_num - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))) * (config.learning_rate - config.min_lr)


class Pace:
    """
    How fast the iterations go and how long the rest takes. The first 20 of a start, in which compilation and caches
    settle, and the evaluations are no measure and left out. `ceiling`: TFLOP/s that MFU is measured against.
    """

    SETTLING = 20

    def __init__(self, trainer: Trainer, ceiling: float):
        self.trainer, self.ceiling = trainer, ceiling
        self.started = time.monotonic() - trainer.elapsed_s
        self.steps, self.last_s, self.eval_s = 0, 0.0, 0.0
        self.lap_steps, self.lap_s, self.per_iter_s = 0, 0.0, 0.0

    def elapsed(self) -> float:
        """Seconds of this run so far, those before a resume included; also kept in the trainer."""
        self.trainer.elapsed_s = round(time.monotonic() - self.started, 2)
        return self.trainer.elapsed_s

    def add_step(self, seconds: float):
        self.steps, self.last_s = self.steps + 1, seconds
        if self.steps > self.SETTLING:
            self.lap_steps, self.lap_s = self.lap_steps + 1, self.lap_s + seconds

    def lap(self) -> float:
        """Mean seconds of the iterations since the last call; 0 as long as none counts."""
        if self.lap_steps:
            self.per_iter_s = self.lap_s / self.lap_steps
            self.lap_steps, self.lap_s = 0, 0.0
        return self.per_iter_s

    def eta(self) -> float:
        """Seconds to the end, at the present speed and with each evaluation that is due taking as long as the last."""
        config, done = self.trainer.config, self.trainer.iter_num
        evals = -(-config.max_iters // config.eval_interval) - (done - 1) // config.eval_interval
        return (config.max_iters - done) * self.per_iter_s + evals * self.eval_s


if __name__ == "__main__":
    main(sys.argv[1:])
