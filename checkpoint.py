"""
Checkpoints: nanoGPT's fields in one file that torch.load(weights_only=True) reads, replaced in one step.
"""

import pickle
from pathlib import Path

import torch

from files import replacing


def save_checkpoint(path: Path, checkpoint: dict):
    """Replaces `path` in one step: at every moment it is a whole checkpoint or absent."""
    with replacing(path) as file:
        torch.save(checkpoint, file)


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
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise SystemExit(f"{path}: damaged, or no checkpoint at all ({reason})")
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
        raise SystemExit(f"{path}: is not a checkpoint of this program (it has no model and model_args)")
    # torch.compile prefixes the names; nanoGPT's checkpoints may have been saved with it.
    checkpoint["model"] = {name.removeprefix("_orig_mod."): value for name, value in checkpoint["model"].items()}
    return checkpoint
