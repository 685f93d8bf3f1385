"""The settings of a training run, with nanoGPT's names: default, type, range and meaning."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from configurator import setting
from model import ARCHITECTURES, GPTConfig
from onenight.device import DTYPES
from onenight.errors import UserError

# What may be chosen as the optimizer: see optim.py.
OPTIMIZERS = ("adamw", "muon")


@dataclass
class TrainConfig:
    """Raises ValueError for settings that contradict one another."""

    # output and stages
    out_dir: str = setting("out", "folder of ckpt.pt, metrics.jsonl and loss.png", path=True)
    eval_interval: int = setting(
        2000, "iterations between evaluations, each with a checkpoint", low=1
    )
    log_interval: int = setting(1, "iterations between printed lines", low=1)
    eval_tokens: int = setting(
        3_276_800, "tokens of an evaluation of each split, at most the whole split", low=1
    )
    eval_iters: int = setting(
        0, "as in nanoGPT: an evaluation of this many batches of batch_size; 0: eval_tokens", low=0
    )
    eval_only: bool = setting(False, "evaluate once and exit")
    always_save_checkpoint: bool = setting(
        True,
        "save at each evaluation; False: after a better val loss, every 10 minutes, at the end",
    )
    early_stop_patience: int = setting(
        0, "stop after this many evaluations without improvement; 0: never", low=0
    )
    plan: bool = setting(False, "measure how fast this machine is, print the plan and exit")
    plan_card: str = setting("", 'print the plan for this card and exit: "RTX 4070", ...')
    allow_new_data: bool = setting(False, "resume even if train.bin has changed")
    init_from: str = setting(
        "scratch",
        "'scratch', 'resume', 'auto' (resume if out_dir has a checkpoint), a *.pt file, or a "
        "Hugging Face folder or name",
        path=True,
    )
    wandb_log: bool = setting(False, "also log to Weights & Biases")
    wandb_project: str = setting("owt", "project at Weights & Biases")
    wandb_run_name: str = setting("gpt2", "name of the run at Weights & Biases")
    reference_loss: float = setting(0.0, "a val loss to compare with in loss.png; 0: none", low=0)
    reference_label: str = setting("", "what reached reference_loss")
    # data
    dataset: str = setting(
        "fineweb", "folder under data/ (or an absolute path) of train.bin and val.bin", path=True
    )
    tokens_per_iter: int = setting(524_288, "tokens in an iteration, about", low=1)
    batch_size: int = setting(
        12, "windows in a micro-batch: more are faster and take more memory", low=1
    )
    gradient_accumulation_steps: int = setting(
        0, "micro-batches in an iteration; 0: as many as tokens_per_iter needs", low=0
    )
    block_size: int = setting(1024, "tokens in a window: the model's context length", low=1)
    # model
    n_layer: int = setting(12, "number of blocks", low=1)
    n_head: int = setting(12, "attention heads; must divide n_embd", low=1)
    n_embd: int = setting(768, "width of the model", low=1)
    dropout: float = setting(0.0, "0 for pretraining; 0.1 can help when finetuning", low=0, below=1)
    bias: bool = setting(False, "biases in LayerNorm and Linear, as in GPT-2")
    architecture: str = setting(
        "gpt2",
        "qwen3: rotary positions, RMSNorm, SwiGLU, untied head",
        choices=tuple(ARCHITECTURES),
    )
    # optimizer
    optimizer: str = setting(
        "adamw", "muon: Muon for the blocks' matrices, AdamW for the rest", choices=OPTIMIZERS
    )
    learning_rate: float = setting(6e-4, "peak learning rate", low=0)
    embedding_lr: float = setting(
        0.0, "peak learning rate of the embeddings; 0: learning_rate", low=0
    )
    head_lr: float = setting(
        0.0, "peak learning rate of an untied output head; 0: learning_rate", low=0
    )
    vector_lr: float = setting(
        0.0, "peak learning rate of norm gains and biases; 0: learning_rate", low=0
    )
    max_iters: int = setting(600000, "total number of iterations", low=1)
    hours: float = setting(
        0.0, "train for this many hours, whatever max_iters is; 0: max_iters", low=0
    )
    weight_decay: float = setting(
        1e-1, "of matrices; not of embeddings or head that have their own learning rate", low=0
    )
    beta1: float = setting(0.9, "AdamW's beta1", low=0, below=1)
    beta2: float = setting(0.95, "AdamW's beta2", low=0, below=1)
    grad_clip: float = setting(1.0, "clip the gradient to this norm; 0: no clipping", low=0)
    decay_lr: bool = setting(True, "warmup and decay; False: a constant learning rate")
    warmup_iters: int = setting(
        2000, "iterations of linear warmup (of max_iters), at most half of the decay", low=0
    )
    warmdown: float = setting(
        0.0, "fraction of the run with a linear decay, at its end; 0: cosine decay", low=0, high=1
    )
    matrix_warmdown: float = setting(
        0.0, "warmdown of the blocks' matrices; 0: the same as the others'", low=0, high=1
    )
    lr_decay_iters: int = setting(
        0, "iteration (of max_iters) at which the decay reaches min_lr; 0: max_iters", low=0
    )
    min_lr: float = setting(
        6e-5, "learning rate at the end of the decay, at most learning_rate", low=0
    )
    # machine
    seed: int = setting(
        1337, "seed of the weights, the order of the data and dropout", low=0, below=2**32
    )
    device: str = setting("auto", "'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")
    dtype: str = setting(
        "auto", "data type for computing; float16 uses loss scaling", choices=("auto", *DTYPES)
    )
    int8: bool | str = setting(
        False,
        "int8 matrix products in the blocks, with torchao; auto: on a GeForce card that is faster "
        "with them",
        choices=("auto", True, False),
    )
    vram_limit_gb: float = setting(
        0.0, "limit GPU memory to that of a card with this many GB; 0: no limit", low=0
    )
    compile: bool = setting(True, "use torch.compile: slow to start, then much faster")

    def __post_init__(self):
        GPTConfig(**self.shape)  # raises if the shape is impossible
        has_own_rates = self.embedding_lr and (self.head_lr or self.tied_head)
        if self.optimizer == "muon" and not has_own_rates:
            raise ValueError("optimizer='muon' needs embedding_lr and head_lr, AdamW's rates")

    @property
    def data_dir(self) -> Path:
        """The folder of train.bin, val.bin and meta.json. --dataset=data/t means t, unless there is
        a folder data/data/t."""
        folder = Path("data", self.dataset)
        if self.dataset.startswith("data/") and not folder.exists():
            return Path(self.dataset)
        return folder

    @property
    def shape(self) -> dict:
        """The shape of the model without its vocabulary, as GPTConfig takes it."""
        names = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias", "architecture")
        return {name: getattr(self, name) for name in names}

    def with_shape_of(self, model_args: dict, must_match: bool) -> "TrainConfig":
        """Return these settings with the shape of the checkpoint that a run starts from; its
        windows may be shorter. With must_match, what is set of the shape stays as it is set, to be
        refused. Raises UserError if other settings cannot have that shape."""
        shape = {name: model_args[name] for name in self.shape if name != "dropout"}
        if must_match:
            defaults = TrainConfig().shape
            is_set = [name for name in shape if self.shape[name] != defaults[name]]
            shape.update({name: self.shape[name] for name in is_set})
        else:
            shape["block_size"] = min(self.block_size, shape["block_size"])
        try:
            return replace(self, **shape)
        except ValueError as error:
            raise UserError(f"{self.source}: {error}")

    @property
    def tied_head(self) -> bool:
        return ARCHITECTURES[self.architecture].tied_head

    @property
    def source(self) -> str:
        """The name of the checkpoint that the run starts from, for error messages."""
        return self.out_dir if self.init_from == "resume" else self.init_from


def resolve(
    config: TrainConfig, device: torch.device, dtype: str, compiled: bool, world_size: int
) -> TrainConfig:
    """Return the settings that a run really uses: what set_up_device() has found, and the tokens of
    an iteration and of an evaluation. None of these change later. Raises UserError if the processes
    cannot share an iteration equally."""
    tokens = config.batch_size * config.block_size
    steps = config.gradient_accumulation_steps
    if not steps:
        steps = world_size * max(1, round(config.tokens_per_iter / (tokens * world_size)))
    if steps * config.batch_size % world_size:
        raise UserError(
            f"gradient_accumulation_steps={steps} x batch_size={config.batch_size} windows cannot "
            f"be shared equally by {world_size} processes"
        )
    return replace(
        config,
        device=str(device),
        dtype=dtype,
        compile=compiled,
        gradient_accumulation_steps=steps,
        tokens_per_iter=steps * tokens,
        eval_tokens=config.eval_iters * tokens or config.eval_tokens,
    )
