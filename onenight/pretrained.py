"""Weights to start from or to sample: a checkpoint of this project or of nanoGPT, or a Hugging Face folder."""

from pathlib import Path

from onenight.checkpoint import load_checkpoint, load_latest, load_weights
from onenight.device import DTYPES
from onenight.files import first_line
from onenight.huggingface import read_folder
from onenight.tokenizer import VOCAB_SIZE

import torch

from model import GPT, GPTConfig


def resolve_checkpoint(init_from: str, out_dir: Path) -> dict:
    """The checkpoint that init_from means: the latest of out_dir for 'resume', the file for a name that ends in .pt,
    and otherwise a Hugging Face folder or hub name. Only model_args and model are always in it. Raises SystemExit."""
    if init_from == "resume":
        return load_latest(out_dir)
    if init_from.endswith(".pt"):
        return load_checkpoint(Path(init_from))
    return read_folder(init_from)


def build_model(checkpoint: dict, name: str, dtype: str = "float32") -> GPT:
    """The model of a checkpoint, called `name` in errors, ready to generate GPT-2's tokens. Its large matrices are in
    `dtype`, because autocast would otherwise convert them again for every token. Raises SystemExit if weights and shape
    do not match."""
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
