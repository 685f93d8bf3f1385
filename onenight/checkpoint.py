"""Checkpoints, and the models in them: nanoGPT's fields in files that torch.load(weights_only=True) reads, replaced
atomically. ckpt.pt is the latest, with everything needed to resume; ckpt-previous.pt the one before, in case the latest
is damaged; best.pt the weights with the lowest val loss."""

import contextlib
import re
import shutil
from pathlib import Path

from onenight.device import DTYPES
from onenight.files import first_line, replacing, where
from onenight.tokenizer import VOCAB_SIZE

import torch

from model import GPT, GPTConfig

LATEST, PREVIOUS, BEST = "ckpt.pt", "ckpt-previous.pt", "best.pt"
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")  # DistributedDataParallel's and torch.compile's, before the names
MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks, which older programs saved with the weights


def save_checkpoint(path: Path, checkpoint: dict, keep: Path | None = None):
    """Replaces the file atomically; the old one stays as `keep`. Raises SystemExit, with nothing replaced."""
    try:
        with replacing(path, keep=keep) as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
        reason = getattr(error, "strerror", None) or first_line(error)
        raise SystemExit(f"{path}: cannot be written ({reason}); --init_from=resume continues from the last checkpoint")


def has_checkpoint(out_dir: Path) -> bool:
    """Whether there is a run to resume; a kill between two renames leaves only the previous checkpoint."""
    return (out_dir / LATEST).exists() or (out_dir / PREVIOUS).exists()


def newest_run() -> str:
    """The folder out*/ here with the newest checkpoint; says which. Raises SystemExit if there is none."""
    newest = max(Path().glob("out*/ckpt*.pt"), key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        raise SystemExit(f"no out*/ in {Path.cwd()} has a checkpoint; train one, or name its folder with --out_dir=")
    print(f"out_dir={newest.parent}, the newest run here")
    return str(newest.parent)


def load_latest(out_dir: Path) -> dict:
    """ckpt.pt or, with a message, the one before. Raises SystemExit if neither can be read."""
    latest, previous = out_dir / LATEST, out_dir / PREVIOUS
    try:
        return load_checkpoint(latest)
    except SystemExit as problem:
        if not previous.exists():
            raise
        print(f"{problem}\ngoing back to {previous}")
    checkpoint = load_checkpoint(previous)
    with contextlib.suppress(FileNotFoundError):  # so that the next save does not keep it as the previous one
        latest.replace(out_dir / "ckpt-damaged.pt")
    return checkpoint


def load_checkpoint(path: Path) -> dict:
    """A checkpoint of this project or of nanoGPT, its tensors on the CPU. Only model and model_args are always in it.
    Raises SystemExit if it is missing, damaged, or something else."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise SystemExit(f"{path}: no such checkpoint{where(path)}; train one, or name its folder with --out_dir=")
    except Exception as error:  # a damaged pickle raises anything
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            what = f"something other than plain values and tensors ({refused[1]})"
            raise SystemExit(f"{path}: holds {what}; save it again without, a NumPy number x as float(x)")
        raise SystemExit(f"{path}: damaged, or not a checkpoint ({first_line(error)})")
    fields = [checkpoint.get(key) for key in ("model", "model_args")] if isinstance(checkpoint, dict) else [None]
    if not all(isinstance(field, dict) for field in fields):
        raise SystemExit(f"{path}: not a checkpoint of this program (it has no dicts model and model_args)")
    weights, model_args = fields
    if model_args.get("architecture") == "nanochat":
        raise SystemExit(f"{path}: the nanochat architecture was removed; the last commit that reads it is e8f887f")
    if unknown := [key for key in SIZES if not isinstance(model_args.get(key), int)]:
        raise SystemExit(f"{path}: its model_args have no whole number for {', '.join(unknown)}")
    weights = {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}
    weights = {WRAPPERS.sub("", name): value for name, value in weights.items() if not name.endswith(MASKS)}
    return {**checkpoint, "model": weights}


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], name: str):
    """Loads the weights of the checkpoint `name`; of position embeddings, as many as the model has. Raises SystemExit,
    naming tensors, if they are not the model's."""
    own, wpe = model.state_dict(), "transformer.wpe.weight"
    if wpe in own.keys() & weights:
        weights = {**weights, wpe: weights[wpe][: len(own[wpe])]}
    shapes = {key: list(weights[key].shape) for key in own.keys() & weights if weights[key].shape != own[key].shape}
    check_keys(name, own.keys() - weights, weights.keys() - own, shapes)
    model.load_state_dict(weights)


def check_keys(name: str, missing: set[str], unexpected: set[str], shapes: dict):
    """Raises SystemExit, naming the first three, if the weights of `name` lack a tensor that its shape needs, or have
    one more, or one of another shape."""
    faults = [f"no {key}" for key in sorted(missing)] + [f"an unknown {key}" for key in sorted(unexpected)]
    faults += [f"{key} of shape {tuple(shape)}" for key, shape in sorted(shapes.items())]
    if faults:
        more = f" and {len(faults) - 3} more" if faults[3:] else ""
        raise SystemExit(f"{name}: its weights do not match its shape ({', '.join(faults[:3])}{more})")


def build_model(checkpoint: dict, name: str, dtype: str = "float32") -> GPT:
    """The model of a checkpoint, called `name` in errors, ready to generate. Its large matrices are in `dtype`: else
    autocast would convert them again for every token. Raises SystemExit if weights, shape or vocabulary do not fit."""
    try:
        model = GPT(GPTConfig(**checkpoint["model_args"]))
    except (TypeError, ValueError) as error:
        raise SystemExit(f"{name}: its model_args have an impossible shape ({first_line(error)})")
    load_weights(model, checkpoint["model"], name)
    if model.config.vocab_size < VOCAB_SIZE:
        raise SystemExit(f"{name}: its vocabulary of {model.config.vocab_size} ids is not GPT-2's of {VOCAB_SIZE}")
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(DTYPES[dtype])
    return model.eval()


def load_optimizers(optimizers: dict[str, torch.optim.Optimizer], checkpoint: dict, out_dir: str):
    """Loads the state of the optimizers, with the options that they have, not the saved ones. Raises SystemExit if the
    checkpoint of out_dir has no such optimizer, or one with other groups of parameters."""
    try:
        for name, optimizer in optimizers.items():
            saved, own = checkpoint[name], optimizer.state_dict()
            for old, new in zip(saved["param_groups"], own["param_groups"], strict=True):
                if old["params"] != new["params"] or old.get("name", new["name"]) != new["name"]:  # nanoGPT's: no name
                    raise ValueError
            optimizer.load_state_dict({**own, "state": saved["state"]})
    except (KeyError, TypeError, ValueError):
        latest, kind = Path(out_dir) / LATEST, "other optimizer settings" if checkpoint.get("optimizer") else "none"
        raise SystemExit(
            f"{latest}: an optimizer state is needed to resume, and it has {kind}; put --optimizer, --embedding_lr and "
            f"--head_lr back as they were, or begin a new run with its weights: --init_from={latest} --out_dir=NEW"
        )


def check_shape(shape: dict, saved: dict, source: str, resumes: bool):
    """Raises SystemExit, naming the differences, if the configured shape is not that of a checkpoint's model_args.
    Dropout may differ, and a new run may see fewer tokens than the checkpoint's."""
    shape, saved = {"architecture": "gpt2", **shape}, {"architecture": "gpt2", **saved, "dropout": shape["dropout"]}
    if not resumes:
        saved["block_size"] = min(saved["block_size"], shape["block_size"])
    if other := ", ".join(f"{key}={saved.get(key)}" for key in shape if shape[key] != saved.get(key)):
        raise SystemExit(f"{source}: the checkpoint has {other}; {'resume' if resumes else 'start'} with the same")


def check_space(out_dir: Path, parameters: int):
    """Raises SystemExit if the disk of out_dir has no room for a run's checkpoints, in float32: the latest, the one
    before and the next, each with two moments for every weight, and the best weights, twice while they are written."""
    needed = (3 * 3 + 2) * 4 * parameters
    reusable = sum((out_dir / name).stat().st_size for name in (LATEST, PREVIOUS, BEST) if (out_dir / name).exists())
    free = shutil.disk_usage(out_dir).free + reusable
    if free < needed:
        raise SystemExit(f"{out_dir}: checkpoints take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; make room")
