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

from onenight.startup import run_script

import contextlib
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from configurator import configure
from onenight.checkpoint import (
    BEST,
    LATEST,
    changed_settings,
    check_folder,
    check_space,
    choose_start,
    load_checkpoint,
    load_start,
    save_checkpoint,
)
from onenight.device import free_memory, peak_memory_gb, set_up_device
from onenight.distributed import Ranks, start_ranks
from onenight.errors import UserError
from onenight.int8 import resolve_int8
from onenight.optim import learning_rates, set_rates, state_numbers
from onenight.page import write_page
from onenight.plan import (
    Plan,
    Speed,
    make_plan,
    measure,
    print_card_plan,
    print_outline,
    print_plan,
)
from onenight.process import StopSignal, lock_folder
from onenight.records import Records
from onenight.schedule import LOG_S, RETRY_S, SAVE_S, Clock
from onenight.settings import TrainConfig, resolve
from onenight.trainer import StopRequested, Trainer
from onenight.wording import duration

SLOW_EVAL_S = 30  # announce evaluations that take longer
GIVE_UP_S = 3600  # how long a finished run keeps trying to save
# Compare the speed with the plan after this fraction of the run, and this many seconds of training.
EARLY = 0.01
EARLY_S = 30
MAX_SLOWDOWN = 1.1  # do not report smaller differences


@dataclass
class Run:
    """A run in its folder. Only the first process of a run that trains has records, and without
    them nothing is written."""

    trainer: Trainer
    clock: Clock
    out_dir: Path
    plan: Plan | None = None  # None if the run only evaluates
    records: Records | None = None
    reloaded_iter: int | None = None  # the iteration of the checkpoint that was reloaded last
    is_compared: bool = False  # with the plan


def main(arguments: list[str]):
    # The settings
    config, replaced = configure(TrainConfig, arguments, __doc__)
    if config.plan_card:
        print_card_plan(resolve(config, torch.device("cuda"), "bfloat16", True, world_size=1))
        return
    ranks = Ranks()
    device = config.device
    if not config.plan:
        ranks, device = start_ranks(config.device)
    clock = Clock(config, ranks)
    config = choose_start(config, replaced, ranks)

    # The folder, locked while the run may write to it
    out_dir = Path(config.out_dir)
    lock = contextlib.ExitStack()
    if not (config.plan or config.eval_only):
        check_folder(config)
        if ranks.is_first:
            lock.enter_context(lock_folder(out_dir))

    with lock:
        # What the run starts from, and the settings as they are on this machine
        checkpoint = None
        if not config.plan and config.init_from != "scratch":
            checkpoint = load_start(config.init_from, out_dir)
        config = settings_here(config, checkpoint, device, ranks)

        # The model
        stop = StopSignal()
        trainer = Trainer(config, ranks, stop, checkpoint)
        run = Run(trainer, clock, out_dir)
        if not config.plan:
            trainer.open_data()

        # The plan; its measurement needs optimizers without a state
        speed = measure_speed(trainer)
        if checkpoint and config.init_from == "resume":
            resume(run, checkpoint)
        del checkpoint  # a second copy of weights and optimizers, in the CPU's memory
        if speed:
            run.plan = make_plan(trainer, speed, clock.elapsed())
            print_plan(trainer, run.plan)
            clock.eval_s = run.plan.eval_s
        if config.plan:
            return

        # The training
        if config.eval_only:
            evaluate(run)
        elif clock.fraction(trainer.progress.iter_num) >= 1 and not evaluation_is_due(run, True):
            print("this run is finished; to extend it, raise --max_iters (or --hours)")
        else:
            stop.listen()
            train_until_stopped(run)
    ranks.stop()


def settings_here(
    config: TrainConfig, checkpoint: dict | None, device_name: str, ranks: Ranks
) -> TrainConfig:
    """Return the settings that the run really uses on this machine, with the shape of the
    checkpoint that it starts from."""
    is_resumed = config.init_from == "resume"
    earlier_int8 = None
    if is_resumed and checkpoint:
        earlier_int8 = checkpoint.get("config", {}).get("int8")
    if checkpoint:
        # A run that began from weights keeps their shape, whatever the config says.
        is_from_scratch = checkpoint.get("started_from", "scratch") == "scratch"
        must_match = is_resumed and is_from_scratch and not config.eval_only
        config = config.with_shape_of(checkpoint["model_args"], must_match)
    device, dtype, compiled = set_up_device(device_name, config.dtype, config.compile)
    config = resolve(config, device, dtype, compiled, ranks.world_size)
    return replace(config, int8=resolve_int8(config.int8, device, dtype, earlier_int8))


def measure_speed(trainer: Trainer) -> Speed | None:
    """Print what the run is, and return how fast it is here; None if it only evaluates."""
    config = trainer.config
    name = config.device
    if trainer.device.type == "cuda":
        name = torch.cuda.get_device_name(trainer.device)
    print(f"device: {name}, {config.dtype}{', compiled' if config.compile else ''}")
    if config.eval_only:
        return None
    print_outline(trainer.model, config, free_memory(trainer.device, config.vram_limit_gb), name)
    return measure(trainer)


def resume(run: Run, checkpoint: dict):
    """Continue from the checkpoint, and print which settings have changed. Raises UserError if
    train.bin has changed."""
    trainer = run.trainer
    config = trainer.config
    if checkpoint.get("data", trainer.data) != trainer.data:
        if not config.allow_new_data:
            raise UserError(
                f"{config.data_dir}: train.bin is not the one that this run began with; restore "
                "it, or continue with the new one: --allow_new_data"
            )
        checkpoint["position"] = 0
    trainer.restore(checkpoint)
    progress = trainer.progress
    run.clock.earlier_s = progress.elapsed_s
    run.clock.begun_s = progress.begun_s
    for line in changed_settings(config, checkpoint):
        print(line)
    best = f"best val loss {progress.best_val_loss:.4f}"
    print(f"resuming at iter {progress.iter_num:,}, {best}")


# -----------------------------------------------------------------------------
# The training


def train_until_stopped(run: Run):
    """Train, and print how the run ended. A run that a signal has stopped exits with 128 plus the
    signal's number."""
    trainer = run.trainer
    if trainer.ranks.is_first:
        open_records(run)
    ending = "ended by an error"
    exit_status = 0
    try:
        show_page(run)
        try:
            ending = train(run)
        except StopRequested:
            ending = f"stopped at iter {trainer.progress.iter_num:,}"
            if trainer.weights_are_finite() and save(run):
                ending += "; to continue, add --init_from=resume to the same command"
            # torchrun would treat any other status as a failure, and kill the other processes.
            if trainer.ranks.world_size == 1:
                exit_status = trainer.stop.exit_status
    except KeyboardInterrupt:
        ending = "stopped without saving"
        exit_status = 130
    finally:
        show_page(run, ending)
    print(ending)
    print_summary(run)
    if exit_status:
        raise SystemExit(exit_status)


def train(run: Run) -> str:
    """Train until the run is over. Return how it ended. Raises StopRequested."""
    trainer = run.trainer
    clock = run.clock
    config = trainer.config
    while True:
        # What is due
        fraction = clock.fraction(trainer.progress.iter_num)
        is_over = fraction >= 1
        eval_is_due = evaluation_is_due(run, is_over)
        has_diverged = trainer.skipped_in_row >= trainer.max_skipped_in_row
        if has_diverged or ((eval_is_due or is_over) and not trainer.weights_are_finite()):
            go_back(run)
            continue
        if eval_is_due:
            evaluate(run)
            continue
        if is_over:
            save_at_the_end(run)
            return "done"
        if 0 < config.early_stop_patience <= trainer.progress.stale_evals:
            save_at_the_end(run)
            return f"stopped: no better val loss in {trainer.progress.stale_evals} evaluations"
        if clock.now() >= clock.next_save and trainer.weights_are_finite():
            save(run)

        # The learning rates
        set_rates(trainer.optimizers, config, fraction)

        # The gradients and the update
        began = clock.now()
        loss = trainer.accumulate()
        grad_norm = trainer.update(loss)
        trainer.count_iteration()
        clock.add_iteration(clock.now() - began)

        # The log
        is_at_interval = (trainer.progress.iter_num - 1) % config.log_interval == 0
        if is_at_interval or clock.now() >= clock.next_log:
            log(run, loss, grad_norm)
        if fraction >= EARLY and clock.iters_s >= EARLY_S and not run.is_compared:
            compare_with_plan(run)


def evaluation_is_due(run: Run, is_over: bool) -> bool:
    """Return whether this iteration's evaluation is still to be done."""
    progress = run.trainer.progress
    is_at_interval = progress.iter_num % run.trainer.config.eval_interval == 0
    return (is_at_interval or is_over) and progress.evaluated_iter != progress.iter_num


def go_back(run: Run):
    """Reload the last checkpoint, and continue with later data. Raises UserError if there is none,
    or if the run diverges a second time from the same one."""
    trainer = run.trainer
    before = trainer.progress
    problem = f"iter {before.iter_num}: loss or weights became NaN or infinite"
    remedy = "try a lower --learning_rate or --dtype=float32"
    if not (run.out_dir / LATEST).exists():
        raise UserError(f"{problem}, before the first checkpoint; {remedy}")
    checkpoint = load_checkpoint(run.out_dir / LATEST)
    if checkpoint["iter_num"] == run.reloaded_iter:
        raise UserError(f"{problem} again; resume with --init_from=resume, and {remedy}")
    run.reloaded_iter = checkpoint["iter_num"]
    trainer.restore(checkpoint)
    trainer.progress.position = before.position
    trainer.progress.skipped_iters = before.skipped_iters
    if run.records:
        run.records.truncate(trainer.progress.iter_num, trainer.progress.evaluated_iter)
    print(
        f"{problem}: reloaded the checkpoint of iter {run.reloaded_iter}, skipping the data since"
    )


# -----------------------------------------------------------------------------
# Evaluations and checkpoints


def evaluate(run: Run):
    """Compute the loss on both splits, record it with a sample, and save checkpoints."""
    trainer = run.trainer
    progress = trainer.progress
    began = run.clock.now()
    has_trained = progress.iter_num > 0
    if has_trained and trainer.config.always_save_checkpoint:
        save(run)  # first, so that a crash during the evaluation loses nothing
    if run.clock.eval_s > SLOW_EVAL_S:
        print(f"evaluating, which takes about {duration(run.clock.eval_s)}")
    train_loss = trainer.mean_loss(trainer.train_tokens)
    val_loss = trainer.mean_loss(trainer.val_tokens)
    print(f"step {progress.iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
    progress.evaluated_iter = progress.iter_num
    is_best = val_loss < progress.best_val_loss
    progress.stale_evals = 0 if is_best else progress.stale_evals + 1
    if is_best and (not has_trained or trainer.ranks.from_first(save_best(run, val_loss))):
        progress.best_val_loss = val_loss
        progress.best_iter = progress.iter_num
    if run.records:
        record_evaluation(run, train_loss, val_loss)
    if is_best and has_trained and not trainer.config.always_save_checkpoint:
        save(run)
    run.clock.eval_s = run.clock.now() - began


def record_evaluation(run: Run, train_loss: float, val_loss: float):
    """Write the losses and a sample to the metrics, and redraw loss.png and the page."""
    record = {
        "iter": run.trainer.progress.iter_num,
        "tokens": run.trainer.progress.tokens,
        "val_loss": val_loss,
        "train_loss_eval": train_loss,
        "elapsed_s": round(run.clock.elapsed(), 2),
    }
    # Sampling from logits that are not finite would end the run on a GPU.
    sample = run.trainer.sample() if math.isfinite(val_loss) else ""
    if sample:
        print(f"sample: {sample}")
        record["sample"] = sample
    run.records.write(record)
    run.records.draw()
    show_page(run)


def save(run: Run) -> bool:
    """Replace the latest checkpoint. Return whether that succeeded; if not, the old one is still
    there, and the next attempt is due in a minute."""
    trainer = run.trainer
    clock = run.clock
    began = clock.now()
    trainer.progress.elapsed_s = round(clock.elapsed(), 2)
    trainer.progress.begun_s = clock.begun_s
    is_saved = True
    if run.records:
        print(f"saving checkpoint to {run.out_dir}")
        run.records.flush()
        is_saved = save_checkpoint(run.out_dir / LATEST, trainer.checkpoint())
    clock.save_s = clock.now() - began
    clock.next_save = clock.now() + (SAVE_S if is_saved else RETRY_S)
    return is_saved


def save_best(run: Run, val_loss: float) -> bool:
    """Replace the best weights. Return whether that succeeded."""
    checkpoint = {**run.trainer.sampling_checkpoint(), "best_val_loss": val_loss}
    return not run.records or save_checkpoint(run.out_dir / BEST, checkpoint)


def save_at_the_end(run: Run):
    """Save the finished run, and retry for up to an hour if that fails. Raises UserError after
    that, and StopRequested if asked to stop meanwhile."""
    deadline = run.clock.now() + GIVE_UP_S
    while not save(run):
        while run.clock.now() < run.clock.next_save:
            time.sleep(0.1)
            if run.trainer.stop.requested:
                raise StopRequested
        if run.clock.now() > deadline:
            raise UserError(f"{run.out_dir / LATEST}: the end of the run could not be saved")


# -----------------------------------------------------------------------------
# What a run prints and records


def open_records(run: Run):
    """Open the metrics and wandb. Raises UserError if the disk has no room for the checkpoints."""
    trainer = run.trainer
    model = trainer.model
    parameters = model.get_num_params(non_embedding=False)
    check_space(run.out_dir, parameters, state_numbers(model, trainer.config))
    progress = trainer.progress
    run.records = Records(trainer.config, progress.wandb_id)
    if run.records.wandb_run:
        progress.wandb_id = run.records.wandb_run.id
    run.records.truncate(progress.iter_num, progress.evaluated_iter)


def log(run: Run, loss: float, grad_norm: float):
    """Print a line about the iteration just done, and record it."""
    trainer = run.trainer
    clock = run.clock
    iter_num = trainer.progress.iter_num - 1
    tokens_per_s = trainer.config.tokens_per_iter / clock.s_per_iter()
    left_s = clock.seconds_left(trainer.progress.iter_num)
    done_at = time.strftime("%H:%M", time.localtime(time.time() + left_s))
    line = f"iter {iter_num}: loss {loss:.4f}, time {clock.last_s * 1000:.2f}ms"
    line += f", grad norm {grad_norm:.2f}, {tokens_per_s:,.0f} tokens/s"
    line += f", ETA {duration(left_s)}, done at {done_at}"
    record = {
        "iter": iter_num,
        "tokens": trainer.progress.tokens - trainer.config.tokens_per_iter,
        "train_loss": loss,
        "grad_norm": grad_norm,
        **learning_rates(trainer.optimizers, trainer.config),
        "tokens_per_s": round(tokens_per_s),
        "elapsed_s": round(clock.elapsed(), 2),
    }
    allocated, reserved = peak_memory_gb(trainer.device)
    if allocated:
        line += f", {allocated:.1f} GB ({reserved:.1f} reserved)"
        record["peak_memory_gb"] = round(allocated, 2)
        record["peak_reserved_gb"] = round(reserved, 2)
    print(f"{line}, epoch {trainer.epoch:.2f}")
    if run.records:
        run.records.write(record)
    clock.next_log = clock.now() + LOG_S


def compare_with_plan(run: Run):
    """Print a line if the run is slower or faster than planned."""
    run.is_compared = True
    tokens_per_s = mean_tokens_per_s(run)
    slowdown = run.plan.tokens_per_s / tokens_per_s
    if 1 / MAX_SLOWDOWN < slowdown < MAX_SLOWDOWN:
        return
    iter_num = run.trainer.progress.iter_num
    new = f"done in {duration(run.clock.seconds_left(iter_num))}"
    if run.trainer.config.hours:
        iters = iter_num + (run.plan.iters - iter_num) / slowdown
        new = f"about {iters:,.0f} iterations instead of {run.plan.iters:,}"
    print(
        f"speed: {tokens_per_s:,.0f} tokens/s instead of {run.plan.tokens_per_s:,.0f} as planned; "
        f"{new}"
    )


def mean_tokens_per_s(run: Run) -> float:
    """Return the speed of this session's iterations, without evaluations and saves."""
    return run.clock.iters * run.trainer.config.tokens_per_iter / run.clock.iters_s


def show_page(run: Run, ending: str = ""):
    """Rewrite index.html. `ending` says how the run ended, and is "" while it lasts."""
    if run.records:
        write_page(run.records, run.trainer, run.clock, run.plan, ending)


def print_summary(run: Run):
    """Print the run as `key: value` lines."""
    trainer = run.trainer
    progress = trainer.progress
    print(f"iterations: {progress.iter_num:,}")
    print(f"tokens: {progress.tokens:,}")
    print(f"epochs: {trainer.epoch:.2f}")
    if progress.evaluated_iter >= 0:
        print(f"best_val_loss: {progress.best_val_loss:.4f} at iter {progress.best_iter:,}")
    print(f"skipped_iterations: {progress.skipped_iters}")
    print(f"time: {duration(run.clock.elapsed())}")
    if run.clock.iters:
        print(f"tokens_per_s: {mean_tokens_per_s(run):,.0f}")
    allocated, _ = peak_memory_gb(trainer.device)
    if allocated:
        print(f"peak_memory_gb: {allocated:.2f}")
    if (run.out_dir / "loss.png").exists():
        print(f"loss picture: {run.out_dir / 'loss.png'}")


if __name__ == "__main__":
    run_script(main)
