"""
Writes a model as a Hugging Face folder, which transformers and other tools open without this project's code.

    python export.py --out_dir=out-fineweb-single-parquet --export_dir=my-gpt2
    python export.py --init_from=out-fineweb-single-parquet/best.pt --export_dir=my-gpt2
"""

import json
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from onenight.files import duration, make_folder, rename, replacing
from onenight.metrics import read_metrics
from onenight.pretrained import GPT2_NAMES, build_model, resolve_checkpoint, transpose
from onenight.tokenizer import EOT, EOT_TEXT, VOCAB_SIZE, get_encoding

import torch

from configurator import configure, setting
from model import GPT, NORM_EPS, ROTARY_BASE

PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that are visible characters in Latin-1
UNPRINTABLE = {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in PRINTABLE)}
COMMON = {"bos_token_id": EOT, "eos_token_id": EOT, "torch_dtype": "float32"}  # in every config.json
NANOCHAT_NAMES = {  # GPTConfig's names and those of NanoChat's config.json
    "block_size": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
}
CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A language model of {millions:.0f}M parameters with {architecture}'s architecture and GPT-2's tokenizer: {shape}.
{training}
```python
from transformers import pipeline

write = pipeline("text-generation", model="{name}")  # the path of this folder
print(write("Once upon a time", max_new_tokens=100)[0]["generated_text"])
```

Made with One-night GPT.
"""


@dataclass
class ExportConfig:
    init_from: str = setting("resume", "'resume': the latest checkpoint of out_dir; or a *.pt file")
    out_dir: str = setting("out", "folder of the ckpt.pt to export, and of metrics.jsonl for the model card")
    export_dir: str = setting("", "the folder to write, which must not exist yet")

    def __post_init__(self):
        if not self.export_dir:
            raise ValueError("--export_dir=FOLDER is missing: where to write")


def main(arguments: list[str]):
    config = configure(ExportConfig, arguments, __doc__)
    target = Path(config.export_dir)
    if target.exists():
        raise SystemExit(f"{target} exists already; delete it, or choose another --export_dir")
    resume = config.init_from == "resume"
    run_dir = Path(config.out_dir) if resume else Path(config.init_from).parent
    checkpoint = resolve_checkpoint(config.init_from, run_dir)
    model = build_model(checkpoint, config.out_dir if resume else config.init_from)
    is_gpt2 = model.config.architecture == "gpt2"
    files = {
        "config.json": to_json({**COMMON, **(gpt2_config(model) if is_gpt2 else nanochat_config(model))}),
        "generation_config.json": to_json({"bos_token_id": EOT, "eos_token_id": EOT, "pad_token_id": EOT}),
        "model.safetensors": to_safetensors(gpt2_weights(model) if is_gpt2 else nanochat_weights(model)),
        **tokenizer_files(model.config.block_size),
        "README.md": model_card(target.name, checkpoint, read_metrics(run_dir / "metrics.jsonl"), model).encode(),
    }
    write_folder(target, files)
    print(f"{target}: {', '.join(files)}")


def gpt2_config(model: GPT) -> dict:
    """config.json of transformers' GPT2LMHeadModel."""
    shape = model.config
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{theirs: getattr(shape, ours) for ours, theirs in GPT2_NAMES.items()},
        "n_ctx": shape.block_size,  # the older name of n_positions, which llama.cpp's converter wants
        "vocab_size": VOCAB_SIZE,  # without the padding
        "activation_function": "gelu",  # GELU itself; OpenAI's GPT-2 has an approximation, "gelu_new"
        "layer_norm_epsilon": 1e-5,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), shape.dropout),
        "tie_word_embeddings": True,
    }


def gpt2_weights(model: GPT) -> dict:
    """The tensors by transformers' names, with zeros for missing biases, without the padding of the ids."""
    weights = model.state_dict()
    del weights["lm_head.weight"]  # the embeddings once more
    embeddings = ("transformer.wte.weight", "transformer.wpe.weight")
    for name in [name for name in weights if name.endswith(".weight") and name not in embeddings]:
        weights.setdefault(name.replace(".weight", ".bias"), torch.zeros(weights[name].size(0)))
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:VOCAB_SIZE].clone()
    return transpose(weights)


def nanochat_config(model: GPT) -> dict:
    """config.json of transformers' NanoChatForCausalLM."""
    shape = model.config
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        **{theirs: getattr(shape, ours) for ours, theirs in NANOCHAT_NAMES.items()},
        "num_key_value_heads": shape.n_head,
        "intermediate_size": 4 * shape.n_embd,
        "vocab_size": VOCAB_SIZE,
        "hidden_act": "relu2",
        "attention_dropout": shape.dropout,
        "rms_norm_eps": NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROTARY_BASE},
        "final_logit_softcapping": model.softcap,
        "tie_word_embeddings": False,
    }


def nanochat_weights(model: GPT) -> dict:
    """The tensors by transformers' names, without the padding of the ids."""
    weights = {
        "model.embed_tokens.weight": model.transformer.wte.weight[:VOCAB_SIZE],
        "lm_head.weight": model.lm_head.weight[:VOCAB_SIZE],
    }
    for i, block in enumerate(model.transformer.h):
        q, k, v = block.attn.c_attn.weight.chunk(3)
        parts = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v}
        parts |= {"self_attn.o_proj": block.attn.c_proj.weight}
        parts |= {"mlp.fc1": block.mlp.c_fc.weight, "mlp.fc2": block.mlp.c_proj.weight}
        weights |= {f"model.layers.{i}.{name}.weight": weight for name, weight in parts.items()}
    return {name: weight.detach().clone() for name, weight in weights.items()}


def to_safetensors(weights: dict) -> bytes:
    """model.safetensors in float32."""
    try:
        from safetensors.torch import save
    except ImportError:
        raise SystemExit("exporting needs the package safetensors (pip install safetensors)")
    return save(weights, metadata={"format": "pt"})


def tokenizer_files(block_size: int) -> dict[str, bytes]:
    """GPT-2's tokenizer: tokenizer.json for current tools, OpenAI's own two files for older ones."""
    tokens = [get_encoding().decode_single_token_bytes(token) for token in range(EOT)]
    vocab = {spell(token): rank for rank, token in enumerate(tokens)} | {EOT_TEXT: EOT}
    merges = [[spell(part) for part in pair] for pair in find_merges(tokens)]
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": EOT, "content": EOT_TEXT, **special}],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), EOT_TEXT),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": block_size,
    }
    lines = ["#version: 0.2", *map(" ".join, merges)]
    return {
        "tokenizer.json": to_json(tokenizer),
        "tokenizer_config.json": to_json(config),
        "vocab.json": json.dumps(vocab).encode(),
        "merges.txt": "".join(line + "\n" for line in lines).encode(),
    }


def find_merges(tokens: list[bytes]) -> Iterator[list[bytes]]:
    """
    Yields the two parts that each token was merged from, in the order of the merges, given the tokens by rank: byte
    pair encoding applied to its bytes, up to the last merge.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for token in tokens:
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            first = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(tokens)))
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            yield parts


def spell(token: bytes) -> str:
    """The bytes as GPT-2's files write them: printable ones as in Latin-1, the others from U+0100 on."""
    return token.decode("latin-1").translate(UNPRINTABLE)


def model_card(name: str, checkpoint: dict, records: list[dict], model: GPT) -> str:
    """README.md: the model, how it was trained according to checkpoint and metrics, and how to load it."""
    shape, config, iter_num = model.config, checkpoint.get("config", {}), checkpoint.get("iter_num", 0)
    training = {}
    if {"dataset", "batch_size", "gradient_accumulation_steps"} <= config.keys():
        per_iter = config["gradient_accumulation_steps"] * config["batch_size"] * shape.block_size
        training["data"] = Path(config["dataset"]).name
        training["iterations"] = f"{iter_num:,} of {per_iter:,} tokens, {iter_num * per_iter:,} in all"
        keys = ("optimizer", "learning_rate", "embedding_lr", "head_lr", "min_lr", "warmup_iters", "warmdown_iters")
        keys += ("weight_decay", "beta1", "beta2", "dropout")
        training["settings"] = ", ".join(f"{key} {config[key]}" for key in keys if config.get(key))  # 0: without it
    evals = [record for record in records if "val_loss" in record and record["iter"] <= iter_num]
    if evals:
        training["val loss"] = f"{evals[-1]['val_loss']:.4f} nats per token at iteration {evals[-1]['iter']:,}"
        training["time"] = duration(evals[-1]["elapsed_s"])
    if math.isfinite(best := float(checkpoint.get("best_val_loss", math.inf))):
        training["best val loss"] = f"{best:.4f}"
    rows = "\n".join(f"| {key} | {value} |" for key, value in training.items())
    return CARD.format(
        name=name,
        millions=model.get_num_params() / 1e6,
        architecture="GPT-2" if shape.architecture == "gpt2" else "nanochat",
        shape=f"{shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} wide, context {shape.block_size:,} tokens",
        training=f"\n| training | |\n|---|---|\n{rows}\n" if training else "",
    )


def to_json(value: dict) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def write_folder(target: Path, files: dict[str, bytes]):
    """Writes the files to a temporary folder, then renames it. Raises SystemExit if they cannot be written."""
    temporary = target.with_name(target.name + ".partial")
    make_folder(temporary)
    try:
        for name, content in files.items():
            with replacing(temporary / name) as file:
                file.write(content)
        rename(temporary, target)
    except OSError as error:
        raise SystemExit(f"{target}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
