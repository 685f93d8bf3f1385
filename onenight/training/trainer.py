"""The state that training changes: weights, optimizers, loss scale, and the place in the data."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch

from model import GPT, IGNORED, GPTConfig
from onenight.data.token_file import open_tokens, read_meta
from onenight.data.tokenizer import VOCAB_SIZE
from onenight.data.windows import TrainWindows, eval_batches
from onenight.models.checkpoint import check_shape, load_optimizers, load_weights
from onenight.models.generate import begin_document
from onenight.system.device import autocast, compile_model, use_tf32
from onenight.system.distributed import Ranks
from onenight.system.memory import limit_memory
from onenight.system.wording import first_line
from onenight.training.int8 import use_int8
from onenight.training.optimizers import make_optimizers
from onenight.training.settings import TrainConfig, micro_batch_size

EVAL_TOKENS = 16 * 1024  # the unit of eval_iters, whatever the batch_size


class StopRequested(Exception):
    """One of the processes was asked to stop. The current iteration or evaluation is discarded; the
    state is unchanged."""


@dataclass
class Progress:
    """How far a run is. Checkpoints hold these fields; nanoGPT's have only iter_num and
    best_val_loss."""

    iter_num: int = 0
    position: int = 0  # in the order of the training windows
    tokens: int = 0  # trained on
    fraction: float = 0.0  # of the run that is done: see schedule.py
    best_val_loss: float = math.inf
    best_iter: int = 0
    evaluated_iter: int = -1  # the iteration of the last evaluation
    stale_evals: int = 0  # evaluations since val loss improved by early_stop_min_delta
    skipped_iters: int = 0  # iterations without an update because loss or gradient was not finite
    elapsed_s: float = 0.0  # at the last checkpoint
    wandb_id: str = ""

    def count_iteration(self, config: TrainConfig):
        self.iter_num += 1
        self.position += config.windows_per_iter
        self.tokens += config.tokens_per_iter

    def count_evaluation(self, val_loss: float, min_delta: float) -> bool:
        """Note the val loss of this iteration. Return whether it is the best so far."""
        self.evaluated_iter = self.iter_num
        if val_loss < self.best_val_loss - min_delta:
            self.stale_evals = 0
        else:  # also if it is not a number
            self.stale_evals += 1
        improved = val_loss < self.best_val_loss
        if improved:
            self.best_val_loss = val_loss
            self.best_iter = self.iter_num
        return improved


def read_progress(checkpoint: dict, config: TrainConfig) -> Progress:
    """Return the progress in a checkpoint. What older versions and nanoGPT did not save follows
    from the number of iterations."""
    iter_num = checkpoint.get("iter_num", 0)
    # Older versions decided on max_iters during a run with --hours.
    max_iters = checkpoint.get("max_iters") or config.max_iters
    # The batch size may have been another one then.
    then = {**asdict(config), **checkpoint.get("config", {})}
    windows = iter_num * then["batch_size"] * then["gradient_accumulation_steps"]
    values = {
        "position": windows,
        "tokens": windows * then["block_size"],
        "fraction": min(1.0, iter_num / max_iters),
        **checkpoint,
    }
    names = [field.name for field in fields(Progress)]
    progress = Progress(**{name: values[name] for name in names if name in values})
    progress.best_val_loss = float(progress.best_val_loss)  # a tensor in nanoGPT's
    # A run that had reached its end and now has more hours continues where it would be with them.
    hours_before = checkpoint.get("config", {}).get("hours", 0)
    if config.hours > hours_before and progress.fraction >= 1:
        progress.fraction = min(1.0, progress.elapsed_s / 3600 / config.hours)
    return progress


def model_args(config: TrainConfig, checkpoint: dict | None = None) -> dict:
    """Return the shape of the model as GPTConfig takes it. The vocabulary is that of the
    checkpoint to start from, or else that of meta.json, padded to a multiple of 64, which is
    faster. Raises UserError if the checkpoint has another shape."""
    if checkpoint:
        resumes = config.init_from == "resume"
        check_shape(config.shape, checkpoint["model_args"], config.source, resumes)
        vocab_size = checkpoint["model_args"]["vocab_size"]
    else:
        vocab_size = read_meta(config.data_dir).get("vocab_size", VOCAB_SIZE)
        vocab_size = 64 * math.ceil(vocab_size / 64)
    return {**config.shape, "vocab_size": vocab_size}


class Trainer:
    """A model in training, new or with the weights of `checkpoint`. `config` is resolved (see
    settings.py). This process takes every world_size-th window of an iteration. Raises UserError
    if the data, the weights or the number of processes do not fit the config."""

    def __init__(self, config: TrainConfig, ranks: Ranks, checkpoint: dict | None = None):
        self.config = config
        self.ranks = ranks
        self.device = torch.device(config.device)
        use_tf32(self.device)
        limit_memory(config.vram_limit_gb, self.device)
        torch.manual_seed(config.seed)
        self.stop_requested = lambda: False  # asked between micro-batches: see StopRequested
        self.progress = Progress()

        # the data
        self.model_args = model_args(config, checkpoint)
        vocab_size = self.model_args["vocab_size"]
        self.train_tokens = open_tokens(config.data_dir, "train", config.block_size, vocab_size)
        self.val_tokens = open_tokens(config.data_dir, "val", config.block_size, vocab_size)
        self.data = {
            "tokens": len(self.train_tokens),
            **read_meta(config.data_dir).get("train", {}),
        }
        self.windows = TrainWindows(self.train_tokens, config.block_size, config.seed)
        # Windows in a micro-batch; fewer once memory has run out: see recovery.py.
        self.micro_batch_size = micro_batch_size(
            config.windows_per_iter, ranks.world_size, limit=config.batch_size
        )

        # the model
        self.model = GPT(GPTConfig(**self.model_args)).to(self.device)
        if checkpoint:
            load_weights(self.model, checkpoint["model"], config.source)
        if config.int8:
            use_int8(self.model)
        self.compiled_model = compile_model(self.model) if config.compile else self.model

        # the optimizers
        self.optimizers = make_optimizers(self.model, config, self.device)
        self.scaler = self.make_scaler()

    def make_scaler(self) -> torch.amp.GradScaler:
        """Return a new loss scale, which only float16 needs."""
        return torch.amp.GradScaler(self.device.type, enabled=self.config.dtype == "float16")

    @property
    def micro_batches_per_iter(self) -> int:
        """Micro-batches of this process in an iteration."""
        windows = self.config.windows_per_iter // self.ranks.world_size
        return windows // self.micro_batch_size

    @property
    def epoch(self) -> float:
        """Epochs trained on so far, with the fraction of the present one."""
        return self.progress.position / self.windows.windows_per_epoch

    @property
    def eval_tokens(self) -> int:
        """Tokens of an evaluation of both splits."""
        limit = self.config.eval_iters * EVAL_TOKENS
        return min(limit, len(self.train_tokens)) + min(limit, len(self.val_tokens))

    def micro_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the inputs and targets of this process's micro-batches in the next iteration, each
        int64 (micro_batch_size, block_size), until a stop is requested."""
        world_size = self.ranks.world_size
        for i in range(self.micro_batches_per_iter):
            if self.stop_requested():
                return
            first = (
                self.progress.position + self.ranks.rank + i * self.micro_batch_size * world_size
            )
            yield self.windows.batch(first, self.micro_batch_size, self.device, stride=world_size)

    def raise_if_stop_requested(self):
        """Raise StopRequested in every process if one of them was asked to stop."""
        if self.ranks.any(self.stop_requested()):
            raise StopRequested

    def sum_over_processes(self, loss: torch.Tensor) -> float:
        """Sum the loss and the gradients over the processes. Return the loss, once the device has
        computed it. Raises StopRequested."""
        self.raise_if_stop_requested()
        gradients = [parameter.grad for parameter in self.model.parameters()]
        self.ranks.sum([loss, *gradients])
        return loss.item()

    def seed_dropout(self):
        """Make dropout depend only on the seed, the iteration and the process, so that a resumed
        run draws what it would have drawn."""
        entropy = [self.config.seed, self.progress.iter_num, self.ranks.rank]
        seeds = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
        torch.manual_seed(int(seeds[0]))

    @torch.no_grad()
    def mean_loss(self, tokens) -> float:
        """Return the loss over the fixed evaluation pass through `tokens`, in nats, every token
        with equal weight. Raises StopRequested."""
        self.model.eval()
        total = torch.zeros((), device=self.device)
        count = torch.zeros((), device=self.device)
        batches = eval_batches(
            tokens,
            self.config.block_size,
            self.micro_batch_size,
            self.config.eval_iters * EVAL_TOKENS,
            self.device,
            self.ranks,
        )
        for x, y in batches:
            if self.stop_requested():
                break
            with autocast(self.config.dtype, self.device):
                _, loss = self.compiled_model(x, y)
            n = (y != IGNORED).sum()
            total = total + loss * n
            count = count + n
        self.raise_if_stop_requested()
        self.ranks.sum([total, count])
        return (total / count).item()

    def sample(self) -> str:
        """Return a line of text by the model as it is; '' if its vocabulary is not GPT-2's or, with
        a message, after an error."""
        if self.model_args["vocab_size"] < VOCAB_SIZE:
            return ""
        self.model.eval()
        try:
            return begin_document(self.model, self.config.dtype)
        except Exception as error:
            print(f"no sample: {first_line(error)}")
            return ""

    def weights_are_finite(self) -> bool:
        return all(bool(parameter.isfinite().all()) for parameter in self.model.parameters())

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
        """Set the state to that of a checkpoint of this project or of nanoGPT."""
        self.model.load_state_dict(checkpoint["model"])
        load_optimizers(self.optimizers, checkpoint, self.config.out_dir)
        if checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.progress = read_progress(checkpoint, self.config)
