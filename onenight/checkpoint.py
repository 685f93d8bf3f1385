"""
Checkpoints: nanoGPT's fields in files that torch.load(weights_only=True) reads, replaced atomically.

out_dir/ckpt.pt is the latest, with everything needed to resume; ckpt-previous.pt the one before, in case the latest is
damaged; best.pt the weights with the lowest val loss.
"""

import contextlib
import pickle
import shutil
from pathlib import Path

from onenight.files import first_line, replacing, where

import torch

LATEST, PREVIOUS, BEST = "ckpt.pt", "ckpt-previous.pt", "best.pt"


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


def load_latest(out_dir: Path) -> dict:
    """ckpt.pt or, with a message, the one before. Raises SystemExit if neither can be read."""
    if not (out_dir / PREVIOUS).exists():
        return load_checkpoint(out_dir / LATEST)
    try:
        return load_checkpoint(out_dir / LATEST)
    except SystemExit as problem:
        print(f"{problem}\ngoing back to {out_dir / PREVIOUS}")
        checkpoint = load_checkpoint(out_dir / PREVIOUS)
    with contextlib.suppress(FileNotFoundError):  # so that the next save does not keep it as the previous one
        (out_dir / LATEST).replace(out_dir / "ckpt-damaged.pt")
    return checkpoint


def load_checkpoint(path: Path) -> dict:
    """A checkpoint of this project or of nanoGPT, tensors on the CPU: model, optimizer, model_args, iter_num,
    best_val_loss, config, and more that resuming needs. Raises SystemExit if it is missing, damaged, or something
    else."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise SystemExit(f"{path}: no such checkpoint{where(path)}; train one, or name its folder with --out_dir=")
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise SystemExit(f"{path}: damaged, or not a checkpoint ({first_line(error)})")
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
        raise SystemExit(f"{path}: not a checkpoint of this program (it has no model and model_args)")
    if checkpoint["model_args"].get("architecture") == "nanochat":
        raise SystemExit(f"{path}: the nanochat architecture was removed; the last commit that reads it is e8f887f")
    # torch.compile adds a prefix to the names; nanoGPT's checkpoints may have it.
    checkpoint["model"] = {name.removeprefix("_orig_mod."): value for name, value in checkpoint["model"].items()}
    return checkpoint


def check_shape(shape: dict, saved: dict, source: str, resumes: bool):
    """Raises SystemExit, naming the differences, if the configured shape is not that of a checkpoint's model_args.
    Dropout may differ, and a new run may see fewer tokens than the checkpoint's."""
    shape, saved = {"architecture": "gpt2", **shape}, {"architecture": "gpt2", **saved}
    other = [key for key, value in shape.items() if saved.get(key) != value and key != "dropout"]
    if "block_size" in other and not resumes and shape["block_size"] < saved["block_size"]:
        other.remove("block_size")
    if other:
        values = ", ".join(f"{key}={saved.get(key)}" for key in other)
        raise SystemExit(f"{source}: the checkpoint has {values}; {'resume' if resumes else 'start'} with the same")


def check_space(out_dir: Path, parameters: int):
    """Raises SystemExit if the disk of out_dir has no room for what a run keeps there: the latest checkpoint, the one
    before, and the next while it is written, each with two moments for every weight, and the best weights, likewise
    twice; all in float32."""
    needed = (3 * 3 + 2) * 4 * parameters
    reusable = sum((out_dir / name).stat().st_size for name in (LATEST, PREVIOUS, BEST) if (out_dir / name).exists())
    free = shutil.disk_usage(out_dir).free + reusable
    if free < needed:
        raise SystemExit(
            f"{out_dir}: the checkpoints of this run take up to {needed / 1e9:.1f} GB, and the disk has "
            f"{free / 1e9:.1f} GB for them; make room, or choose another --out_dir"
        )
