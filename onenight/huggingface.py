"""Weights to start from, and models as transformers has them, GPT2LMHeadModel and Qwen3ForCausalLM, from ours and back.
transformers reads and writes the files; here are the shape, the names of the tensors and the tokenizer. The package is
optional, and imported only where it is used: that takes seconds."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path

from onenight.checkpoint import check_keys, load_checkpoint, load_latest
from onenight.files import first_line, where
from onenight.tokenizer import EOT, EOT_TEXT, VOCAB_SIZE, read_ranks

import torch

from model import ARCHITECTURES, GPT, RMS_NORM_EPS, ROTARY_BASE, GPTConfig

SHAPE = {  # GPTConfig's names, and transformers' for both architectures
    "block_size": "max_position_embeddings", "vocab_size": "vocab_size", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_embd": "hidden_size",
}  # fmt: skip
COMPUTATION = (  # what else in a config decides what the model computes: GPT-2's, Qwen3's, both
    "activation_function", "n_inner", "layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx",
    "add_cross_attention", "num_key_value_heads", "head_dim", "intermediate_size", "hidden_act", "rms_norm_eps",
    "rope_parameters", "attention_bias", "use_sliding_window", "tie_word_embeddings",
)  # fmt: skip
GELUS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")  # read as GELU itself, as in nanoGPT: 0.0005 off at most
QWEN3_NAMES = {  # parts of the tensors' names, ours and theirs
    "transformer.h.": "model.layers.", "transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm",
    "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", ".attn.c_proj": ".self_attn.o_proj",
    ".attn.": ".self_attn.", "c_gate": "gate_proj", "c_fc": "up_proj", "mlp.c_proj": "mlp.down_proj",
}  # fmt: skip


def resolve_checkpoint(init_from: str, out_dir: Path) -> dict:
    """The checkpoint that init_from means: the latest of out_dir for 'resume', the file for a name that ends in .pt,
    and otherwise a Hugging Face folder or hub name. Only model_args and model are always in it. Raises SystemExit."""
    if init_from == "resume":
        return load_latest(out_dir)
    return load_checkpoint(Path(init_from)) if init_from.endswith(".pt") else read_folder(init_from)


def import_transformers():
    """The package, made to print nothing but errors. Raises SystemExit if it is missing or too old."""
    try:
        import transformers
        from transformers import TokenizersBackend  # noqa: F401  new in version 5
    except ImportError:
        raise SystemExit('Hugging Face folders need transformers 5 or newer (pip install "transformers>=5")')
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def to_config(shape: GPTConfig):
    """transformers' config of a model that computes what ours of this shape does."""
    common = {theirs: getattr(shape, ours) for ours, theirs in SHAPE.items()}
    common |= {"bos_token_id": EOT, "eos_token_id": EOT}
    if shape.architecture == "gpt2":
        # n_ctx: the older name of n_positions, which llama.cpp reads. "gelu" is exact; OpenAI's own was "gelu_new".
        common |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), shape.dropout)
        return import_transformers().GPT2Config(**common, n_ctx=shape.block_size, activation_function="gelu")
    config = import_transformers().Qwen3Config(
        **common, num_key_value_heads=shape.n_head, head_dim=shape.head_size, intermediate_size=shape.mlp_width,
        rms_norm_eps=RMS_NORM_EPS, rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE},
        tie_word_embeddings=False,
    )  # fmt: skip
    config.rope_theta = ROTARY_BASE  # where Ollama reads it
    return config


def from_config(config, name: str) -> dict:
    """model_args from transformers' config. Raises SystemExit, naming what differs, if GPT does not compute that, and
    ValueError if the shape is impossible."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise SystemExit(f"{name}: its model_type is {kind!r}; this program reads {' and '.join(ARCHITECTURES)}")
    model_args = {ours: getattr(config, theirs) for ours, theirs in SHAPE.items()}
    model_args |= {"bias": kind == "gpt2", "dropout": 0.0, "architecture": kind}
    wanted = to_config(GPTConfig(**model_args))
    same = {"activation_function": GELUS, "n_inner": (None, 4 * config.hidden_size)}
    found = {key: getattr(config, key) for key in COMPUTATION if hasattr(config, key)}
    other = [f"{key}={value!r}" for key, value in found.items() if value not in same.get(key, [getattr(wanted, key)])]
    if other:
        raise SystemExit(f"{name}: not an architecture of this program (its config.json has {', '.join(other)})")
    return model_args


def to_transformers(model: GPT, dtype: torch.dtype):
    """transformers' model with our weights in `dtype`, without the padding of the vocabulary."""
    config = to_config(replace(model.config, vocab_size=VOCAB_SIZE))
    theirs = import_transformers().AutoModelForCausalLM.from_config(config, dtype=dtype)
    weights = theirs.state_dict()  # its biases are 0, which bias=False lacks
    for name, weight in model.state_dict().items():
        names = their_names(name, config.model_type)
        for key, part in zip(names, turned(name, weight, config.model_type).chunk(len(names))):
            weights[key].copy_(part[: len(weights[key])])
    theirs.generation_config.pad_token_id = EOT
    return theirs


def their_names(name: str, kind: str) -> list[str]:
    """transformers' names of our tensor. Query, key and value are one tensor here, and three in Qwen3."""
    if kind == "gpt2":
        return [name]
    for ours, theirs in QWEN3_NAMES.items():
        name = name.replace(ours, theirs)
    return [name.replace("c_attn", f"{part}_proj") for part in "qkv"] if "c_attn" in name else [name]


def turned(name: str, weight: torch.Tensor, kind: str) -> torch.Tensor:
    """A matrix of GPT-2's blocks transposed, which OpenAI stored as (in, out), and torch as (out, in)."""
    stored = kind == "gpt2" and name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))
    return weight.T.contiguous() if stored else weight


def read_folder(name: str) -> dict:
    """model_args and model, float32 weights, of the folder `name`, in one or several safetensors files, or of that
    repository on the Hugging Face hub ('gpt2', 'gpt2-xl'). Raises SystemExit if it cannot be read or fetched, has
    another architecture or tokenizer, or weights of another shape."""
    transformers = import_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        model_args = from_config(config, name)
        check_tokenizer(name)
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=torch.float32, trust_remote_code=False, use_safetensors=True,
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # no network, no such file, a damaged one, ...: each package has its own
        source = "" if Path(name).is_dir() else f"no such folder{where(Path(name))}, and from the Hugging Face hub it "
        raise SystemExit(f"{name}: {source}cannot be read ({first_line(error)})")
    shapes = {key: shape for key, shape, _ in found["mismatched_keys"]}
    check_keys(name, found["missing_keys"], found["unexpected_keys"], shapes)
    weights, kind = model.state_dict(), config.model_type
    with torch.device("meta"):
        names = GPT(GPTConfig(**model_args)).state_dict()
    ours = {name: turned(name, torch.cat([weights[key] for key in their_names(name, kind)]), kind) for name in names}
    return {"model_args": model_args, "model": ours}


def check_tokenizer(name: str):
    """Raises SystemExit if tokenizer.json or vocab.json, where there is one, has other tokens than GPT-2."""
    from transformers.utils import cached_file

    for file in ("tokenizer.json", "vocab.json"):
        with contextlib.suppress(OSError):  # there is none
            content = json.loads(Path(cached_file(name, file)).read_text(encoding="utf-8"))
            vocab = content["model"]["vocab"] if file == "tokenizer.json" else content
            if {EOT_TEXT: EOT, **vocab} != vocabulary():
                raise SystemExit(f"{name}: its {file} is not GPT-2's, which this program uses")


def vocabulary() -> dict[str, int]:
    """GPT-2's ids by their tokens as its files write them: one visible character for each byte."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    spelling = bytes_to_unicode()
    return {"".join(map(spelling.get, token)): rank for token, rank in read_ranks().items()} | {EOT_TEXT: EOT}


def make_tokenizer(max_tokens: int):
    """transformers' GPT-2 tokenizer. Its merges are, in the order of their ranks, the two parts that each token was
    merged from: those to which byte pair encoding leads from its bytes, up to the last merge."""
    vocab, merges = vocabulary(), []
    for token in list(vocab)[:EOT]:
        parts = list(token)
        while len(parts) > 2:
            first = min(range(len(parts) - 1), key=lambda i: vocab.get(parts[i] + parts[i + 1], EOT))
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            merges.append(tuple(parts))
    return import_transformers().GPT2Tokenizer(vocab=vocab, merges=merges, model_max_length=max_tokens)
