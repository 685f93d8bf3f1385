"""
What training changes, from the weights to the position in the data, and the three things done with it: a step,
an evaluation, a checkpoint.
"""

import math
from dataclasses import asdict

import numpy as np
import torch

from backend import autocast, compile_model, limit_memory, use_tf32
from bins import open_bin, read_meta
from loader import TrainWindows, eval_batches
from loss import IGNORED
from model import GPT, GPTConfig
from optimizer import make_optimizers
from pretrained import crop_positions
from ranks import Ranks
from train_config import TrainConfig

EVAL_TOKENS = 16 * 1024  # one of eval_iters, whatever the batch_size
# What a checkpoint keeps of the trainer beside weights and optimizer, and what each is at the start of a run.
PROGRESS = {
    "iter_num": 0,
    "position": 0,  # in the order of the training windows
    "best_val_loss": float("inf"),
    "best_iter": 0,
    "evaluated_iter": -1,  # of the last evaluation
    "stale_evals": 0,  # evaluations since val loss improved by early_stop_min_delta
    "skipped_iters": 0,  # whose loss or gradient was not finite
    "elapsed_s": 0.0,
    "wandb_id": "",
}


def model_args(config: TrainConfig, start: dict | None = None) -> dict:
    """
    The model's shape, as GPTConfig takes it. The vocabulary is that of the checkpoint to start from, or else that of
    the data, as far as meta.json tells. Raises SystemExit if the checkpoint is of another shape.
    """
    if start:
        check_shape(config, start["model_args"])
        return {**config.shape, "vocab_size": start["model_args"]["vocab_size"]}
    vocab_size = read_meta(config.data_dir).get("vocab_size", 50257)
    return {**config.shape, "vocab_size": -(-vocab_size // 64) * 64}  # a multiple of 64 is faster


def check_shape(config: TrainConfig, was: dict):
    """
    Raises SystemExit, naming the differences, if the config's shape is not that of the model_args `was`. Dropout may
    differ, and what does not resume a run may see fewer tokens.
    """
    resumes, was = config.init_from == "resume", {"architecture": "gpt2", **was}
    other = [key for key, value in {"architecture": "gpt2", **config.shape}.items() if was.get(key) != value]
    other = [key for key in other if key != "dropout"]
    if "block_size" in other and not resumes and config.block_size < was["block_size"]:
        other.remove("block_size")
    if other:
        values = ", ".join(f"{key}={was.get(key)}" for key in other)
        if resumes:
            raise SystemExit(f"{config.out_dir}: this run has {values}; resume it with the same")
        raise SystemExit(f"{config.init_from}: has {values}; start from it with the same")


class Trainer:
    """
    `ranks` share the windows of each iteration: this one takes every world_size-th. `start` is the checkpoint whose
    weights it begins with. Raises SystemExit where there is no data that fits the shape, the windows cannot be shared,
    or the weights are of another shape.
    """

    def __init__(self, config: TrainConfig, device: torch.device, dtype: str, ranks: Ranks, start: dict | None = None):
        self.config, self.device, self.dtype, self.ranks = config, device, dtype, ranks
        use_tf32(device)
        limit_memory(config.vram_limit_gb, device)
        torch.manual_seed(config.seed)
        self.model_args = model_args(config, start)
        self.train_tokens = open_bin(config.data_dir, "train", config.block_size, self.model_args["vocab_size"])
        self.val_tokens = open_bin(config.data_dir, "val", config.block_size, self.model_args["vocab_size"])
        self.data = {"tokens": len(self.train_tokens), **read_meta(config.data_dir).get("train", {})}
        self.windows = TrainWindows(self.train_tokens, config.block_size, config.seed)
        self.windows_per_iter = config.batch_size * config.gradient_accumulation_steps
        self.batch_size = self.largest_micro_batch(config.batch_size)

        self.model = GPT(GPTConfig(**self.model_args))
        if start:
            self.model.load_state_dict(crop_positions(start["model"], config.block_size))
        self.model.to(device)
        self.optimizers = make_optimizers(self.model, config, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
        self.forward = compile_model(self.model, device) if config.compile else self.model
        self.skipped_in_row = 0
        for name, initial in PROGRESS.items():
            setattr(self, name, initial)

    def largest_micro_batch(self, limit: int) -> int:
        """The largest micro-batch up to `limit` that divides this process's share of an iteration."""
        share, rest = divmod(self.windows_per_iter, self.ranks.world_size)
        if rest or not share:
            raise SystemExit(
                f"an iteration of {self.windows_per_iter} windows (batch_size x gradient_accumulation_steps) cannot be "
                f"shared by {self.ranks.world_size} processes; make it a multiple of that"
            )
        return max(size for size in range(1, limit + 1) if share % size == 0)

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of this process in an iteration."""
        return self.windows_per_iter // self.ranks.world_size // self.batch_size

    @property
    def epoch(self) -> float:
        """Epochs seen so far, with the fraction of the present one."""
        return self.position / self.windows.windows_per_epoch

    @property
    def groups(self) -> list[dict]:
        """The parameter groups of all optimizers."""
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    def step(self, lr_share: float = 1.0) -> float:
        """
        One iteration: the gradient over all micro-batches, clipped, and the update, with each learning rate at that
        share of its peak. Returns the mean loss. Where the loss or the gradient is not finite there is no update.
        """
        for group in self.groups:
            group["lr"] = lr_share * group["peak_lr"]
        loss = self.within_memory(self.forward_backward)
        for optimizer in self.optimizers.values():
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip or math.inf).item()
        is_finite = math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled())
        if is_finite or self.scaler.is_enabled():  # which leaves out the update by itself, and lowers its scale
            for optimizer in self.optimizers.values():
                self.scaler.step(optimizer)
            self.scaler.update()
        self.skipped_in_row = 0 if is_finite else self.skipped_in_row + 1
        self.skipped_iters += not is_finite
        self.position += self.windows_per_iter
        self.iter_num += 1
        return loss

    def forward_backward(self) -> float:
        """The gradient of the mean loss over the iteration's windows, micro-batch by micro-batch. Returns that loss."""
        ranks, share = self.ranks, self.batch_size / self.windows_per_iter
        self.model.zero_grad(set_to_none=True)
        # Dropout depends on nothing but the seed and the iteration: a resumed run draws what it would have drawn.
        seeds = np.random.SeedSequence([self.config.seed, self.iter_num, ranks.rank])
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
        total = torch.zeros((), device=self.device)
        for i in range(self.gradient_accumulation_steps):
            first = self.position + ranks.rank + i * self.batch_size * ranks.world_size
            x, y = self.windows.batch(first, self.batch_size, self.device, stride=ranks.world_size)
            with autocast(self.dtype, self.device):
                _, loss = self.forward(x, y)
            loss = loss * share
            self.scaler.scale(loss).backward()
            total += loss.detach()
        ranks.sum([total, *(parameter.grad for parameter in self.model.parameters())])
        return total.item()  # waits for the device

    @torch.no_grad()
    def evaluate(self, tokens) -> float:
        """Mean loss over the fixed pass through `tokens`, each token weighing the same; no random number is drawn."""
        self.model.eval()
        loss = self.within_memory(lambda: self.mean_loss(tokens))
        self.model.train()
        return loss

    def mean_loss(self, tokens) -> float:
        total, count = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        max_tokens = self.config.eval_iters * EVAL_TOKENS
        for x, y in eval_batches(tokens, self.config.block_size, self.batch_size, max_tokens, self.device, self.ranks):
            with autocast(self.dtype, self.device):
                _, loss = self.forward(x, y)
            n = (y != IGNORED).sum()
            total, count = total + loss * n, count + n
        self.ranks.sum([total, count])
        return (total / count).item()

    def within_memory(self, job):
        """
        What job() returns. Where memory runs out, it is done again with a micro-batch of half the size and as many more
        of them: the same windows in the same order. Raises SystemExit where a single window is too much.
        """
        while True:
            try:
                return job()
            except torch.OutOfMemoryError:
                pass  # go on outside of this block, which keeps the tensors of the attempt alive
            if self.batch_size == 1:
                raise SystemExit("out of memory with a micro-batch of one window; take a smaller model or block_size")
            self.batch_size = self.largest_micro_batch(self.batch_size // 2)
            self.model.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            print(
                f"out of memory: going on with --batch_size={self.batch_size} --gradient_accumulation_steps="
                f"{self.windows_per_iter // self.batch_size}, which is the same training"
            )

    def is_sound(self) -> bool:
        """Whether all weights are finite."""
        return all(bool(parameter.isfinite().all()) for parameter in self.model.parameters())

    def weights(self) -> dict:
        """What sampling needs, with nanoGPT's names."""
        return {
            "model": self.model.state_dict(),
            "model_args": self.model_args,
            "iter_num": self.iter_num,
            "best_val_loss": self.best_val_loss,
            "config": asdict(self.config),
        }

    def checkpoint(self) -> dict:
        """All that going on needs: plain values and tensors only."""
        return {
            **self.weights(),
            **{name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "scaler": self.scaler.state_dict(),
            "data": self.data,
            **{name: getattr(self, name) for name in PROGRESS},
        }

    def restore(self, checkpoint: dict):
        """Takes up where the checkpoint stopped; reads nanoGPT's own too."""
        self.model.load_state_dict(checkpoint["model"])
        for name, optimizer in self.optimizers.items():
            own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
            optimizer.load_state_dict(checkpoint[name])
            for group, options in zip(optimizer.param_groups, own):  # as configured, not as they were saved
                group.update(options)
        if checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])
        for name, start in PROGRESS.items():  # nanoGPT's have iter_num and best_val_loss only
            setattr(self, name, checkpoint.get(name, start))
        self.best_val_loss = float(self.best_val_loss)
        if "position" not in checkpoint:
            self.position = self.iter_num * self.windows_per_iter
        self.skipped_in_row = 0
