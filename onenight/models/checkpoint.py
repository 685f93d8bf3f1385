"""Checkpoint files, and the models in them.

The files have nanoGPT's fields, can be read with torch.load(weights_only=True), and are replaced
atomically. A run writes three of them: ckpt.pt is the latest, with everything needed to resume;
ckpt-previous.pt is the one before it, used if the latest is damaged; best.pt has the weights with
the lowest validation loss.
"""

import contextlib
import re
import shutil
from pathlib import Path

import torch

from configurator import UserError
from model import GPT, GPTConfig
from onenight.data.tokenizer import VOCAB_SIZE
from onenight.system.device import DTYPES
from onenight.system.files import replacing
from onenight.system.memory import is_out_of_memory
from onenight.system.wording import first_line, looked_in

LATEST = "ckpt.pt"
PREVIOUS = "ckpt-previous.pt"
BEST = "best.pt"
DAMAGED = "ckpt-damaged.pt"

SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")  # always in model_args
# Prefixes that DistributedDataParallel and torch.compile add to the names of the weights.
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")
# Causal masks, which older versions of nanoGPT and transformers saved with the weights.
MASKS = (".attn.bias", ".attn.masked_bias")


class UnusableCheckpoint(UserError):
    """A checkpoint is missing or damaged: another one has to be used."""


# ---- files


def save_checkpoint(path: Path, checkpoint: dict, keep: Path | None = None):
    """Replace the file `path` atomically, and rename the old one to `keep`, if given.

    Raises UserError if the file cannot be written; the old one is then still in place.
    """
    content = {**checkpoint, "model_args": stored_model_args(checkpoint["model_args"])}
    try:
        with replacing(path, keep=keep) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError if the disk is full
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path}: cannot be written ({reason}); {how_to_resume(path.parent)}")


def how_to_resume(out_dir: Path) -> str:
    """Return what a run that ends without saving says about its earlier checkpoints."""
    if has_checkpoint(out_dir):
        return "--init_from=resume continues from the last checkpoint"
    return f"there is no checkpoint in {out_dir} to resume from"


def has_checkpoint(out_dir: Path) -> bool:
    """Return whether there is a run to resume in this folder."""
    # A process that is killed between two renames leaves only the previous checkpoint.
    return (out_dir / LATEST).exists() or (out_dir / PREVIOUS).exists()


def newest_run() -> str:
    """Return the folder out*/ in the working directory that has the newest checkpoint, and print
    its name. Raises UserError if there is none."""
    paths = Path().glob("out*/ckpt*.pt")
    newest = max(paths, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        raise UserError(
            f"no folder out*/ in {Path.cwd()} has a checkpoint; "
            "train a model first, or correct --out_dir or --init_from"
        )
    print(f"out_dir={newest.parent}, the newest run here")
    return str(newest.parent)


def load_latest(out_dir: Path, set_aside: bool = False) -> dict:
    """Read the latest checkpoint of a run or, if it is missing or damaged, the previous one.

    A run that will save again must set a damaged one aside: the next save would otherwise keep it
    in the place of the good previous one. Raises UserError if neither can be read.
    """
    latest = out_dir / LATEST
    previous = out_dir / PREVIOUS
    try:
        return load_checkpoint(latest)
    except UnusableCheckpoint as problem:
        if not previous.exists():
            raise
        print(f"{problem}\nloading {previous} instead")
    checkpoint = load_checkpoint(previous)
    if set_aside:
        with contextlib.suppress(FileNotFoundError):
            latest.replace(out_dir / DAMAGED)
    return checkpoint


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint of this project or of nanoGPT, with its tensors on the CPU.

    Only `model`, the weights by name, and `model_args` are always present. Raises UserError if the
    file is missing, damaged, or not a checkpoint.
    """
    checkpoint = read_file(path)
    weights = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    model_args = checkpoint.get("model_args") if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not isinstance(model_args, dict):
        raise UnusableCheckpoint(
            f"{path}: not a checkpoint of this program (it has no dicts model and model_args)"
        )
    invalid = [key for key in SIZES if not isinstance(model_args.get(key), int)]
    if invalid:
        raise UnusableCheckpoint(
            f"{path}: its model_args have no whole number for {', '.join(invalid)}"
        )
    return {
        **checkpoint,
        "model": clean_weights(weights),
        "model_args": read_model_args(model_args),
    }


def read_file(path: Path):
    """Return what torch.load reads from the file, without running code that it may contain.

    Raises UnusableCheckpoint if it is missing or damaged, and UserError if it may not be read or
    holds other objects than plain values and tensors. Passes on that memory ran out.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UnusableCheckpoint(
            f"{path}: no such checkpoint{looked_in(path)}; "
            "train a model first, or correct --out_dir or --init_from"
        )
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})")
    except Exception as error:  # a damaged pickle raises anything
        if is_out_of_memory(error):
            raise
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise UserError(
                f"{path}: contains something other than plain values and tensors ({refused[1]}); "
                "save it again without that, for example float(x) instead of a NumPy number x"
            )
        raise UnusableCheckpoint(
            f"{path}: damaged, or not a checkpoint ({first_line(error)}); use another"
        )


def clean_weights(weights: dict) -> dict[str, torch.Tensor]:
    """Return the tensors without causal masks, by their names without the prefixes of wrappers."""
    return {
        WRAPPERS.sub("", name): value
        for name, value in weights.items()
        if isinstance(value, torch.Tensor) and not name.endswith(MASKS)
    }


# nanoGPT's sample.py passes all of model_args to its own GPTConfig, which has no "architecture".
# So files of GPT-2 models leave it out, as nanoGPT's own do; everywhere else it is present.


def stored_model_args(model_args: dict) -> dict:
    """Return model_args as they are written to a checkpoint file."""
    if model_args.get("architecture") != "gpt2":
        return model_args
    return {key: value for key, value in model_args.items() if key != "architecture"}


def read_model_args(stored: dict) -> dict:
    """Return the model_args of a checkpoint file, with what nanoGPT's may lack."""
    return {"architecture": "gpt2", "bias": True, "dropout": 0.0, **stored}


def check_space(out_dir: Path, parameters: int, state_per_weight: float):
    """Check that the disk of out_dir has room for all checkpoints of a run.

    `state_per_weight` is the number of float32 numbers that the optimizers keep for each of the
    model's `parameters`, on average: 2 for AdamW. Raises UserError if there is not enough room.
    """
    # While a checkpoint is written, the latest and the previous one exist beside it.
    per_weight = 3 * (1 + state_per_weight)
    # best.pt has no optimizer state, and exists twice while it is replaced.
    per_weight += 2
    needed = 4 * per_weight * parameters
    existing = [out_dir / name for name in (LATEST, PREVIOUS, BEST) if (out_dir / name).exists()]
    reusable = sum(path.stat().st_size for path in existing)
    free = shutil.disk_usage(out_dir).free + reusable
    if free < needed:
        raise UserError(
            f"{out_dir}: the checkpoints need {needed / 1e9:.1f} GB of disk space, "
            f"but only {free / 1e9:.1f} GB are free; free some, or choose another --out_dir"
        )


# ---- models


def build_model(checkpoint: dict, name: str, dtype: str = "float32") -> GPT:
    """Return the model of a checkpoint, in evaluation mode, on the CPU.

    Its linear layers are in `dtype`, because autocast would convert their weights again for every
    token; the rest is in float32. `name` is what error messages call the checkpoint. Raises
    UserError if the shape is impossible, the weights do not match it, or the vocabulary is smaller
    than GPT-2's.
    """
    try:
        model = GPT(GPTConfig(**checkpoint["model_args"]))
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: its model_args are invalid ({first_line(error)})")
    load_weights(model, checkpoint["model"], name)
    if model.config.vocab_size < VOCAB_SIZE:
        raise UserError(
            f"{name}: its vocabulary has {model.config.vocab_size} ids, "
            f"but GPT-2's has {VOCAB_SIZE}"
        )
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(DTYPES[dtype])
    return model.eval()


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], name: str):
    """Load the weights of the checkpoint `name` into the model.

    If the model has fewer position embeddings than the checkpoint, the rest is left out. Raises
    UserError, naming tensors, if the weights do not match the model.
    """
    expected = model.state_dict()
    positions = "transformer.wpe.weight"
    if positions in expected and positions in weights:
        weights = {**weights, positions: weights[positions][: len(expected[positions])]}
    wrong_shapes = {
        key: weights[key].shape
        for key in expected.keys() & weights.keys()
        if weights[key].shape != expected[key].shape
    }
    missing = expected.keys() - weights.keys()
    unexpected = weights.keys() - expected.keys()
    check_weights(name, missing, unexpected, wrong_shapes)
    model.load_state_dict(weights)


def check_weights(name: str, missing: set[str], unexpected: set[str], wrong_shapes: dict):
    """Raise UserError, with the first three faults, if there are missing or unexpected tensors, or
    tensors of a wrong shape (by name, with that shape) among the weights of `name`."""
    faults = [f"no {key}" for key in sorted(missing)]
    faults += [f"an unknown {key}" for key in sorted(unexpected)]
    faults += [f"{key} of shape {tuple(shape)}" for key, shape in sorted(wrong_shapes.items())]
    if not faults:
        return
    shown = ", ".join(faults[:3])
    if len(faults) > 3:
        shown += f" and {len(faults) - 3} more"
    raise UserError(f"{name}: its weights do not match its shape ({shown})")


def check_shape(shape: dict, model_args: dict, source: str, resumes: bool):
    """Check that the configured shape is that of the checkpoint `source`, given its model_args.

    Dropout may differ, and a run that does not resume the checkpoint may use shorter windows.
    Raises UserError, naming the differences.
    """
    expected = {**model_args, "dropout": shape["dropout"]}
    if not resumes:
        expected["block_size"] = min(model_args["block_size"], shape["block_size"])
    differences = [
        f"{key}={expected.get(key)}" for key, value in shape.items() if value != expected.get(key)
    ]
    if differences:
        raise UserError(
            f"{source}: the checkpoint has {', '.join(differences)}; set the same values"
        )


# ---- optimizers


def load_optimizers(optimizers: dict[str, torch.optim.Optimizer], checkpoint: dict, out_dir: str):
    """Load the state of each optimizer, by its name in the checkpoint of out_dir.

    Options such as weight decay are not loaded: those of the current run apply. Raises UserError if
    the checkpoint lacks one of the optimizers, or has other groups of parameters in it.
    """
    try:
        for name, optimizer in optimizers.items():
            saved = checkpoint[name]
            current = optimizer.state_dict()
            check_groups(saved["param_groups"], current["param_groups"])
            optimizer.load_state_dict({**current, "state": saved["state"]})
    except (KeyError, TypeError, ValueError):
        latest = Path(out_dir) / LATEST
        problem = f"{latest}: cannot be resumed, because it has no optimizer state;"
        if checkpoint.get("optimizer"):
            problem = (
                f"{latest}: its optimizer state belongs to other settings; change --optimizer, "
                "--embedding_lr and --head_lr back, or"
            )
        raise UserError(
            f"{problem} start a new run from its weights: --init_from={latest} --out_dir=NEW"
        )


def check_groups(saved: list[dict], current: list[dict]):
    """Raise ValueError unless both have the same groups of the same parameters."""
    for saved_group, group in zip(saved, current, strict=True):
        if saved_group["params"] != group["params"]:
            raise ValueError("other parameters")
        if saved_group.get("name", group["name"]) != group["name"]:  # nanoGPT's have no names
            raise ValueError("other groups")
