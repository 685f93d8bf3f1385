"""
Weights to start from: a checkpoint of this project or of nanoGPT, or GPT-2 in a Hugging Face folder.
"""

import json
from pathlib import Path

from onenight.checkpoint import load_checkpoint, load_latest
from onenight.device import DTYPES
from onenight.files import first_line, where
from onenight.tokenizer import VOCAB_SIZE

import torch

from model import GPT, GPTConfig

GPT2_NAMES = {  # from GPTConfig's names to those in GPT-2's config.json
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}


def resolve_checkpoint(init_from: str, out_dir: Path) -> dict:
    """
    The checkpoint that init_from means: the latest of out_dir for 'resume', the file for a name that ends in .pt, and
    otherwise GPT-2 from a Hugging Face folder or hub name. Only model_args and model are always in it. Raises
    SystemExit.
    """
    if init_from == "resume":
        return load_latest(out_dir)
    if init_from.endswith(".pt"):
        return load_checkpoint(Path(init_from))
    model_args, weights = load_gpt2(init_from)
    return {"model_args": model_args, "model": weights}


def build_model(checkpoint: dict, name: str, dtype: str = "float32") -> GPT:
    """
    The model of a checkpoint, called `name` in errors, ready to generate GPT-2's tokens. Its large matrices are in
    `dtype`, because autocast would otherwise convert them again for every token. Raises SystemExit if weights and
    shape do not match.
    """
    try:
        model = GPT(GPTConfig(**checkpoint["model_args"]))
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise SystemExit(f"{name}: its weights do not match its model_args ({first_line(error)})")
    if model.config.vocab_size < VOCAB_SIZE:
        raise SystemExit(
            f"{name}: its vocabulary of {model.config.vocab_size} ids is not GPT-2's, which has {VOCAB_SIZE}"
        )
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(DTYPES[dtype])
    return model.eval()


def crop_positions(weights: dict, block_size: int) -> dict:
    """The weights for a smaller block_size: only the first of the position embeddings, if there are any."""
    wpe = "transformer.wpe.weight"
    return {**weights, wpe: weights[wpe][:block_size]} if wpe in weights else weights


def load_gpt2(name: str) -> tuple[dict, dict]:
    """
    model_args and float32 weights of a GPT-2 in a folder with config.json and model.safetensors, or on the Hugging
    Face hub ('gpt2', 'gpt2-xl'). OpenAI's tanh approximation of GELU is computed as GELU itself, as in nanoGPT: they
    differ by 0.0005 at most. Raises SystemExit if it cannot be read or fetched, or is not GPT-2.
    """
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise SystemExit(f"{name}: reading it needs the package safetensors (pip install safetensors)")
    config_file, weights_file = find_file(name, "config.json"), find_file(name, "model.safetensors")
    try:
        config, weights = json.loads(config_file.read_text(encoding="utf-8")), load_file(weights_file)
    except Exception as error:  # OSError, ValueError, and safetensors' own
        raise SystemExit(f"{name}: cannot be read ({first_line(error)})")
    check_architecture(name, config)
    # OpenAI's files omit the prefix, and contain the causal masks.
    weights = {f"transformer.{key.removeprefix('transformer.')}": value.float() for key, value in weights.items()}
    masks = (".attn.bias", ".attn.masked_bias")
    weights = transpose({key: value for key, value in weights.items() if not key.endswith(masks)})
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return {key: config[their] for key, their in GPT2_NAMES.items()} | {"bias": True, "dropout": 0.0}, weights


def check_architecture(name: str, config: dict):
    """Raises SystemExit, naming the differences, if the config.json describes anything but GPT-2's architecture."""
    gpt2 = {"model_type": "gpt2", "n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
            "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}  # fmt: skip
    other = [f"{key}={config[key]!r}" for key, value in gpt2.items() if config.get(key, value) != value]
    if "gelu" not in config.get("activation_function", "gelu"):
        other.append(f"activation_function={config['activation_function']!r}")
    other += [f"no {key}" for key in ("model_type", *GPT2_NAMES.values()) if key not in config]
    if other:
        raise SystemExit(f"{name}: not GPT-2's architecture (its config.json has {', '.join(other)})")


def transpose(weights: dict) -> dict:
    """Transposes the matrices of the blocks, which OpenAI's GPT-2 stores as (in, out), and torch as (out, in)."""
    turned = ("c_attn.weight", "c_fc.weight", "c_proj.weight")
    return {key: value.T.contiguous() if key.endswith(turned) else value for key, value in weights.items()}


def find_file(name: str, file: str) -> Path:
    """The file in the folder `name`, or else in the hub's repository of that name, fetched once. Raises SystemExit."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / file).is_file():
            raise SystemExit(f"{name}: not a Hugging Face folder of GPT-2: it has no {file}")
        return folder / file
    missing = f"{name}: no such folder{where(folder)}"
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise SystemExit(f"{missing}; for a name on the Hugging Face hub: pip install huggingface_hub")
    try:
        return Path(hf_hub_download(name, file))
    except Exception as error:  # no network, no such repository, ...
        raise SystemExit(f"{missing}, and not available from the Hugging Face hub ({first_line(error)})")
