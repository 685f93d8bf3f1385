"""
Trains a GPT on data/<dataset>/{train,val}.bin.

    python train.py config/train_fineweb_4070.py --plan                 # what it will take: memory, hours, epochs
    python train.py config/train_fineweb_4070.py                        # from scratch
    python train.py config/train_fineweb_4070.py --init_from=resume     # continue from out_dir/ckpt.pt
    python train.py config/finetune_gpt2.py --dataset=mine              # from GPT-2, on data/mine
    torchrun --standalone --nproc_per_node=4 train.py config/train_fineweb_4070.py      # on four GPUs

Writes ckpt.pt, best.pt, metrics.jsonl, loss.png and samples.txt to out_dir. Ctrl-C and, except on Windows, SIGTERM and
closing the terminal save and stop.
"""

import contextlib
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from onenight.checkpoint import BEST, LATEST, PREVIOUS, check_space, has_checkpoint, load_latest, save_checkpoint
from onenight.console import StopSignal, set_up_output
from onenight.device import Ranks, measure_tflops, peak_memory_gb, set_up_device, start_ranks
from onenight.files import duration, lock_folder
from onenight.hours import decide_length, open_ended
from onenight.huggingface import resolve_checkpoint
from onenight.metrics import SAVE_S, Metrics, Pace, start_wandb
from onenight.optimizer import learning_rates, schedule
from onenight.plan import print_plan, recipe_warning
from onenight.train_config import TrainConfig
from onenight.trainer import Stopped, Trainer

from configurator import configure

BAD_IN_A_ROW = 5  # iterations without an update after which the run goes back to its last checkpoint
ROLLBACKS = 2  # to the same checkpoint, after which it gives up


def main(arguments: list[str]):
    started = time.monotonic()
    set_up_output("stdout", "stderr")
    config = configure(TrainConfig, arguments, __doc__)
    out_dir = Path(config.out_dir)
    if config.init_from != "resume" and has_checkpoint(out_dir) and not (config.eval_only or config.plan):
        raise SystemExit(
            f"{out_dir} holds the checkpoint of an earlier run, which a new one would overwrite: "
            "continue it with --init_from=resume, or choose another --out_dir, or delete it"
        )
    ranks, device = (Ranks(), config.device) if config.plan else start_ranks(config.device)
    from_scratch = config.init_from == "scratch" or config.plan
    checkpoint = None if from_scratch else resolve_checkpoint(config.init_from, out_dir)
    if config.eval_only and checkpoint:
        config = config.with_shape_of(checkpoint["model_args"])
    for_other = config.plan and config.plan_vram_gb > 0  # a plan for another machine
    device, dtype, compiled = set_up_device(device, config.dtype, config.compile and not for_other)
    config = replace(config, compile=config.compile if for_other else compiled)
    ceiling = measure_tflops(device, dtype)
    print_plan(config, device, dtype, ceiling)
    print(recipe_warning(config, arguments), end="")
    if config.plan:
        return
    trainer = Trainer(config, device, dtype, ranks, checkpoint)
    if config.init_from == "resume":
        resume(trainer, checkpoint)
    elif checkpoint:
        print(f"starting from {config.init_from}")
    del checkpoint  # as large as the run's own, which need not stay in memory
    if config.hours:
        trainer.config = open_ended(config, trainer.progress)
    progress, pace = trainer.progress, Pace(trainer, ceiling, started)
    if config.eval_only:
        evaluate(trainer, None, pace, out_dir)
    elif progress.iter_num >= trainer.config.max_iters and progress.evaluated_iter == progress.iter_num:
        print(f"this run is finished (iter {progress.iter_num:,}); larger --max_iters and --lr_decay_iters extend it")
    else:
        with lock_folder(out_dir) if ranks.is_first else contextlib.nullcontext():
            run(trainer, pace, out_dir)
    ranks.stop()


def resume(trainer: Trainer, checkpoint: dict):
    """Continues from the checkpoint, and prints which settings changed. Raises SystemExit if the data are others."""
    config = trainer.config
    if checkpoint.get("data", trainer.data) != trainer.data:
        if not config.allow_new_data:
            then, now = checkpoint["data"]["tokens"], trainer.data["tokens"]
            raise SystemExit(
                f"{config.data_dir}: train.bin is not the one that this run began with ({then:,} tokens then, {now:,} "
                "now); put it back, or continue with the new one: --allow_new_data"
            )
        checkpoint["position"] = 0
    trainer.restore(checkpoint)
    print(f"resuming at iter {trainer.progress.iter_num:,}, best val loss {trainer.progress.best_val_loss:.4f}")
    before, own = checkpoint.get("config", {}), {"init_from", "out_dir", "eval_only", "allow_new_data"}
    if config.hours:  # which has its own say on these
        own |= {"max_iters", "lr_decay_iters", "warmdown_iters"}
    for key, value in asdict(config).items():
        if key in before and before[key] != value and key not in own:
            print(f"changed since: {key} {before[key]} -> {value}")


def run(trainer: Trainer, pace: Pace, out_dir: Path):
    """Opens the output files, trains, and prints how it ended."""
    metrics = None
    if trainer.ranks.is_first:  # the other processes write nothing
        check_space(out_dir, trainer.model.get_num_params(non_embedding=False))
        metrics = Metrics(out_dir, start_wandb(trainer, out_dir) if trainer.config.wandb_log else None)
        metrics.truncate(trainer.progress.iter_num, trainer.progress.evaluated_iter)
    stop = StopSignal()
    trainer.stop_asked = lambda: stop.asked
    try:
        ending = train(trainer, metrics, pace, out_dir)
    except KeyboardInterrupt:
        print("stopped at once; --init_from=resume continues from the last checkpoint")
        raise SystemExit(130) from None
    print(ending)
    print_summary(trainer, pace)
    print(f"loss picture: {out_dir / 'loss.png'}")


def train(trainer: Trainer, metrics: Metrics | None, pace: Pace, out_dir: Path) -> str:
    """Iterates until max_iters, or until something else ends it; saves and evaluates. Returns why it ended."""
    went_back_to, asked = [], False  # iterations; whether somebody has asked to stop
    while True:
        if trainer.config.hours:
            decide_length(trainer, pace)
        config, progress = trainer.config, trainer.progress
        iter_num, done = progress.iter_num, progress.iter_num >= config.max_iters
        due = (done or iter_num % config.eval_interval == 0) and progress.evaluated_iter != iter_num and not asked
        is_bad = trainer.skipped_in_row >= BAD_IN_A_ROW or trainer.half_updated
        if is_bad or ((due or asked) and not trainer.weights_are_finite()):
            go_back(trainer, metrics, out_dir, went_back_to)
            continue
        try:
            if due:
                evaluate(trainer, metrics, pace, out_dir)
            elif time.monotonic() - pace.saved > SAVE_S and trainer.weights_are_finite():
                save(trainer, metrics, pace, out_dir)
            stale = 0 < config.early_stop_patience <= progress.stale_evals
            if done or stale or asked:
                save(trainer, metrics, pace, out_dir)
                if asked and not (done and progress.evaluated_iter == iter_num):
                    return f"stopped at iter {iter_num:,}; to continue, add --init_from=resume to the same command"
                return f"stopped: no better val loss in {progress.stale_evals} evaluations" if stale else "done"
            started, lr_share = time.monotonic(), schedule(config, iter_num)
            loss = trainer.step(lr_share)
        except Stopped:
            asked = True
            continue
        pace.add_step(time.monotonic() - started)
        if trainer.skipped_in_row:
            print(f"iter {iter_num}: loss or gradient is not finite, no update")
        if pace.log_is_due():
            log(trainer, metrics, lr_share, loss, pace)


def evaluate(trainer: Trainer, metrics: Metrics | None, pace: Pace, out_dir: Path):
    """The loss on both splits, and a sample: prints, records and draws them, and saves."""
    config, progress, started = trainer.config, trainer.progress, time.monotonic()
    if progress.iter_num and config.always_save_checkpoint:  # before the evaluation, so that it cannot cost the run
        save(trainer, metrics, pace, out_dir)
    train_loss, val_loss = trainer.evaluate(trainer.train_tokens), trainer.evaluate(trainer.val_tokens)
    print(f"step {progress.iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
    improved = val_loss < progress.best_val_loss
    stale = val_loss >= progress.best_val_loss - config.early_stop_min_delta
    progress.evaluated_iter, progress.stale_evals = progress.iter_num, progress.stale_evals + 1 if stale else 0
    if improved:
        progress.best_val_loss, progress.best_iter = val_loss, progress.iter_num
    if metrics:
        record = {"val_loss": val_loss, "train_loss_eval": train_loss, "elapsed_s": pace.elapsed()}
        record |= learning_rates(config, schedule(config, progress.iter_num))
        if text := trainer.sample():
            print(f"sample: {text}")
            record["sample"] = text
        metrics.write(iter=progress.iter_num, tokens=progress.iter_num * config.tokens_per_iter, **record)
        metrics.draw()
        if improved and progress.iter_num:
            save_checkpoint(out_dir / BEST, trainer.sampling_checkpoint())
    if improved and progress.iter_num and not config.always_save_checkpoint:
        save(trainer, metrics, pace, out_dir)
    pace.evals, pace.eval_s = pace.evals + 1, time.monotonic() - started


def log(trainer: Trainer, metrics: Metrics | None, lr_share: float, loss: float, pace: Pace):
    """Prints a line about the iteration just done, and records it."""
    iter_num = trainer.progress.iter_num - 1
    record = {"iter": iter_num, "tokens": iter_num * trainer.config.tokens_per_iter, "train_loss": loss}
    record |= learning_rates(trainer.config, lr_share)
    line = f"iter {iter_num}: loss {loss:.4f}, time {pace.last_s * 1000:.2f}ms"
    if seconds := pace.s_per_iter():
        tokens_per_s, mfu = pace.speed(seconds)
        record |= {"tokens_per_s": round(tokens_per_s), "mfu": round(mfu, 4)}
        share = f"{mfu:.1%}" if mfu <= 1 else "unknown (the machine was busy when it was measured)"
        line += f", {tokens_per_s:,.0f} tokens/s, mfu {share}, ETA {duration(pace.eta())}"
    allocated, reserved = peak_memory_gb(trainer.device)
    if allocated:
        record |= {"peak_memory_gb": round(allocated, 2), "peak_reserved_gb": round(reserved, 2)}
        line += f", {allocated:.1f} GB ({reserved:.1f} reserved)"
    print(f"{line}, epoch {trainer.epoch:.2f}")
    if metrics:
        metrics.write(**record, elapsed_s=pace.elapsed())


def save(trainer: Trainer, metrics: Metrics | None, pace: Pace, out_dir: Path):
    """Replaces the latest checkpoint, once the metrics before it are on the disk."""
    started = time.monotonic()
    if metrics:
        print(f"saving checkpoint to {out_dir}")
        metrics.sync()
        save_checkpoint(out_dir / LATEST, trainer.checkpoint(), keep=out_dir / PREVIOUS)
    pace.saved, pace.save_s = time.monotonic(), time.monotonic() - started


def go_back(trainer: Trainer, metrics: Metrics | None, out_dir: Path, went_back_to: list[int]):
    """Returns to the last checkpoint, with other data ahead, and notes its iteration in went_back_to. Raises SystemExit
    if there is none or it did not help."""
    now, what = trainer.progress, "loss or weights are not finite"
    advice = "a lower --learning_rate, a longer --warmup_iters, --grad_clip=1.0 or --dtype=float32"
    if trainer.half_updated:
        what, advice = "memory ran out in an update", "a smaller --batch_size"
    if not has_checkpoint(out_dir):
        raise SystemExit(f"{what} at iter {now.iter_num}, before any checkpoint; try {advice}")
    checkpoint = load_latest(out_dir)
    if went_back_to[-ROLLBACKS:] == [checkpoint["iter_num"]] * ROLLBACKS:
        raise SystemExit(f"{what} again at iter {now.iter_num}; try {advice}; {out_dir / LATEST} is good")
    went_back_to.append(checkpoint["iter_num"])
    if trainer.half_updated:
        trainer.halve_micro_batch()
    trainer.restore(checkpoint)
    kept = ("position", "skipped_iters", "elapsed_s", "hours", "decisions", "max_iters", "warmdown_iters")
    trainer.progress = replace(trainer.progress, **{key: getattr(now, key) for key in kept})
    if metrics:
        metrics.truncate(trainer.progress.iter_num, trainer.progress.evaluated_iter)
    print(f"{what}: back to iter {trainer.progress.iter_num}, with other data ahead")


def print_summary(trainer: Trainer, pace: Pace):
    """The run in `key: value` lines."""
    progress = trainer.progress
    print(f"iterations: {progress.iter_num:,}")
    print(f"tokens: {progress.iter_num * trainer.config.tokens_per_iter:,}")
    print(f"epochs: {trainer.epoch:.2f}")
    print(f"best_val_loss: {progress.best_val_loss:.4f} at iter {progress.best_iter:,}")
    print(f"skipped_iterations: {progress.skipped_iters}")
    print(f"time: {duration(pace.elapsed())}")
    if pace.counted > 0:
        print(f"tokens_per_s: {pace.speed(pace.counted_s / pace.counted)[0]:,.0f}")
    if memory := peak_memory_gb(trainer.device)[0]:
        print(f"peak_memory_gb: {memory:.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
