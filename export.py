"""
Writes a model as a Hugging Face folder, which transformers, llama.cpp and other tools open without this project's code.

    python export.py --out_dir=out-fineweb-single-parquet --export_dir=my-gpt
    python export.py --init_from=out-fineweb-single-parquet/best.pt --export_dir=my-gpt --dtype=bfloat16
"""

import json
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from onenight.console import set_up_output
from onenight.device import DTYPES
from onenight.files import duration, make_folder, rename, replacing
from onenight.huggingface import MODEL_TYPES, merges, vocabulary, write_config, write_weights
from onenight.metrics import read_metrics
from onenight.pretrained import build_model, resolve_checkpoint
from onenight.tokenizer import EOT, EOT_TEXT

from configurator import configure, setting
from model import GPT

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A language model of {millions:.0f}M parameters, a {architecture} with GPT-2's tokenizer: {shape}.
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
    init_from: str = setting("resume", "'resume': the latest checkpoint of out_dir; or a *.pt file", path=True)
    out_dir: str = setting("out", "folder of the ckpt.pt to export, and of metrics.jsonl for the card", path=True)
    export_dir: str = setting("", "the folder to write, which must not exist yet", path=True)
    dtype: str = setting("float32", "number format of the weights", choices=tuple(DTYPES))

    def __post_init__(self):
        if not self.export_dir:
            raise ValueError("--export_dir=FOLDER is missing: where to write")


def main(arguments: list[str]):
    set_up_output("stdout", "stderr")
    config = configure(ExportConfig, arguments, __doc__)
    target = Path(config.export_dir)
    if target.exists():
        raise SystemExit(f"{target} exists already; delete it, or choose another --export_dir")
    resume = config.init_from == "resume"
    run_dir = Path(config.out_dir) if resume else Path(config.init_from).parent
    checkpoint = resolve_checkpoint(config.init_from, run_dir)
    model = build_model(checkpoint, config.out_dir if resume else config.init_from)
    files = {
        "config.json": to_json(write_config(model.config, config.dtype)),
        "generation_config.json": to_json({"bos_token_id": EOT, "eos_token_id": EOT, "pad_token_id": EOT}),
        "model.safetensors": to_safetensors(write_weights(model), config.dtype),
        **tokenizer_files(model.config.block_size),
        "README.md": model_card(target.name, checkpoint, read_metrics(run_dir / "metrics.jsonl"), model).encode(),
    }
    write_folder(target, files)
    print(f"{target}: {', '.join(files)}")


def to_safetensors(weights: dict, dtype: str) -> bytes:
    """model.safetensors with the weights in `dtype`."""
    try:
        from safetensors.torch import save
    except ImportError:
        raise SystemExit("exporting needs the package safetensors (pip install safetensors)")
    return save({name: weight.to(DTYPES[dtype]) for name, weight in weights.items()}, metadata={"format": "pt"})


def tokenizer_files(block_size: int) -> dict[str, bytes]:
    """GPT-2's tokenizer: tokenizer.json for current tools, OpenAI's own two files for older ones."""
    vocab, pairs = vocabulary(), list(merges())
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": EOT, "content": EOT_TEXT, **special}],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": pairs},
    }
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), EOT_TEXT),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": block_size,
    }
    lines = ["#version: 0.2", *map(" ".join, pairs)]
    return {
        "tokenizer.json": to_json(tokenizer),
        "tokenizer_config.json": to_json(config),
        "vocab.json": json.dumps(vocab).encode(),
        "merges.txt": "".join(line + "\n" for line in lines).encode(),
    }


def model_card(name: str, checkpoint: dict, records: list[dict], model: GPT) -> str:
    """README.md: the model, how it was trained according to checkpoint and metrics, and how to load it."""
    shape, config, iter_num = model.config, checkpoint.get("config", {}), checkpoint.get("iter_num", 0)
    training = {}
    if {"dataset", "batch_size", "gradient_accumulation_steps"} <= config.keys():
        per_iter = config["gradient_accumulation_steps"] * config["batch_size"] * shape.block_size
        training["data"] = Path(config["dataset"]).name
        training["iterations"] = f"{iter_num:,} of {per_iter:,} tokens, {iter_num * per_iter:,} in all"
        keys = (
            "optimizer", "learning_rate", "embedding_lr", "head_lr", "vector_lr", "min_lr", "warmup_iters",
            "warmdown_iters", "weight_decay", "beta1", "beta2", "dropout",
        )  # fmt: skip
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
        architecture=MODEL_TYPES[shape.architecture],
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
