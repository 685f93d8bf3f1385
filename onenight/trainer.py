"""An iteration: the gradients, the update, and the state that they change."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch

from model import GPT, IGNORED, GPTConfig
from onenight.bins import open_tokens, read_meta
from onenight.checkpoint import check_shape, load_optimizers, load_weights
from onenight.device import autocast, compile_model, is_out_of_memory, limit_memory, release_memory
from onenight.distributed import Ranks
from onenight.errors import UserError, first_line
from onenight.generate import begin_document
from onenight.int8 import set_int8
from onenight.optim import make_optimizers
from onenight.process import StopSignal
from onenight.settings import TrainConfig
from onenight.tokenizer import VOCAB_SIZE
from onenight.windows import TrainWindows, eval_batches

# The last checkpoint is reloaded after this many iterations in a row without an update. With
# float16, some overflows at the start are normal: the first loss scale is too large, and each one
# halves it.
MAX_SKIPPED_IN_ROW = 5
MAX_OVERFLOWS_IN_ROW = 20


class StopRequested(Exception):
    """One of the processes was asked to stop. The current iteration or evaluation is discarded; the
    state is unchanged."""


@dataclass
class Progress:
    """How far a run has got. Checkpoints hold these fields; nanoGPT's have only iter_num and
    best_val_loss."""

    iter_num: int = 0
    position: int = 0  # in the order of the training windows
    tokens: int = 0  # trained on
    best_val_loss: float = math.inf
    best_iter: int = 0
    evaluated_iter: int = -1  # the iteration of the last evaluation
    stale_evals: int = 0  # evaluations since val loss improved
    skipped_iters: int = 0  # iterations without an update because loss or gradient was not finite
    elapsed_s: float = 0.0  # at the last checkpoint
    begun_s: float = 0.0  # elapsed_s when the first iteration began
    wandb_id: str = ""
    started_from: str = "scratch"  # init_from of the first session


def model_args(config: TrainConfig, checkpoint: dict | None = None) -> dict:
    """Return the shape of the model as GPTConfig takes it. vocab_size comes from the checkpoint to
    start from or else from meta.json, padded to a multiple of 64, which is faster. Raises UserError
    if the checkpoint to resume has another shape."""
    if checkpoint:
        if config.init_from == "resume":
            check_shape(config, checkpoint["model_args"])
        vocab_size = checkpoint["model_args"]["vocab_size"]
    else:
        vocab_size = read_meta(config.data_dir).get("vocab_size", VOCAB_SIZE)
        vocab_size = 64 * math.ceil(vocab_size / 64)
    return {**config.shape, "vocab_size": vocab_size}


class Trainer:
    """A model in training, new or with the weights of `checkpoint`. `config` is resolved (see
    settings.py). This process takes every world_size-th window of an iteration. Raises UserError
    if the weights do not fit the config."""

    def __init__(
        self, config: TrainConfig, ranks: Ranks, stop: StopSignal, checkpoint: dict | None = None
    ):
        self.config = config
        self.ranks = ranks
        self.stop = stop
        self.device = torch.device(config.device)
        self.progress = Progress(started_from=config.init_from)
        self.skipped_in_row = 0  # iterations without an update
        is_float16 = config.dtype == "float16"
        self.max_skipped_in_row = MAX_OVERFLOWS_IN_ROW if is_float16 else MAX_SKIPPED_IN_ROW
        self.windows_per_iter = config.gradient_accumulation_steps * config.batch_size
        windows = self.windows_per_iter // ranks.world_size
        # Windows in a micro-batch; fewer once memory has run out.
        self.micro_batch_size = largest_divisor(windows, limit=config.batch_size)
        limit_memory(config.vram_limit_gb, self.device)
        torch.manual_seed(config.seed)

        # the model
        self.model_args = model_args(config, checkpoint)
        self.model = GPT(GPTConfig(**self.model_args)).to(self.device)
        if checkpoint:
            load_weights(self.model, checkpoint["model"], config.source)
        if config.int8 is True:
            set_int8(self.model, True)
        self.compiled_model = compile_model(self.model) if config.compile else self.model
        self.autocast = autocast(config.dtype, self.device)

        # the optimizers
        self.optimizers = make_optimizers(self.model, config, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=is_float16)

    def open_data(self):
        """Open train.bin and val.bin. Raises UserError if they are missing or do not match the
        model."""
        config = self.config
        vocab_size = self.model_args["vocab_size"]
        self.train_tokens = open_tokens(config.data_dir, "train", config.block_size, vocab_size)
        self.val_tokens = open_tokens(config.data_dir, "val", config.block_size, vocab_size)
        meta = read_meta(config.data_dir)
        self.data = {"tokens": len(self.train_tokens), **meta.get("train", {})}
        self.windows = TrainWindows(self.train_tokens, config.block_size, config.seed)

    def set_int8(self, int8: bool):
        """Switch int8 products on or off, and record that in the config."""
        self.config = replace(self.config, int8=int8)
        set_int8(self.model, int8)

    @property
    def epoch(self) -> float:
        """Epochs trained on so far, with the fraction of the current one."""
        return self.progress.position / self.windows.windows_per_epoch

    # ---- an iteration

    def accumulate(self) -> float:
        """Compute the gradient of the mean loss over the windows of the next iteration, summed over
        all processes, in micro-batches that become smaller if memory runs out. Return the loss.
        Raises StopRequested."""
        loss = self.within_memory(self.forward_backward)
        if self.ranks.any(self.stop.requested):
            raise StopRequested
        if self.ranks.world_size > 1:
            self.ranks.sum([loss, *(parameter.grad for parameter in self.model.parameters())])
        return loss.item()

    def forward_backward(self) -> torch.Tensor:
        """Compute this process's part of the gradient. Return its part of the loss, a scalar on the
        device."""
        self.model.train()  # evaluation and sampling leave it in evaluation mode
        self.model.zero_grad(set_to_none=True)
        self.seed_dropout()
        world_size = self.ranks.world_size
        total = torch.zeros((), device=self.device)
        begin = self.progress.position + self.ranks.rank
        end = self.progress.position + self.windows_per_iter
        for first in range(begin, end, self.micro_batch_size * world_size):
            if self.stop.requested:
                break  # accumulate() discards the partial result
            x, y = self.windows.batch(first, self.micro_batch_size, self.device, world_size)
            total += self.micro_step(x, y)
        return total

    def micro_step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Add the gradients of a micro-batch, int64 (windows, block_size) each. Return its part of
        the mean loss of an iteration."""
        with self.autocast:
            _, loss = self.compiled_model(x, y)
        loss = loss * (len(x) / self.windows_per_iter)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def update(self, loss: float) -> float:
        """Clip the gradient and update the weights; skip that if the loss or the gradient is not
        finite. Return the norm of the gradient before clipping."""
        for optimizer in self.optimizers.values():
            self.scaler.unscale_(optimizer)
        max_norm = self.config.grad_clip or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm).item()
        if math.isfinite(loss) and math.isfinite(grad_norm):
            for optimizer in self.optimizers.values():
                self.scaler.step(optimizer)
            self.skipped_in_row = 0
        else:
            self.skipped_in_row += 1
            self.progress.skipped_iters += 1
            print(f"iter {self.progress.iter_num}: non-finite loss or gradient: update skipped")
        self.scaler.update()
        return grad_norm

    def count_iteration(self):
        self.progress.iter_num += 1
        self.progress.position += self.windows_per_iter
        self.progress.tokens += self.config.tokens_per_iter

    def seed_dropout(self):
        """Make dropout depend only on the seed, the iteration and the process, so that a resumed
        run gets the same masks."""
        entropy = [self.config.seed, self.progress.iter_num, self.ranks.rank]
        seeds = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
        torch.manual_seed(int(seeds[0]))

    # ---- when memory runs out, or numbers go bad

    def within_memory(self, job: Callable, *arguments):
        """Return job(*arguments). If memory runs out, repeat it with more, smaller micro-batches of
        the same windows in the same order. The job must not exchange tensors with other processes,
        which would wait while this one repeats it."""
        while True:
            try:
                return job(*arguments)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            # Outside of the except block, which keeps the tensors of the failed attempt alive.
            self.halve_micro_batch()

    def halve_micro_batch(self):
        """Lower the micro-batch to half its size or the next smaller size that divides an
        iteration. Raises UserError if it is a single window."""
        if self.micro_batch_size == 1:
            raise UserError(
                "out of memory with a micro-batch of one window; use a smaller model or block_size"
            )
        windows = self.windows_per_iter // self.ranks.world_size
        self.micro_batch_size = largest_divisor(windows, limit=self.micro_batch_size // 2)
        self.model.zero_grad(set_to_none=True)
        release_memory(self.device)
        print(
            f"out of memory: continuing with --batch_size={self.micro_batch_size} "
            "(same effective batch)"
        )

    def weights_are_finite(self) -> bool:
        return all(bool(parameter.isfinite().all()) for parameter in self.model.parameters())

    # ---- evaluation

    @torch.no_grad()
    def mean_loss(self, tokens) -> float:
        """Return the loss over the fixed evaluation pass through `tokens`, in nats, every token
        with equal weight. Raises StopRequested."""
        total, count = self.within_memory(self.eval_sums, tokens)
        if self.ranks.any(self.stop.requested):
            raise StopRequested
        self.ranks.sum([total, count])
        return (total / count).item()

    def eval_sums(self, tokens) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum of the losses over this process's part of the evaluation pass, and their
        number."""
        self.model.eval()
        total = torch.zeros((), device=self.device)
        count = torch.zeros((), device=self.device)
        for x, y in eval_batches(
            tokens,
            self.config.block_size,
            self.micro_batch_size,
            self.config.eval_tokens,
            self.device,
            self.ranks,
        ):
            if self.stop.requested:
                break  # mean_loss() discards the partial result
            n = (y != IGNORED).sum()
            total += self.eval_step(x, y) * n
            count += n
        return total, count

    def eval_step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of a micro-batch, without gradients."""
        with self.autocast:
            _, loss = self.compiled_model(x, y)
        return loss

    def sample(self) -> str:
        """Return a line of text, generated by the current weights; '' if the vocabulary is not
        GPT-2's or, with a message, if that fails."""
        if self.model_args["vocab_size"] < VOCAB_SIZE:
            return ""
        self.model.eval()
        try:
            return begin_document(self.model, self.config.dtype)
        except Exception as error:
            print(f"no sample: {first_line(error)}")
            return ""

    # ---- checkpoints

    def sampling_checkpoint(self) -> dict:
        """Return what sampling and export need, with nanoGPT's names."""
        return {
            "model": self.model.state_dict(),
            "model_args": self.model_args,
            "iter_num": self.progress.iter_num,
            "tokens": self.progress.tokens,
            "best_val_loss": self.progress.best_val_loss,
            "config": asdict(self.config),
        }

    def checkpoint(self) -> dict:
        """Return everything needed to resume, as plain values and tensors."""
        states = {key: optimizer.state_dict() for key, optimizer in self.optimizers.items()}
        return {
            **self.sampling_checkpoint(),
            **states,
            "scaler": self.scaler.state_dict(),
            "data": self.data,
            **asdict(self.progress),
        }

    def restore(self, checkpoint: dict):
        """Set the state to that of a checkpoint. Raises UserError if it cannot be resumed."""
        load_optimizers(self.optimizers, checkpoint, self.config.source)
        self.model.load_state_dict(checkpoint["model"])
        if checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])
        names = {field.name for field in fields(Progress)} & checkpoint.keys()
        self.progress = Progress(**{name: checkpoint[name] for name in names})
        self.skipped_in_row = 0


def largest_divisor(windows: int, limit: int) -> int:
    """Return the largest micro-batch of at most `limit` windows that divides `windows`."""
    return max(size for size in range(1, limit + 1) if windows % size == 0)
