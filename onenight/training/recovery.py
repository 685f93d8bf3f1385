"""What protects a run from memory that runs out, from a model that cannot be compiled, and from
losses, gradients and weights that are not finite. (A stop that was requested: StopRequested in
trainer.py, and the end of train.py's loop.)"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from configurator import UserError
from onenight.models.checkpoint import LATEST, has_checkpoint, load_latest
from onenight.system.device import describe_compile_failure, is_compile_failure
from onenight.system.memory import is_out_of_memory
from onenight.training.settings import micro_batch_size
from onenight.training.trainer import Trainer

# Reload the last checkpoint after this many iterations in a row without an update.
MAX_SKIPPED_IN_ROW = 5
# More overflows of float16 in a row than this are not normal, and count as skipped iterations.
MAX_OVERFLOWS_IN_ROW = 20
MAX_RELOADS = 2  # of the same checkpoint in a row, after which the run ends


class Recovery:
    """Runs the parts of an iteration so that a failure leaves a run that can continue. Without an
    out_dir there is no checkpoint to return to."""

    def __init__(self, trainer: Trainer, out_dir: Path | None = None, metrics=None):
        self.trainer = trainer
        self.out_dir = out_dir
        self.metrics = metrics
        self.skipped_in_row = 0  # iterations without an update
        self.overflows_in_row = 0  # of float16
        self.is_half_updated = False  # memory ran out in an update: some weights may be new
        self.reloaded_iters = []  # the iterations of the checkpoints that were reloaded

    def within_memory(self, job: Callable, *arguments):
        """Return job(*arguments). If memory runs out, repeat it with smaller micro-batches, more of
        them: the same windows in the same order. Raises UserError if one window is too much. If
        the model cannot be compiled, repeat it without torch.compile. The job must not exchange
        large tensors with other processes: out of memory there, it would leave them waiting."""
        while True:
            try:
                return job(*arguments)
            except Exception as error:
                if self.is_compiled and is_compile_failure(error):
                    print(describe_compile_failure(error))
                    change = self.stop_compiling
                elif is_out_of_memory(error):
                    change = self.shrink_micro_batch
                else:
                    raise
            # Outside of the except block, which keeps the tensors of the failed attempt alive.
            change()

    @property
    def is_compiled(self) -> bool:
        return self.trainer.compiled_model is not self.trainer.model

    def stop_compiling(self):
        """Continue with the model as it is, uncompiled."""
        self.trainer.compiled_model = self.trainer.model

    def shrink_micro_batch(self):
        """Lower the micro-batch to half its size or the next smaller size that divides an
        iteration. Raises UserError if it is a single window."""
        trainer = self.trainer
        if trainer.micro_batch_size == 1:
            raise UserError(
                "out of memory with a micro-batch of one window; use a smaller model or block_size"
            )
        windows = trainer.config.windows_per_iter
        trainer.micro_batch_size = micro_batch_size(
            windows, trainer.ranks.world_size, limit=trainer.micro_batch_size // 2
        )
        trainer.model.zero_grad(set_to_none=True)
        if trainer.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(trainer.device)
        size = trainer.micro_batch_size
        print(
            f"out of memory: continuing with --batch_size={size} "
            f"--gradient_accumulation_steps={windows // size} (same effective batch)"
        )

    def guard_update(self, update: Callable, loss: float) -> float:
        """Return update(trainer, loss), which gives the gradient norm, and note whether there was
        an update: not with a loss or a norm that is not finite, nor if memory ran out in any of
        the processes."""
        grad_norm = math.inf
        try:
            grad_norm = update(self.trainer, loss)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.is_half_updated = True
        self.is_half_updated = self.trainer.ranks.any(self.is_half_updated)
        if self.is_half_updated:
            return grad_norm

        # Overflows are normal with float16: the loss scale was too large, and is lowered.
        is_updated = math.isfinite(loss) and math.isfinite(grad_norm)
        is_overflow = math.isfinite(loss) and self.trainer.scaler.is_enabled()
        if is_updated:
            self.skipped_in_row = 0
            self.overflows_in_row = 0
        elif is_overflow and self.overflows_in_row < MAX_OVERFLOWS_IN_ROW:
            self.overflows_in_row += 1
        else:
            self.skipped_in_row += 1
            self.trainer.progress.skipped_iters += 1
            iter_num = self.trainer.progress.iter_num
            print(f"iter {iter_num}: non-finite loss or gradient: update skipped")
        return grad_norm

    def go_back_if_needed(self, check_weights: bool = False):
        """Reload the last checkpoint if the weights cannot be trusted: after too many iterations in
        a row without an update, after half an update, or, with check_weights, if some are not
        finite. The run then continues with later data. Raises UserError if there is no checkpoint,
        or if it has not helped."""
        is_bad = self.is_half_updated or self.skipped_in_row >= MAX_SKIPPED_IN_ROW
        if is_bad or (check_weights and not self.trainer.weights_are_finite()):
            self.go_back()

    def go_back(self):
        problem = "loss or weights are not finite"
        advice = (
            "a lower --learning_rate, a longer --warmup_iters, --grad_clip=1.0 or --dtype=float32"
        )
        if self.is_half_updated:
            problem = "memory ran out in an update"
            advice = "a smaller --batch_size"
        iter_num = self.trainer.progress.iter_num
        if self.out_dir is None or not has_checkpoint(self.out_dir):
            raise UserError(f"{problem} at iter {iter_num}, before any checkpoint; try {advice}")
        checkpoint = load_latest(self.out_dir, set_aside=True)
        if self.reloaded_iters[-MAX_RELOADS:] == [checkpoint["iter_num"]] * MAX_RELOADS:
            raise UserError(
                f"{problem} again at iter {iter_num}; {self.out_dir / LATEST} is good: resume with "
                f"--init_from=resume and {advice}"
            )
        self.reloaded_iters.append(checkpoint["iter_num"])
        if self.is_half_updated:
            self.shrink_micro_batch()
        before = self.trainer.progress
        self.trainer.scaler = self.trainer.make_scaler()  # it may be in the middle of an update
        self.trainer.restore(checkpoint)
        self.trainer.progress = replace(
            self.trainer.progress, position=before.position, skipped_iters=before.skipped_iters
        )
        self.skipped_in_row = 0
        self.overflows_in_row = 0
        self.is_half_updated = False
        progress = self.trainer.progress
        if self.metrics:
            self.metrics.truncate(progress.iter_num, progress.evaluated_iter)
        print(f"{problem}: back to iter {progress.iter_num}, continuing with later data")
