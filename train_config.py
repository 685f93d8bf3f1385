"""
The settings of a training run, with nanoGPT's names: defaults, types, and the reason to change each.
"""

from dataclasses import dataclass
from pathlib import Path

from configurator import setting
from model import GPTConfig


@dataclass
class TrainConfig:
    """Raises ValueError, naming every problem, for values that cannot be."""

    # where things go, and when
    out_dir: str = setting("out", "folder of ckpt.pt, metrics.jsonl and loss.png")
    eval_interval: int = setting(2000, "iterations between evaluations, each with a checkpoint")
    log_interval: int = setting(1, "iterations between printed lines")
    eval_iters: int = setting(200, "size of an evaluation in units of 16,384 tokens, at most the whole split")
    eval_only: bool = setting(False, "evaluate once and stop")
    always_save_checkpoint: bool = setting(True, "save at each evaluation; False: when val loss improves, and last")
    early_stop_patience: int = setting(0, "stop after so many evaluations without improving; 0: go on to max_iters")
    early_stop_min_delta: float = setting(0.0, "what counts as improving val loss, in nats")
    plan: bool = setting(False, "print what the run takes, and stop")
    plan_vram_gb: float = setting(0.0, "plan for a card with so much memory; 0: this machine's")
    plan_tflops: float = setting(0.0, "plan with so many TFLOP/s; 0: by a matrix product timed on this machine")
    allow_new_data: bool = setting(False, "resume although train.bin is not what the run began with")
    init_from: str = setting("scratch", "'scratch'; 'resume'; a *.pt file; or GPT-2: a Hugging Face folder or name")
    wandb_log: bool = setting(False, "log to Weights & Biases as well")
    wandb_project: str = setting("owt", "wandb's project")
    wandb_run_name: str = setting("gpt2", "wandb's name for the run")
    # data
    dataset: str = setting("fineweb", "folder under data/ (or an absolute path) with train.bin and val.bin")
    gradient_accumulation_steps: int = setting(40, "micro-batches in an iteration")
    batch_size: int = setting(12, "windows in a micro-batch: what the memory must hold at once")
    block_size: int = setting(1024, "tokens in a window: how far the model can look back")
    # model
    n_layer: int = setting(12, "number of blocks")
    n_head: int = setting(12, "attention heads; n_embd must be a multiple")
    n_embd: int = setting(768, "width")
    dropout: float = setting(0.0, "0 for pretraining, 0.1 or more for finetuning")
    bias: bool = setting(False, "bias in LayerNorm and Linear, as GPT-2 has")
    architecture: str = setting("gpt2", "'gpt2', or what was learnt since: 'nanochat' or 'qwen3' (see model.py)")
    # optimizer
    optimizer: str = setting("adamw", "'adamw', or 'muon' for the matrices of the blocks and AdamW for the rest")
    learning_rate: float = setting(6e-4, "peak learning rate")
    embedding_lr: float = setting(0.0, "peak learning rate of the embeddings; 0: as the rest")
    head_lr: float = setting(0.0, "peak learning rate of a head that is not the embedding; 0: as the rest")
    vector_lr: float = setting(0.0, "peak learning rate of gains and biases (AdamW's); 0: as the rest")
    max_iters: int = setting(600000, "iterations in all")
    weight_decay: float = setting(1e-1, "on matrices; not on embeddings and head with their own learning rate")
    beta1: float = setting(0.9, "AdamW's")
    beta2: float = setting(0.95, "AdamW's")
    grad_clip: float = setting(1.0, "largest gradient norm; 0.0 clips nothing")
    decay_lr: bool = setting(True, "warmup and decay; False: constant")
    warmup_iters: int = setting(2000, "iterations of linear warmup")
    warmdown_iters: int = setting(0, "constant, and linear decay over so many iterations; 0: cosine decay")
    lr_decay_iters: int = setting(600000, "where the decay reaches min_lr; usually max_iters")
    min_lr: float = setting(6e-5, "learning rate at the end, usually a tenth of the peak")
    # machine
    seed: int = setting(1337, "for the weights, the order of the data and dropout")
    device: str = setting("auto", "'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")
    dtype: str = setting("auto", "'auto', 'float32', 'bfloat16', 'float16' (with loss scaling)")
    vram_limit_gb: float = setting(0.0, "use no more of the GPU's memory than this; 0: all that is free")
    compile: bool = setting(True, "torch.compile: slow to start, then much faster")

    def __post_init__(self):
        positive = "eval_interval log_interval eval_iters gradient_accumulation_steps batch_size block_size max_iters"
        problems = [f"{key} must be at least 1" for key in positive.split() if getattr(self, key) < 1]
        not_negative = "learning_rate weight_decay grad_clip warmup_iters min_lr plan_vram_gb plan_tflops vram_limit_gb"
        not_negative += " early_stop_patience early_stop_min_delta embedding_lr head_lr vector_lr warmdown_iters"
        problems += [f"{key} must not be negative" for key in not_negative.split() if getattr(self, key) < 0]
        problems += [f"{key} must be in [0, 1)" for key in ("beta1", "beta2") if not 0 <= getattr(self, key) < 1]
        if not 0 <= self.seed < 2**32:
            problems.append("seed must be in [0, 2**32)")
        if self.decay_lr and self.lr_decay_iters <= self.warmup_iters:
            problems.append(f"lr_decay_iters={self.lr_decay_iters} must be more than warmup_iters={self.warmup_iters}")
        if self.optimizer not in ("adamw", "muon"):
            problems.append(f"optimizer is 'adamw' or 'muon', not '{self.optimizer}'")
        own_rates = self.embedding_lr and (self.head_lr or self.architecture == "gpt2")
        if self.optimizer == "muon" and not own_rates:
            problems.append(
                "optimizer='muon' is for the blocks: embedding_lr and head_lr (AdamW's) must be set as well"
            )
        try:
            GPTConfig(**{**self.shape, "block_size": max(1, self.block_size)})
        except ValueError as problem:
            problems.append(str(problem))
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def data_dir(self) -> Path:
        """The folder of train.bin, val.bin and meta.json."""
        return Path("data") / self.dataset

    @property
    def shape(self) -> dict:
        """The model's, as GPTConfig takes it, but for the vocabulary. GPT-2's has nanoGPT's keys only."""
        shape = {key: getattr(self, key) for key in ("n_layer", "n_head", "n_embd", "block_size", "bias", "dropout")}
        return shape if self.architecture == "gpt2" else {**shape, "architecture": self.architecture}

    @property
    def tokens_per_iter(self) -> int:
        return self.gradient_accumulation_steps * self.batch_size * self.block_size
