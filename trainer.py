"""
What training changes, from the weights to the position in the data, and the three things done with it: a step,
an evaluation, a checkpoint.
"""

from dataclasses import asdict
from pathlib import Path

import torch

from backend import autocast, compile_model, limit_memory, use_tf32
from bins import open_bin, read_meta
from loader import TrainWindows, eval_batches
from loss import IGNORED
from model import GPT, GPTConfig
from train_config import TrainConfig

EVAL_TOKENS = 16 * 1024  # one of eval_iters, whatever the batch_size


def model_args(config: TrainConfig) -> dict:
    """The model's shape, as GPTConfig takes it; the vocabulary is that of the data, as far as meta.json tells."""
    shape = {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "block_size", "bias", "dropout")}
    vocab_size = read_meta(Path("data") / config.dataset).get("vocab_size", 50257)
    return {**shape, "vocab_size": -(-vocab_size // 64) * 64}  # a multiple of 64 is faster


class Trainer:
    """Raises SystemExit where there is no data that fits the shape."""

    def __init__(self, config: TrainConfig, device: torch.device, dtype: str):
        self.config, self.device, self.dtype = config, device, dtype
        use_tf32(device)
        limit_memory(config.vram_limit_gb, device)
        torch.manual_seed(config.seed)

        self.model_args = model_args(config)
        data_dir, vocab_size = Path("data") / config.dataset, self.model_args["vocab_size"]
        self.train_tokens = open_bin(data_dir, "train", config.block_size, vocab_size)
        self.val_tokens = open_bin(data_dir, "val", config.block_size, vocab_size)
        self.windows, self.position = TrainWindows(self.train_tokens, config.block_size, config.seed), 0
        # smaller and more of them than configured once memory has run out
        self.batch_size, self.gradient_accumulation_steps = config.batch_size, config.gradient_accumulation_steps
        self.model = GPT(GPTConfig(**self.model_args)).to(self.device)
        self.optimizer = self.model.configure_optimizers(
            config.weight_decay, config.learning_rate, (config.beta1, config.beta2), self.device.type
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == "float16")
        self.forward = compile_model(self.model, self.device) if config.compile else self.model
        self.iter_num, self.elapsed_s = 0, 0.0
        self.best_val_loss, self.just_improved = float("inf"), False

    @property
    def epoch(self) -> float:
        """Epochs seen so far, with the fraction of the present one."""
        return self.position / self.windows.windows_per_epoch

    def step(self, lr: float) -> float:
        """One iteration: the gradient over all micro-batches, clipped, and the update. Returns the mean loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self.within_memory(self.forward_backward)
        if self.config.grad_clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.position += self.config.batch_size * self.config.gradient_accumulation_steps
        self.iter_num += 1
        return loss

    def forward_backward(self) -> float:
        """The gradient of the mean loss over the iteration's windows, micro-batch by micro-batch. Returns that loss."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for i in range(self.gradient_accumulation_steps):
            x, y = self.windows.batch(self.position + i * self.batch_size, self.batch_size, self.device)
            with autocast(self.dtype, self.device):
                _, loss = self.forward(x, y)
            loss = loss / self.gradient_accumulation_steps
            self.scaler.scale(loss).backward()
            total += loss.detach()
        return total.item()  # waits for the device

    @torch.no_grad()
    def evaluate(self, tokens) -> float:
        """Mean loss over the fixed pass through `tokens`, each token weighing the same; no random number is drawn."""
        self.model.eval()
        loss = self.within_memory(lambda: self.mean_loss(tokens))
        self.model.train()
        return loss

    def mean_loss(self, tokens) -> float:
        total, count = torch.zeros((), device=self.device), 0
        max_tokens = self.config.eval_iters * EVAL_TOKENS
        for x, y in eval_batches(tokens, self.config.block_size, self.batch_size, max_tokens, self.device):
            with autocast(self.dtype, self.device):
                _, loss = self.forward(x, y)
            n = (y != IGNORED).sum()
            total, count = total + loss * n, count + n
        return (total / count).item()

    def within_memory(self, job):
        """
        What job() returns. Where memory runs out, it is done again with a smaller micro-batch and as many more of
        them: the same windows in the same order. Raises SystemExit where a single window is too much.
        """
        while True:
            try:
                return job()
            except torch.OutOfMemoryError:
                pass  # go on outside of this block, which keeps the tensors of the attempt alive
            if self.batch_size == 1:
                raise SystemExit("out of memory with a micro-batch of one window; take a smaller model or block_size")
            windows = self.batch_size * self.gradient_accumulation_steps
            self.batch_size = max(size for size in range(1, self.batch_size) if self.batch_size % size == 0)
            self.gradient_accumulation_steps = windows // self.batch_size
            self.optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            print(
                f"out of memory: going on with --batch_size={self.batch_size} "
                f"--gradient_accumulation_steps={self.gradient_accumulation_steps}, which is the same training"
            )

    def checkpoint(self) -> dict:
        """nanoGPT's fields, and what else is needed to go on: plain values and tensors only."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "model_args": self.model_args,
            "iter_num": self.iter_num,
            "best_val_loss": self.best_val_loss,
            "config": asdict(self.config),
            "position": self.position,
            "elapsed_s": self.elapsed_s,
            "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all(),
        }

    def restore(self, checkpoint: dict):
        """Takes up where the checkpoint stopped; reads nanoGPT's own too. Raises SystemExit if the shapes differ."""
        other = checkpoint["model_args"]
        differing = [f"{k}={other.get(k)}" for k, v in self.model_args.items() if k != "dropout" and other.get(k) != v]
        if differing:
            raise SystemExit(f"the checkpoint was trained with {', '.join(differing)}; resume with the same")
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.iter_num = checkpoint["iter_num"]
        self.best_val_loss = float(checkpoint["best_val_loss"])
        # nanoGPT's own checkpoints lack the following
        windows_per_iter = self.config.tokens_per_iter // self.config.block_size
        self.position = checkpoint.get("position", self.iter_num * windows_per_iter)
        self.elapsed_s = checkpoint.get("elapsed_s", 0.0)
        if checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])
        if "rng" in checkpoint:
            torch.set_rng_state(checkpoint["rng"])
        if self.device.type == "cuda" and checkpoint.get("cuda_rng"):
            torch.cuda.set_rng_state_all(checkpoint["cuda_rng"])
