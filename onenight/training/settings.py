"""The settings of a training run, with nanoGPT's names: default, type, range and meaning."""

from dataclasses import dataclass, replace
from pathlib import Path

from configurator import UserError, is_file, read_config_file, setting
from model import ARCHITECTURES, GPTConfig
from onenight.system.cards import find_card
from onenight.system.device import DTYPES, choose_device, choose_dtype, compile_works
from onenight.training.int8 import check_int8
from onenight.training.optimizers import CHOICES, rates_missing


@dataclass
class TrainConfig:
    """Raises ValueError for settings that contradict one another."""

    # output and stages
    out_dir: str = setting("out", "folder of ckpt.pt, metrics.jsonl and loss.png", folder=True)
    eval_interval: int = setting(
        2000, "iterations between evaluations, each with a checkpoint", low=1
    )
    log_interval: int = setting(1, "iterations between printed lines", low=1)
    eval_iters: int = setting(
        200, "size of an evaluation in units of 16,384 tokens, at most the whole split", low=1
    )
    eval_only: bool = setting(False, "evaluate once and exit")
    always_save_checkpoint: bool = setting(
        True,
        "save at each evaluation; False: after a better val loss, every 10 minutes, at the end",
    )
    early_stop_patience: int = setting(
        0, "stop after this many evaluations without improvement; 0: never", low=0
    )
    early_stop_min_delta: float = setting(
        0.0, "the decrease of val loss, in nats, that counts as an improvement", low=0
    )
    plan: bool = setting(False, "print the plan and exit")
    plan_card: str = setting(
        "", 'plan for this card: "RTX 4070", "RTX 4090", ...; empty: for this machine'
    )
    plan_vram_gb: float = setting(
        0.0, "plan for a card with this much memory; 0: for this machine", low=0
    )
    plan_tflops: float = setting(
        0.0,
        "plan for this many TFLOP/s, with nothing added for memory traffic; 0: for the speeds "
        "measured on this machine",
        low=0,
    )
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
    # data
    dataset: str = setting(
        "fineweb", "folder under data/ (or an absolute path) of train.bin and val.bin", path=True
    )
    gradient_accumulation_steps: int = setting(40, "micro-batches in an iteration", low=1)
    batch_size: int = setting(12, "windows in a micro-batch", low=1)
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
        "adamw", "muon: Muon for the blocks' matrices, AdamW for the rest", choices=tuple(CHOICES)
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
        0.0, "train for this many hours; the schedule is fitted to them; 0: max_iters", low=0
    )
    weight_decay: float = setting(
        1e-1, "of matrices; not of embeddings or head that have their own learning rate", low=0
    )
    beta1: float = setting(0.9, "AdamW's beta1", low=0, below=1)
    beta2: float = setting(0.95, "AdamW's beta2", low=0, below=1)
    grad_clip: float = setting(1.0, "clip the gradient to this norm; 0: no clipping", low=0)
    decay_lr: bool = setting(True, "warmup and decay; False: a constant learning rate")
    warmup_iters: int = setting(2000, "iterations of linear warmup", low=0)
    warmdown_iters: int = setting(
        0, "decay linearly to min_lr over the last N iterations; 0: cosine decay", low=0
    )
    matrix_warmdown_iters: int = setting(
        0, "warmdown_iters of the matrices of the blocks; 0: the same as the others'", low=0
    )
    lr_decay_iters: int = setting(
        600000, "iteration at which the decay reaches min_lr; usually max_iters"
    )
    min_lr: float = setting(
        6e-5, "learning rate at the end of the decay, usually learning_rate / 10", low=0
    )
    # machine
    seed: int = setting(
        1337, "seed of the weights, the order of the data and dropout", low=0, below=2**32
    )
    device: str = setting("auto", "'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")
    dtype: str = setting(
        "auto", "data type for computing; float16 uses loss scaling", choices=("auto", *DTYPES)
    )
    int8: bool = setting(
        False, "int8 matrix products in the blocks, for an RTX 30 or newer; needs torchao"
    )
    vram_limit_gb: float = setting(
        0.0, "limit GPU memory to that of a card with this many GB; 0: no limit", low=0
    )
    compile: bool = setting(True, "use torch.compile: slow to start, then much faster")

    def __post_init__(self):
        missing = rates_missing(self)
        if missing:
            raise ValueError(
                f"optimizer={self.optimizer!r} also needs {' and '.join(missing)}, "
                "for the parameters that another optimizer updates"
            )
        GPTConfig(**self.shape)  # raises if the shape is impossible
        if self.plan_card:
            find_card(self.plan_card)  # raises if it is not listed
            if self.plan_vram_gb or self.plan_tflops:
                raise ValueError(
                    "plan_card sets memory and speed: leave out plan_vram_gb and plan_tflops"
                )
        if self.is_planned_elsewhere and not self.plan:
            raise ValueError("plan_card and plan_vram_gb are for a plan: add --plan")
        if self.int8 and self.dtype == "float16":
            # The scales, 1/127 of the largest number of a row, would underflow.
            raise ValueError("int8 needs the range of bfloat16: leave out dtype=float16")
        refuse_file_as_dataset(self.dataset)

    @property
    def data_dir(self) -> Path:
        """The folder of train.bin, val.bin and meta.json. --dataset=data/t means t, unless there is
        a folder data/data/t."""
        given = Path(self.dataset)
        folder = Path("data", self.dataset)
        starts_with_data = given.parent.parts[:1] == ("data",)
        if starts_with_data and not folder.exists():
            return given
        return folder

    @property
    def shape(self) -> dict:
        """The shape of the model without its vocabulary, as GPTConfig takes it."""
        names = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias", "architecture")
        return {name: getattr(self, name) for name in names}

    @property
    def source(self) -> str:
        """The name of the checkpoint that the run starts from, for error messages."""
        return self.out_dir if self.init_from == "resume" else self.init_from

    @property
    def tied_head(self) -> bool:
        return ARCHITECTURES[self.architecture].tied_head

    @property
    def is_planned_elsewhere(self) -> bool:
        """Whether the plan is for another card than this machine's."""
        return bool(self.plan_card or self.plan_vram_gb)

    @property
    def windows_per_iter(self) -> int:
        return self.gradient_accumulation_steps * self.batch_size

    @property
    def tokens_per_iter(self) -> int:
        return self.windows_per_iter * self.block_size

    def with_shape_of(self, model_args: dict) -> "TrainConfig":
        """Return these settings with the shape of a checkpoint. A smaller block_size is kept.
        Raises UserError if the other settings cannot have that shape."""
        shape = {name: model_args[name] for name in self.shape}
        shape["block_size"] = min(self.block_size, shape["block_size"])
        try:
            return replace(self, **shape)
        except ValueError as error:  # another setting does not suit this shape
            raise UserError(f"{self.source}: {error}")


def resolve(config: TrainConfig, device: str) -> TrainConfig:
    """Return the settings that a run on `device` ("auto", or this process's own under torchrun)
    will really use: the device, the number format, and whether to compile. None of these change
    later. Raises UserError if the device is not available."""
    chosen = choose_device(device)
    if config.is_planned_elsewhere:
        # A plan for another card, which is taken to support everything.
        dtype = "bfloat16" if config.dtype == "auto" else config.dtype
        return replace(config, device=str(chosen), dtype=dtype)
    dtype = choose_dtype(config.dtype, chosen)
    if config.int8:
        check_int8(chosen)
    compiled = config.compile and compile_works(chosen)
    return replace(config, device=str(chosen), dtype=dtype, compile=compiled)


def refuse_file_as_dataset(dataset: str):
    """Raise ValueError, with what to write instead, if the dataset is a file. A relative path may
    begin in the working directory or in data/."""
    path = Path(dataset)
    in_data = Path("data", dataset)
    if in_data.is_dir() or not (is_file(dataset) or in_data.is_file()):
        return
    begins_here = path.is_file() or path.parts[0] == "data"
    folder = path.parent if begins_here and not in_data.is_file() else in_data.parent
    if path.suffix == ".bin" or (folder / "train.bin").is_file():
        # A folder that is not in data/ can only be given by its absolute path.
        if folder.parent != Path("data"):
            folder = folder.absolute()
        remedy = f"write --dataset={folder}"
    else:
        source = dataset if path.suffix == ".parquet" else "FILE.parquet"
        name = path.stem if path.suffix == ".parquet" else "NAME"
        remedy = (
            f"make it with: python prepare_single_parquet.py {source} --out_dir=data/{name}, "
            f"then write --dataset={name}"
        )
    raise ValueError(f"dataset takes the folder of train.bin and val.bin, not a file; {remedy}")


def flag_names(arguments: list[str]) -> set[str]:
    """Return the settings that are given as flags."""
    return {flag[2:].partition("=")[0] for flag in arguments if flag.startswith("--")}


def config_file_values(arguments: list[str], keys: tuple[str, ...]) -> dict:
    """Return the values of those keys that are set in config files, before any flags."""
    values = {}
    for argument in arguments:
        if argument.endswith(".py") and not argument.startswith("--"):
            values.update(read_config_file(argument, keys))
    return {key: values[key] for key in keys if key in values}


def micro_batch_size(windows_per_iter: int, world_size: int, limit: int) -> int:
    """Return the largest micro-batch, in windows, of at most `limit` that divides a process's
    part of an iteration. Raises UserError if the processes cannot share the iteration equally."""
    windows, remainder = divmod(windows_per_iter, world_size)
    if remainder or not windows:
        raise UserError(
            f"an iteration of {windows_per_iter} windows (batch_size x "
            f"gradient_accumulation_steps) cannot be shared by {world_size} processes; make it a "
            f"multiple of {world_size}"
        )
    return max(size for size in range(1, limit + 1) if windows % size == 0)
