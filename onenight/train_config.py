"""The settings of a training run, with nanoGPT's names: default, type, range, and the reason to change each."""

from dataclasses import dataclass, replace
from pathlib import Path

from onenight.device import DTYPES

from configurator import setting
from model import ARCHITECTURES, GPTConfig


@dataclass
class TrainConfig:
    """Raises ValueError for values that contradict one another."""

    # where things go, and when
    out_dir: str = setting("out", "folder of ckpt.pt, metrics.jsonl and loss.png", path=True)
    eval_interval: int = setting(2000, "iterations between evaluations, each with a checkpoint", low=1)
    log_interval: int = setting(1, "iterations between printed lines", low=1)
    eval_iters: int = setting(200, "size of an evaluation in units of 16,384 tokens, at most the whole split", low=1)
    eval_only: bool = setting(False, "evaluate once and stop")
    always_save_checkpoint: bool = setting(True, "save at each evaluation; False: at better ones and at the end")
    early_stop_patience: int = setting(0, "stop after this many evaluations without improvement; 0: never", low=0)
    early_stop_min_delta: float = setting(0.0, "the decrease of val loss that counts as an improvement, in nats", low=0)
    plan: bool = setting(False, "print what the run will take, and stop")
    plan_vram_gb: float = setting(0.0, "plan for a card with this much memory; 0: for this machine", low=0)
    plan_tflops: float = setting(0.0, "plan for this many TFLOP/s; 0: for the speed measured on this machine", low=0)
    allow_new_data: bool = setting(False, "resume although train.bin is not the one that the run began with")
    init_from: str = setting("scratch", "'scratch', 'resume', a *.pt file, or a Hugging Face folder or name", path=True)
    wandb_log: bool = setting(False, "log to Weights & Biases as well")
    wandb_project: str = setting("owt", "project at Weights & Biases")
    wandb_run_name: str = setting("gpt2", "name of the run at Weights & Biases")
    # data
    dataset: str = setting("fineweb", "folder under data/ (or an absolute path) of train.bin and val.bin", path=True)
    gradient_accumulation_steps: int = setting(40, "micro-batches in an iteration", low=1)
    batch_size: int = setting(12, "windows in a micro-batch, which are in memory at the same time", low=1)
    block_size: int = setting(1024, "tokens in a window: how far the model can look back", low=1)
    # model
    n_layer: int = setting(12, "number of blocks", low=1)
    n_head: int = setting(12, "attention heads; must divide n_embd", low=1)
    n_embd: int = setting(768, "width", low=1)
    dropout: float = setting(0.0, "0 for pretraining, 0.1 or more for finetuning", low=0, below=1)
    bias: bool = setting(False, "biases in LayerNorm and Linear, as GPT-2 has")
    architecture: str = setting("gpt2", "the model in model.py", choices=tuple(ARCHITECTURES))
    # optimizer
    optimizer: str = setting("adamw", "muon: the blocks' matrices; AdamW: the rest", choices=("adamw", "muon"))
    learning_rate: float = setting(6e-4, "peak learning rate", low=0)
    embedding_lr: float = setting(0.0, "peak learning rate of the embeddings; 0: learning_rate", low=0)
    head_lr: float = setting(0.0, "peak learning rate of a head that is not the embedding; 0: learning_rate", low=0)
    vector_lr: float = setting(0.0, "peak learning rate of gains and biases; 0: learning_rate", low=0)
    max_iters: int = setting(600000, "iterations in all", low=1)
    hours: float = setting(0.0, "train for this long: max_iters and the decay follow; 0: max_iters counts", low=0)
    weight_decay: float = setting(1e-1, "of matrices; not of embeddings and head that have their own rate", low=0)
    beta1: float = setting(0.9, "AdamW's", low=0, below=1)
    beta2: float = setting(0.95, "AdamW's", low=0, below=1)
    grad_clip: float = setting(1.0, "largest gradient norm; 0: no clipping", low=0)
    decay_lr: bool = setting(True, "warmup and decay; False: a constant learning rate")
    warmup_iters: int = setting(2000, "iterations of linear warmup", low=0)
    warmdown_iters: int = setting(0, "iterations of linear decay after a constant rate; 0: cosine decay", low=0)
    lr_decay_iters: int = setting(600000, "iteration at which the decay reaches min_lr; usually max_iters")
    min_lr: float = setting(6e-5, "learning rate at the end, usually a tenth of the peak", low=0)
    # machine
    seed: int = setting(1337, "for the weights, the order of the data and dropout", low=0, below=2**32)
    device: str = setting("auto", "'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")
    dtype: str = setting("auto", "number format; float16 with loss scaling", choices=("auto", *DTYPES))
    vram_limit_gb: float = setting(0.0, "as if the GPU had this much memory; 0: as much as it has", low=0)
    compile: bool = setting(True, "torch.compile: slow to start, then much faster")

    def __post_init__(self):
        if self.decay_lr and not self.hours and self.lr_decay_iters <= self.warmup_iters:
            raise ValueError(f"lr_decay_iters={self.lr_decay_iters} must be more than warmup_iters={self.warmup_iters}")
        own_rates = self.embedding_lr and (self.head_lr or ARCHITECTURES[self.architecture].tied)
        if self.optimizer == "muon" and not own_rates:
            raise ValueError("optimizer='muon' needs embedding_lr and head_lr as well: AdamW's, for what is not Muon's")
        GPTConfig(**self.shape)  # which refuses a shape that cannot be

    @property
    def data_dir(self) -> Path:
        """The folder of train.bin, val.bin and meta.json. The dataset data/t is t, unless there is a data/data/t."""
        given, folder = Path(self.dataset), Path("data", self.dataset)
        return given if given.parent.parts[:1] == ("data",) and not folder.exists() else folder

    @property
    def shape(self) -> dict:
        """The model's, as GPTConfig takes it, without the vocabulary. For GPT-2 it has nanoGPT's keys only."""
        shape = {key: getattr(self, key) for key in ("n_layer", "n_head", "n_embd", "block_size", "bias", "dropout")}
        return shape if self.architecture == "gpt2" else {**shape, "architecture": self.architecture}

    def with_shape_of(self, model_args: dict) -> "TrainConfig":
        """With the shape of a checkpoint, which block_size may cut short."""
        shape = {"architecture": "gpt2", **model_args, "block_size": min(self.block_size, model_args["block_size"])}
        return replace(self, **{key: value for key, value in shape.items() if key != "vocab_size"})

    @property
    def tokens_per_iter(self) -> int:
        return self.gradient_accumulation_steps * self.batch_size * self.block_size
