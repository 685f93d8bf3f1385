"""One training run in its folder: the trainer, and what times, plans, protects and records it."""

import contextlib
import os
from pathlib import Path

from onenight.models.checkpoint import check_space
from onenight.system.locks import lock_folder
from onenight.training.clock import Clock
from onenight.training.metrics import Metrics
from onenight.training.optimizers import state_numbers
from onenight.training.plan import Plan
from onenight.training.recovery import Recovery
from onenight.training.schedule import Schedule
from onenight.training.trainer import Progress, Trainer
from onenight.training.wandb_log import start_wandb


class Run:
    """What the functions of train.py share."""

    def __init__(self, trainer: Trainer, clock: Clock, plan: Plan, out_dir: Path):
        self.trainer = trainer
        self.config = trainer.config
        self.clock = clock
        self.plan = plan
        self.out_dir = out_dir
        self.lock = contextlib.ExitStack()  # holds the lock of out_dir while the run writes there
        self.schedule = Schedule(self.config, clock, trainer.ranks, trainer.eval_tokens)
        self.recovery = Recovery(trainer, out_dir)
        self.metrics = None  # stays None in all processes but the first

    @property
    def progress(self) -> Progress:
        return self.trainer.progress

    def open_outputs(self):
        """Open the metrics and wandb, in the first process: the others write nothing. Raises
        UserError if the disk has no room for the checkpoints."""
        if not self.trainer.ranks.is_first:
            return
        model = self.trainer.model
        weights = model.get_num_params(non_embedding=False)
        check_space(self.out_dir, weights, state_numbers(model, self.config) / weights)
        wandb_run = None
        if self.config.wandb_log:
            wandb_run = start_wandb(self.config, self.out_dir, self.progress.wandb_id)
        if wandb_run:
            self.progress.wandb_id = wandb_run.id
        self.metrics = Metrics(self.out_dir, wandb_run)
        self.metrics.truncate(self.progress.iter_num, self.progress.evaluated_iter)
        self.recovery.metrics = self.metrics

    @property
    def writes_files(self) -> bool:
        """Whether this process records the run: not the others, and not with --eval_only."""
        return self.metrics is not None

    def restore_folder(self):
        """Create and lock out_dir again if it was removed or renamed during the run."""
        if os.path.isdir(self.out_dir):
            return
        print(f"{self.out_dir} was removed or renamed during the run: creating it again")
        self.lock.close()
        self.lock.enter_context(lock_folder(self.out_dir))

    def evaluation_is_due(self) -> bool:
        if self.progress.evaluated_iter == self.progress.iter_num:
            return False
        at_interval = self.progress.iter_num % self.config.eval_interval == 0
        return at_interval or self.schedule.is_over(self.progress)

    def has_plateaued(self) -> bool:
        """Return whether val loss has not improved for early_stop_patience evaluations."""
        patience = self.config.early_stop_patience
        return 0 < patience <= self.progress.stale_evals

    def is_finished(self) -> bool:
        """Return whether the last iteration and its evaluation are done."""
        return self.schedule.is_over(self.progress) and not self.evaluation_is_due()

    def tokens_per_s(self, s_per_iter: float) -> float:
        return self.config.tokens_per_iter / s_per_iter

    def mfu(self, s_per_iter: float) -> float:
        """Return the model FLOPs utilization: the fraction of the plan's ceiling, over the devices
        of all processes."""
        flops_per_s = self.tokens_per_s(s_per_iter) * self.trainer.model.flops_per_token()
        return flops_per_s / 1e12 / self.plan.ceiling / self.trainer.ranks.world_size
