"""
Weights to go on from: a checkpoint of this project or of nanoGPT, or GPT-2 in a Hugging Face folder.
"""

import json
from pathlib import Path

import torch

from backend import DTYPES
from checkpoint import load_checkpoint, load_latest
from model import GPT, GPTConfig
from tokenizer import VOCAB_SIZE
from words import first_line

GPT2_NAMES = {  # GPTConfig's names and those of GPT-2's config.json
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}


def load_weights(init_from: str, out_dir: Path) -> dict:
    """
    A checkpoint, of which only model_args and model are sure to be there: the latest of out_dir for 'resume', the
    file for a name that ends in .pt, and otherwise GPT-2 from a Hugging Face folder or hub name. Raises SystemExit.
    """
    if init_from == "resume":
        return load_latest(out_dir)
    if init_from.endswith(".pt"):
        return load_checkpoint(Path(init_from))
    model_args, weights = load_gpt2(init_from)
    return {"model_args": model_args, "model": weights}


def build_model(checkpoint: dict, name: str, dtype: str = "float32") -> GPT:
    """
    The model of a checkpoint, called `name` in errors, ready to write GPT-2's tokens. Its large matrices are in
    `dtype`, as autocast would else make them for every token anew. Raises SystemExit if something does not fit.
    """
    try:
        model = GPT(GPTConfig(**checkpoint["model_args"]))
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise SystemExit(f"{name}: its weights do not fit its model_args ({first_line(error)})")
    if model.config.vocab_size < VOCAB_SIZE:
        raise SystemExit(f"{name}: was trained on {model.config.vocab_size} ids, which are not GPT-2's {VOCAB_SIZE}")
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(DTYPES[dtype])
    return model.eval()


def crop_positions(weights: dict, block_size: int) -> dict:
    """The weights of a model that sees block_size tokens only: its first positions, if they are learnt."""
    wpe = "transformer.wpe.weight"
    return {**weights, wpe: weights[wpe][:block_size]} if wpe in weights else weights


def load_gpt2(name: str) -> tuple[dict, dict]:
    """
    model_args and float32 weights of a GPT-2 from a folder with config.json and model.safetensors, or from the
    Hugging Face hub ('gpt2', 'gpt2-xl'). The tanh approximation of GELU that OpenAI used is taken for GELU itself, as
    nanoGPT does: they differ by 0.0005 at most. Raises SystemExit if it cannot be had or is not GPT-2.
    """
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise SystemExit(f"{name}: reading it needs the package safetensors: pip install safetensors")
    config_file, weights_file = find_file(name, "config.json"), find_file(name, "model.safetensors")
    try:
        config, weights = json.loads(config_file.read_text(encoding="utf-8")), load_file(weights_file)
    except Exception as error:  # OSError, ValueError, and safetensors' own
        raise SystemExit(f"{name}: cannot be read ({first_line(error)})")
    check_architecture(name, config)
    # OpenAI's files name the parts without their parent, and hold the causal masks as well.
    weights = {f"transformer.{key.removeprefix('transformer.')}": value.float() for key, value in weights.items()}
    masks = (".attn.bias", ".attn.masked_bias")
    weights = transpose({key: value for key, value in weights.items() if not key.endswith(masks)})
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return {key: config[their] for key, their in GPT2_NAMES.items()} | {"bias": True, "dropout": 0.0}, weights


def check_architecture(name: str, config: dict):
    """Raises SystemExit, naming the differences, if the config.json is not that of a GPT-2 that GPT can compute."""
    gpt2 = {"model_type": "gpt2", "n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
            "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}  # fmt: skip
    other = [f"{key}={config[key]!r}" for key, value in gpt2.items() if config.get(key, value) != value]
    if "gelu" not in config.get("activation_function", "gelu"):
        other.append(f"activation_function={config['activation_function']!r}")
    other += [f"no {key}" for key in ("model_type", *GPT2_NAMES.values()) if key not in config]
    if other:
        raise SystemExit(f"{name}: is not GPT-2's architecture (its config.json has {', '.join(other)})")


def transpose(weights: dict) -> dict:
    """OpenAI's GPT-2 keeps the matrices of its blocks as (in, out), and torch as (out, in): from one to the other."""
    turned = ("c_attn.weight", "c_fc.weight", "c_proj.weight")
    return {key: value.T.contiguous() if key.endswith(turned) else value for key, value in weights.items()}


def find_file(name: str, file: str) -> Path:
    """The file in the folder `name`, or else in the hub's repository, fetched once. Raises SystemExit."""
    if Path(name).is_dir():
        if not (Path(name) / file).is_file():
            raise SystemExit(f"{name}: is no Hugging Face folder of GPT-2, because it has no {file}")
        return Path(name) / file
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise SystemExit(f"{name}: no such folder; a name on the Hugging Face hub needs: pip install huggingface_hub")
    try:
        return Path(hf_hub_download(name, file))
    except Exception as error:  # no network, no such repository, ...
        raise SystemExit(f"{name}: no such folder, and not to be had from the Hugging Face hub ({first_line(error)})")
