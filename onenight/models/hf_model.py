"""Our models as transformers' GPT2LMHeadModel and Qwen3ForCausalLM, and back: the settings in their
config.json, and the names and layout of their tensors.

transformers is optional, and takes seconds to import, so it is imported only where it is used.
"""

import sys
from dataclasses import replace

import torch

from configurator import UserError
from model import ARCHITECTURES, GPT, RMS_NORM_EPS, ROTARY_BASE, GPTConfig
from onenight.data.tokenizer import EOT, VOCAB_SIZE
from onenight.system.console import quiet_torchao


def import_transformers():
    """Return the transformers package, set up to print nothing but errors. Raises UserError if it
    is missing or too old, or cannot work because Python leaves out docstrings."""
    if sys.flags.optimize >= 2:
        raise UserError(
            "transformers, which Hugging Face folders need, does not work without docstrings; "
            "run this without python -OO and PYTHONOPTIMIZE=2"
        )
    quiet_torchao()  # which transformers imports if it is installed
    try:
        import transformers
        from transformers import TokenizersBackend  # noqa: F401  new in version 5
    except ImportError:
        raise UserError(
            'Hugging Face folders need transformers 5 or newer (pip install "transformers>=5")'
        )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


# ---- settings

# Names in GPTConfig, and in the configs of both of transformers' architectures.
SHAPE = {
    "block_size": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
}
# The other settings in a config that change what the model computes.
COMPUTATION = (
    # GPT-2's
    "activation_function",
    "n_inner",
    "layer_norm_epsilon",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "add_cross_attention",
    # Qwen3's
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "attention_bias",
    "use_sliding_window",
    # of both
    "tie_word_embeddings",
)
# Read as exact GELU, as nanoGPT does. The approximations differ from it by 0.0005 at most.
GELUS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")


def to_config(shape: GPTConfig):
    """Return transformers' config of a model that computes the same as ours of this shape."""
    transformers = import_transformers()
    common = {theirs: getattr(shape, ours) for ours, theirs in SHAPE.items()}
    common["bos_token_id"] = EOT
    common["eos_token_id"] = EOT
    if shape.architecture == "gpt2":
        return transformers.GPT2Config(
            **common,
            n_ctx=shape.block_size,  # the old name of n_positions, which llama.cpp reads
            activation_function="gelu",  # exact; OpenAI's own models have "gelu_new"
            resid_pdrop=shape.dropout,
            embd_pdrop=shape.dropout,
            attn_pdrop=shape.dropout,
        )
    config = transformers.Qwen3Config(
        **common,
        num_key_value_heads=shape.n_head,
        head_dim=shape.head_size,
        intermediate_size=shape.mlp_width,
        rms_norm_eps=RMS_NORM_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE},
        tie_word_embeddings=False,
    )
    config.rope_theta = ROTARY_BASE  # where Ollama reads it
    return config


def from_config(config, name: str) -> dict:
    """Return the model_args for transformers' config, read from `name`.

    Raises UserError, naming what differs, if our model cannot compute the same, and ValueError if
    the shape is impossible.
    """
    architecture = config.model_type
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{name}: its model_type is {architecture!r}; "
            f"this program reads {' and '.join(ARCHITECTURES)}"
        )
    model_args = {ours: getattr(config, theirs) for ours, theirs in SHAPE.items()}
    model_args["bias"] = architecture == "gpt2"
    model_args["dropout"] = 0.0
    model_args["architecture"] = architecture

    # Everything else must be as our model has it, or equivalent.
    expected = to_config(GPTConfig(**model_args))
    equivalent = {"activation_function": GELUS, "n_inner": (None, 4 * config.hidden_size)}
    differences = []
    for key in COMPUTATION:
        if not hasattr(config, key):
            continue
        value = getattr(config, key)
        accepted = equivalent.get(key, [getattr(expected, key)])
        if value not in accepted:
            differences.append(f"{key}={value!r}")
    if differences:
        raise UserError(
            f"{name}: this program has no such architecture "
            f"(its config.json has {', '.join(differences)})"
        )
    return model_args


# ---- weights

# Parts of the tensors' names, ours and Qwen3's.
QWEN3_NAMES = {
    "transformer.h.": "model.layers.",
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.norm",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    ".attn.c_proj": ".self_attn.o_proj",
    ".attn.": ".self_attn.",
    "c_gate": "gate_proj",
    "c_fc": "up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
# OpenAI stored these matrices of GPT-2 as (in, out); PyTorch's linear layers have (out, in).
GPT2_TRANSPOSED = ("c_attn.weight", "c_fc.weight", "c_proj.weight")


def to_transformers(model: GPT, dtype: torch.dtype):
    """Return transformers' model with our weights in `dtype`, without the ids that only pad the
    vocabulary."""
    config = to_config(replace(model.config, vocab_size=VOCAB_SIZE))
    theirs = import_transformers().AutoModelForCausalLM.from_config(config, dtype=dtype)
    # GPT-2's has all biases, initialized to 0; those that ours lacks with bias=False stay 0.
    weights = theirs.state_dict()
    for name, weight in model.state_dict().items():
        names = their_names(name, config.model_type)
        parts = transpose(name, weight, config.model_type).chunk(len(names))
        for their_name, part in zip(names, parts):
            weights[their_name].copy_(part[: len(weights[their_name])])
    theirs.generation_config.pad_token_id = EOT
    return theirs


def from_transformers(theirs, model_args: dict) -> dict[str, torch.Tensor]:
    """Return the weights of transformers' model by our names."""
    with torch.device("meta"):
        names = GPT(GPTConfig(**model_args)).state_dict().keys()
    weights = theirs.state_dict()
    architecture = model_args["architecture"]
    ours = {}
    for name in names:
        parts = [weights[their_name] for their_name in their_names(name, architecture)]
        ours[name] = transpose(name, torch.cat(parts), architecture)
    return ours


def their_names(name: str, architecture: str) -> list[str]:
    """Return transformers' names of our tensor. Query, key and value are one tensor here, and three
    in Qwen3."""
    if architecture == "gpt2":
        return [name]
    for ours, theirs in QWEN3_NAMES.items():
        name = name.replace(ours, theirs)
    if "c_attn" in name:
        return [name.replace("c_attn", part) for part in ("q_proj", "k_proj", "v_proj")]
    return [name]


def transpose(name: str, weight: torch.Tensor, architecture: str) -> torch.Tensor:
    """Return our tensor in transformers' layout, or theirs in ours: most are the same in both."""
    if architecture == "gpt2" and name.endswith(GPT2_TRANSPOSED):
        return weight.T.contiguous()
    return weight
