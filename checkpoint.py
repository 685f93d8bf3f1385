"""
Checkpoints: nanoGPT's fields in files that torch.load(weights_only=True) reads, replaced in one step.

out_dir/ckpt.pt is the latest, with all that going on needs; ckpt-previous.pt the one before, should the latest be
damaged; best.pt the weights with the lowest val loss.
"""

import contextlib
import pickle
import shutil
from pathlib import Path

import torch

from files import replacing
from words import first_line

LATEST, PREVIOUS, BEST = "ckpt.pt", "ckpt-previous.pt", "best.pt"


def save_latest(out_dir: Path, checkpoint: dict):
    """Replaces ckpt.pt; the one before becomes ckpt-previous.pt. Raises OSError, and then has replaced nothing."""
    write(out_dir / LATEST, checkpoint, keep=out_dir / PREVIOUS)


def save_best(out_dir: Path, weights: dict):
    """Replaces best.pt. Raises OSError, and then has replaced nothing."""
    write(out_dir / BEST, weights)


def write(path: Path, checkpoint: dict, keep: Path | None = None):
    try:
        with replacing(path, keep=keep) as file:
            torch.save(checkpoint, file)
    except RuntimeError as error:  # what torch's writer makes of a full disk
        raise OSError(f"cannot be written ({first_line(error)})") from error


def has_checkpoint(out_dir: Path) -> bool:
    """Whether there is a run to go on with; a kill between two renames leaves only the previous one."""
    return (out_dir / LATEST).exists() or (out_dir / PREVIOUS).exists()


def load_latest(out_dir: Path) -> dict:
    """ckpt.pt or, with a line that says so, the one before. Raises SystemExit if neither can be read."""
    if not (out_dir / PREVIOUS).exists():
        return load_checkpoint(out_dir / LATEST)
    try:
        return load_checkpoint(out_dir / LATEST)
    except SystemExit as problem:
        print(f"{problem}\ngoing back to {out_dir / PREVIOUS}")
        checkpoint = load_checkpoint(out_dir / PREVIOUS)
    with contextlib.suppress(FileNotFoundError):  # else the next save would make it the previous one
        (out_dir / LATEST).replace(out_dir / "ckpt-damaged.pt")
    return checkpoint


def load_checkpoint(path: Path) -> dict:
    """
    The checkpoint, tensors on the CPU: model, optimizer, model_args, iter_num, best_val_loss, config, and more
    that resuming needs. Reads nanoGPT's own too. Raises SystemExit if it is missing, damaged, or something else.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise SystemExit(f"{path}: no such checkpoint; train one, or name its folder with --out_dir=")
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise SystemExit(f"{path}: damaged, or no checkpoint at all ({first_line(error)})")
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
        raise SystemExit(f"{path}: is not a checkpoint of this program (it has no model and model_args)")
    # torch.compile prefixes the names; nanoGPT's checkpoints may have been saved with it.
    checkpoint["model"] = {name.removeprefix("_orig_mod."): value for name, value in checkpoint["model"].items()}
    return checkpoint


def check_space(out_dir: Path, parameters: int):
    """
    Raises SystemExit if the disk of out_dir has no room for what a run keeps there: the latest, the one before, the
    next on its way, each with two moments for every weight, and the best weights, likewise twice; all in float32.
    """
    needed = (3 * 3 + 2) * 4 * parameters
    there = sum((out_dir / name).stat().st_size for name in (LATEST, PREVIOUS, BEST) if (out_dir / name).exists())
    free = shutil.disk_usage(out_dir).free
    if free + there < needed:
        raise SystemExit(
            f"{out_dir}: the checkpoints of this run take up to {needed / 1e9:.1f} GB, and the disk has "
            f"{(free + there) / 1e9:.1f} GB for them; make room, or choose another --out_dir"
        )
