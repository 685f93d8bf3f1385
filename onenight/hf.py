"""Our models as transformers' GPT2LMHeadModel and Qwen3ForCausalLM, and back: the settings in their
config.json, the names and layout of their tensors, the tokenizer, and the folder.

transformers is optional, and takes seconds to import, so it is imported only where it is used.
"""

import functools
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from model import GPT, RMS_NORM_EPS, ROTARY_BASE, GPTConfig
from onenight.errors import UserError, first_line
from onenight.process import PARTIAL, rename
from onenight.tokenizer import EOT, EOT_TEXT, VOCAB_SIZE, encode_document, read_ranks

# Names in GPTConfig, and in the configs of both of transformers' architectures.
SHAPE = {
    "block_size": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
}
# The other settings in a config that change what the model computes.
COMPUTATION = {
    "gpt2": (
        "activation_function",
        "n_inner",
        "layer_norm_epsilon",
        "scale_attn_weights",
        "scale_attn_by_inverse_layer_idx",
        "add_cross_attention",
        "tie_word_embeddings",
    ),
    "qwen3": (
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "hidden_act",
        "rms_norm_eps",
        "rope_parameters",
        "attention_bias",
        "use_sliding_window",
        "tie_word_embeddings",
    ),
}
# Read as exact GELU, as nanoGPT does. The approximations differ from it by 0.0005 at most.
GELUS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")
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
# A tokenizer that encodes this as GPT-2's does has its rules for case, spaces, digits, accents and
# ligatures, which are split, combined or lost by each of Unicode's normal forms.
PROBE = "The  year\n\n2013: it's CAF\u00c9 'n' nai\u0308ve\t100,000 \ufb01 \u732b "


def import_transformers():
    """Return the transformers package, set up to print nothing but errors. Raises UserError if it
    is missing or too old."""
    # It imports torchao if that is installed, which prints warnings.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        import transformers
        from transformers import TokenizersBackend  # noqa: F401  new in version 5
    except ImportError:
        raise UserError('Hugging Face folders need transformers: pip install "transformers>=5"')
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


# -----------------------------------------------------------------------------
# Folders


def read_folder(name: str) -> dict:
    """Return `model`, the weights in float32, and `model_args` of a folder, or else of a repository
    on the Hugging Face hub ('gpt2', 'gpt2-xl').

    Raises UserError if it cannot be read, or is not the whole of a model that ours can be: its
    architecture, its tokenizer, all of its weights.
    """
    transformers = import_transformers()
    if (Path(name) / "adapter_config.json").exists():
        raise UserError(f"{name}: has an adapter; merge it into the model that it changes")
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
    except Exception as error:  # each package has its own for a missing file, or no network
        raise UserError(f"{name}: cannot be read as a Hugging Face folder ({first_line(error)})")
    faults = [*report["missing_keys"], *report["unexpected_keys"]]
    faults += [key for key, *_ in report["mismatched_keys"]]
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if is_tied != config.tie_word_embeddings:  # transformers reads two matrices if there are two
        faults.append("lm_head.weight")
    if faults:
        raise UserError(
            f"{name}: its weights are not those of this model ({', '.join(faults[:3])})"
        )
    return {"model": from_transformers(model, model_args), "model_args": model_args}


def write_folder(target: Path, model, tokenizer, card: str):
    """Write transformers' model and tokenizer and the model card to the new folder `target`, which
    appears only when it is complete. Raises UserError if it cannot be written."""
    temporary = target.with_name(target.name + PARTIAL)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        # vocab.json and merges.txt, the two files that OpenAI published, for older programs
        tokenizer.backend_tokenizer.model.save(str(temporary))
        (temporary / "README.md").write_text(card, encoding="utf-8")
        rename(temporary, target)
    except Exception as error:  # safetensors and tokenizers raise their own
        raise UserError(f"{target}: cannot be written ({first_line(error)})")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# -----------------------------------------------------------------------------
# Settings


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
    if shape.architecture != "qwen3":
        raise UserError(f"transformers has no model like architecture={shape.architecture!r}")
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
    """Return the model_args for transformers' config, read from `name`. Raises UserError if our
    model cannot compute the same, and ValueError if the shape is impossible."""
    architecture = config.model_type
    if architecture not in COMPUTATION:
        raise UserError(f"{name}: is a {architecture!r}; only gpt2 and qwen3 are read")
    model_args = {ours: getattr(config, theirs) for ours, theirs in SHAPE.items()}
    model_args["bias"] = architecture == "gpt2"
    model_args["dropout"] = 0.0
    model_args["architecture"] = architecture

    # Everything else must be as our model has it, or equivalent.
    expected = to_config(GPTConfig(**model_args))
    equivalent = {"activation_function": GELUS, "n_inner": (None, 4 * config.hidden_size)}
    differences = [
        f"{key}={getattr(config, key)!r}"
        for key in COMPUTATION[architecture]
        if getattr(config, key) not in equivalent.get(key, [getattr(expected, key)])
    ]
    if differences:
        raise UserError(f"{name}: has no architecture of ours ({', '.join(differences)})")
    return model_args


# -----------------------------------------------------------------------------
# Weights


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


# -----------------------------------------------------------------------------
# The tokenizer


def make_tokenizer(max_tokens: int):
    """Return transformers' GPT-2 tokenizer, for a model with a context of max_tokens.

    Its vocabulary and merges are those that OpenAI published, derived from tiktoken's ranks.
    """
    transformers = import_transformers()
    return transformers.GPT2Tokenizer(
        vocab=vocabulary(), merges=merges(), model_max_length=max_tokens
    )


@functools.cache
def merges() -> list[tuple[str, str]]:
    """Return GPT-2's merges. In the order of their ids, each token of several bytes is made by one
    merge of two others."""
    vocab = vocabulary()
    parts = [split_by_last_merge(token, vocab) for token in list(vocab)[:EOT]]
    return [(pair[0], pair[1]) for pair in parts if len(pair) == 2]


@functools.cache
def vocabulary() -> dict[str, int]:
    """Return GPT-2's ids by their tokens, spelled with one visible character for each byte, as in
    vocab.json."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    spelling = bytes_to_unicode()
    vocab = {"".join(map(spelling.get, token)): rank for token, rank in read_ranks().items()}
    vocab[EOT_TEXT] = EOT
    return vocab


def split_by_last_merge(token: str, vocab: dict[str, int]) -> list[str]:
    """Return the two parts from which byte pair encoding makes the token in its last merge; a token
    of one byte has one part."""
    parts = list(token)
    while len(parts) > 2:
        # Merge the neighbors whose merge comes first: the token that they make has the lowest id.
        ids = [vocab.get(left + right, EOT) for left, right in zip(parts, parts[1:])]
        first = ids.index(min(ids))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts


def check_tokenizer(name: str):
    """Raise UserError if the tokenizer of a Hugging Face folder or repository is not GPT-2's, or
    has other tokens besides. A folder may have none."""
    transformers = import_transformers()
    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
        return
    tokenizers = [transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)]
    if (folder / "tokenizer.json").exists():
        # AutoTokenizer may take the rules of a class instead of those in this file.
        tokenizers.append(transformers.TokenizersBackend.from_pretrained(name))
    for tokenizer in tokenizers:
        others = {token for token, _ in tokenizer.get_vocab().items() ^ vocabulary().items()}
        is_same = tokenizer(PROBE)["input_ids"] == encode_document(PROBE).tolist()
        if others or not is_same:
            reason = ", ".join(sorted(others)[:3]) or "other rules"
            raise UserError(f"{name}: its tokenizer is not GPT-2's alone ({reason})")
