"""Models from and for other programs: Hugging Face folders, and the weights that a script starts
from, wherever they are."""

import shutil
from pathlib import Path

import torch

from configurator import UserError
from onenight.models.checkpoint import (
    BEST,
    LATEST,
    PREVIOUS,
    check_weights,
    has_checkpoint,
    load_checkpoint,
    load_latest,
)
from onenight.models.hf_model import from_config, from_transformers, import_transformers
from onenight.models.hf_tokenizer import check_tokenizer
from onenight.system.files import rename
from onenight.system.wording import first_line, looked_in


def resolve_checkpoint(init_from: str, out_dir: Path, set_aside: bool = False) -> dict:
    """Return the checkpoint that init_from refers to.

    'resume' is the latest of out_dir, a name that ends in .pt is a file, and any other is a Hugging
    Face folder or the name of a repository on the hub. Only `model` and `model_args` are always in
    it. `set_aside`: see load_latest(). Raises UserError if it cannot be read.
    """
    if init_from == "resume":
        if (out_dir / "config.json").is_file() and not has_checkpoint(out_dir):
            raise UserError(f"{out_dir}: is a Hugging Face folder; write --init_from={out_dir}")
        return load_latest(out_dir, set_aside)
    if init_from.endswith(".pt"):
        return load_checkpoint(Path(init_from))
    refuse_other_paths(Path(init_from))
    return read_folder(init_from)


def refuse_other_paths(path: Path):
    """Raise UserError, with what to write instead, if a path is a file, the folder of a run, or a
    Hugging Face folder whose weights are not in safetensors files."""
    beside_config = (path.parent / "config.json").is_file()
    if beside_config and (path.is_file() or path.suffix == ".safetensors"):
        raise UserError(f"{path}: is one file of a folder; write --init_from={path.parent}")
    if path.is_file():
        raise UserError(
            f"{path}: is neither a checkpoint, whose name ends in .pt, nor the folder of a Hugging "
            "Face model, with config.json and *.safetensors; write --init_from= with one of these"
        )
    if (path / "config.json").is_file():
        refuse_pickled_weights(path)
        return
    checkpoints = [path / name for name in (LATEST, PREVIOUS, BEST)]
    for checkpoint in checkpoints:
        if checkpoint.is_file():
            raise UserError(f"{path}: is the folder of a run; write --init_from={checkpoint}")


def refuse_pickled_weights(folder: Path):
    """Raise UserError if a Hugging Face folder has its weights in the old format only."""
    if any(folder.glob("*.safetensors")) or not any(folder.glob("pytorch_model*.bin")):
        return
    new = folder.with_name(folder.name + "-safetensors")
    raise UserError(
        f"{folder}: its weights are in pytorch_model.bin, but only safetensors are read; convert "
        'them with: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained(r'{folder}').save_pretrained(r'{new}')\", "
        f"then write --init_from={new}"
    )


def read_folder(name: str) -> dict:
    """Return `model`, the weights in float32, and `model_args` of a folder, or else of a repository
    on the Hugging Face hub ('gpt2', 'gpt2-xl').

    The weights may be in several safetensors files. Raises UserError if they cannot be read or
    downloaded, or if the architecture, the tokenizer or the shape of a tensor is not supported.
    """
    transformers = import_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        model_args = from_config(config, name)
        check_tokenizer(name)
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except UserError:
        raise
    # Each package has its own exceptions for a missing file, a damaged one, or no network.
    except Exception as error:
        if Path(name).is_dir():
            problem = "cannot be read"
        else:
            problem = (
                f"no such folder{looked_in(Path(name))}, "
                "and it cannot be loaded from the Hugging Face hub"
            )
        raise UserError(f"{name}: {problem} ({first_line(error)})")
    wrong_shapes = {key: shape for key, shape, _ in report["mismatched_keys"]}
    check_weights(name, report["missing_keys"], report["unexpected_keys"], wrong_shapes)
    return {"model": from_transformers(model, model_args), "model_args": model_args}


def write_folder(target: Path, model, tokenizer, card: str):
    """Write transformers' model and tokenizer and the model card to the new folder `target`, which
    appears only when it is complete. Raises UserError if it cannot be written."""
    temporary = target.with_name(target.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        # vocab.json and merges.txt, the two files that OpenAI published, for older programs
        tokenizer.backend_tokenizer.model.save(str(temporary))
        (temporary / "README.md").write_text(card, encoding="utf-8")
        rename(temporary, target)
    # safetensors and tokenizers raise their own exceptions instead of OSError.
    except Exception as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{target}: cannot be written ({reason})")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
