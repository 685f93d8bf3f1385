"""The state that training changes, from the weights to the position in the data, and what is done with it: a step, an
evaluation, a checkpoint."""

import math
from dataclasses import asdict, dataclass, fields

from onenight.bins import read_meta
from onenight.checkpoint import check_shape, load_optimizers, load_weights
from onenight.dataset import TrainWindows, eval_batches, open_bin
from onenight.device import Ranks, autocast, compile_model, is_out_of_memory, limit_memory, use_tf32
from onenight.files import first_line
from onenight.generate import begin_document
from onenight.optimizer import make_optimizers
from onenight.tokenizer import VOCAB_SIZE
from onenight.train_config import TrainConfig

import numpy as np
import torch

from model import GPT, IGNORED, GPTConfig

EVAL_TOKENS = 16 * 1024  # what eval_iters counts, independent of batch_size


class Stopped(Exception):
    """A stop was asked for, in any of the processes: the iteration or evaluation is dropped, the state as before it."""


@dataclass
class Progress:
    """How far a run is. A checkpoint holds it field by field; nanoGPT's has iter_num and best_val_loss only."""

    iter_num: int = 0
    position: int = 0  # in the order of the training windows
    best_val_loss: float = math.inf
    best_iter: int = 0
    evaluated_iter: int = -1  # of the last evaluation
    stale_evals: int = 0  # evaluations since val loss improved by early_stop_min_delta
    skipped_iters: int = 0  # iterations without an update, because loss or gradient was not finite
    elapsed_s: float = 0.0
    wandb_id: str = ""
    hours: float = 0.0  # for which the following were decided: see hours.py
    decisions: int = 0
    max_iters: int = 0
    warmdown_iters: int = 0


def model_args(config: TrainConfig, checkpoint: dict | None = None) -> dict:
    """The model's shape, as GPTConfig takes it, with the vocabulary of the checkpoint to start from, or else that of
    meta.json. Raises SystemExit if the checkpoint has another shape."""
    if checkpoint:
        resumes = config.init_from == "resume"
        check_shape(config.shape, checkpoint["model_args"], config.out_dir if resumes else config.init_from, resumes)
        return {**config.shape, "vocab_size": checkpoint["model_args"]["vocab_size"]}
    vocab_size = read_meta(config.data_dir).get("vocab_size", 50257)
    return {**config.shape, "vocab_size": -(-vocab_size // 64) * 64}  # a multiple of 64 is faster


class Trainer:
    """Trains a new model, with the weights of `checkpoint` if given. This process takes every world_size-th window of
    an iteration. Raises SystemExit if the data, the weights or the number of processes do not fit the config."""

    def __init__(self, config: TrainConfig, device: torch.device, dtype: str, ranks: Ranks, checkpoint=None):
        self.config, self.device, self.dtype, self.ranks = config, device, dtype, ranks
        use_tf32(device)
        limit_memory(config.vram_limit_gb, device)
        torch.manual_seed(config.seed)
        self.model_args = model_args(config, checkpoint)
        self.train_tokens = open_bin(config.data_dir, "train", config.block_size, self.model_args["vocab_size"])
        self.val_tokens = open_bin(config.data_dir, "val", config.block_size, self.model_args["vocab_size"])
        self.data = {"tokens": len(self.train_tokens), **read_meta(config.data_dir).get("train", {})}
        self.windows = TrainWindows(self.train_tokens, config.block_size, config.seed)
        self.windows_per_iter = config.batch_size * config.gradient_accumulation_steps
        self.batch_size = self.largest_micro_batch(config.batch_size)

        self.model = GPT(GPTConfig(**self.model_args)).to(device)
        if checkpoint:
            source = config.out_dir if config.init_from == "resume" else config.init_from
            load_weights(self.model, checkpoint["model"], source)
        self.compiled_model = compile_model(self.model) if config.compile else self.model
        self.optimizers = make_optimizers(self.model, config, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
        self.progress = Progress()
        self.skipped_in_row, self.half_updated = 0, False
        self.stop_asked = lambda: False  # asked between micro-batches: see Stopped

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
        """Epochs trained on so far, with the fraction of the present one."""
        return self.progress.position / self.windows.windows_per_epoch

    def step(self, lr_share: float = 1.0) -> float:
        """One iteration: the gradient over all micro-batches, clipped, and the update, with each learning rate at that
        share of its peak; no update if loss or gradient is not finite. Returns the mean loss. Raises Stopped."""
        for group in (group for optimizer in self.optimizers.values() for group in optimizer.param_groups):
            group["lr"] = lr_share * group["peak_lr"]
        loss = self.within_memory(self.forward_backward)
        is_finite = self.update(loss)
        self.skipped_in_row = 0 if is_finite else self.skipped_in_row + 1
        self.progress.skipped_iters += not is_finite
        self.progress.position += self.windows_per_iter
        self.progress.iter_num += 1
        return loss

    def forward_backward(self) -> float:
        """The gradient of the mean loss over the iteration's windows, micro-batch by micro-batch. Returns that loss."""
        ranks, share = self.ranks, self.batch_size / self.windows_per_iter
        self.model.train()  # after evaluate() or sample()
        self.model.zero_grad(set_to_none=True)
        # Dropout depends on the seed and the iteration only, so that a resumed run draws what it would have drawn.
        seeds = np.random.SeedSequence([self.config.seed, self.progress.iter_num, ranks.rank])
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
        total = torch.zeros((), device=self.device)
        for i in range(self.gradient_accumulation_steps):
            if self.stop_asked():
                break
            first = self.progress.position + ranks.rank + i * self.batch_size * ranks.world_size
            x, y = self.windows.batch(first, self.batch_size, self.device, stride=ranks.world_size)
            with autocast(self.dtype, self.device):
                _, loss = self.compiled_model(x, y)
            loss = loss * share
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self.agree_to_stop()
        ranks.sum([total, *(parameter.grad for parameter in self.model.parameters())])
        return total.item()  # waits for the device

    def update(self, loss: float) -> bool:
        """Clips the gradient and updates the weights; returns whether that was possible. If memory runs out meanwhile,
        in any process, half_updated is set: some weights may be new, and others old."""
        for optimizer in self.optimizers.values():
            self.scaler.unscale_(optimizer)
        try:
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip or math.inf).item()
            if math.isfinite(loss) and math.isfinite(norm):  # one decision for all optimizers
                for optimizer in self.optimizers.values():
                    self.scaler.step(optimizer)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.half_updated, norm = True, math.inf
        self.half_updated = self.ranks.any(self.half_updated)
        self.scaler.update()  # lowers the scale after an overflow, which is not the model's fault
        return math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled())

    def agree_to_stop(self):
        """Raises Stopped in every process if one of them was asked to stop."""
        if self.ranks.any(self.stop_asked()):
            raise Stopped

    @torch.no_grad()
    def evaluate(self, tokens) -> float:
        """Mean loss over the fixed pass through `tokens`, every token with equal weight. Raises Stopped."""
        self.model.eval()
        return self.within_memory(lambda: self.mean_loss(tokens))

    def mean_loss(self, tokens) -> float:
        """evaluate() as long as memory suffices."""
        total, count = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        max_tokens = self.config.eval_iters * EVAL_TOKENS
        for x, y in eval_batches(tokens, self.config.block_size, self.batch_size, max_tokens, self.device, self.ranks):
            if self.stop_asked():
                break
            with autocast(self.dtype, self.device):
                _, loss = self.compiled_model(x, y)
            n = (y != IGNORED).sum()
            total, count = total + loss * n, count + n
        self.agree_to_stop()
        self.ranks.sum([total, count])
        return (total / count).item()

    def within_memory(self, job):
        """What job() returns. If memory runs out, it is repeated with a micro-batch of half the size and twice as many:
        the same windows in the same order. Raises SystemExit if a single window is too much."""
        while True:
            try:
                return job()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            self.halve_micro_batch()  # outside of that block, which keeps the tensors of the attempt alive

    def halve_micro_batch(self):
        """Halves the micro-batch, and measures the peak anew. Raises SystemExit if it is a single window."""
        if self.batch_size == 1:
            raise SystemExit("out of memory with a micro-batch of one window; take a smaller model or block_size")
        self.batch_size = self.largest_micro_batch(self.batch_size // 2)
        self.model.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        steps = self.windows_per_iter // self.batch_size
        sizes = f"--batch_size={self.batch_size} --gradient_accumulation_steps={steps}"
        print(f"out of memory: going on with {sizes}, which is the same training")

    def sample(self) -> str:
        """A line of text by the model as it is; '' if its vocabulary is not GPT-2's, or at an error, with a message."""
        if self.model_args["vocab_size"] < VOCAB_SIZE:
            return ""
        self.model.eval()
        try:
            return begin_document(self.model, self.dtype)
        except Exception as error:
            print(f"no sample: {first_line(error)}")
            return ""

    def weights_are_finite(self) -> bool:
        return all(bool(parameter.isfinite().all()) for parameter in self.model.parameters())

    def sampling_checkpoint(self) -> dict:
        """What sampling and export need, with nanoGPT's names."""
        return {
            "model": self.model.state_dict(),
            "model_args": self.model_args,
            "iter_num": self.progress.iter_num,
            "best_val_loss": self.progress.best_val_loss,
            "config": asdict(self.config),
        }

    def checkpoint(self) -> dict:
        """Everything needed to resume, in plain values and tensors."""
        return {
            **self.sampling_checkpoint(),
            **{name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "scaler": self.scaler.state_dict(),
            "data": self.data,
            **asdict(self.progress),
        }

    def restore(self, checkpoint: dict):
        """Sets the state to that of a checkpoint of this project or of nanoGPT."""
        self.model.load_state_dict(checkpoint["model"])
        load_optimizers(self.optimizers, checkpoint, self.config.out_dir)
        if checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])
        told = {"position": checkpoint.get("iter_num", 0) * self.windows_per_iter, **checkpoint}  # nanoGPT's has none
        self.progress = Progress(**{field.name: told[field.name] for field in fields(Progress) if field.name in told})
        self.progress.best_val_loss = float(self.progress.best_val_loss)  # a tensor in nanoGPT's
        self.skipped_in_row, self.half_updated = 0, False
