"""Checkpoint files, the models in them, and where a run starts.

The files have nanoGPT's fields, can be read with torch.load(weights_only=True), and are replaced
atomically. A run writes two of them: ckpt.pt is the latest, with everything needed to resume;
best.pt has the weights with the lowest validation loss.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from model import GPT, GPTConfig
from onenight.device import DTYPES
from onenight.distributed import Ranks
from onenight.errors import UserError, first_line
from onenight.hf import read_folder
from onenight.process import PARTIAL, free_space, replacing
from onenight.settings import TrainConfig
from onenight.tokenizer import VOCAB_SIZE

LATEST = "ckpt.pt"
BEST = "best.pt"
# Prefixes that DistributedDataParallel and torch.compile add to the names of the weights.
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")
# Causal masks, which older versions of nanoGPT and transformers saved with the weights.
MASKS = (".attn.bias", ".attn.masked_bias")


# -----------------------------------------------------------------------------
# Files


def save_checkpoint(path: Path, checkpoint: dict) -> bool:
    """Replace the file `path` atomically, in a folder that is made again if it was moved away. If
    that fails, print why and return False: the old file is then still in place, and no failure of
    the disk ends a run.

    nanoGPT's sample.py passes all of model_args to its own GPTConfig, which has no "architecture".
    So files of GPT-2 models leave it out, as nanoGPT's own do.
    """
    model_args = dict(checkpoint["model_args"])
    if model_args["architecture"] == "gpt2":
        del model_args["architecture"]
    writer = Writer()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as writer.file:
            torch.save({**checkpoint, "model_args": model_args}, writer)
        return True
    except (OSError, RuntimeError) as error:
        error = writer.error or error
        reason = getattr(error, "strerror", None) or first_line(error)
        iter_num = checkpoint["iter_num"]
        print(f"{path}: iter {iter_num} was not saved ({reason})")
        return False


class Writer:
    """A file for torch.save(), which remembers why it could not be written: torch's own error does
    not say."""

    file = None
    error = None

    def write(self, content) -> int:
        try:
            return self.file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self):
        self.file.flush()


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint of this project or of nanoGPT, with its tensors on the CPU, without running
    code that it may contain.

    Only `model`, the weights by name, and `model_args` are always present. Raises UserError if it
    cannot be read.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        weights = {
            WRAPPERS.sub("", name): weight
            for name, weight in checkpoint["model"].items()
            if not name.endswith(MASKS)
        }
        model_args = asdict(GPTConfig(**checkpoint["model_args"]))  # nanoGPT's may lack some
    except Exception as error:  # a damaged pickle raises anything
        raise UserError(f"{path}: cannot be read as a checkpoint ({first_line(error)})")
    return {**checkpoint, "model": weights, "model_args": model_args}


def has_checkpoint(out_dir: Path) -> bool:
    return (out_dir / LATEST).exists()


def open_checkpoint(init_from: str, out_dir: str) -> tuple[str, dict]:
    """Return the name and the content of the checkpoint that sample.py or export.py is to use. An
    empty out_dir is that of the newest run here. Raises UserError."""
    name = init_from
    if name == "resume":
        name = out_dir or newest_run()
    return name, load_start(init_from, Path(name))


def newest_run() -> str:
    """Return the folder out*/ in the working directory that has the newest checkpoint, and print
    its name. Raises UserError if there is none."""
    paths = Path().glob(f"out*/{LATEST}")
    newest = max(paths, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        raise UserError(f"no folder out*/ in {Path.cwd()} has a checkpoint: give --out_dir")
    print(f"out_dir={newest.parent}, the newest run here")
    return str(newest.parent)


def check_space(out_dir: Path, parameters: int, state_numbers: int):
    """Check that the disk of out_dir has room for both checkpoints of a run, each of which exists
    twice while it is replaced. `state_numbers`: how many numbers the optimizers keep. Raises
    UserError."""
    needed = 4 * (2 * (parameters + state_numbers) + 2 * parameters)
    # The files that saves replace, and what a crash has left of them.
    names = [LATEST, BEST, LATEST + PARTIAL, BEST + PARTIAL]
    existing = [out_dir / name for name in names if (out_dir / name).exists()]
    free = free_space(out_dir) + sum(path.stat().st_size for path in existing)
    if free < needed:
        raise UserError(
            f"{out_dir}: the checkpoints need {needed / 1e9:.1f} GB of disk space, "
            f"but only {free / 1e9:.1f} GB are free"
        )


# -----------------------------------------------------------------------------
# Where a run starts


def choose_start(config: TrainConfig, replaced: dict, ranks: Ranks) -> TrainConfig:
    """Replace init_from='auto': by 'resume' if out_dir has a checkpoint. Otherwise by the value
    that 'auto' has replaced, such as a config file's, or by 'scratch'."""
    if config.init_from != "auto":
        return config
    # The first process decides for all: another machine may not see its folder.
    init_from = replaced.get("init_from", "scratch")
    if init_from in ("auto", "resume"):
        init_from = "scratch"
    if ranks.any(ranks.is_first and has_checkpoint(Path(config.out_dir))):
        init_from = "resume"
    print(f"init_from=auto: {init_from}")
    return replace(config, init_from=init_from)


def check_folder(config: TrainConfig):
    """Raise UserError if a new run would overwrite the checkpoint of an earlier one, or if there is
    none to resume."""
    has_one = has_checkpoint(Path(config.out_dir))
    if config.init_from == "resume" and not has_one:
        raise UserError(f"{config.out_dir} has no {LATEST} to resume")
    if config.init_from != "resume" and has_one:
        raise UserError(
            f"{config.out_dir} has the checkpoint of an earlier run: continue it with "
            "--init_from=resume, or choose another --out_dir"
        )


def load_start(init_from: str, out_dir: Path) -> dict:
    """Return the checkpoint that init_from refers to.

    'resume' is ckpt.pt in out_dir, a name that ends in .pt is a file, and any other is a Hugging
    Face folder or the name of a repository on the hub. Only `model` and `model_args` are always in
    the result. Raises UserError if it cannot be read, or if some of its numbers are not finite.
    """
    if init_from == "resume":
        init_from = str(out_dir / LATEST)
    checkpoint = load_checkpoint(Path(init_from)) if init_from.endswith(".pt") else None
    if checkpoint is None:
        checkpoint = read_folder(init_from)
    for name, tensor in tensors_of(checkpoint):
        if not tensor.isfinite().all():
            raise UserError(f"{init_from}: {name} has numbers that are infinite or NaN")
    return checkpoint


def tensors_of(checkpoint: dict, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors in nested dicts, with the keys that lead to them."""
    for key, value in checkpoint.items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, dict):
            yield from tensors_of(value, f"{prefix}{key}.")


def changed_settings(config: TrainConfig, checkpoint: dict) -> list[str]:
    """Return how the settings differ from those of the run that is resumed, one line each."""
    # A setting that the checkpoint lacks is newer than its run, which did what the default does.
    before = {**asdict(TrainConfig()), **checkpoint.get("config", {})}
    return [
        f"changed since: {key} {before[key]} -> {value}"
        for key, value in asdict(config).items()
        if before[key] != value
        and key not in ("init_from", "out_dir", "allow_new_data", "eval_only")
    ]


def check_shape(config: TrainConfig, model_args: dict):
    """Raise UserError if the configured shape is not that of the checkpoint to resume, given its
    model_args. Dropout may differ."""
    differences = [
        f"{key}={model_args[key]}"
        for key, value in config.shape.items()
        if value != model_args[key] and key != "dropout"
    ]
    if differences:
        raise UserError(
            f"{config.source}: the checkpoint has {', '.join(differences)}; set the same values"
        )


# -----------------------------------------------------------------------------
# Models and optimizers


def build_model(checkpoint: dict, name: str, dtype: str = "float32") -> GPT:
    """Return the model of a checkpoint, in evaluation mode, on the CPU.

    Its linear layers are in `dtype`, and so are embeddings that the head shares, because autocast
    would convert the weights again for every token; the rest is in float32. `name` is what error
    messages call the checkpoint. Raises UserError if the weights are not those of a model with
    GPT-2's vocabulary.
    """
    model = GPT(GPTConfig(**checkpoint["model_args"]))
    load_weights(model, checkpoint["model"], name)
    if model.config.vocab_size < VOCAB_SIZE:
        raise UserError(f"{name}: its vocabulary is not GPT-2's, which has {VOCAB_SIZE} ids")
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(DTYPES[dtype])
    return model.eval()


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], name: str):
    """Load the weights of the checkpoint `name` into the model. If the model has fewer position
    embeddings, the rest is left out. Raises UserError if they do not match."""
    positions = "transformer.wpe.weight"
    if positions in weights:
        weights = {**weights, positions: weights[positions][: model.config.block_size]}
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        # torch's message has a line for each kind of fault.
        faults = " ".join(str(error).split())[:300]
        raise UserError(f"{name}: its weights are not those of this model ({faults})")


def load_optimizers(optimizers: dict[str, torch.optim.Optimizer], checkpoint: dict, name: str):
    """Load the state of each optimizer, by its key in the checkpoint.

    Options such as weight decay are not loaded: those of the current run apply. Raises UserError if
    the checkpoint has no state, or state for other groups of parameters.
    """
    for key, optimizer in optimizers.items():
        current = optimizer.state_dict()
        saved = checkpoint.get(key) or {"param_groups": []}
        if groups_of(saved) != groups_of(current):
            raise UserError(
                f"{name}: has no state for these optimizers, and cannot be resumed; "
                "start a new run from its weights with --init_from=FILE.pt"
            )
        optimizer.load_state_dict({**current, "state": saved["state"]})


def groups_of(state_dict: dict) -> list[tuple]:
    """Return the names of an optimizer's parameter groups and the indices of their parameters."""
    return [(group.get("name"), group["params"]) for group in state_dict["param_groups"]]
