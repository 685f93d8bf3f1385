"""Where a run begins: from scratch, from other weights, or from its own checkpoint."""

import os
from dataclasses import asdict, replace
from pathlib import Path

from configurator import UserError
from onenight.models.checkpoint import has_checkpoint
from onenight.models.huggingface import resolve_checkpoint
from onenight.system.distributed import Ranks
from onenight.system.locks import LOCK, lock_folder
from onenight.training.run import Run
from onenight.training.settings import TrainConfig, config_file_values
from onenight.training.trainer import Trainer


def choose_start(config: TrainConfig, arguments: list[str], ranks: Ranks) -> TrainConfig:
    """Return the settings with init_from='auto' replaced by 'resume' if out_dir has a checkpoint,
    and otherwise by what a config file sets, or 'scratch'. Print which it is."""
    if config.init_from != "auto":
        return config
    # The first process decides for all: another machine may not see its folder.
    has_one = ranks.any(ranks.is_first and has_checkpoint(Path(config.out_dir)))
    if has_one:
        print(f"init_from=auto: resuming, because {config.out_dir} has a checkpoint")
        return replace(config, init_from="resume")
    start = config_file_values(arguments, ("init_from",)).get("init_from", "scratch")
    if start in ("auto", "resume"):
        start = "scratch"
    print(f"init_from=auto: starting from {start}, because {config.out_dir} has no checkpoint")
    return replace(config, init_from=os.path.expanduser(start))


def refuse_to_overwrite(config: TrainConfig, out_dir: Path):
    """Raise UserError if a new run would overwrite the checkpoints of an earlier one."""
    overwrites = not (config.init_from == "resume" or config.eval_only or config.plan)
    if overwrites and has_checkpoint(out_dir):
        raise UserError(
            f"{out_dir} contains the checkpoint of an earlier run, which a new run would "
            "overwrite: continue it with --init_from=resume, choose another --out_dir, or delete it"
        )


def refuse_second_run(config: TrainConfig, out_dir: Path):
    """Raise UserError if another run is writing to out_dir. The run locks the folder later, but
    until then it would already take memory from the other one on the GPU."""
    writes = not (config.eval_only or config.plan)
    if writes and (out_dir / LOCK).exists():
        with lock_folder(out_dir):
            pass


def load_start(config: TrainConfig, out_dir: Path) -> dict | None:
    """Return the checkpoint that the run starts from; None from scratch."""
    if config.init_from == "scratch":
        return None
    return resolve_checkpoint(config.init_from, out_dir, set_aside=not config.eval_only)


def resume(trainer: Trainer, checkpoint: dict):
    """Continue from the checkpoint, and print which settings have changed. Raises UserError if
    train.bin has changed."""
    config = trainer.config
    if checkpoint.get("data", trainer.data) != trainer.data:
        if not config.allow_new_data:
            raise UserError(
                f"{config.data_dir}: train.bin is not the one that this run began with "
                f"({checkpoint['data']['tokens']:,} tokens then, {trainer.data['tokens']:,} now); "
                "restore it, or continue with the new one: --allow_new_data"
            )
        checkpoint["position"] = 0
    trainer.restore(checkpoint)
    # A setting that the checkpoint lacks is newer than its run, which did what the default does.
    before = {**asdict(TrainConfig()), **checkpoint.get("config", {})}
    for key, value in asdict(config).items():
        may_differ = key in ("init_from", "out_dir", "eval_only", "allow_new_data")
        was_resolved = before[key] != "auto"  # older versions saved "auto"
        if before[key] != value and was_resolved and not may_differ:
            print(f"changed since: {key} {before[key]} -> {value}")
    if has_earlier_muon(checkpoint):
        print("changed since: Muon, which now has improvements that it did not have then")


def has_earlier_muon(checkpoint: dict) -> bool:
    """Return whether a checkpoint is from a version whose Muon had less state, or was
    torch.optim.Muon. Its state is loaded; what it lacks begins at zero."""
    states = checkpoint.get("muon", {}).get("state", {})
    return bool(states) and not any("slow_momentum" in state for state in states.values())


def describe_resume(run: Run) -> str:
    progress = run.progress
    lr_multiplier = run.schedule.lr_multiplier(progress)
    return (
        f"resuming at iter {progress.iter_num:,}, best val loss {progress.best_val_loss:.4f}, "
        f"learning rate at {lr_multiplier:.0%} of its peak"
    )


def how_to_extend(config: TrainConfig) -> str:
    if config.hours:
        return f"to extend it, resume with --hours above {config.hours:g}"
    return f"to extend it, resume with --max_iters above {config.max_iters}"
