"""
Train a GPT on data/<dataset>/{train,val}.bin.

    python train.py config/train_fineweb_4070.py --plan              # print the plan and exit
    python train.py config/train_fineweb_4070.py                     # from scratch
    python train.py config/train_fineweb_4070.py --init_from=resume  # continue from a checkpoint
    python train.py config/train_fineweb_4070.py --init_from=auto    # continue if there is one
    python train.py config/finetune_gpt2.py --dataset=mine           # from GPT-2, on data/mine
    torchrun --standalone --nproc_per_node=4 train.py config/train_fineweb_4070.py  # on four GPUs

Writes ckpt.pt, best.pt, metrics.jsonl, loss.png, samples.txt and index.html, a page about the run,
to out_dir. Ctrl-C and, except on Windows, closing the terminal and signals such as SIGTERM and
SIGUSR1 save a checkpoint and stop.
"""

try:
    import onenight.startup  # isort: skip  (first: see there)  # noqa: F401
except ModuleNotFoundError as error:
    raise SystemExit(
        f"{error}: keep this script next to onenight/, and run it without -P, -I or PYTHONSAFEPATH"
    ) from None

import math
from pathlib import Path

import torch

from configurator import configure
from onenight.models.checkpoint import (
    BEST,
    LATEST,
    PREVIOUS,
    how_to_resume,
    save_checkpoint,
)
from onenight.system.console import run_script, set_up_output
from onenight.system.device import autocast
from onenight.system.distributed import Ranks, start_ranks
from onenight.system.locks import lock_folder
from onenight.system.memory import peak_memory_gb
from onenight.system.signals import StopSignal
from onenight.system.wording import duration
from onenight.training.clock import Clock, awake_seconds
from onenight.training.optimizers import learning_rates
from onenight.training.page import write_page
from onenight.training.plan import make_plan, measure_ceiling, print_plan
from onenight.training.run import Run
from onenight.training.schedule import fit_to_max_iters
from onenight.training.settings import TrainConfig, resolve
from onenight.training.start import (
    choose_start,
    describe_resume,
    how_to_extend,
    load_start,
    refuse_second_run,
    refuse_to_overwrite,
    resume,
)
from onenight.training.trainer import StopRequested, Trainer


def main(arguments: list[str], now=awake_seconds):
    clock = Clock(now)
    set_up_output("stdout", "stderr")
    config = configure(TrainConfig, arguments, __doc__)
    out_dir = Path(config.out_dir)

    # What the run starts from
    ranks = Ranks()
    device = config.device
    if not config.plan:
        ranks, device = start_ranks(config.device)
    config = choose_start(config, arguments, ranks)
    refuse_to_overwrite(config, out_dir)
    if ranks.is_first:
        refuse_second_run(config, out_dir)
    checkpoint = None
    if not config.plan:
        checkpoint = load_start(config, out_dir)

    # What it will really use, and what it will take
    if config.eval_only and checkpoint:
        config = config.with_shape_of(checkpoint["model_args"])
    config = resolve(config, device)
    config = fit_to_max_iters(config, arguments)
    plan = make_plan(config, measure_ceiling(config))
    print_plan(plan, config, arguments, ranks.world_size)
    if config.plan:
        return

    # The model, from its first iteration or from where it was
    trainer = Trainer(config, ranks, checkpoint)
    if config.init_from == "resume":
        resume(trainer, checkpoint)
        clock.earlier_s = trainer.progress.elapsed_s
    elif checkpoint:
        print(f"starting from {config.init_from}")
    del checkpoint  # it takes as much memory as the run itself

    # The training
    run = Run(trainer, clock, plan, out_dir)
    if config.init_from == "resume":
        print(describe_resume(run))
    if config.eval_only:
        evaluate(run)
    elif run.is_finished():
        print(f"this run is finished (iter {run.progress.iter_num:,}); {how_to_extend(config)}")
    else:
        with run.lock as lock:
            if ranks.is_first:
                lock.enter_context(lock_folder(out_dir))
            train_until_stopped(run)
    ranks.stop()


def train_until_stopped(run: Run):
    """Train, and print how the run ended. The exit status of a run that a signal has stopped is 128
    plus the signal's number."""
    run.open_outputs()
    stop = StopSignal()
    run.trainer.stop_requested = lambda: stop.requested
    ending = "ended by an error"
    exit_status = 0
    try:
        write_page(run)
        ending = train(run)
    except StopRequested:
        ending = (
            f"stopped at iter {run.progress.iter_num:,}; "
            "to continue, add --init_from=resume to the same command"
        )
        # torchrun would take another status for a failure, and kill the other processes.
        if run.trainer.ranks.world_size == 1:
            exit_status = stop.exit_status
    except KeyboardInterrupt:
        ending = "stopped without saving"
        print(f"stopped without saving; {how_to_resume(run.out_dir)}")
        raise SystemExit(130) from None
    finally:
        write_page(run, ending)
    print(ending)
    print_summary(run)
    if exit_status:
        raise SystemExit(exit_status)


def train(run: Run) -> str:
    """Train until the schedule is over or val loss has plateaued. Return how the run ended. Raises
    StopRequested, after saving, if a stop is requested."""
    trainer = run.trainer
    recovery = run.recovery
    try:
        while True:
            # If the weights cannot be trusted, go back to the last checkpoint
            recovery.go_back_if_needed(check_weights=run.evaluation_is_due())

            # The learning rates of the next iteration
            run.schedule.set_rates(trainer.optimizers, run.progress)

            # Evaluate, sample and save when it is due
            if run.evaluation_is_due():
                evaluate(run)
            elif run.clock.save_is_due() and trainer.weights_are_finite():
                save(run)

            # The end of the run
            if run.schedule.is_over(run.progress):
                save(run)
                return "done"
            if run.has_plateaued():
                save(run)
                return (
                    f"stopped: no better val loss in {run.progress.stale_evals} evaluations; to "
                    "continue, resume with a larger --early_stop_patience, or 0"
                )

            # The gradients, over micro-batches that become smaller if memory runs out
            started = run.clock.now()
            loss = recovery.within_memory(forward_backward, trainer)
            loss = trainer.sum_over_processes(loss)

            # Clipping and the update, which a non-finite loss or gradient skips
            grad_norm = recovery.guard_update(clip_and_update, loss)
            run.progress.count_iteration(run.config)
            run.clock.add_iteration(run.clock.now() - started)
            run.schedule.advance(run.progress)

            # The log
            slept_s = run.clock.take_slept_s()
            if slept_s:
                print(f"the machine slept for {duration(slept_s)}, which does not count")
            is_logged = (run.progress.iter_num - 1) % run.config.log_interval == 0
            if is_logged or run.clock.log_is_due():
                log(run, loss, grad_norm)
    except StopRequested:
        recovery.go_back_if_needed(check_weights=True)
        save(run)
        raise


def forward_backward(trainer: Trainer) -> torch.Tensor:
    """Compute this process's part of the gradient of the mean loss over an iteration's windows, one
    micro-batch after the other. Return its part of that loss, a scalar on the device."""
    trainer.model.train()  # evaluate() and sample() leave it in evaluation mode
    trainer.model.zero_grad(set_to_none=True)
    trainer.seed_dropout()
    weight = trainer.micro_batch_size / trainer.config.windows_per_iter
    total = torch.zeros((), device=trainer.device)
    for x, y in trainer.micro_batches():
        with autocast(trainer.config.dtype, trainer.device):
            _, loss = trainer.compiled_model(x, y)
        loss = loss * weight
        trainer.scaler.scale(loss).backward()
        total += loss.detach()
    return total


def clip_and_update(trainer: Trainer, loss: float) -> float:
    """Clip the gradient and update the weights, unless the loss or the gradient is not finite.
    Return the norm of the gradient before clipping."""
    for optimizer in trainer.optimizers.values():
        trainer.scaler.unscale_(optimizer)
    max_norm = trainer.config.grad_clip or math.inf
    grad_norm = torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), max_norm).item()
    if math.isfinite(loss) and math.isfinite(grad_norm):
        for optimizer in trainer.optimizers.values():
            trainer.scaler.step(optimizer)
    trainer.scaler.update()
    return grad_norm


def evaluate(run: Run):
    """Compute the loss on both splits, record it with a sample, and save checkpoints."""
    trainer = run.trainer
    config = run.config
    progress = run.progress
    started = run.clock.now()
    has_trained = progress.iter_num > 0
    if has_trained and config.always_save_checkpoint:
        save(run)  # first, so that a failed evaluation cannot cost the run
    train_loss = run.recovery.within_memory(trainer.mean_loss, trainer.train_tokens)
    val_loss = run.recovery.within_memory(trainer.mean_loss, trainer.val_tokens)
    print(f"step {progress.iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
    improved = progress.count_evaluation(val_loss, config.early_stop_min_delta)
    if run.writes_files:
        record_evaluation(run, train_loss, val_loss)
    if improved and has_trained:
        save_best(run)
        if not config.always_save_checkpoint:
            save(run)
    run.clock.add_evaluation(run.clock.now() - started)


def record_evaluation(run: Run, train_loss: float, val_loss: float):
    """Write the losses and a sample to the metrics, and draw loss.png and the page anew."""
    record = {
        "iter": run.progress.iter_num,
        "tokens": run.progress.tokens,
        "val_loss": val_loss,
        "train_loss_eval": train_loss,
        "elapsed_s": round(run.clock.elapsed(), 2),
        **learning_rates(run.trainer.optimizers, run.config),
    }
    sample = run.trainer.sample()
    if sample:
        print(f"sample: {sample}")
        record["sample"] = sample
    run.restore_folder()
    run.metrics.write(record)
    run.metrics.draw()
    write_page(run)


def log(run: Run, loss: float, grad_norm: float):
    """Print a line about the iteration just done, and record it."""
    config = run.config
    iter_num = run.progress.iter_num - 1
    record = {
        "iter": iter_num,
        "tokens": run.progress.tokens - config.tokens_per_iter,
        "train_loss": loss,
        "grad_norm": grad_norm,
        **learning_rates(run.trainer.optimizers, config),
    }
    line = f"iter {iter_num}: loss {loss:.4f}, time {run.clock.last_s * 1000:.2f}ms"
    line += f", grad norm {grad_norm:.2f}"
    s_per_iter = run.clock.s_per_iter()
    if s_per_iter:
        tokens_per_s = run.tokens_per_s(s_per_iter)
        mfu = run.mfu(s_per_iter)
        record["tokens_per_s"] = round(tokens_per_s)
        line += f", {tokens_per_s:,.0f} tokens/s, mfu "
        # The ceiling is that of products in the config's dtype, which int8 may exceed.
        if mfu <= 1 or config.int8:
            record["mfu"] = round(mfu, 4)
            line += f"{mfu:.1%}"
        else:
            line += "unknown (the machine was busy when its speed was measured)"
        eta = max(0, run.schedule.seconds_left(run.progress))
        line += f", ETA {duration(eta)}, done at {run.clock.time_of_day(eta)}"
    allocated, reserved = peak_memory_gb(run.trainer.device)
    if allocated:
        record["peak_memory_gb"] = round(allocated, 2)
        record["peak_reserved_gb"] = round(reserved, 2)
        line += f", {allocated:.1f} GB ({reserved:.1f} reserved)"
    print(f"{line}, epoch {run.trainer.epoch:.2f}")
    if run.writes_files:
        record["elapsed_s"] = round(run.clock.elapsed(), 2)
        run.restore_folder()
        run.metrics.write(record)
    run.clock.add_log()


def save(run: Run):
    """Replace the latest checkpoint, once the metrics before it are on the disk."""
    started = run.clock.now()
    run.progress.elapsed_s = round(run.clock.elapsed(), 2)
    if run.writes_files:
        run.restore_folder()
        print(f"saving checkpoint to {run.out_dir}")
        run.metrics.sync()
        checkpoint = run.trainer.checkpoint()
        save_checkpoint(run.out_dir / LATEST, checkpoint, keep=run.out_dir / PREVIOUS)
    run.clock.add_save(run.clock.now() - started)


def save_best(run: Run):
    """Replace the best weights."""
    if run.writes_files:
        run.restore_folder()
        save_checkpoint(run.out_dir / BEST, run.trainer.sampling_checkpoint())


def print_summary(run: Run):
    """Print the run as `key: value` lines."""
    progress = run.progress
    print(f"iterations: {progress.iter_num:,}")
    print(f"tokens: {progress.tokens:,}")
    print(f"epochs: {run.trainer.epoch:.2f}")
    print(f"best_val_loss: {progress.best_val_loss:.4f} at iter {progress.best_iter:,}")
    print(f"skipped_iterations: {progress.skipped_iters}")
    print(f"time: {duration(run.clock.elapsed())}")
    s_per_iter = run.clock.mean_s_per_iter()
    if s_per_iter:
        print(f"tokens_per_s: {run.tokens_per_s(s_per_iter):,.0f}")
    allocated, _ = peak_memory_gb(run.trainer.device)
    if allocated:
        print(f"peak_memory_gb: {allocated:.2f}")
    picture = run.out_dir / "loss.png"
    if picture.exists():
        print(f"loss picture: {picture}")


if __name__ == "__main__":
    run_script(main)
