"""The Hugging Face format of both architectures, GPT2LMHeadModel and Qwen3ForCausalLM: config.json, the names of the
tensors and the tokenizer's vocabulary, for writing and for reading."""

import json
from collections.abc import Iterator
from pathlib import Path

from onenight.files import first_line, where
from onenight.tokenizer import EOT, EOT_TEXT, VOCAB_SIZE, get_encoding

import torch

from model import GPT, RMS_NORM_EPS, ROTARY_BASE, GPTConfig

MODEL_TYPES = {"gpt2": "GPT2LMHeadModel", "qwen3": "Qwen3ForCausalLM"}
SHAPE_KEYS = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
KEYS = {  # what config.json calls SHAPE_KEYS
    "gpt2": ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd"),
    "qwen3": ("max_position_embeddings", "vocab_size", "num_hidden_layers", "num_attention_heads", "hidden_size"),
}
QWEN3_NAMES = {  # of the tensors, ours and theirs; query, key and value are one tensor here and three there
    "transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "lm_head": "lm_head",
    "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn.c_proj": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm",
    "mlp.c_gate": "mlp.gate_proj", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj",
}  # fmt: skip
GELUS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")  # all within 0.0005 of one another
QKV = [f"self_attn.{part}_proj" for part in "qkv"]
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that are visible characters in Latin-1
UNPRINTABLE = {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in PRINTABLE)}


# ---- config.json


def fixed_config(shape: GPTConfig) -> dict:
    """The entries of config.json that this project requires, apart from KEYS: what its model computes."""
    if shape.architecture == "gpt2":
        return {"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
    return {
        "num_key_value_heads": shape.n_head, "head_dim": shape.head_size, "intermediate_size": shape.mlp_width,
        "hidden_act": "silu", "rms_norm_eps": RMS_NORM_EPS, "attention_bias": False, "use_sliding_window": False,
        "tie_word_embeddings": False,
    }  # fmt: skip


def write_config(shape: GPTConfig, dtype: str) -> dict:
    """config.json of a model of this shape, without the padding of its vocabulary, with weights in `dtype`."""
    config = {"architectures": [MODEL_TYPES[shape.architecture]], "model_type": shape.architecture}
    config |= {theirs: getattr(shape, ours) for ours, theirs in zip(SHAPE_KEYS, KEYS[shape.architecture])}
    config |= {**fixed_config(shape), "vocab_size": VOCAB_SIZE, "bos_token_id": EOT, "eos_token_id": EOT}
    config["torch_dtype"] = dtype
    if shape.architecture == "gpt2":
        # n_ctx: the older name of n_positions, which llama.cpp reads. "gelu" is exact; OpenAI's own was "gelu_new".
        dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), shape.dropout)
        return {**config, "n_ctx": shape.block_size, "activation_function": "gelu", **dropouts}
    rope = {"rope_type": "default", "rope_theta": ROTARY_BASE}
    return {**config, "rope_parameters": rope, "rope_theta": ROTARY_BASE}  # Ollama reads the latter


def read_config(name: str, config: dict) -> dict:
    """model_args from the config.json of `name`. Raises SystemExit, naming what differs, if GPT cannot compute it."""
    architecture = config.get("model_type")
    if architecture not in KEYS:
        raise SystemExit(f"{name}: its model_type is {architecture!r}; this program reads {' and '.join(KEYS)}")
    missing = [theirs for theirs in KEYS[architecture] if theirs not in config]
    if missing:
        raise SystemExit(f"{name}: its config.json has no {', '.join(missing)}")
    model_args = {ours: config[theirs] for ours, theirs in zip(SHAPE_KEYS, KEYS[architecture])}
    model_args |= {"bias": architecture == "gpt2", "dropout": 0.0}
    if architecture != "gpt2":
        model_args["architecture"] = architecture
    try:
        wanted = fixed_config(GPTConfig(**model_args))
    except (ValueError, TypeError) as error:
        raise SystemExit(f"{name}: its config.json has an impossible shape ({first_line(error)})")
    if architecture == "gpt2":
        wanted |= {"n_inner": None, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
        if config.get("activation_function", "gelu") not in GELUS:
            wanted["activation_function"] = "gelu"
    else:
        config = {"rope_theta": ROTARY_BASE, **config, **(config.get("rope_parameters") or {})}
        wanted |= {"rope_type": "default", "rope_theta": ROTARY_BASE, "rope_scaling": None}
    other = [f"{key}={config[key]!r}" for key, value in wanted.items() if config.get(key, value) != value]
    if other:
        raise SystemExit(f"{name}: not an architecture of this program (its config.json has {', '.join(other)})")
    return model_args


# ---- tensors


def write_weights(model: GPT) -> dict[str, torch.Tensor]:
    """The tensors by transformers' names, without the padding of the vocabulary."""
    weights = model.state_dict()
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = weights[name][:VOCAB_SIZE]
    if model.config.architecture == "gpt2":
        del weights["lm_head.weight"]  # the embeddings once more
        for name in [name for name in weights if ".h." in name or ".ln_f." in name]:
            if name.endswith(".weight"):  # zeros for the biases that a model with bias=False lacks
                weights.setdefault(name.replace(".weight", ".bias"), torch.zeros(weights[name].size(0)))
        return transpose(weights)
    named = {}
    for name, weight in weights.items():
        prefix, part = split_name(name)
        if part == "attn.c_attn":
            named |= {f"{prefix}{theirs}.weight": rows for theirs, rows in zip(QKV, weight.chunk(3))}
        else:
            named[f"{prefix}{QWEN3_NAMES[part]}.weight"] = weight
    return {name: weight.clone() for name, weight in named.items()}


def split_name(name: str) -> tuple[str, str]:
    """'transformer.h.3.ln_1.weight' as transformers' prefix and our part: ('model.layers.3.', 'ln_1')."""
    part = name.removesuffix(".weight")
    if not part.startswith("transformer.h."):
        return "", part
    layer, part = part.removeprefix("transformer.h.").split(".", 1)
    return f"model.layers.{layer}.", part


def read_weights(weights: dict[str, torch.Tensor], model_args: dict) -> dict[str, torch.Tensor]:
    """The tensors by our names, float32, from transformers' for a model of that shape. Raises KeyError."""
    weights = {name: weight.float() for name, weight in weights.items()}
    if "architecture" not in model_args:
        # OpenAI's files omit the prefix, and contain the causal masks.
        weights = {f"transformer.{name.removeprefix('transformer.')}": weight for name, weight in weights.items()}
        masks = (".attn.bias", ".attn.masked_bias")
        weights = transpose({name: weight for name, weight in weights.items() if not name.endswith(masks)})
        return {**weights, "lm_head.weight": weights["transformer.wte.weight"]}
    with torch.device("meta"):
        names = GPT(GPTConfig(**model_args)).state_dict()
    ours = {}
    for name in names:
        prefix, part = split_name(name)
        theirs = QKV if part == "attn.c_attn" else [QWEN3_NAMES[part]]
        ours[name] = torch.cat([weights[f"{prefix}{other}.weight"] for other in theirs])
    return ours


def transpose(weights: dict) -> dict:
    """Transposes the matrices of the blocks, which OpenAI's GPT-2 stores as (in, out), and torch as (out, in)."""
    turned = ("c_attn.weight", "c_fc.weight", "c_proj.weight")
    return {key: value.T.contiguous() if key.endswith(turned) else value for key, value in weights.items()}


# ---- a folder, or a repository on the hub


def read_folder(name: str) -> tuple[dict, dict]:
    """model_args and float32 weights of the folder `name`, in one or several safetensors files, or of that repository
    on the Hugging Face hub ('gpt2', 'gpt2-xl'). OpenAI's tanh approximation of GELU is computed as GELU itself, as in
    nanoGPT: they differ by 0.0005 at most. Raises SystemExit if it cannot be read or fetched, or has another
    architecture or tokenizer."""
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise SystemExit(f"{name}: reading it needs the package safetensors (pip install safetensors)")
    model_args = read_config(name, read_json_of(name, find_file(name, "config.json")))
    check_tokenizer(name)
    index = Path(name) / "model.safetensors.index.json"
    files = sorted(set(read_json_of(name, index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    weights = {}
    for file in files:
        path = find_file(name, file)
        try:
            weights |= load_file(path)
        except Exception as error:  # OSError, and safetensors' own
            raise SystemExit(f"{path}: cannot be read ({first_line(error)})")
    try:
        return model_args, read_weights(weights, model_args)
    except KeyError as missing:
        raise SystemExit(f"{name}: its weights lack {missing.args[0]}")


def read_json_of(name: str, path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{name}: its {path.name} cannot be read ({first_line(error)})")


def check_tokenizer(name: str):
    """Raises SystemExit if the folder has a tokenizer.json that is not GPT-2's."""
    path = Path(name) / "tokenizer.json"
    if path.is_file():
        model = read_json_of(name, path).get("model") or {}
        vocab = {EOT_TEXT: EOT, **(model.get("vocab") or {})}
        if vocab != vocabulary():
            raise SystemExit(f"{name}: its tokenizer.json is not GPT-2's, which this program uses")


def find_file(name: str, file: str) -> Path:
    """The file in the folder `name`, or else in the hub's repository of that name, fetched once. Raises SystemExit."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / file).is_file():
            raise SystemExit(f"{name}: not a Hugging Face folder: it has no {file}")
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


# ---- the tokenizer


def vocabulary() -> dict[str, int]:
    """GPT-2's ids by their tokens as its files write them."""
    return {spell(token): rank for rank, token in enumerate(ranked_tokens())} | {EOT_TEXT: EOT}


def merges() -> Iterator[list[str]]:
    """Yields the two parts that each token was merged from, in the order of the merges: byte pair encoding applied to
    its bytes, up to the last merge."""
    tokens = ranked_tokens()
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for token in tokens:
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            first = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(tokens)))
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            yield [spell(part) for part in parts]


def ranked_tokens() -> list[bytes]:
    return [get_encoding().decode_single_token_bytes(token) for token in range(EOT)]


def spell(token: bytes) -> str:
    """The bytes as GPT-2's files write them: printable ones as in Latin-1, the others from U+0100 on."""
    return token.decode("latin-1").translate(UNPRINTABLE)
