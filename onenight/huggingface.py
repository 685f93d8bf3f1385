"""Models as transformers has them, GPT2LMHeadModel and Qwen3ForCausalLM, from ours and back. transformers reads and
writes the files; here are the shape, the names of the tensors and the tokenizer. It is optional, and imported only
where it is used: that takes seconds."""

import functools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from onenight.checkpoint import check_keys
from onenight.files import first_line, where
from onenight.tokenizer import EOT, EOT_TEXT, VOCAB_SIZE, get_encoding

import torch

from model import GPT, RMS_NORM_EPS, ROTARY_BASE, GPTConfig

SHAPE = {  # GPTConfig's names, and transformers' for both architectures
    "block_size": "max_position_embeddings", "vocab_size": "vocab_size", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_embd": "hidden_size",
}  # fmt: skip
COMPUTATION = {  # what else in a config decides what the model computes
    "gpt2": (
        "activation_function", "n_inner", "layer_norm_epsilon", "scale_attn_weights", "add_cross_attention",
        "scale_attn_by_inverse_layer_idx", "tie_word_embeddings",
    ),
    "qwen3": (
        "num_key_value_heads", "head_dim", "intermediate_size", "hidden_act", "rms_norm_eps", "rope_parameters",
        "attention_bias", "use_sliding_window", "tie_word_embeddings",
    ),
}  # fmt: skip
GELUS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")  # all within 0.0005 of one another
QWEN3_NAMES = {  # parts of the tensors' names, ours and theirs; query, key and value are one tensor here, three there
    "transformer.h.": "model.layers.", "transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm",
    "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", ".attn.c_proj": ".self_attn.o_proj",
    ".attn.": ".self_attn.", "c_gate": "gate_proj", "c_fc": "up_proj", "mlp.c_proj": "mlp.down_proj",
}  # fmt: skip


@functools.cache
def import_transformers():
    """The package, made to print nothing but errors. Raises SystemExit if it is missing or too old."""
    try:
        import transformers
        from transformers import GPT2Tokenizer, Qwen3ForCausalLM  # noqa: F401

        if int(transformers.__version__.split(".")[0]) < 5:
            raise ImportError
    except ImportError:
        raise SystemExit('Hugging Face folders need transformers 5 or newer (pip install "transformers>=5")')
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


# ---- the shape


def to_config(shape: GPTConfig):
    """transformers' config of a model that computes what ours of this shape does."""
    transformers = import_transformers()
    common = {theirs: getattr(shape, ours) for ours, theirs in SHAPE.items()}
    common |= {"bos_token_id": EOT, "eos_token_id": EOT}
    if shape.architecture == "gpt2":
        # n_ctx: the older name of n_positions, which llama.cpp reads. "gelu" is exact; OpenAI's own was "gelu_new".
        dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), shape.dropout)
        return transformers.GPT2Config(**common, n_ctx=shape.block_size, activation_function="gelu", **dropouts)
    config = transformers.Qwen3Config(
        **common, num_key_value_heads=shape.n_head, head_dim=shape.head_size, intermediate_size=shape.mlp_width,
        rms_norm_eps=RMS_NORM_EPS, rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE},
        tie_word_embeddings=False,
    )  # fmt: skip
    config.rope_theta = ROTARY_BASE  # where Ollama reads it
    return config


def from_config(config, name: str) -> dict:
    """model_args from transformers' config. Raises SystemExit, naming what differs, if GPT does not compute that."""
    architecture = config.model_type
    if architecture not in COMPUTATION:
        raise SystemExit(f"{name}: its model_type is {architecture!r}; this program reads {' and '.join(COMPUTATION)}")
    model_args = {ours: getattr(config, theirs) for ours, theirs in SHAPE.items()}
    model_args |= {"bias": architecture == "gpt2", "dropout": 0.0, "architecture": architecture}
    try:
        wanted = to_config(GPTConfig(**model_args))
    except (ValueError, TypeError) as error:
        raise SystemExit(f"{name}: its config.json has an impossible shape ({first_line(error)})")
    same = {"activation_function": GELUS, "n_inner": (None, 4 * model_args["n_embd"])}
    found = {key: getattr(config, key) for key in COMPUTATION[architecture]}
    other = [f"{key}={value!r}" for key, value in found.items() if value not in same.get(key, (getattr(wanted, key),))]
    if other:
        raise SystemExit(f"{name}: not an architecture of this program (its config.json has {', '.join(other)})")
    return model_args


# ---- the weights


def to_transformers(model: GPT, dtype: torch.dtype):
    """transformers' model with our weights in `dtype`, without the padding of the vocabulary."""
    weights = model.state_dict()
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = weights[name][:VOCAB_SIZE]
    if model.config.architecture == "gpt2":
        weights = transpose(weights)
    else:
        for name in [name for name in weights if "c_attn" in name]:
            for part, rows in zip("qkv", weights.pop(name).chunk(3)):
                weights[name.replace("c_attn", f"{part}_proj")] = rows
        weights = renamed(weights, QWEN3_NAMES)
    config = to_config(replace(model.config, vocab_size=VOCAB_SIZE))
    theirs = import_transformers().AutoModelForCausalLM.from_config(config, dtype=dtype)
    theirs.load_state_dict({**theirs.state_dict(), **weights})  # its biases are 0, which bias=False lacks
    theirs.generation_config.pad_token_id = EOT
    return theirs


def from_transformers(weights: dict[str, torch.Tensor], architecture: str) -> dict[str, torch.Tensor]:
    """The tensors by our names, from transformers'."""
    if architecture == "gpt2":
        return transpose(weights)
    weights = renamed(weights, {theirs: ours for ours, theirs in QWEN3_NAMES.items()})
    for name in [name for name in weights if "q_proj" in name]:
        parts = [weights.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        weights[name.replace("q_proj", "c_attn")] = torch.cat(parts)
    return weights


def transpose(weights: dict) -> dict:
    """Transposes the matrices of the blocks, which OpenAI's GPT-2 stores as (in, out), and torch as (out, in)."""
    turned = ("c_attn.weight", "c_fc.weight", "c_proj.weight")
    return {key: value.T.contiguous() if key.endswith(turned) else value for key, value in weights.items()}


def renamed(weights: dict, names: dict[str, str]) -> dict:
    return {functools.reduce(lambda key, pair: key.replace(*pair), names.items(), key): weights[key] for key in weights}


# ---- a folder, or a repository on the hub


def read_folder(name: str) -> tuple[dict, dict]:
    """model_args and float32 weights of the folder `name`, in one or several safetensors files, or of that repository
    on the Hugging Face hub ('gpt2', 'gpt2-xl'). OpenAI's tanh approximation of GELU is computed as GELU itself, as in
    nanoGPT: they differ by 0.0005 at most. Raises SystemExit if it cannot be read or fetched, has another architecture
    or tokenizer, or weights of another shape."""
    transformers = import_transformers()
    how = {
        "trust_remote_code": False,
        "output_loading_info": True,
        "dtype": torch.float32,
        "use_safetensors": True,
        "ignore_mismatched_sizes": True,
    }
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        model_args = from_config(config, name)
        check_tokenizer(name)
        model, found = transformers.AutoModelForCausalLM.from_pretrained(name, config=config, **how)
    except Exception as error:  # no network, no such file, a damaged one, ...: each package has its own
        problem = "cannot be read as" if Path(name).is_dir() else f"no such folder{where(Path(name))}, nor"
        raise SystemExit(f"{name}: {problem} a model of the Hugging Face format ({first_line(error)})")
    misshapen = [f"{key} is {tuple(shape)}" for key, shape, _ in sorted(found["mismatched_keys"])]
    check_keys(name, found["missing_keys"], found["unexpected_keys"], misshapen)
    return model_args, from_transformers(model.state_dict(), model_args["architecture"])


def check_tokenizer(name: str):
    """Raises SystemExit if tokenizer.json or vocab.json, where there is one, has other tokens than GPT-2."""
    from transformers.utils import cached_file

    for file in ("tokenizer.json", "vocab.json"):
        try:
            content = json.loads(Path(cached_file(name, file)).read_text(encoding="utf-8"))
        except OSError:
            continue
        vocab = content["model"]["vocab"] if file == "tokenizer.json" else content
        if {EOT_TEXT: EOT, **vocab} != vocabulary():
            raise SystemExit(f"{name}: its {file} is not GPT-2's, which this program uses")


# ---- the tokenizer


def gpt2_tokenizer(block_size: int):
    """transformers' GPT2Tokenizer, from tiktoken's ranks."""
    vocab = vocabulary()
    return import_transformers().GPT2Tokenizer(vocab=vocab, merges=list(merges(vocab)), model_max_length=block_size)


def vocabulary() -> dict[str, int]:
    """GPT-2's ids by their tokens as its files write them: one visible character for each byte."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    spelling = bytes_to_unicode()
    tokens = [get_encoding().decode_single_token_bytes(token) for token in range(EOT)]
    return {"".join(spelling[byte] for byte in token): rank for rank, token in enumerate(tokens)} | {EOT_TEXT: EOT}


def merges(vocab: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Yields the two parts that each token was merged from, in the order of the merges: byte pair encoding applied to
    its bytes, up to the last merge."""
    for token in list(vocab)[:EOT]:
        parts = list(token)
        while len(parts) > 2:
            first = min(range(len(parts) - 1), key=lambda i: vocab.get(parts[i] + parts[i + 1], EOT))
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]
